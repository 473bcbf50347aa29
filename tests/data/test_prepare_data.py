"""prepare_data.py: reproducible shards, no half-written files, and a count of bad inputs."""
import csv
import io
import json
import random
import re
import tarfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT
from PIL import Image

import prepare_data
from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.shapes import detector, scenes


def command(*words, code=0):
    """Run the command as a user does; returns (stdout, stderr)."""
    done = warm.run([ROOT / "prepare_data.py", *words])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def pack(*words):
    """Run the command inside this process, which avoids starting Python again."""
    words = [str(word) for word in words]
    if "--workers" not in words:
        words += ["--workers", "1"]
    args = prepare_data.parse_args(words)
    return args.run(args)


def read_tar(path):
    """{key: {kind: bytes}} of a tar."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, kind = member.name.split(".", 1)
            samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return samples


def read_shards(out):
    """The samples {key: {kind: bytes}} of all tars, and the index and the report as one dict.

    Asserts that tars, index, offsets and report agree.
    """
    index = json.loads((out / "index.json").read_text())
    report = json.loads((out / "report.json").read_text())
    offsets = np.load(out / "offsets.npy")
    expected_names = [shard["name"] for shard in index["shards"]]
    expected_names += ["index.json", "offsets.npy", "report.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected_names)

    all_samples = {}
    for shard in index["shards"]:
        path = out / shard["name"]
        samples = read_tar(path)
        assert path.stat().st_size == shard["bytes"]
        assert len(samples) == shard["samples"]
        assert not samples.keys() & all_samples.keys()
        starts = offsets[:len(samples)]
        offsets = offsets[len(samples) + 1:]               # + 1 for the end of the last sample
        content = path.read_bytes()
        for key, start in zip(samples, starts, strict=True):
            assert content[start:start + len(key)].decode() == key
        all_samples |= samples

    assert len(all_samples) == index["samples"] == report["outputs"]
    assert report["inputs"] == report["outputs"] + sum(report["skipped"].values())
    counts = {reason: len(keys) for reason, keys in report["skipped_keys"].items()}
    assert report["skipped"] == counts
    return all_samples, index | report


def files(folder):
    """{relative path: bytes} of all files below a folder."""
    content = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content[str(path.relative_to(folder))] = path.read_bytes()
    return content


# ---- index ---------------------------------------------------------------------------------------

def test_index_writes_a_missing_index(tmp_path):
    pack("shapes", tmp_path, "-n", 25, "--shard-size", 10)
    written = files(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "offsets.npy").unlink()
    out, _ = command("index", tmp_path, "--workers", 2)
    assert "25 samples in 3 shards" in out and files(tmp_path) == written


def test_index_reports_damaged_shards(tmp_path):
    pack("shapes", tmp_path, "-n", 25, "--shard-size", 10)
    first, second, third = sorted(tmp_path.glob("*.tar"))
    damaged = bytearray(first.read_bytes())
    header = damaged.index(b"00000004.")                   # of the fifth sample
    damaged[header + 20] ^= 1
    first.write_bytes(damaged)
    cut = second.read_bytes()
    second.write_bytes(cut[:cut.index(b"00000013.")])      # before the fourth sample
    third.write_bytes(b"")

    out, err = command("index", tmp_path)
    assert "7 samples in 3 shards" in out
    for tar, count in ((first, 4), (second, 3), (third, 0)):
        assert re.search(rf"{tar.name} is damaged or truncated at byte [\d,]+, after {count} "
                         "samples", err)
        tar.write_bytes(b"<html>")
    assert "no samples in any of 3 shards" in command("index", tmp_path, code=1)[1]
    (tmp_path / "none").mkdir()
    assert "no *.tar" in command("index", tmp_path / "none", code=1)[1]


# ---- shapes --------------------------------------------------------------------------------------

def test_shapes_do_not_depend_on_the_workers(tmp_path):
    out, _ = command("shapes", tmp_path / "two", "-n", 25, "--shard-size", 10, "--workers", 2)
    assert "25 images in 3 shards" in out
    pack("shapes", tmp_path / "one", "-n", 25, "--shard-size", 10)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    pack("shapes", tmp_path / "other", "-n", 25, "--shard-size", 10, "--seed", 1)
    assert files(tmp_path / "one").keys() == files(tmp_path / "other").keys()
    assert files(tmp_path / "one") != files(tmp_path / "other")


def test_images_of_shapes_match_their_captions(tmp_path):
    pack("shapes", tmp_path / "out", "-n", 40, "--shard-size", 16, "--image-size", 64)
    samples, index = read_shards(tmp_path / "out")
    assert [shard["samples"] for shard in index["shards"]] == [16, 16, 8]
    for i, key in enumerate(sorted(samples)):
        sample = samples[key]
        assert set(sample) == {"image.png", "synthetic_caption.txt", "original_caption.txt"}
        image = Image.open(io.BytesIO(sample["image.png"]))
        assert image.size == (64, 64) and int(key) == i

        rng = random.Random(f"shapes 0 {i}")
        scene = scenes.training_scene(rng)
        assert detector.mismatch(scene, detector.detect(image)) == ""
        scenes.layout(scene, rng)
        caption = scenes.caption(scenes.omit_defaults(scene, rng), rng)
        assert sample["synthetic_caption.txt"].decode() == caption


# ---- restarts ------------------------------------------------------------------------------------

def test_a_folder_in_use_is_refused_and_overwrite_replaces_only_shards(tmp_path):
    out = tmp_path / "out"
    pack("shapes", out, "-n", 20, "--shard-size", 5)
    before = files(out)
    _, err = command("shapes", out, "-n", 5, "--shard-size", 5, code=1)
    assert "not empty" in err and "--overwrite" in err and err.count("\n") == 1
    assert files(out) == before

    (out / ".shapes-000001.tar.123.tmp").write_text("of a killed run")
    (out / "shapes-000003.latents.safetensors").write_text("of shards that are replaced")
    pack("shapes", out, "-n", 5, "--shard-size", 5, "--overwrite")
    assert len(read_shards(out)[0]) == 5

    (out / "notes.txt").write_text("mine")
    with pytest.raises(FuseDiTError, match="notes.txt"):
        pack("shapes", out, "-n", 5, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(FuseDiTError, match="is a file"):
        pack("shapes", out / "notes.txt", "-n", 5)


def packing_args(out):
    return Namespace(out=out, workers=1, overwrite=False)


def numbered_sample(broken, i):
    """A sample of item i. At item `broken`, the disk is full."""
    if i == broken:
        raise OSError(28, "No space left on device")
    return {"__key__": str(i), "image.png": b"x"}


def pack_numbers(args, broken=None):
    """Pack ten items into four shards."""
    assert packing.begin(args, n=10)
    jobs = [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    packing.pack(args, "shapes", jobs, partial(numbered_sample, broken))


def test_a_run_that_fails_midway_is_resumed(tmp_path, capsys):
    args = packing_args(tmp_path / "out")
    with pytest.raises(OSError):
        pack_numbers(args, broken=7)
    assert "stopped: 2 of 4 shards are packed" in capsys.readouterr().err
    written = {name for name in files(args.out) if not name.startswith(".progress/settings")}
    assert len(written) == 4                               # two shards and their records

    pack_numbers(args)
    assert "2 of 4 shards are already packed" in capsys.readouterr().err
    pack_numbers(packing_args(tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    capsys.readouterr()
    assert not packing.begin(args, n=10)                   # there is nothing left to do
    assert "is already complete: 10 images" in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused(tmp_path):
    args = packing_args(tmp_path / "out")
    assert packing.begin(args, n=10, seed=0)
    assert packing.begin(args, n=10, seed=0)
    with pytest.raises(FuseDiTError, match=r"other settings \(seed 0, now 1\).*--overwrite"):
        packing.begin(args, n=10, seed=1)
    args.overwrite = True
    assert packing.begin(args, n=10, seed=1)


def test_the_settings_of_a_run_keep_their_names(tmp_path, photos):
    """A run started by an earlier version is resumed only if it wrote the same settings."""
    pack("shapes", tmp_path / "shapes", "-n", 3)
    _, report = read_shards(tmp_path / "shapes")
    assert report["settings"] == dict(command="shapes", n=3, image_size=32, seed=0, shard_size=2000)
    pack("folder", photos, tmp_path / "folder", "--overwrite")
    settings = read_shards(tmp_path / "folder")[1]["settings"]
    assert settings.pop("items") == "59bc5946b234d6e188560b09335dfd51b668356b"
    assert settings == dict(command="folder", images=str(photos), captions=None, size=0, quality=95,
                            min_size=1, max_aspect=1000, seed=0, shard_size=2000)
    pack("folder", photos, tmp_path / "folder", "--overwrite", "--resize", "bilinear")
    assert read_shards(tmp_path / "folder")[1]["settings"]["resize"] == "bilinear"


# ---- folder --------------------------------------------------------------------------------------

COLOURS = {"RGB": "orange", "L": 200, "P": 3}


def write_image(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 10), COLOURS[mode]).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Six good images in six formats, one of them in a subfolder."""
    folder = tmp_path / "photos"
    write_image(folder / "sub" / "d.gif", "P")
    for name in ("a.png", "b.jpg", "c.webp", "e.bmp", "f.JPEG"):
        write_image(folder / name)
    for path in list(folder.rglob("*.*")):
        path.with_suffix(".txt").write_text(f"an orange  {path.stem}\n")
    return folder


def original_caption(sample):
    return sample["original_caption.txt"].decode()


def captions(samples):
    return sorted(original_caption(sample) for sample in samples.values())


def test_folder_with_txt_beside_the_images(photos, tmp_path, capsys):
    pack("folder", photos, tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == [f"an orange {letter}" for letter in "abcdef"]
    assert not index["skipped"]

    by_letter = {original_caption(sample)[-1]: sample for sample in samples.values()}
    kinds = {}
    for letter, sample in by_letter.items():
        kinds[letter] = next(kind for kind in sample if "image" in kind)
    assert kinds == {"a": "image.png", "b": "image.jpg", "c": "image.webp", "d": "image.png",
                     "e": "image.png", "f": "image.jpg"}
    assert by_letter["b"]["image.jpg"] == (photos / "b.jpg").read_bytes()
    assert "6 images in 1 shards" in capsys.readouterr().out


def test_folder_skips_and_counts_broken_inputs(photos, tmp_path):
    (photos / "a.txt").unlink()
    (photos / "b.txt").write_text(" \n")
    (photos / "c.txt").write_bytes("né".encode("latin-1"))
    for number in range(7):                 # one file that is not an image and six truncated ones
        path = photos / f"bad{number}.png"
        path.write_bytes((photos / "a.png").read_bytes()[:50])
        path.with_suffix(".txt").write_text("broken")
    (photos / "bad0.png").write_text("this is not an image")

    out, err = command("folder", photos, tmp_path / "out", "--shard-size", 4, "--workers", 2)
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == ["an orange d", "an orange e", "an orange f"]
    assert index["skipped"] == {"damaged or cut short": 6, "no caption": 2, "not an image": 1,
                                "caption is not UTF-8": 1}
    assert "skipped 6: damaged or cut short: " in err and "and 1 more" in err
    assert "skipped 2: no caption: a.png, b.jpg" in err and "c.txt" in err
    assert "3 images" in out


ROWS = [("a.png", "one"), ("./b.jpg", "two"), ("c", "three"), ("sub/d.gif", "four")]


def write_captions(path, rows):
    """Write (image, caption) rows in one of the formats that `folder` reads."""
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    elif path.name == "map.json":
        path.write_text(json.dumps(dict(rows)))
    elif path.suffix == ".json":
        entries = [dict(file_name=image, text=[caption, "more"]) for image, caption in rows]
        path.write_text(json.dumps(entries))
    else:
        lines = [json.dumps(dict(image=image, caption=caption)) for image, caption in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["map.json", "list.json", "c.jsonl", "c.csv"])
def test_folder_with_a_file_of_captions(photos, tmp_path, name, capsys):
    rows = [*ROWS, ("nowhere.png", "five"), ("e.bmp", "")]
    pack("folder", photos, write_captions(tmp_path / name, rows), tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == sorted(caption for _, caption in ROWS)
    assert index["skipped"] == {"no caption": 2, "image not found": 1}
    err = capsys.readouterr().err
    assert "nowhere.png" in err and "e.bmp" in err and "f.JPEG" in err


def caption_texts(sample):
    return sorted((kind, text.decode()) for kind, text in sample.items() if "caption" in kind)


def test_both_captions_broken_lines_and_odd_rows(photos, tmp_path):
    lines = [
        json.dumps(dict(image="a.png", caption="short", synthetic_caption="long")),
        json.dumps(dict(image="b.jpg", synthetic_caption="only long")),
        "{broken",
        "",
        json.dumps(["not", "a", "row"]),
        json.dumps(dict(image="b.jpg", caption="second")),
        json.dumps(dict(caption="of nothing")),
        json.dumps(dict(image="c.webp", caption=5)),
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    pack("folder", photos, tmp_path / "c.jsonl", tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert sorted(caption_texts(sample) for sample in samples.values()) == [
        [("original_caption.txt", "second")],
        [("original_caption.txt", "short"), ("synthetic_caption.txt", "long")],
        [("synthetic_caption.txt", "only long")]]
    counts = {reason.split(" (")[0]: count for reason, count in index["skipped"].items()}
    assert counts == {"not JSON": 1, "no image name": 2, "no caption": 4}


def test_half_an_emoji_in_a_caption_is_skipped_and_counted(photos, tmp_path):
    rows = [dict(image="a.png", caption="\ud83d"), dict(image="b.jpg", caption="\U0001f600")]
    (tmp_path / "c.json").write_text(json.dumps(rows))     # written as escapes: valid JSON
    pack("folder", photos, tmp_path / "c.json", tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == ["\U0001f600"]
    assert index["skipped"]["caption is not Unicode"] == 1


def test_the_seed_determines_the_shuffled_order(photos, tmp_path):
    for number in range(30):
        name = f"n{number:02}"
        write_image(photos / f"{name}.png").with_suffix(".txt").write_text(name)
    orders = []
    for k, seed in enumerate((0, 0, 1)):
        pack("folder", photos, tmp_path / f"out{k}", "--seed", seed)
        samples, _ = read_shards(tmp_path / f"out{k}")
        orders.append([original_caption(sample) for sample in samples.values()])
    first, same_seed, other_seed = orders
    assert first == same_seed != other_seed
    assert sorted(first) == sorted(other_seed)
    assert first != sorted(first)


@pytest.mark.parametrize("words, message", [
    (["{}/none", "{}/out"], "no such file or folder"),
    (["{}/photos", "{}/none.csv", "{}/out"], "none.csv"),
    (["{}/photos", "{}/broken.json", "{}/out"], "cannot read .*broken.json as JSON"),
    (["{}/photos", "{}/latin.csv", "{}/out"], "cannot read .*latin.csv as CSV in UTF-8"),
    (["{}/photos", "{}/c.yaml", "{}/out"], ".json, .jsonl or .csv"),
    (["{}/empty", "{}/out"], "no images in"),
    (["{}/photos", "{}/empty", "{}/out"], "all 6 inputs were skipped"),
])
def test_unusable_input_is_reported_in_one_message(photos, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"a.png": "one"')
    (tmp_path / "latin.csv").write_bytes("image,caption\na.png,né\n".encode("latin-1"))
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(FuseDiTError, match=message):
        pack("folder", *[word.format(tmp_path) for word in words])
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())


# ---- the command line ----------------------------------------------------------------------------

def test_help_has_an_example_and_usage_errors_exit_2():
    out, _ = command("folder", "--help")
    assert "default: 2000" in out and "python prepare_data.py folder photos/" in out
    _, err = command("shapes", "out", "-n", "0", code=2)
    assert "at least 1" in err


def test_every_command_has_one_line_of_help():
    out, _ = command("--help")
    rows = re.findall(r"^    ([a-z0-9-]+)\s+\S.*$", out[out.index("  COMMAND"):], re.M)
    assert len(rows) == 11 and {"shapes", "sa1b-download", "encode"} <= set(rows)


def test_the_old_name_of_grid_is_accepted(capsys):
    old = prepare_data.parse_args(["check", "shards", "--sheet", "grid.png"])
    assert capsys.readouterr().err.endswith(": --sheet is now called --grid\n")
    new = prepare_data.parse_args(["check", "shards", "--grid", "grid.png"])
    assert old.grid == new.grid == Path("grid.png") and vars(old) == vars(new)
    assert capsys.readouterr().err == ""

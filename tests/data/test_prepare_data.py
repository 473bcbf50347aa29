"""prepare_data.py: the same shards from any workers, nothing half-written, bad input counted."""
import csv
import io
import json
import random
import re
import tarfile
from argparse import Namespace
from functools import partial

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
    """The same, inside this process (no second start of Python)."""
    one = ["--workers", "1"] * ("--workers" not in words)
    args = prepare_data.arguments([*map(str, words), *one])
    return args.run(args)


def read_shards(out):
    """{key: {kind: bytes}} of all tars, index and report; everything is as these say."""
    index, samples = json.loads((out / "index.json").read_text()), {}
    report = json.loads((out / "report.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [s["name"] for s in index["shards"]] + ["index.json", "offsets.npy", "report.json"])
    offsets = np.load(out / "offsets.npy")
    for shard in index["shards"]:
        path, here = out / shard["name"], {}
        assert path.stat().st_size == shard["bytes"]
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.split(".", 1)
                here.setdefault(key, {})[kind] = tar.extractfile(member).read()
        assert len(here) == shard["samples"] and not here.keys() & samples.keys()
        begins, offsets = offsets[:len(here)], offsets[len(here) + 1:]     # and the end
        for key, at in zip(here, begins, strict=True):
            assert path.read_bytes()[at:at + len(key)].decode() == key
        samples |= here
    assert len(samples) == index["samples"] == report["outputs"]
    assert report["inputs"] == report["outputs"] + sum(report["skipped"].values())
    assert report["skipped"] == {why: len(keys) for why, keys in report["skipped_keys"].items()}
    return samples, index | report


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- index ---------------------------------------------------------------------------------------

def test_the_index_of_shards_that_came_without(tmp_path):
    pack("shapes", tmp_path, "-n", 25, "--shard-size", 10)
    written = files(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "offsets.npy").unlink()
    out, _ = command("index", tmp_path, "--workers", 2)
    assert "25 samples in 3 shards" in out and files(tmp_path) == written
    tars = sorted(tmp_path.glob("*.tar"))
    data, cut = (bytearray(tar.read_bytes()) for tar in tars[:2])
    at = data.index(b"00000004.")                     # a header of its fifth sample
    data[at + 20] ^= 1
    tars[0].write_bytes(data)
    tars[1].write_bytes(cut[:cut.index(b"00000013.")])
    tars[2].write_bytes(b"")
    out, err = command("index", tmp_path)
    assert "7 samples in 3 shards" in out
    for tar, n in zip(tars, (4, 3, 0), strict=True):
        assert re.search(rf"{tar.name} is damaged or cut short at byte [\d,]+, after {n} samples",
                         err)
        tar.write_bytes(b"<html>")
    assert "no sample in any of 3 shards" in command("index", tmp_path, code=1)[1]
    (tmp_path / "none").mkdir()
    assert "no *.tar" in command("index", tmp_path / "none", code=1)[1]


# ---- shapes --------------------------------------------------------------------------------------

def test_shapes_are_the_same_whatever_the_workers(tmp_path):
    out, _ = command("shapes", tmp_path / "two", "-n", 25, "--shard-size", 10, "--workers", 2)
    assert "25 images in 3 shards" in out
    pack("shapes", tmp_path / "one", "-n", 25, "--shard-size", 10)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    pack("shapes", tmp_path / "other", "-n", 25, "--shard-size", 10, "--seed", 1)
    assert files(tmp_path / "one").keys() == files(tmp_path / "other").keys()
    assert files(tmp_path / "one") != files(tmp_path / "other")


def test_shapes_pictures_show_their_captions(tmp_path):
    pack("shapes", tmp_path / "out", "-n", 40, "--shard-size", 16, "--image-size", 64)
    samples, index = read_shards(tmp_path / "out")
    assert [s["samples"] for s in index["shards"]] == [16, 16, 8]
    for i, (key, sample) in enumerate(sorted(samples.items())):
        assert set(sample) == {"image.png", "synthetic_caption.txt", "original_caption.txt"}
        image = Image.open(io.BytesIO(sample["image.png"]))
        assert image.size == (64, 64) and int(key) == i
        rng = random.Random(f"shapes 0 {i}")
        scene = scenes.training_scene(rng)
        assert detector.mismatch(scene, detector.detect(image)) == ""
        scenes.layout(scene, rng)
        assert sample["synthetic_caption.txt"].decode() == scenes.caption(
            scenes.omit_defaults(scene, rng), rng)


def test_a_folder_in_use_is_refused_and_overwrite_replaces_only_shards(tmp_path):
    out = tmp_path / "out"
    pack("shapes", out, "-n", 20, "--shard-size", 5)
    before = files(out)
    _, err = command("shapes", out, "-n", 5, "--shard-size", 5, code=1)
    assert "not empty" in err and "--overwrite" in err and err.count("\n") == 1
    assert files(out) == before
    (out / ".shapes-000001.tar.123.tmp").write_text("of a killed run")
    (out / "shapes-000003.latents.safetensors").write_text("of shards that go")
    pack("shapes", out, "-n", 5, "--shard-size", 5, "--overwrite")
    assert len(read_shards(out)[0]) == 5
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FuseDiTError, match="notes.txt"):
        pack("shapes", out, "-n", 5, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(FuseDiTError, match="is a file"):
        pack("shapes", out / "notes.txt", "-n", 5)


def test_what_fails_midway_is_gone_on_with(tmp_path, capsys):
    def make(broken, i):
        if i == broken:
            raise OSError(28, "No space left on device")
        return {"__key__": str(i), "image.png": b"x"}
    for name, broken in (("out", 7), ("out", None), ("whole", None)):
        args = Namespace(out=tmp_path / name, workers=1, overwrite=False)
        jobs = [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
        assert packing.begin(args, n=10)
        if broken:
            before = files(args.out)
            with pytest.raises(OSError):
                packing.pack(args, "shapes", jobs, partial(make, broken))
            assert "stopped; 2 of 4 shards are packed" in capsys.readouterr().err
            assert len(files(args.out)) == len(before) + 4     # and their records
        else:
            packing.pack(args, "shapes", jobs, partial(make, broken))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not packing.begin(args, n=10)                   # there is nothing left to do
    assert "is finished: 10 images" in capsys.readouterr().out


def test_what_was_begun_otherwise_is_refused(tmp_path):
    args = Namespace(out=tmp_path / "out", workers=1, overwrite=False)
    assert packing.begin(args, n=10, seed=0) and packing.begin(args, n=10, seed=0)
    with pytest.raises(FuseDiTError, match=r"begun otherwise \(seed 0, now 1\).*--overwrite"):
        packing.begin(args, n=10, seed=1)
    args.overwrite = True
    assert packing.begin(args, n=10, seed=1)


# ---- folder --------------------------------------------------------------------------------------

def image(path, size=(20, 10), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 200 if mode == "L" else "orange" if mode != "P" else 3).save(path, **save)
    return path


@pytest.fixture
def photos(tmp_path):
    """Six good images of six kinds, one below another folder."""
    folder = tmp_path / "photos"
    for name in ("a.png", "b.jpg", "c.webp", "sub/d.gif", "e.bmp", "f.JPEG"):
        path = image(folder / name, mode="P" if name.endswith("gif") else "RGB")
        path.with_suffix(".txt").write_text(f"an orange  {path.stem}\n")
    return folder


def captions(samples):
    return sorted(s["original_caption.txt"].decode() for s in samples.values())


def test_folder_with_txt_beside_the_images(photos, tmp_path, capsys):
    pack("folder", photos, tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == [f"an orange {c}" for c in "abcdef"] and not index["skipped"]
    kinds = {s["original_caption.txt"].decode()[-1]: next(k for k in s if "image" in k)
             for s in samples.values()}
    assert kinds == {"a": "image.png", "b": "image.jpg", "c": "image.webp", "d": "image.png",
                     "e": "image.png", "f": "image.jpg"}
    kept = next(s for s in samples.values() if s["original_caption.txt"].endswith(b"b"))
    assert kept["image.jpg"] == (photos / "b.jpg").read_bytes()
    assert "6 images in 1 shards" in capsys.readouterr().out


def test_folder_skips_and_counts_what_is_broken(photos, tmp_path):
    (photos / "a.txt").unlink()
    (photos / "b.txt").write_text(" \n")
    (photos / "c.txt").write_bytes("né".encode("latin-1"))
    for n in range(7):                      # cut short, and no image at all
        path = photos / f"bad{n}.png"
        path.write_bytes((photos / "a.png").read_bytes()[:50])
        path.with_suffix(".txt").write_text("broken")
    (photos / "bad0.png").write_text("this is not a picture")
    out, err = command("folder", photos, tmp_path / "out", "--shard-size", 4, "--workers", 2)
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == [f"an orange {c}" for c in "def"]
    assert index["skipped"] == {"damaged or cut short": 6, "no caption": 2, "not an image": 1,
                                "caption is not UTF-8": 1}
    assert "skipped 6: damaged or cut short: " in err and "and 1 more" in err
    assert "skipped 2: no caption: a.png, b.jpg" in err and "c.txt" in err
    assert "3 images" in out


ROWS = [("a.png", "one"), ("./b.jpg", "two"), ("c", "three"), ("sub/d.gif", "four")]


def write_captions(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    elif path.name == "map.json":
        path.write_text(json.dumps(dict(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([dict(file_name=i, text=[c, "more"]) for i, c in rows]))
    else:
        path.write_text("".join(json.dumps(dict(image=i, caption=c)) + "\n" for i, c in rows))
    return path


@pytest.mark.parametrize("name", ["map.json", "list.json", "c.jsonl", "c.csv"])
def test_folder_with_a_file_of_captions(photos, tmp_path, name, capsys):
    rows = [*ROWS, ("nowhere.png", "five"), ("e.bmp", "")]
    pack("folder", photos, write_captions(tmp_path / name, rows), tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == sorted(c for _, c in ROWS)
    assert index["skipped"] == {"no caption": 2, "image is not there": 1}
    err = capsys.readouterr().err
    assert "nowhere.png" in err and "e.bmp" in err and "f.JPEG" in err


def test_both_captions_broken_lines_and_odd_rows(photos, tmp_path):
    lines = [json.dumps(dict(image="a.png", caption="short", synthetic_caption="long")),
             json.dumps(dict(image="b.jpg", synthetic_caption="only long")), "{broken", "",
             json.dumps(["not", "a", "row"]), json.dumps(dict(image="b.jpg", caption="second")),
             json.dumps(dict(caption="of nothing")), json.dumps(dict(image="c.webp", caption=5))]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    pack("folder", photos, tmp_path / "c.jsonl", tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    texts = sorted(sorted((k, v.decode()) for k, v in s.items() if "caption" in k)
                   for s in samples.values())
    assert texts == [[("original_caption.txt", "second")],
                     [("original_caption.txt", "short"), ("synthetic_caption.txt", "long")],
                     [("synthetic_caption.txt", "only long")]]
    skipped = {why.split(" (")[0]: n for why, n in index["skipped"].items()}
    assert skipped == {"not JSON": 1, "no image name": 2, "no caption": 4}


def test_half_an_emoji_in_a_caption_is_skipped_and_counted(photos, tmp_path):
    rows = [dict(image="a.png", caption="\ud83d"), dict(image="b.jpg", caption="\U0001f600")]
    (tmp_path / "c.json").write_text(json.dumps(rows))     # written as escapes: sound JSON
    pack("folder", photos, tmp_path / "c.json", tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == ["\U0001f600"]
    assert index["skipped"]["caption is not Unicode"] == 1


def test_the_order_is_mixed_and_the_seed_decides(photos, tmp_path):
    for n in range(30):
        image(photos / f"n{n:02}.png").with_suffix(".txt").write_text(f"n{n:02}")
    orders = []
    for k, seed in enumerate((0, 0, 1)):
        pack("folder", photos, tmp_path / f"out{k}", "--seed", seed)
        orders.append([s["original_caption.txt"]
                       for s in read_shards(tmp_path / f"out{k}")[0].values()])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("words, message", [
    (["{}/none", "{}/out"], "no such file or folder"),
    (["{}/photos", "{}/none.csv", "{}/out"], "none.csv"),
    (["{}/photos", "{}/broken.json", "{}/out"], "cannot read .*broken.json as JSON"),
    (["{}/photos", "{}/latin.csv", "{}/out"], "cannot read .*latin.csv as CSV in UTF-8"),
    (["{}/photos", "{}/c.yaml", "{}/out"], ".json, .jsonl or .csv"),
    (["{}/empty", "{}/out"], "no images in"),
    (["{}/photos", "{}/empty", "{}/out"], "all 6 were skipped"),
])
def test_unusable_input_is_one_message(photos, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"a.png": "one"')
    (tmp_path / "latin.csv").write_bytes("image,caption\na.png,né\n".encode("latin-1"))
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(FuseDiTError, match=message):
        pack("folder", *[w.format(tmp_path) for w in words])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_help_teaches_and_usage_errors_exit_2():
    out, _ = command("folder", "--help")
    assert "default: 2000" in out and "python prepare_data.py folder photos/" in out
    _, err = command("shapes", "out", "-n", "0", code=2)
    assert "at least 1" in err

"""prepare_data.py: reproducible shards, no half-written files, and a count of bad inputs."""
import io
import json
import os
import random
import re
import tarfile
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT
from PIL import Image

import prepare_data
from fusedit import FuseDiTError
from fusedit_lib.data import items, packing
from fusedit_lib.data.images import Skip
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
    written = {name for name in files(args.out) if "shapes" in name}
    assert len(written) == 4                               # two shards and their records

    pack_numbers(args)
    assert "2 of 4 shards are already packed" in capsys.readouterr().err
    pack_numbers(packing_args(tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    capsys.readouterr()
    assert not packing.begin(args, n=10)                   # there is nothing left to do
    assert "is already complete: 10 images" in capsys.readouterr().out


def nothing(item):
    raise Skip("empty")


INTERRUPTED_EARLY = """
import time
from fusedit_lib.data import packing

class Jobs(list):
    def __iter__(self):
        yield 1000
        raise KeyboardInterrupt             # while jobs are still handed to the workers

with packing.in_parallel(time.sleep, Jobs([1000, 1000]), 2) as results:
    for _ in results:
        pass
"""

INTERRUPTED_LATER = """
import time
from fusedit_lib.data import packing

with packing.in_parallel(time.sleep, [1000, 1000], 2) as results:
    for _ in results:
        raise KeyboardInterrupt             # while the caller handles a result
"""


@pytest.mark.parametrize("program", [INTERRUPTED_EARLY, INTERRUPTED_LATER])
def test_an_interrupted_run_does_not_wait_for_its_jobs(program):
    process = warm.start(["-c", program], os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert process.wait(timeout=200) != 0
    finally:
        process.kill()


def test_nothing_to_pack_leaves_no_folder_that_the_run_has_created(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (mine, tmp_path / "new"):
        args = packing_args(out)
        assert packing.begin(args, n=10)
        assert packing.begin(args, n=10)                   # it is resumed
        with pytest.raises(FuseDiTError, match="nothing to pack: all 3 inputs"):
            packing.pack(args, "shapes", [range(3)], nothing)
    assert list(tmp_path.iterdir()) == [mine] and not files(mine)

    assert packing.begin(args, n=10)
    (args.out / "notes.txt").write_text("of the user")
    with pytest.raises(FuseDiTError, match="nothing to pack"):
        packing.pack(args, "shapes", [range(3)], nothing)
    assert files(args.out) == {"notes.txt": b"of the user"}


def test_a_report_that_is_no_object_does_not_stop_the_command(tmp_path):
    (tmp_path / "report.json").write_text("[1]")
    for seed in (0, -1):
        _, err = command("shapes", tmp_path, "-n", 5, "--seed", seed, code=1)
        assert "is not empty (it contains report.json" in err
    (tmp_path / "index.json").write_text("[1]")
    assert "contains finished shards" in command("shapes", tmp_path, "-n", 5, code=1)[1]


def test_resuming_with_other_settings_is_refused(tmp_path):
    args = packing_args(tmp_path / "out")
    assert packing.begin(args, n=10, seed=0)
    assert packing.begin(args, n=10, seed=0)
    with pytest.raises(FuseDiTError, match=r"other settings \(seed 0, now 1\).*--overwrite"):
        packing.begin(args, n=10, seed=1)
    args.overwrite = True
    assert packing.begin(args, n=10, seed=1)


# ---- folders -------------------------------------------------------------------------------------

def test_links_in_a_circle_are_followed_once(tmp_path):
    images = tmp_path / "images"
    for here, other in ("ab", "ba"):
        (images / here).mkdir(parents=True)
        (images / here / "1.png").touch()
        (images / here / "link").symlink_to(f"../{other}")
    assert list(items.list_images(images, Counter())) == ["a/1.png", "a/link/1.png", "b/1.png",
                                               "b/link/1.png"]
    assert ("a/link/link", "link to a folder above it") in list(items.list_files(images))

    # By way of a folder elsewhere, back to one above the images.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path)
    (images / "b" / "link").unlink()
    (images / "b" / "link").symlink_to(tmp_path / "other")
    found = dict(items.list_files(images))
    assert found["b/link/back"] == "link to a folder above it"
    assert [name for name, kind in found.items() if kind == items.IMAGE] == [
        "a/1.png", "a/link/1.png", "b/1.png"]


# ---- the command line ----------------------------------------------------------------------------

def test_help_has_an_example_and_usage_errors_exit_2():
    out, _ = command("folder", "--help")
    assert "default: 2000" in out and "python prepare_data.py folder photos/" in out
    _, err = command("shapes", "out", "-n", "0", code=2)
    assert "at least 1" in err


def test_every_command_has_one_line_of_help():
    out, _ = command("--help")
    rows = re.findall(r"^    ([a-z0-9-]+)\s+\S.*$", out[out.index("  COMMAND"):], re.M)
    assert len(rows) == 13 and {"shapes", "sa1b-download", "encode"} <= set(rows)


def test_the_old_name_of_grid_is_accepted(capsys):
    old = prepare_data.parse_args(["check", "shards", "--sheet", "grid.png"])
    assert capsys.readouterr().err.endswith(": --sheet is now called --grid\n")
    new = prepare_data.parse_args(["check", "shards", "--grid", "grid.png"])
    assert old.grid == new.grid == Path("grid.png") and vars(old) == vars(new)
    assert capsys.readouterr().err == ""

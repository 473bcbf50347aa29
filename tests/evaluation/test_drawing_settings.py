"""evaluate.py: a part of a benchmark, the negative prompt, the size and the quality of images."""
import io
import json
import re

import numpy as np
import pytest
import sample
from PIL import Image
from test_evaluate import (
    METADATA,
    command,
    contents,
    file_names,
    modification_times,
    read_json,
    write_metadata,
)

import evaluate
from fusedit import FuseDiTError
from fusedit_lib.evaluation import drawing

RUN = "guidance-3-steps-1"                  # the folder of a run of the demo with --steps 1


def geneval(tmp_path, *more, out="out"):
    """Draw GenEval's prompts, 4 images each, one prompt per batch. Returns the folder."""
    command("geneval", "--prompts", write_metadata(tmp_path), "--out", tmp_path / out,
            "--steps", 1, "--batch-size", 4, "--device", "cpu", *more)
    return tmp_path / out / RUN


def drawn(folder):
    """The numbers of drawn prompts and of all prompts in run.json."""
    settings = read_json(folder / "run.json")
    return settings["prompts_drawn"], settings["prompts_total"]


def write_mjhq(tmp_path, count=3):
    """The path of a meta_data.json with these prompts."""
    rows = {f"{k:032x}": dict(category="art", prompt="a star") for k in range(count)}
    path = tmp_path / "meta_data.json"
    path.write_text(json.dumps(rows))
    return path


def write_dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "a.txt").write_text("a large red circle")
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """Replaces generate() by one that returns images of noise. A list of its keyword arguments."""
    calls = []
    rng = np.random.default_rng(0)

    def generate(model, prompts, seeds, **settings):
        calls.append(settings)
        size = (settings["height"], settings["width"], 3)
        return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for _ in prompts]
    monkeypatch.setattr(drawing, "generate", generate)
    return calls


# ---- a part of a benchmark -----------------------------------------------------------------------

def test_a_part_is_continued_and_nothing_is_drawn_twice(tmp_path, capsys):
    folder = geneval(tmp_path, "-n", 2)
    # The official scorer stops at a metadata.jsonl without images.
    assert {name.split("/")[0] for name in file_names(folder / "images")} == {"00000", "00001"}
    assert drawn(folder) == (2, len(METADATA))
    assert "8 images for the first 2 of 6 prompts" in capsys.readouterr().out

    for more, count in ((["-n", 3], 3), ([], 6)):
        before = modification_times(folder)
        geneval(tmp_path, *more)
        now = modification_times(folder)
        assert all(now[path] == age for path, age in before.items())
        assert len(now) == 4 * count
        assert drawn(folder) == (count, 6)
    assert "24 images for 6 prompts" in capsys.readouterr().out
    assert contents(folder) == contents(geneval(tmp_path, out="whole"))

    geneval(tmp_path, "-n", 1)              # everything is there
    assert modification_times(folder) == now
    assert drawn(folder) == (6, 6)


def test_a_part_is_shared_by_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        folder = geneval(tmp_path, "-n", 3)
        finished = "images for the first" in capsys.readouterr().out
        counts.append((len(modification_times(folder)), drawn(folder), finished))
    assert counts == [(4, (0, 6), False), (12, (3, 6), True)]


def test_the_speed_is_that_of_most_of_the_images(tmp_path):
    folder = geneval(tmp_path, "-n", 2)
    settings = read_json(folder / "run.json")
    settings["images_per_s"] = 1234
    (folder / "run.json").write_text(json.dumps(settings))
    geneval(tmp_path, "-n", 3)
    assert read_json(folder / "run.json")["images_per_s"] == 1234
    (folder / "images/00002/samples/0000.png").unlink()
    for path in (folder / "images/00001/samples").iterdir():
        path.unlink()
    geneval(tmp_path, "-n", 3)
    assert read_json(folder / "run.json")["images_per_s"] != 1234


def test_run_json_does_not_claim_more_than_is_drawn(tmp_path, monkeypatch):
    folder = geneval(tmp_path, "-n", 1)
    generate = drawing.generate

    def fail_at_the_third(model, prompts, seeds, **settings):
        if prompts[0] == METADATA[2]["prompt"]:
            raise KeyboardInterrupt
        return generate(model, prompts, seeds, **settings)
    monkeypatch.setattr(drawing, "generate", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        geneval(tmp_path)
    assert (folder / "images/00001/samples/0003.png").exists()
    assert drawn(folder) == (1, 6)
    with pytest.raises(KeyboardInterrupt):
        geneval(tmp_path)
    assert drawn(folder) == (2, 6)

    (folder / "images/00001/samples/0003.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        geneval(tmp_path, out="new")
    assert drawn(tmp_path / "new" / RUN) == (0, 6)
    geneval(tmp_path, "-n", 1)
    assert drawn(folder) == (1, 6)


def test_mjhq_draws_the_first_entries_of_its_file(tmp_path, recorded):
    prompts = write_mjhq(tmp_path)
    words = ["mjhq", "--prompts", prompts, "--out", tmp_path / "out", "--steps", 1]
    command(*words, "-n", 2)
    assert file_names(tmp_path / "out" / RUN / "images") == {
        f"art/{k:032x}.jpg" for k in range(2)}
    command(*words, "-n", 99)
    assert drawn(tmp_path / "out" / RUN) == (3, 3)


# ---- the negative prompt and the size ------------------------------------------------------------

def test_negative_and_size_reach_the_images(tmp_path, monkeypatch):
    """sample.py draws the same image from the same flags."""
    flags = ["--negative", "a small blue star", "--height", "48", "--width", "24"]
    image = Image.open(geneval(tmp_path, "-n", 1, *flags) / "images/00000/samples/0001.png")
    assert image.size == (24, 48)
    assert image.text["negative"] == "a small blue star"

    monkeypatch.setattr("sys.argv", [
        "sample.py", "--prompt", METADATA[0]["prompt"], "--seed", image.text["seed"], "--steps",
        "1", "--out", str(tmp_path / "one"), "--device", "cpu", *flags])
    sample.main()
    (path,) = (tmp_path / "one").glob("*.png")
    difference = np.asarray(Image.open(path), int) - np.asarray(image, int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("flags, message", [
    (["--negative", "blurry"], "negative '', now 'blurry'"),
    (["--height", 48], "height 32, now 48"),
    (["--width", 48], "width 32, now 48")])
def test_another_negative_prompt_or_size_is_not_mixed(tmp_path, recorded, flags, message):
    geneval(tmp_path, "-n", 1)
    with pytest.raises(FuseDiTError, match=message):
        geneval(tmp_path, *flags)
    geneval(tmp_path, "-n", 1, *flags, out="with")
    with pytest.raises(FuseDiTError, match="with other settings"):
        geneval(tmp_path, "-n", 1, out="with")
    assert len(recorded) == 2
    geneval(tmp_path, "-n", 2, "--height", 32, "--width", 32)    # the model's own size


@pytest.mark.parametrize("name", ["shapes", "dpg"])
def test_scorers_of_squares_get_squares(tmp_path, recorded, capsys, name):
    words = [name, "--out", tmp_path / "out", "--steps", 1, "-n", 1]
    if name == "dpg":
        words += ["--prompts", write_dpg(tmp_path)]
    with pytest.raises(FuseDiTError, match="48 x 32 pixels: .*give --height and --width the same"):
        command(*words, "--height", 48)
    assert not (tmp_path / "out").exists()
    command(*words, "--height", 48, "--width", 48)
    assert recorded[0]["height"] == 48
    if name == "dpg":
        assert "--resolution 48 " in capsys.readouterr().out


def test_an_impossible_size_is_refused_before_drawing(tmp_path):
    with pytest.raises(FuseDiTError, match="width 33 is not a multiple"):
        geneval(tmp_path, "--width", 33)
    assert not (tmp_path / "out").exists()


# ---- JPEGs ---------------------------------------------------------------------------------------

def as_jpeg(image, **options):
    data = io.BytesIO()
    image.save(data, "JPEG", **options)
    return data.getvalue()


@pytest.mark.parametrize("flags, options", [
    ([], dict(quality=95, subsampling=0)),
    (["--jpeg-quality", 75], {}),           # as the published script saves them
    (["--jpeg-quality", 90], dict(quality=90, subsampling=0))])
def test_jpeg_quality(tmp_path, monkeypatch, flags, options):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(noise)
    monkeypatch.setattr(drawing, "generate", lambda *args, **settings: [image])
    command("mjhq", "--prompts", write_mjhq(tmp_path, 1), "--out", tmp_path, "--steps", 1, *flags)
    (path,) = tmp_path.rglob("*.jpg")
    assert path.read_bytes() == as_jpeg(image, **options)


@pytest.mark.parametrize("quality", ["0", "101", "x"])
def test_a_wrong_jpeg_quality_is_a_usage_error(tmp_path, capsys, quality):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["mjhq", "--prompts", "x", "--jpeg-quality", quality])
    assert "--jpeg-quality" in capsys.readouterr().err


# ---- folders of earlier versions -----------------------------------------------------------------

def make_old(folder):
    """Rewrite run.json as the version at commit 9be9440 wrote it."""
    settings = read_json(folder / "run.json")
    for key in ("width", "guidance_span", "negative", "jpeg_quality", "prompts_drawn",
                "prompts_total"):
        settings.pop(key, None)
    settings["size"] = settings.pop("height")
    (folder / "run.json").write_text(json.dumps(settings))


def test_an_old_folder_is_continued_with_the_same_settings_only(tmp_path, recorded):
    words = ["mjhq", "--prompts", write_mjhq(tmp_path), "--out", tmp_path, "--steps", 1]
    command(*words)
    folder = tmp_path / RUN
    last = folder / f"images/art/{2:032x}.jpg"
    make_old(folder)
    last.unlink()
    for flags, message in ((["--jpeg-quality", 75], "jpeg_quality 95, now 75"),
                           (["--negative", "blurry"], "negative '', now 'blurry'"),
                           (["--height", 48, "--width", 48], "height 32, now 48; width 32")):
        with pytest.raises(FuseDiTError, match=message):
            command(*words, *flags)
    command(*words)
    assert last.exists()
    assert drawn(folder) == (3, 3)


def test_the_settings_are_in_the_help(capsys):
    for name in ("shapes", "geneval", "dpg", "mjhq"):
        with pytest.raises(SystemExit):
            evaluate.parse_args([name, "--help"])
        text = capsys.readouterr().out
        for flag in ("-n N", "--negative TEXT", "--height PIXELS", "--width PIXELS"):
            assert f"\n  {flag}" in text, name
        assert ("--jpeg-quality" in text) == (name == "mjhq")
        assert not re.search(r"default: (None|\?)", text)

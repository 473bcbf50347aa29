"""Files written by an earlier version, at commit 9be9440: runs, checkpoints, models, shards.

tests/reference/old/ holds a run of 4 steps with its checkpoints, the shards and the tiny Gemma that
it was trained on, its export in the released layout, and the results of that version
(expected.json). The tests work on copies in another folder.
"""
import json
import shutil

import numpy as np
import pytest
import warm
from conftest import REFERENCE, ROOT
from launching import ENV
from PIL import Image
from safetensors.torch import load_file

OLD = REFERENCE / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def old(tmp_path):
    """A copy of the folder, whose paths flags() fills in."""
    return shutil.copytree(OLD, tmp_path / "old")


def flags(name, folder):
    """A command line from expected.json, with the folders of a copy."""
    paths = {"GEMMA": folder / "gemma", "SHARDS": folder / "data", "RUN": folder / "run",
             "RELEASED": folder / "released"}
    return [paths.get(word, word) for word in EXPECTED[name]]


def run(program, words, cwd):
    done = warm.run([ROOT / program, *words], ENV, cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def drawn(words, out, cwd):
    """The image that sample.py draws, int [16,16,3], and the text stored in its PNG."""
    run("sample.py", [*words, "--out", out], cwd)
    (path,) = out.glob("*.png")
    image = Image.open(path)
    return np.asarray(image.convert("RGB"), int), image.text


@pytest.mark.parametrize("name, flags_name, more", [
    ("run", "sample_flags", []), ("run_no_ema", "sample_flags", ["--no-ema"]),
    ("released", "released_flags", [])])
def test_an_old_model_draws_the_same_image(old, tmp_path, name, flags_name, more):
    got, text = drawn([*flags(flags_name, old), *more], tmp_path / "out", tmp_path)
    pixels = bytes.fromhex(EXPECTED["images"][name]["pixels_hex"])
    want = np.frombuffer(pixels, np.uint8).reshape(16, 16, 3).astype(int)
    assert abs(got - want).max() <= 1
    assert (got == want).mean() > 0.99
    assert text["prompt"] == "a red square"
    assert text.get("weights") == ("raw (--no-ema)" if more else None)
    if name != "released":
        assert text["model"] == str(old / "run" / "step-0000004")


def test_an_old_checkpoint_is_exported_as_before(old, tmp_path):
    words = ["--model", old / "run", "--export", tmp_path / "new", "--dtype", "float32"]
    run("sample.py", words, tmp_path)
    config = json.loads((old / "released" / "transformer" / "config.json").read_text())
    got = json.loads((tmp_path / "new" / "transformer" / "config.json").read_text())
    del config["fusion"]                    # since then model_type says it
    for name in config["base_config"].keys() & {"rope_parameters", "rope_theta"}:
        del config["base_config"][name]
    assert {name: got["base_config"][name] for name in config["base_config"]} \
        == config.pop("base_config")
    assert {name: got[name] for name in config} == config
    want = load_file(old / "released" / "transformer" / "model.safetensors")
    got = load_file(tmp_path / "new" / "transformer" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].equal(tensor), name


def rows(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_an_old_run_is_resumed(old, tmp_path):
    before = rows(old)
    done = run("train_gpu.py", flags("resume_flags", old), tmp_path)
    assert "passed over" not in done.stderr
    assert "WARNING" not in done.stderr
    assert "from step 4 to 6" in done.stdout

    after = rows(old)
    assert after[:len(before)] == before
    losses = {str(row["step"]): row["loss"] for row in after if "loss" in row}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-5)
    val_losses = {str(row["step"]): row["val_loss"] for row in after if "val_loss" in row}
    assert val_losses == pytest.approx(EXPECTED["val_losses"], rel=1e-5)

    assert (old / "run" / "latest").read_text().strip() == "step-0000006"
    steps = sorted(path.name for path in (old / "run").glob("step-*"))
    assert steps == ["step-0000002", "step-0000004", "step-0000006"]


def test_an_old_run_is_not_resumed_with_other_settings(old, tmp_path):
    words = [*flags("resume_flags", old), "--lr", "2e-2"]
    done = warm.run([ROOT / "train_gpu.py", *words], ENV, tmp_path)
    assert done.returncode == 1
    assert "lr was 0.01, is now 0.02" in done.stderr

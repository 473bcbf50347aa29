"""examples/train_minimal.py: it computes what train_gpu.py computes, and its default path works."""
import re

import pytest
import torch
import warm
from conftest import ROOT, tiny_gemma
from launching import ENV, launch, losses, state
from PIL import Image
from safetensors.torch import load_file
from tiny_shards import numbered

from fusedit_lib.pretrained import load_model

STEPS = 50


def train_minimal(*argv):
    """Run it; returns the losses that it prints."""
    done = warm.run([ROOT / "examples" / "train_minimal.py", "--log-every", "1", *argv], ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"^step .*  loss (\S+)", done.stdout, re.M)]


def test_losses_and_ema_are_those_of_train_gpu(tmp_path):
    gemma = tmp_path / "gemma"
    tiny_gemma(gemma, num_hidden_layers=2)
    data = numbered(tmp_path / "data")
    common = ["--data", str(data), "--base", str(gemma), "--steps", str(STEPS), "--batch", "8",
              "--lr", "2e-3", "--seed", "7"]
    launch([*common, "--out", str(tmp_path / "gpu"), "--preset", "demo", "--dtype", "float32",
            "--log-every", "1", "--warmup-steps", f"{STEPS // 10}", "--lr-schedule", "cosine",
            "--beta2", "0.99", "--ema-every", "1", "--ema-decay", "0.995", "--workers", "0",
            "--sample-every", "0"])
    found = train_minimal(*common, "--out", tmp_path / "minimal")

    known = losses(tmp_path / "gpu")
    assert len(known) == STEPS and known[-1] < 0.5 * known[0]
    assert found == pytest.approx(known, rel=0, abs=1e-5)
    ema = load_file(tmp_path / "minimal" / "model.safetensors")
    theirs = state(tmp_path / "gpu", STEPS)
    for name, tensor in ema.items():
        torch.testing.assert_close(tensor, theirs[f"step-{STEPS:07d}/{name}"], rtol=0, atol=1e-5)


def test_without_shards_it_draws_scenes(tmp_path):
    out = tmp_path / "run"
    found = train_minimal("--steps", "25", "--batch", "4", "--out", out)
    assert len(found) == 25
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert Image.open(out / "samples.png").width > 4 * 32
    config = load_model(out).config
    assert config.image_size == 32

    again = warm.run([ROOT / "examples" / "train_minimal.py", "--out", out], ENV)
    assert again.returncode == 1
    assert again.stderr == (f"train_minimal.py: error: {out} exists: choose another --out, or "
                            "remove it\n")

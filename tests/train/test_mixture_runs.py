"""Runs of train_gpu.py whose DiT reads mixtures of Gemma's hidden states: text_states."""
import numpy as np
import pytest
import warm
from conftest import ROOT
from launching import assert_equal, flags, launch, launch_all, losses, metrics, state
from PIL import Image
from starting import start_flags

from fusedit_lib import pretrained


def job(gemma, data, out, text_states, steps, *more):
    """The flags of a run. The learning rate is high, so that the mixtures soon differ."""
    return flags(gemma, data, out, "--steps", str(steps), "--ema-every", "1", "--lr", "3e-2",
                 "--sample-every", "100", "--set", "fusion=shallow", f"text_states={text_states}",
                 *more)


def mixing_weights(out, step):
    """{name: tensor} of the EMA of the weights that determine the mixtures."""
    return {name: tensor for name, tensor in state(out, step).items()
            if name.startswith("step-") and "text_mix" in name}


def drawn(model, out, *more):
    """The pixels of the image that sample.py draws."""
    done = warm.run([ROOT / "sample.py", "--model", model, "--prompt", "a red square", "--steps",
                     "2", "--out", out, "--dtype", "float32", *more])
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.png")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_run_trains_its_gates_saves_resumes_exports_and_draws(gemma, data, tmp_path):
    """At ZeRO 1, to the bit; and as two ranks at ZeRO 3, with --cache-text, to 1e-5."""
    def joint(name, steps, *more):
        return job(gemma, data, tmp_path / name, "joint", steps, *more)

    whole = tmp_path / "whole"
    validated = ("--val-data", str(data), "--val-every", "2")
    launch_all([
        joint("whole", 4, "--save-every", "2", *validated),
        joint("part", 2),
        joint("part", 4),
        joint("cached", 4, "--cache-text"),
    ])
    launch(joint("three", 4, "--zero", "3", "--cache-text"), n=2)
    assert_equal(state(whole, 4), state(tmp_path / "part", 4))
    for name in ("cached", "three"):
        assert losses(tmp_path / name) == pytest.approx(losses(whole), rel=1e-5)
    assert sum("val_loss" in row for row in metrics(whole)) == 2

    before = mixing_weights(whole, 2)
    after = mixing_weights(whole, 4)
    assert len(after) == 4
    for name, tensor in after.items():
        earlier = before[name.replace("0000004", "0000002")]
        assert (tensor != earlier).float().mean() > 0.9, name

    image = drawn(whole, tmp_path / "image")
    assert np.ptp(image) > 20
    done = warm.run([ROOT / "sample.py", "--model", whole, "--export", tmp_path / "exported"])
    assert "The published classes cannot: they need" in done.stdout
    assert "text_states layer" in done.stdout
    assert np.array_equal(drawn(tmp_path / "exported", tmp_path / "again"), image)


def started(model, data, out, text_states, check=True):
    """Starts a run of one step from a model, with another mixture. Returns a CompletedProcess."""
    argv = start_flags(model, data, out, "--set", f"text_states={text_states}")
    return launch(argv, check=check)


def test_a_run_starts_from_a_model_that_reads_one_layer(gemma, data, tmp_path):
    """With --init, where only the mixture starts fresh. The other way round, it has no place."""
    layer = tmp_path / "layer"
    depth = tmp_path / "depth"
    launch(job(gemma, data, layer, "layer", 2))
    done = started(layer, data, depth, "depth")
    assert "4 weights start fresh: text_mix\n" in done.stderr       # of 2 layers in 2 blocks
    model = pretrained.load_model(depth)
    assert model.config.text_states == "depth"

    done = started(depth, data, tmp_path / "back", "layer", check=False)
    assert done.returncode == 1
    assert "text_states was 'depth', is now 'layer'" in done.stderr


def test_a_run_is_not_resumed_with_another_mixture(gemma, data, tmp_path):
    out = tmp_path / "run"
    launch(job(gemma, data, out, "static", 1))
    done = launch(job(gemma, data, out, "uniform", 2), check=False)
    assert done.returncode == 1
    assert "text_states was 'static', is now 'uniform'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("text_states", ["uniform", "static", "depth", "time", "joint"])
def test_every_mixture_trains_the_same_at_every_stage(gemma, data, tmp_path, text_states):
    """As two ranks, with Adam on the CPU, with gradient accumulation, --remat and --compile."""
    def named(name, *more):
        return job(gemma, data, tmp_path / name, text_states, 3, "--lr", "3e-3", *more)

    launch_all([
        named("one", "--zero", "0"),
        named("remat", "--remat", "--micro-batch", "2"),
        named("compiled", "--compile"),
    ])
    stages = ("1", "3", "2-offload")
    launch_all([named(zero, "--zero", zero) for zero in stages], n=2)
    for name in ("remat", "compiled", *stages):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), name
        for key, tensor in mixing_weights(tmp_path / name, 3).items():
            assert tensor.isfinite().all(), (name, key)

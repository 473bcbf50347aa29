"""--seed -1 of a training run: one seed for all ranks, which the run keeps."""
import json

import pytest
from launching import flags, launch, losses, state


def settings(out):
    return json.loads((out / "config.json").read_text())["run"]


def test_ranks_share_a_random_seed_and_a_resumed_run_keeps_it(gemma, data, tmp_path):
    """The run is the same as one that was started with this seed."""
    words = ("--sample-every", "0", "--save-every", "1", "--seed")
    first = launch(flags(gemma, data, tmp_path / "a", "--steps", "1", *words, "-1"), n=2)
    seed = settings(tmp_path / "a")["seed"]
    assert first.stderr == f"--seed -1: drew seed {seed}\n"
    second = launch(flags(gemma, data, tmp_path / "a", "--steps", "2", *words, "-1"), n=2)
    assert second.stderr == f"--seed -1: keeps seed {seed}\n"
    assert settings(tmp_path / "a")["seed"] == seed

    launch(flags(gemma, data, tmp_path / "b", "--steps", "2", *words, str(seed)))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_a_seed_of_64_bits_trains_and_resumes(gemma, data, tmp_path):
    """Initial weights, order of the data and image grid are others than with its low 32 bits."""
    large = 2**64 - 1
    for name, seed, steps in (("a", large, 1), ("a", large, 2), ("b", large % 2**32, 1)):
        launch(flags(gemma, data, tmp_path / name, "--steps", str(steps), "--sample-every", "1",
                     "--save-every", "1", "--seed", str(seed)))
    assert settings(tmp_path / "a")["seed"] == large
    weights = [state(tmp_path / name, 1) for name in ("a", "b")]
    name = "train_state/weight.dit.layers.0.mlp.up_proj.weight"
    assert not weights[0][name].equal(weights[1][name])
    grids = [(tmp_path / name / "samples" / "step-0000001.png").read_bytes() for name in "ab"]
    assert grids[0] != grids[1]

"""--seed -1 of a training run: one seed for all ranks, which the run keeps."""
import json

import pytest
from launching import flags, launch, losses, state


def settings(out):
    return json.loads((out / "config.json").read_text())["run"]


def test_ranks_share_a_random_seed_and_a_resumed_run_keeps_it(gemma, data, tmp_path):
    """The run is the same as one that was started with this seed."""
    def train(name, steps, seed, n):
        argv = flags(gemma, data, tmp_path / name, "--steps", str(steps), "--seed", str(seed),
                     "--sample-every", "0", "--save-every", "1")
        return launch(argv, n=n).stderr
    first = train("a", 1, -1, 2)
    seed = settings(tmp_path / "a")["seed"]
    assert first == f"--seed -1: drew seed {seed}\n"
    second = train("a", 2, -1, 2)
    assert second == f"--seed -1: keeps seed {seed}\n"
    assert settings(tmp_path / "a")["seed"] == seed

    train("b", 2, seed, 1)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_a_seed_of_64_bits_trains_and_resumes(gemma, data, tmp_path):
    """Initial weights and the image grid are others than with its low 32 bits."""
    def train(name, steps, seed):
        argv = flags(gemma, data, tmp_path / name, "--steps", str(steps), "--seed", str(seed),
                     "--sample-every", "1", "--save-every", "1")
        launch(argv)
        return tmp_path / name
    large = 2**64 - 1
    a = train("a", 1, large)
    assert train("a", 2, large) == a
    b = train("b", 1, large % 2**32)
    assert settings(a)["seed"] == large
    assert len(losses(a)) == 2

    name = "train_state/weight.dit.layers.0.mlp.up_proj.weight"
    assert not state(a, 1)[name].equal(state(b, 1)[name])
    grid = "samples/step-0000001.png"
    assert (a / grid).read_bytes() != (b / grid).read_bytes()

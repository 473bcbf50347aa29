"""A resumed run equals one that never stopped, for every kind of stop and every ZeRO stage."""
import json
import random
import signal
from dataclasses import replace

import pytest
from launching import (
    ENV,
    WATCHED,
    assert_equal,
    flags,
    keys_by_position,
    launch,
    launch_all,
    losses,
    state,
)

from fusedit_lib.train import checkpoints, resuming
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run


@pytest.mark.parametrize("stages, dtype", [
    ("13", "float32"),
    pytest.param(["0", "2", "2-offload"], "float32", marks=pytest.mark.slow),
    pytest.param(["0", "1", "2", "3", "2-offload"], "bf16", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_never_stopped(gemma, data, tmp_path, stages, dtype):
    """Bit for bit at every ZeRO stage. A checkpoint of one stage can be resumed at another."""
    def job(name, steps, zero, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", zero,
                     "--ema-every", "1", "--dtype", dtype, "--sample-every", "100", *more)
    jobs = [job("mixed", 2, "1"), job("mixed", 3, "3"), job("mixed", 4, "2")]
    for zero in stages:                     # a also saves and samples at step 2; b stops there
        jobs += [job(f"a{zero}", 4, zero, "--save-every", "2", "--sample-every", "2"),
                 job(f"b{zero}", 2, zero), job(f"b{zero}", 4, zero)]
    launch_all(jobs)

    near = 1e-2
    if dtype == "float32":                  # in bf16, stages round at different points
        near = 1e-5
    for zero in stages:
        a = tmp_path / f"a{zero}"
        assert_equal(state(a, 4), state(tmp_path / f"b{zero}", 4))
        assert losses(a) == pytest.approx(losses(tmp_path / "mixed"), rel=near)
        if dtype == "float32":
            assert_equal(state(tmp_path / "mixed", 4), state(a, 4), atol=1e-5)


@pytest.mark.slow
def test_resumed_ranks_equal_ranks_never_stopped(gemma, data, tmp_path):
    """Bit for bit with two ranks, and under ZeRO 3 with three, which divides few tensors evenly."""
    def job(name, steps, zero, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", zero,
                     "--ema-every", "1", "--sample-every", "100", *more)
    jobs = []
    for zero in "0123":
        jobs += [job(f"a{zero}", 4, zero, "--save-every", "2"), job(f"b{zero}", 2, zero),
                 job(f"b{zero}", 4, zero)]
    launch_all(jobs, n=2)
    three = ("--batch", "9")
    launch_all([job("c", 4, "3", *three), job("d", 2, "3", *three), job("d", 4, "3", *three)], n=3)
    for a, b in (("a0", "b0"), ("a1", "b1"), ("a2", "b2"), ("a3", "b3"), ("c", "d")):
        assert_equal(state(tmp_path / a, 4), state(tmp_path / b, 4))


def state_in_one(out, step):
    """state() without the folders at the start of its names."""
    return {name.rpartition("/")[2]: tensor for name, tensor in state(out, step).items()}


@pytest.mark.parametrize("stages, more_ranks", [
    ("1", 2), pytest.param("0123", 2, marks=pytest.mark.slow),
    pytest.param("13", 4, marks=pytest.mark.slow)])
def test_the_number_of_ranks_may_change(gemma, data, tmp_path, stages, more_ranks):
    """More or fewer ranks mid-run, with gradient accumulation, give the same losses."""
    def job(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--sample-every", "100", *more)

    def jobs(name, steps):
        return [job(f"{name}-{zero}", steps, "--zero", zero, "--micro-batch", "2")
                for zero in stages]
    launch_all([job("whole", 12), *jobs("grows", 6)])
    launch_all([*jobs("shrinks", 6), *jobs("grows", 12)], n=more_ranks)
    launch_all(jobs("shrinks", 12))
    for name in ("grows", "shrinks"):
        for zero in stages:
            out = tmp_path / f"{name}-{zero}"
            assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5), out.name
            assert_equal(state_in_one(out, 12), state_in_one(tmp_path / "whole", 12), atol=1e-5)


# ------------------------------------------------------------------------------ kills

@pytest.mark.parametrize("kills, steps", [(3, 30), pytest.param(12, 90, marks=pytest.mark.slow)])
def test_killed_again_and_again_equals_never_killed(gemma, data, tmp_path, kills, steps):
    """SIGKILL at random moments, every third time while a checkpoint is being written."""
    def run(name, **env):
        argv = flags(gemma, data, tmp_path / name, "--steps", str(steps), "--save-every", "4",
                     "--ema-every", "1", "--caption-drop", "0", "--original-caption-rate", "1",
                     "--zero", "2")
        return launch(argv, WATCHED, env=ENV | env, check=False)
    assert run("whole").returncode == 0
    rng = random.Random(0)
    keys = {}
    codes = []
    for i in range(kills + 1):
        env = {}
        if i < kills:
            env["AFTER"] = str(rng.randrange(4, 9))
        if i % 3 == 2:
            env["WRITING"] = "1"
        done = run("killed", **env)
        codes.append(done.returncode)
        keys |= keys_by_position(done.stdout)
    assert codes == [-signal.SIGKILL] * kills + [0]
    assert_equal(state(tmp_path / "killed", steps), state(tmp_path / "whole", steps))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

    # an epoch is 3 steps of 8 samples, and has each of the 24 samples once
    assert sorted(keys) == list(range(8 * steps))
    for first in range(0, 8 * steps, 24):
        epoch = [keys[position] for position in range(first, first + 24)]
        assert sorted(epoch) == [f"n{i:02d}" for i in range(24)]


# ------------------------------------------------------------------------------ older versions

def test_a_run_older_than_a_flag_resumes(gemma, data, tmp_path):
    """A setting that is missing in an older run's config.json had its default in that run."""
    argv = flags(gemma, data, tmp_path / "run", "--steps", "2", "--sample-every", "9")
    launch(argv)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["run"]["float8"]
    path.write_text(json.dumps(config))
    done = launch([*argv, "--float8"], check=False)
    assert done.returncode == 1
    assert "float8 was False, is now True" in done.stderr
    launch(argv)


@pytest.mark.parametrize("now, before", [
    ("/old/clone/demo/gemma", "demo/gemma"), ("demo/gemma", "/old/clone/demo/gemma")])
def test_the_demo_resumes_with_either_name_of_its_gemma(data, tmp_path, now, before):
    """Earlier versions stored its absolute path, and a later one its path in the repository."""
    argv = flags("demo/gemma", data, tmp_path / "run", "--steps", "1", "--sample-every", "9")
    config = model_config(parse_run(argv, ""))
    assert config.base == "demo/gemma"
    stored = json.loads(checkpoints.run_settings_json(parse_run(argv, ""), config))
    stored["model"]["base"] = before
    changed = resuming.changed_settings(stored, parse_run(argv, ""), replace(config, base=now))
    assert changed == []

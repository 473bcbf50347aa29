"""The real launcher stops correctly on Ctrl-C, SIGTERM or a dead rank."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from conftest import ROOT
from launching import (
    ENV,
    WATCHED,
    command,
    flags,
    free_port,
    launch,
    metrics,
    ranks,
    read_until,
)

from fusedit_lib.train import checkpoints, distributed


@pytest.mark.parametrize("number, while_saving", [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_ends_the_step_and_saves(gemma, data, tmp_path, number, while_saving):
    argv = flags(gemma, data, tmp_path / "run", "--steps", "100000", "--log-every", "5",
                 "--workers", "1", "--save-every", "7")
    process = warm.start(command(argv, WATCHED), ENV)
    line = "step 5/"
    if while_saving:
        line = "WRITING"
    read_until(process, line)
    os.killpg(process.pid, number)          # like a terminal or launcher, including data workers
    out, err = process.communicate()
    latest = (tmp_path / "run" / "latest").read_text().strip()
    step = int(latest.removeprefix("step-"))
    assert process.returncode == 0 and "Traceback" not in err
    assert f"stopped by {number.name}; step {step} is saved. To resume:" in out
    assert "--steps 100000" in out
    assert checkpoints.damage(tmp_path / "run" / latest) is None
    assert metrics(tmp_path / "run")[-1]["step"] == step


@pytest.fixture
def clock(monkeypatch):
    """The list that holds the time. Handlers of signals are restored at the end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    now = [0]
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: now[0]))
    yield now
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_second_signal_ends_the_process(clock):
    """Within 3 seconds it may be the same one, and once a run trains, SIGTERM never does."""
    caught = distributed.catch_sigterm()
    for clock[0] in (1, 4):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        clock[0] = 5
        signal.raise_signal(signal.SIGTERM)

    distributed.catch_while_training(caught)
    for clock[0] in (1, 4, 10):
        signal.raise_signal(signal.SIGTERM)
    for clock[0] in (11, 14):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        clock[0] = 15
        signal.raise_signal(signal.SIGINT)
    assert caught == 6 * [signal.SIGTERM] + 3 * [signal.SIGINT]


def test_a_signal_to_one_rank_stops_all(gemma, data, tmp_path):
    argv = flags(gemma, data, tmp_path / "run", "--steps", "1000000")
    processes = ranks(command(argv), 2, live=True)
    read_until(processes[0], "step 5/")
    os.kill(processes[1].pid, signal.SIGTERM)
    ends = [process.communicate() for process in processes]
    latest = (tmp_path / "run" / "latest").read_text().strip()
    step = int(latest.removeprefix("step-"))
    assert [process.returncode for process in processes] == [0, 0], ends
    assert f"stopped by SIGTERM; step {step} is saved" in ends[0][0]
    assert checkpoints.damage(tmp_path / "run" / latest) is None


def two_ranks(launcher):
    """The command line of a launcher that starts two processes."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2"]
    deepspeed = shutil.which("deepspeed", path=Path(sys.executable).parent)
    return [deepspeed, "--num_gpus", "2", "--master_port", free_port()]


def running(out):
    """Ids of the processes whose command line contains the run folder."""
    done = subprocess.run(["pgrep", "-f", str(out)], text=True, capture_output=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_dead_rank_ends_the_others(gemma, data, tmp_path, launcher):
    out = tmp_path / "run"
    argv = flags(gemma, data, out, "--steps", "1000000")
    process = subprocess.Popen([*two_ranks(launcher), ROOT / "train_gpu.py", *argv], text=True,
                               env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    next(line for line in process.stdout if "step 5/" in line)
    second = [pid for pid in running(out)
              if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second[-1], signal.SIGKILL)
    process.communicate(timeout=500)        # less than the half-hour timeout of a collective
    assert process.returncode != 0
    assert not running(out)


# Ranks that watch each other, as TPU hosts do. The last one finishes after the time limit.
LATE = """
import time, torch.distributed as dist
from datetime import timedelta
from fusedit_lib.train import distributed
dist.init_process_group("gloo", timeout=timedelta(seconds=1))
distributed.watch_next_rank()
time.sleep(3 if dist.get_rank() == 2 else 0)
distributed.disconnect()
"""


def test_hosts_wait_for_one_that_still_saves():
    for process in ranks(["-c", LATE], 3):
        _, err = process.communicate()
        assert process.returncode == 0 and not err, err


# Rank 1 receives SIGTERM while the model is loaded.
AT_START = """
import signal
build_models = launcher.build_models

def build_slowly(*args):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return build_models(*args)

launcher.build_models = build_slowly
"""


def test_a_signal_before_the_loop_ends_all_ranks(gemma, data, tmp_path):
    """A new run has nothing to save. A resumed one is saved already."""
    new = flags(gemma, data, tmp_path / "new", "--steps", "5")
    done = launch(new, AT_START, n=2)
    assert "stopped by SIGTERM before the first step: there is nothing to save" in done.stdout
    assert "Traceback" not in done.stderr and not metrics(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*step-*"))

    launch(flags(gemma, data, tmp_path / "old", "--steps", "5", "--save-every", "2"), n=2)
    done = launch(flags(gemma, data, tmp_path / "old", "--steps", "9"), AT_START, n=2)
    assert "stopped by SIGTERM; step 5 is saved. To resume:" in done.stdout
    assert len(metrics(tmp_path / "old")) == 5

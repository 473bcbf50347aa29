"""Runs the real launchers: as one process, several in turn, or the ranks that torchrun starts."""
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import torch
import warm
from conftest import ROOT
from safetensors.torch import load_file
from tiny_shards import SHAPE

PYTHONPATH = f"{ROOT}:{ROOT}/tests:{ROOT}/tests/train"
if os.environ.get("PYTHONPATH"):
    PYTHONPATH += os.pathsep + os.environ["PYTHONPATH"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}


def flags(gemma, data, out, *more):
    """The flags of a small float32 run that logs every step; later flags override earlier ones."""
    return ["--data", str(data), "--base", str(gemma), "--out", str(out), "--set", *SHAPE,
            "--batch", "8", "--lr", "3e-3", "--workers", "0", "--log-every", "1",
            "--prompts", "a blue square", "a star", "a red circle", "--sample-steps", "2",
            "--dtype", "float32", *more]


# ------------------------------------------------------------------------------ processes

# A launcher that runs after `before` has replaced something in it.
PATCHED = """
import json, os, sys, time, torch, torch.distributed as dist, train_{engine} as launcher
import fusedit
from fusedit_lib import cli
from fusedit_lib.data import batches, order, shards
from fusedit_lib.train import checkpoints, distributed, monitor, sharding, validation, xla
{before}
cli.run(launcher.main, "")
"""


def command(argv, before="", engine="gpu"):
    """Python's arguments to run a launcher. before: code to run in it before its main()."""
    if before:
        return ["-c", PATCHED.format(before=before, engine=engine), *argv]
    return [ROOT / f"train_{engine}.py", *argv]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(argv, n, env=ENV, live=False):
    """Start n processes, each with the environment variables that torchrun would set.

    live: True to read rank 0's output while it runs.
    """
    shared = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    processes = []
    for i in range(n):
        rank_env = env | shared | dict(RANK=str(i), LOCAL_RANK=str(i))
        processes.append(warm.start(argv, rank_env, live=live and i == 0))
    return processes


def finish(processes):
    """Wait for processes. Returns one CompletedProcess. If one fails, the others are killed."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.01)
    ends = [process.communicate() for process in processes]
    stdout = "".join(out for out, _ in ends)
    stderr = "".join(err for _, err in ends)

    # the exit code of one that failed by itself, if there is one
    codes = [process.returncode for process in processes if process.returncode > 0]
    codes.append(processes[0].returncode)
    return subprocess.CompletedProcess(processes[0].args, codes[0], stdout, stderr)


def launch(argv, before="", n=1, engine="gpu", env=ENV, check=True):
    """Run a launcher to its end, as one process or as n ranks. Returns a CompletedProcess."""
    words = command(argv, before, engine)
    if n == 1:
        done = warm.run(words, env)
    else:
        done = finish(ranks(words, n, env))
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def launch_all(jobs, n=1, engine="gpu", env=ENV, check=True):
    """Launch jobs one by one; each is flags or (flags, code to run before). Returns a list."""
    ends = []
    for job in jobs:
        argv = job
        before = ""
        if isinstance(job, tuple):
            argv, before = job
        ends.append(launch(argv, before, n, engine, env, check))
    return ends


def read_until(process, begin):
    """Read a process's stdout up to the line that starts with `begin`."""
    for line in process.stdout:
        if line.startswith(begin):
            return
    raise AssertionError(process.communicate())


# Code that writes checkpoint files slowly and prints when it does, and prints the keys of each
# micro-batch's samples after the position of the first. If AFTER is in the environment, the process
# kills its process group: a moment after the AFTER-th micro-batch from now or, with WRITING, when a
# checkpoint file is half written after that.
WATCHED = """
import random, signal, threading
save_file = checkpoints.save_file
load_batches = launcher.load_batches
steps_left = int(os.environ.get("AFTER", 10**9))
while_writing = "WRITING" in os.environ

def kill():
    os.killpg(0, signal.SIGKILL)

def save_slowly(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.write(1, f"WRITING {path}\\n".encode())     # whole lines, also from two threads at once
    if while_writing and steps_left <= 0:
        os.truncate(path, path.stat().st_size // 2)
        kill()
    time.sleep(0.1)

def print_keys(source, which, batches):
    global steps_left
    for m, batch in zip(which, batches):
        keys = ""
        for position, caption in zip(source.positions(m), batch["captions"]):
            keys += f" {position}:{caption.rpartition(' ')[2]}"
        os.write(1, f"KEYS{keys}\\n".encode())
        steps_left -= 1
        if steps_left == 0 and not while_writing:
            threading.Timer(random.random() * 0.02, kill).start()
        yield batch

def load_and_print(batches, which, *args, **kwargs):
    return print_keys(batches, which, load_batches(batches, which, *args, **kwargs))

checkpoints.save_file = save_slowly
launcher.load_batches = load_and_print
"""


def keys_by_position(stdout):
    """{position: key of its sample}, from the output of a launcher with WATCHED."""
    found = {}
    for line in stdout.splitlines():
        if line.startswith("KEYS"):
            for word in line.split()[1:]:
                position, key = word.split(":")
                found[int(position)] = key
    return found


# ------------------------------------------------------------------------------ what a run leaves

def metrics(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [row["loss"] for row in metrics(out) if "loss" in row]


def state(out, step):
    """All tensors of a checkpoint, written by any number of ranks."""
    checkpoint = Path(out) / f"step-{step:07d}"
    tensors = {}
    for folder in (checkpoint, checkpoint / "train_state"):
        for path in folder.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                tensors[f"{folder.name}/{name}"] = tensor
    return tensors


def assert_equal(a, b, atol=None):
    """Assert that two {name: tensor} are equal, to the bit or within atol."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name        # allclose would broadcast
        if atol is None:
            assert torch.equal(a[name], b[name]), name
        else:
            assert torch.allclose(a[name], b[name], atol=atol), name

"""The real launchers as processes: one, many, or the ranks that torchrun would start."""
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


def flags(gemma, data, out, *more):
    return ["--data", str(data), "--base", str(gemma), "--out", str(out), "--set", *SHAPE,
            "--batch", "8", "--lr", "3e-3", "--workers", "0", "--log-every", "1", "--prompts",
            "a blue square", "a star", "a red circle", "--sample-steps", "2", "--dtype", "float32",
            *more]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/train"}

# A launcher in which something is replaced first.
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
    """A launcher's command line; before: code that runs in it ahead of its main()."""
    if before:
        return ["-c", PATCHED.format(before=before, engine=engine), *argv]
    return [ROOT / f"train_{engine}.py", *argv]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(argv, n, env=ENV, live=False):
    """Start n processes with what torchrun would tell each of them."""
    port = free_port()
    return [warm.start(argv, env | dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n),
                                        MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                       live=live and i == 0)
            for i in range(n)]


def finish(processes):
    """Their end as one subprocess.CompletedProcess; if one fails, the others are killed."""
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):
            for p in processes:
                p.kill()
        time.sleep(0.01)
    ends = [p.communicate() for p in processes]
    code = next((p.returncode for p in processes if p.returncode > 0), processes[0].returncode)
    return subprocess.CompletedProcess(processes[0].args, code, *map("".join, zip(*ends)))


def launch(argv, before="", n=1, engine="gpu", env=ENV, check=True):
    """Run a launcher to its end, as one process or as n ranks."""
    words = command(argv, before, engine)
    done = warm.run(words, env) if n == 1 else finish(ranks(words, n, env))
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def launch_all(jobs, n=1, engine="gpu", env=ENV, check=True):
    """Run one after the other; jobs: flags, or (flags, code to run before). Returns a list."""
    jobs = [job if isinstance(job, tuple) else (job, "") for job in jobs]
    return [launch(argv, before, n, engine, env, check) for argv, before in jobs]


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [r["loss"] for r in metrics(out) if "loss" in r]


def state(out, step):
    """All tensors of a checkpoint, whoever wrote them."""
    where = Path(out) / f"step-{step:07d}"
    return {f"{folder.name}/{k}": v for folder in (where, where / "train_state")
            for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal(a, b, atol=None):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].shape == b[k].shape, k  # allclose would broadcast
        assert torch.equal(a[k], b[k]) if atol is None else torch.allclose(a[k], b[k], atol=atol), k

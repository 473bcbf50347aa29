"""The real launcher as processes: one, several runs in one, or two ranks."""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file
from shards import SHAPE

def flags(gemma, data, out, *more):
    return ["--data", str(data), "--base", str(gemma), "--out", str(out), "--set", *SHAPE,
            "--batch", "8", "--lr", "3e-3", "--workers", "0", "--log-every", "1", "--prompts",
            "a blue square", "a star", "a red circle", "--sample-steps", "2", "--dtype", "float32",
            *more]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def launch(argv, *launcher, check=True, **more):
    done = subprocess.run([sys.executable, *launcher, ROOT / "train_gpu.py", *argv], text=True,
                          capture_output=True, env=ENV, timeout=300, **more)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


# Several runs in one process, whose start takes longest. Jobs: (what to do before, flags).
SEVERAL = """
import json, sys, torch, torch.distributed as dist, train_{engine} as launcher
import checkpoints, fusedit, loader, spmd, watch
init = dist.init_process_group
dist.init_process_group = lambda *a, **k: dist.is_initialized() or init(*a, **k)
dist.destroy_process_group = lambda: None
for code, argv in json.load(open(sys.argv[1])):
    exec(code)
    sys.argv = ["train_{engine}.py", *argv]
    try:
        print("exit", launcher.main())
    except fusedit.FuseDiTError as e:
        print("error:", e)
"""


def several(tmp_path, jobs, *launcher, engine="gpu", devices=1):
    """Jobs: flags, or (what to do before, flags). devices: of a CPU, for train_tpu.py."""
    jobs = [job if isinstance(job, tuple) else ("", job) for job in jobs]
    (tmp_path / "several.py").write_text(SEVERAL.format(engine=engine))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, *launcher, str(tmp_path / "several.py"),
                           str(tmp_path / "jobs.json")], env=virtual(devices), text=True,
                          capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def virtual(devices):
    """The environment in which a CPU has several devices, for XLA."""
    return ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}


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

"""train_gpu.py in every way that a flag offers, some steps each, in one process: what fails?

The demo's model on drawn shapes. Each run validates, draws, saves checkpoints and ends; some go on
from a checkpoint, at another ZeRO stage or after a SIGTERM in the middle. Losses of ways that
compute the same are compared.

    python benchmarks/gpu/smoke.py --only zero
"""
import argparse
import gc
import io
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import kit  # isort: skip (before torch)
import torch
import torch.distributed as dist
from kit import CUDA, SMALL, record, why

import summary
import train_gpu

SIGNAL = "SIGTERM in the middle"
# How far a loss may be from that of --zero 1, of its size: bfloat16 and another order of sums.
CLOSE = 0.02


class Job(NamedTuple):
    """A run: its flags, and the job from whose checkpoint it goes on."""
    name: str
    flags: list
    folder: str = ""
    same: bool = False                      # computes what "zero 1" does
    quick: bool = False                     # with SMALL=1 as well


def jobs():
    def steps(n):
        return ["--steps", str(n)]
    n = batch()
    deepspeed = '{"zero_optimization": {"reduce_bucket_size": 1000000}}'
    return [
        Job("zero 1", steps(4), same=True, quick=True),
        Job("zero 1, on at zero 3", [*steps(6), "--zero", "3"], "zero 1", quick=True),
        Job("zero 1, on at zero 2-offload", [*steps(8), "--zero", "2-offload"], "zero 1"),
        Job("zero 0", [*steps(4), "--zero", "0"], same=True),
        Job("zero 2, micro-batches, workers", [
            *steps(4), "--zero", "2", "--micro-batch", str(n // 2), "--workers", "2"], same=True,
            quick=True),
        Job("zero 3", [*steps(4), "--zero", "3"], same=True),
        Job("zero 1-offload", [*steps(4), "--zero", "1-offload"], same=True),
        Job("zero 2-offload", [*steps(4), "--zero", "2-offload"], same=True),
        Job("zero 3-offload", [*steps(4), "--zero", "3-offload"], same=True, quick=True),
        Job("zero 0, float32", [*steps(4), "--zero", "0", "--dtype", "float32"], same=True,
            quick=True),
        Job("zero 1, float32", [*steps(4), "--dtype", "float32"], same=True),
        Job("zero 0, on in float32", [*steps(6), "--dtype", "float32", "--zero", "1"],
            "zero 0, float32"),
        Job("ema-offload", [*steps(4), "--ema-offload"], same=True, quick=True),
        Job("ema-offload, on without", steps(6), "ema-offload"),
        Job("remat", [*steps(4), "--remat"], same=True),
        Job(SIGNAL, steps(100_000), quick=True),
        Job("on after the SIGTERM", [], SIGNAL, quick=True),
        Job("compile", [*steps(4), "--compile"], same=True),
        Job("compile, memory budget", [*steps(4), "--compile", "--memory-budget", "0.5"],
            same=True),
        Job("compile, remat, zero 3", [*steps(4), "--compile", "--remat", "--zero", "3"],
            same=True),
        Job("train-llm", [*steps(4), "--train-llm", "--remat"]),
        Job("no clipping, cosine, crops", [*steps(4), "--max-grad-norm", "0", "--lr-schedule",
                                           "cosine", "--crop", "random", "--save-minutes", "0.01"]),
        Job("DeepSpeed's own settings", [*steps(4), "--deepspeed-config", deepspeed], same=True),
        Job("float32, no qk_norm", [*steps(4), "--dtype", "float32", "--set", "qk_norm=false"]),
        Job("no qk_norm", [*steps(4), "--set", "qk_norm=false"]),
        Job("adaln-zero, ape", [*steps(4), "--set", "timestep_conditioning=adaln-zero",
                                "pos_embed=ape"]),
        Job("cross-attention, shallow", [*steps(4), "--set", "attention=cross",
                                         "fusion=shallow"])]


def batch():
    return 8 if SMALL else 64


def base():
    """Flags of all jobs: a checkpoint every 2 steps, pictures and validation every 4."""
    data, n = str(kit.WORK / "val"), str(batch())
    return ["--preset", "demo", "--data", data, "--val-data", data, "--batch", n, "--log-every",
            "1", "--save-every", "2", "--sample-every", "4", "--val-every", "4", "--val-samples",
            n, "--sample-steps", "2", "--ema-every", "1", "--lr", "1e-3", "--prompts", "a star",
            "--workers", "0"]


def one_process_group():
    """All jobs share one, as a process can make it but once with NCCL, and quickly."""
    init = dist.init_process_group

    def first(*args, **kwargs):
        if not dist.is_initialized():
            init(*args, **kwargs)
    dist.init_process_group, dist.destroy_process_group = first, lambda: None


def signal_at(path, step):
    """Send this process a SIGTERM as soon as a run has logged a step."""
    def watch():
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if any(r.get("step", 0) >= step and "loss" in r for r in summary.rows(path)):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)
    threading.Thread(target=watch, daemon=True).start()


def do(job, out):
    """Run a job; returns (exit code or None, problem, what it printed)."""
    text = io.StringIO()
    sys.argv = ["train_gpu.py", *base(), "--out", str(out), *job.flags]
    if job.name == SIGNAL:
        signal_at(out / "metrics.jsonl", 3)
    if job.folder == SIGNAL:
        sys.argv += ["--steps", str(last_step(out) + 2)]
    try:
        with redirect_stdout(text), redirect_stderr(text):
            return train_gpu.main(), "", text.getvalue()
    except BaseException as e:              # SystemExit, too
        return None, why(e), text.getvalue() + traceback.format_exc()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def last_step(out):
    """The step of a run's last checkpoint."""
    path = out / "latest"
    return int(path.read_text().split("-")[-1]) if path.exists() else 0


def judge(job, out, code, problem, first):
    """(what is wrong, the losses of its steps)."""
    rows = summary.rows(out / "metrics.jsonl")
    logged = {r["step"]: r["loss"] for r in rows if "loss" in r}
    steps, losses = [*logged], [*logged.values()]
    if problem or code != 0:
        return problem or f"exit code {code}", losses
    if not losses or None in losses or steps != [*range(1, len(steps) + 1)]:
        return f"steps {steps}, losses {losses}", losses
    if last_step(out) != steps[-1]:
        return f"step {last_step(out)} is saved, not {steps[-1]}", losses
    if job.name != SIGNAL and not any("val_loss" in r for r in rows):
        return "no validation loss", losses
    if job.same and first:
        apart = max(abs(a / b - 1) for a, b in zip(losses, first, strict=False))
        print(f"{'':<34}{apart:.1e} from zero 1")
        record("apart", name=job.name, apart=apart)
        if not apart < CLOSE:
            return f"losses are {apart:.1e} from those of zero 1", losses
    return "", losses


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="jobs whose name holds this")
    p.add_argument("--more", nargs="*", default=[], help="flags for all jobs, as --float8")
    args = p.parse_args()
    one_process_group()
    first, failed = [], []
    for job in jobs():
        if args.only not in job.name or SMALL and not job.quick:
            continue
        if kit.seconds_left() < 8:
            print(f"{job.name:<34}no time left")
            continue
        out, begin = kit.WORK / "smoke" / (job.folder or job.name).replace(" ", "-"), time.time()
        if not job.folder:
            shutil.rmtree(out, ignore_errors=True)
        job = job._replace(flags=[*job.flags, *(f"--{flag}" for flag in args.more)])
        code, problem, text = do(job, out)
        problem, losses = judge(job, out, code, problem, first)
        first = first or losses
        print(f"{job.name:<34}{'FAILED' if problem else 'ok':<8}{time.time() - begin:6.1f} s  "
              f"losses {[round(x, 4) for x in losses[-4:] if x]} {problem}", flush=True)
        record("smoke", name=job.name, problem=problem, losses=losses[-4:],
               seconds=time.time() - begin)
        if problem:
            failed.append(job.name)
            print("    " + text[-3000:].replace("\n", "\n    "))
        torch.compiler.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

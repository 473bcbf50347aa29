"""Smoke test of train_gpu.py: runs a few steps with each of its flags, all in one process.

The model is the demo's, trained on rendered shapes. Each run validates, samples, saves checkpoints
and ends. Some resume from a checkpoint, with another ZeRO stage or after a SIGTERM. The losses of
runs that should compute the same are compared.

    python benchmarks/gpu/smoke.py --only zero
"""
import argparse
import gc
import io
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import kit  # isort: skip (before torch)
import summary
import torch
import torch.distributed as dist
from kit import CUDA, SMALL, one_line, record

import train_gpu

SIGNAL_RUN = "SIGTERM in the middle"
# Largest relative difference of a loss from that of --zero 1, due to bfloat16 and summation order.
TOLERANCE = 0.02
BATCH = 64
if SMALL:
    BATCH = 8
DEEPSPEED_CONFIG = '{"zero_optimization": {"reduce_bucket_size": 1000000}}'


class Run(NamedTuple):
    name: str
    flags: str
    resumes: str = ""                       # name of the run from whose checkpoint this one resumes
    same: bool = False                      # computes the same as "zero 1"
    quick: bool = False                     # also runs with SMALL=1


RUNS = [
    Run("zero 1", "--steps 4", same=True, quick=True),
    Run("zero 1, resumed at zero 3", "--steps 6 --zero 3", "zero 1", quick=True),
    Run("zero 1, resumed at zero 2-offload", "--steps 8 --zero 2-offload", "zero 1"),
    Run("zero 0", "--steps 4 --zero 0", same=True),
    Run("zero 2, micro-batches, workers",
        f"--steps 4 --zero 2 --micro-batch {BATCH // 2} --workers 2", same=True, quick=True),
    Run("zero 3", "--steps 4 --zero 3", same=True),
    Run("zero 1-offload", "--steps 4 --zero 1-offload", same=True),
    Run("zero 2-offload", "--steps 4 --zero 2-offload", same=True),
    Run("zero 3-offload", "--steps 4 --zero 3-offload", same=True, quick=True),
    Run("zero 0, float32", "--steps 4 --zero 0 --dtype float32", same=True, quick=True),
    Run("zero 1, float32", "--steps 4 --dtype float32", same=True),
    Run("zero 0, resumed in float32", "--steps 6 --dtype float32 --zero 1", "zero 0, float32"),
    Run("ema-offload", "--steps 4 --ema-offload", same=True, quick=True),
    Run("ema-offload, resumed without", "--steps 6", "ema-offload"),
    Run("remat", "--steps 4 --remat", same=True),
    Run(SIGNAL_RUN, "--steps 100000", quick=True),
    Run("resumed after the SIGTERM", "", SIGNAL_RUN, quick=True),
    Run("compile", "--steps 4 --compile", same=True),
    Run("compile, memory budget", "--steps 4 --compile --memory-budget 0.5", same=True),
    Run("compile, remat, zero 3", "--steps 4 --compile --remat --zero 3", same=True),
    Run("train-llm", "--steps 4 --train-llm --remat"),
    Run("no clipping, cosine, crops",
        "--steps 4 --max-grad-norm 0 --lr-schedule cosine --crop random --save-minutes 0.01"),
    Run("DeepSpeed's own settings", f"--steps 4 --deepspeed-config '{DEEPSPEED_CONFIG}'",
        same=True),
    Run("float32, no qk_norm", "--steps 4 --dtype float32 --set qk_norm=false"),
    Run("no qk_norm", "--steps 4 --set qk_norm=false"),
    Run("adaln-zero, ape", "--steps 4 --set timestep_conditioning=adaln-zero pos_embed=ape"),
    Run("cross-attention, shallow", "--steps 4 --set attention=cross fusion=shallow"),
]


def base_flags():
    """The flags of all runs: a checkpoint every 2 steps, samples and validation every 4."""
    data = str(kit.WORK / "val")
    flags = (f"--preset demo --batch {BATCH} --log-every 1 --save-every 2 --sample-every 4 "
             f"--val-every 4 --val-samples {BATCH} --sample-steps 2 --ema-every 1 --lr 1e-3 "
             "--workers 0")
    return [*flags.split(), "--data", data, "--val-data", data, "--prompts", "a star"]


def share_process_group():
    """Make all runs share one process group, as a process can create only one with NCCL."""
    init = dist.init_process_group

    def init_once(*args, **kwargs):
        if not dist.is_initialized():
            init(*args, **kwargs)

    def destroy():
        pass

    dist.init_process_group = init_once
    dist.destroy_process_group = destroy


def send_sigterm_at(path, step):
    """Start a thread that sends this process a SIGTERM once a run has logged a step."""
    def has_logged():
        return any(row.get("step", 0) >= step and "loss" in row for row in summary.rows(path))

    def watch():
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if has_logged():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


class Outcome(NamedTuple):
    code: int | None                        # exit code; None after an exception
    problem: str                            # "" or the exception
    output: str


def train(run, flags, out):
    """Run train_gpu.py in this process."""
    output = io.StringIO()
    sys.argv = ["train_gpu.py", *base_flags(), "--out", str(out), *flags]
    if run.name == SIGNAL_RUN:
        send_sigterm_at(out / "metrics.jsonl", 3)
    if run.resumes == SIGNAL_RUN:
        sys.argv += ["--steps", str(last_step(out) + 2)]
    try:
        with redirect_stdout(output), redirect_stderr(output):
            code = train_gpu.main()
        return Outcome(code, "", output.getvalue())
    except BaseException as e:              # including SystemExit
        return Outcome(None, one_line(e), output.getvalue() + traceback.format_exc())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def last_step(out):
    """The step of a run's last checkpoint."""
    path = out / "latest"
    if not path.exists():
        return 0
    return int(path.read_text().split("-")[-1])


def find_problem(run, out, outcome, losses, first_losses):
    """The problem with a run, or "". losses: {step: loss}. first_losses: those of zero 1."""
    if outcome.problem:
        return outcome.problem
    if outcome.code != 0:
        return f"exit code {outcome.code}"
    steps = list(losses)
    values = list(losses.values())
    if not values or None in values or steps != list(range(1, len(steps) + 1)):
        return f"steps {steps}, losses {values}"
    if last_step(out) != steps[-1]:
        return f"step {last_step(out)} is saved, not {steps[-1]}"
    if run.name != SIGNAL_RUN:
        if not any("val_loss" in row for row in summary.rows(out / "metrics.jsonl")):
            return "no validation loss"
    if run.same and first_losses:
        apart = max(abs(a / b - 1) for a, b in zip(values, first_losses, strict=False))
        print(f"{'':<34}{apart:.1e} from zero 1")
        record("apart", name=run.name, apart=apart)
        if not apart < TOLERANCE:
            return f"losses are {apart:.1e} from those of zero 1"
    return ""


def do(run, more_flags, first_losses):
    """Run, check and report. Returns the problem or "", and the losses of the steps."""
    begin = time.time()
    folder = (run.resumes or run.name).replace(" ", "-")
    out = kit.WORK / "smoke" / folder
    if not run.resumes:
        shutil.rmtree(out, ignore_errors=True)
    outcome = train(run, [*shlex.split(run.flags), *more_flags], out)
    rows = summary.rows(out / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    problem = find_problem(run, out, outcome, losses, first_losses)

    values = list(losses.values())
    status = "ok"
    if problem:
        status = "FAILED"
    shown = [round(x, 4) for x in values[-4:] if x]
    print(f"{run.name:<34}{status:<8}{time.time() - begin:6.1f} s  losses {shown} {problem}",
          flush=True)
    record("smoke", name=run.name, problem=problem, losses=values[-4:],
           seconds=time.time() - begin)
    if problem:
        print("    " + outcome.output[-3000:].replace("\n", "\n    "))
    return problem, values


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="run only those whose name contains this text")
    p.add_argument("--more", nargs="*", default=[],
                   help="additional flags for all runs, without their dashes, such as float8")
    args = p.parse_args()
    more_flags = [f"--{flag}" for flag in args.more]
    share_process_group()
    first_losses = []
    failed = []
    for run in RUNS:
        if args.only not in run.name:
            continue
        if SMALL and not run.quick:
            continue
        if kit.seconds_left() < 8:
            print(f"{run.name:<34}no time left")
            continue
        problem, losses = do(run, more_flags, first_losses)
        first_losses = first_losses or losses
        if problem:
            failed.append(run.name)
        torch.compiler.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""What the parts of the kit share: the device, a clock, and lines of results.jsonl.

Import this before torch: it also makes the repository's and the benchmarks' modules known.
"""
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch

SMALL = os.environ.get("SMALL") == "1"
OUT, WORK = (Path(os.environ.get(name, ROOT / "runs" / default)).resolve()
             for name, default in (("OUT", "gpu"), ("W", "gpu-work")))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32          # a CPU may only emulate bfloat16
BEGIN = time.monotonic()
warnings.filterwarnings("ignore")


def record(kind, **row):
    """Add a line to results.jsonl at once, so that a kill later on does not lose it."""
    OUT.mkdir(parents=True, exist_ok=True)
    row = dict(kind=kind, part=os.environ.get("PART"), **row)
    with open(OUT / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def seconds_left():
    """Until this part is killed, less a few for it to end by itself."""
    return float(os.environ.get("LIMIT", "1e9")) - 5 - (time.monotonic() - BEGIN)


def wait():
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(work, rounds=10, warm=3):
    """The median of work()'s times, by the GPU's own clock where there is one."""
    if SMALL:
        rounds, warm = 1, 0
    for _ in range(warm):
        work()
    wait()
    if not CUDA:
        took = []
        for _ in range(rounds):
            begin = time.perf_counter()
            work()
            took.append(1000 * (time.perf_counter() - begin))
        return statistics.median(took)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    wait()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


def forget_peak():
    """Start to watch the memory anew; returns the bytes that are in use now."""
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak():
    """Bytes that were in use at most since forget_peak()."""
    return torch.cuda.max_memory_allocated() if CUDA else 0


def why(e):
    """An exception in one line."""
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0][:160] if text else ''}"


def distance(a, b):
    """How far a is from b, of b's norm; nan if a is not finite."""
    return float((a.double() - b.double()).norm() / b.double().norm())

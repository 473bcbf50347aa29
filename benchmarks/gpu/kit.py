"""Code shared by the parts of the kit: the device, timing, and the lines of results.jsonl.

Import this before torch: it also puts the repository and benchmarks/ on the import path.
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
from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch


def folder_setting(name, default):
    """The folder that an environment variable names, or one in runs/."""
    return Path(os.environ.get(name, ROOT / "runs" / default)).resolve()


SMALL = os.environ.get("SMALL") == "1"
OUT = folder_setting("OUT", "gpu")
WORK = folder_setting("W", "gpu-work")
CUDA = torch.cuda.is_available()
if CUDA:
    DEVICE = torch.device("cuda:0")
    DTYPE = torch.bfloat16
else:
    DEVICE = torch.device("cpu")
    DTYPE = torch.float32                   # a CPU may only emulate bfloat16
BEGIN = time.monotonic()
warnings.filterwarnings("ignore")


def record(kind, **row):
    """Append a line to results.jsonl at once, so that it is kept if the part is killed later."""
    OUT.mkdir(parents=True, exist_ok=True)
    row = dict(kind=kind, part=os.environ.get("PART"), **row)
    with open(OUT / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def seconds_left():
    """Seconds until this part is killed, minus a few so that it can end by itself."""
    limit = float(os.environ.get("LIMIT", "1e9"))
    return limit - 5 - (time.monotonic() - BEGIN)


def wait():
    """Wait until the GPU has finished all work."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(work, rounds=10, warm=3):
    """Median milliseconds of work(), measured with GPU events if there is a GPU.

    The first `warm` calls are not counted.
    """
    if SMALL:
        rounds = 1
        warm = 0
    for _ in range(warm):
        work()
    wait()
    if CUDA:
        return statistics.median(_gpu_times(work, rounds))
    return statistics.median(_cpu_times(work, rounds))


def _cpu_times(work, rounds):
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - begin))
    return times


def _gpu_times(work, rounds):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    wait()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def reset_peak():
    """Start a new measurement of the peak memory. Returns the bytes in use now."""
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak():
    """The peak memory in bytes since reset_peak()."""
    if not CUDA:
        return 0
    return torch.cuda.max_memory_allocated()


def one_line(error):
    """A one-line description of an exception."""
    lines = str(error).strip().splitlines()
    message = ""
    if lines:
        message = lines[0][:160]
    return f"{type(error).__name__}: {message}"


def distance(a, b):
    """The norm of a - b, relative to the norm of b; NaN if a is not finite."""
    return float((a.double() - b.double()).norm() / b.double().norm())

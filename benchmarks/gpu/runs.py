"""Parts of the kit that run the repository's own commands, as a user would.

    shards    make the demo's data, for training and for validation
    demo      train the demo with train_gpu.py for some time, until a SIGTERM makes it save and stop
    draw      draw images with sample.py, using the bundled demo and the newly trained one
    score     score the newly trained demo (or else the bundled one) with evaluate.py shapes
    sample    run benchmarks/sample.py with 8 images and with 1
    exact     run benchmarks/train.py with its distances from float32
    large     run train_gpu.py for some steps on a 2B model with random weights, at each --zero, and
              from latents that prepare_data.py encode has written
"""
import argparse
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import summary

# torch is not imported here: in this process only "large" needs it.
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a large red circle above a small blue square", "three small green stars",
           "a big yellow star on a black background", "two purple squares and two yellow circles"]

LARGE = ["--preset", "fusedit/large-scale"]
TINY = ["benchmarks/gpu/tiny.py"]
TINY_FLAGS = ["--rounds", 1, "--no-compile", "--dtype", "float32", "--image-size", 16]


def start(*argv):
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT)


def run(*argv):
    """Run a program of the repository. Ends this process if it fails."""
    code = start(*argv).wait()
    if code:
        raise SystemExit(f"{argv[0]} failed with exit code {code}")


# ---------------------------------------------------------------------------- the demo
def shards(kit, _):
    """Make the demo's data. 80,000 images take 15 seconds on 16 cores."""
    if kit.SMALL:
        counts = dict(val=40, shards=200)
    else:
        counts = dict(val=512, shards=80_000)
    seeds = dict(val=7, shards=0)
    for folder, count in counts.items():
        tmp = kit.WORK / f"{folder}.tmp"
        run("prepare_data.py", "shapes", tmp, "-n", count, "--seed", seeds[folder], "--overwrite")
        tmp.rename(kit.WORK / folder)


def demo_flags(kit, out):
    """The flags of the documented command, with a batch size for a GPU."""
    flags = ["--preset", "demo", "--data", kit.WORK / "shards", "--val-data", kit.WORK / "val",
             "--out", out, "--lr", "2e-3", "--beta2", "0.99", "--ema-every", 5, "--compile"]
    if kit.SMALL:
        return [*flags, "--batch", 16, "--steps", 6, "--log-every", 1, "--save-every", 3,
                "--val-every", 3, "--sample-every", 3, "--val-samples", 16, "--sample-steps", 2,
                "--workers", 1]
    return [*flags, "--batch", 512, "--steps", 100_000, "--warmup-steps", 100, "--log-every", 25,
            "--save-every", 400, "--val-every", 400, "--sample-every", 400, "--val-samples", 512]


def demo(kit, args):
    """Train the demo. Fails if the loss does not fall."""
    out = kit.WORK / "demo"
    shutil.rmtree(out, ignore_errors=True)
    process = start("train_gpu.py", *demo_flags(kit, out))
    seconds = None
    if not kit.SMALL:
        seconds = min(args.seconds, kit.seconds_left() - 20)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()

    shutil.copy(out / "metrics.jsonl", kit.OUT / "demo.jsonl")
    logged = [row for row in summary.rows(out / "metrics.jsonl") if "loss" in row]
    second_half = logged[len(logged) // 2:]
    first_loss = logged[0]["loss"]
    last_loss = logged[-1]["loss"]
    kit.record("demo", steps=logged[-1]["step"], first_loss=first_loss, last_loss=last_loss,
               saved=(out / "latest").read_text().strip(),
               images_per_s=statistics.median(row["images_per_s"] for row in second_half),
               best_images_per_s=max(row["images_per_s"] for row in second_half),
               memory_gb=logged[-1]["memory_gb"])
    fell = kit.SMALL or last_loss <= 0.9 * first_loss      # SMALL has too few steps to tell
    if code or not math.isfinite(last_loss) or not fell:
        raise SystemExit(f"exit code {code}, loss {first_loss} to {last_loss}")


def newest_demo(kit):
    """The demo that was trained here, or the bundled one."""
    trained = kit.WORK / "demo"
    if (trained / "latest").exists():
        return trained
    return ROOT / "demo"


def draw(kit, _):
    shutil.rmtree(kit.WORK / "samples", ignore_errors=True)
    flags = []
    for prompt in PROMPTS:
        flags += ["--prompt", prompt]
    models = dict(bundled=ROOT / "demo", new=newest_demo(kit))
    if kit.SMALL:
        flags += ["--steps", 2]
        del models["bundled"]
    for name, model in models.items():
        out = kit.WORK / "samples" / name
        run("sample.py", "--model", model, "--num-images", 2, "--grid", "--out", out, *flags)
        shutil.copy(out / "grid.png", kit.OUT / "grid.png")
        images = len(list(out.glob("*.png"))) - 1          # one is the grid
        kit.record("draw", name=name, images=images)


def score(kit, _):
    out = kit.WORK / "score"
    shutil.rmtree(out, ignore_errors=True)
    size = ["-n", 300, "--batch-size", 150]
    if kit.SMALL:
        size = ["-n", 6, "--steps", 2]
    model = newest_demo(kit)
    run("evaluate.py", "shapes", "--model", model, "--out", out, *size)
    found = json.loads(next(out.glob("*/shapes.json")).read_text())
    found.pop("rows", None)
    kit.record("score", model=model.name, **found)


# ---------------------------------------------------------------------------- benchmarks
def sample(kit, _):
    program = ["benchmarks/sample.py", *LARGE, "--steps", 10, "--rounds", 2]
    batches = (8, 1)
    if kit.SMALL:
        program = [*TINY, "sample", *TINY_FLAGS, "--steps", 2]
        batches = (1,)
    found = {}
    for batch in batches:
        path = kit.WORK / f"sample-{batch}.json"
        run(*program, "--batch", batch, "--out", path)
        found[batch] = json.loads(path.read_text())
        (kit.OUT / "sample.json").write_text(json.dumps(found, indent=1) + "\n")


def exact(kit, _):
    """benchmarks/train.py with its distances from float32: the small model, and the 2B."""
    programs = {"31.5 M": ["benchmarks/train.py", "--batch", 32, "--rounds", 3],
                "2B": ["benchmarks/train.py", *LARGE, "--batch", 2, "--rounds", 1]}
    if kit.SMALL:
        programs = {"tiny": [*TINY, "train", *TINY_FLAGS, "--batch", 1]}
    for name, program in programs.items():
        path = kit.WORK / "exact.json"
        run(*program, "--out", path)
        kit.record("exact", name=name, exactness=json.loads(path.read_text())["exactness"])


# ---------------------------------------------------------------------------- the 2B model
class LargeRun(NamedTuple):
    name: str
    flags: list
    latents: bool = False                   # encode latents first, and train from them


def large_runs(kit, args):
    runs = []
    for stage in args.zero:
        runs.append(LargeRun(f"zero {stage}", ["--zero", stage, "--no-latents"]))
    runs.append(LargeRun("zero 1, latents", ["--latents"], latents=True))
    if not kit.SMALL:
        runs.append(LargeRun("zero 1, memory budget 0.7, micro-batch 12",
                             ["--no-latents", "--memory-budget", 0.7, "--micro-batch", 12,
                              "--batch", 24]))
    return runs


def large(kit, args):
    """Do all runs that there is time for. Fails if one finishes no step or a loss is not finite."""
    import random_model
    folder = kit.WORK / "random"
    random_model.make(folder)
    (kit.OUT / "large.jsonl").unlink(missing_ok=True)
    runs = large_runs(kit, args)
    failed = []
    for large_run in runs:
        if kit.seconds_left() < 45:
            print(f"{large_run.name}: no time left")
            continue
        if large_run.latents:
            encode(kit, folder)
        if train_some_steps(kit, folder, large_run):
            continue
        had_time = kit.seconds_left() > 0 or large_run is runs[0]
        if had_time:
            failed.append(large_run.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def encode(kit, folder):
    size = []
    if kit.SMALL:
        size = ["--image-size", 32]
    run("prepare_data.py", "encode", folder / "shards", "--vae", folder / "vae", "--compile",
        "--workers", 2, *size)


def large_flags(kit, folder, out, large_run):
    flags = ["--preset", "fusedit/large-scale", "--base", folder / "gemma", "--data",
             folder / "shards", "--out", out, "--steps", 1000, "--log-every", 1, "--save-every",
             100_000, "--sample-every", 0, "--compile"]
    changes = ["--set", f"vae={folder / 'vae'}"]
    sizes = ["--batch", 32, "--micro-batch", 8]
    if kit.SMALL:
        changes.append("image_size=32")
        sizes = ["--batch", 4, "--micro-batch", 2, "--workers", 1]
    return [*flags, *changes, *sizes, *large_run.flags]    # a flag given twice: the last one counts


def run_until_logged(kit, flags, out, enough):
    """Run train_gpu.py until it has logged some steps, then kill it, as a checkpoint takes 32 GB.

    Returns the logged rows, and the exit code, or None if it was still running.
    """
    process = start("train_gpu.py", *flags)
    rows = []
    while process.poll() is None and kit.seconds_left() > 0 and len(rows) < enough:
        time.sleep(0.3)
        rows = [row for row in summary.rows(out / "metrics.jsonl") if "loss" in row]
    code = process.poll()
    process.kill()
    process.wait()
    if kit.CUDA:
        # Its data workers notice within 5 seconds, and hold some GPU memory until then.
        time.sleep(6)
    return rows, code


def train_some_steps(kit, folder, large_run):
    """Train some steps of a run and record them. Returns True if nothing went wrong."""
    out = kit.WORK / "large"
    shutil.rmtree(out, ignore_errors=True)
    begin = time.monotonic()
    enough = 5
    if kit.SMALL:
        enough = 2
    flags = large_flags(kit, folder, out, large_run)
    rows, code = run_until_logged(kit, flags, out, enough)
    name = large_run.name
    seconds = time.monotonic() - begin
    with open(kit.OUT / "large.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(dict(row, name=name)) + "\n")
    if not rows:
        error = f"no step finished in {seconds:.0f} s; exit code {code}"
        print(f"{name}: {error}")
        kit.record("large", name=name, error=error)
        return False

    last = rows[-1]
    compiled = rows[1:] or rows             # the first step compiles
    losses = [row["loss"] for row in rows]
    row = dict(steps=len(rows), losses=losses, memory_gb=last["memory_gb"],
               images_per_s=statistics.median(row["images_per_s"] for row in compiled),
               utilisation=last.get("mfu", last.get("utilisation")), seconds=seconds)
    kit.record("large", name=name, **row)
    print(f"{name}: {row}", flush=True)
    finite = all(loss is not None and math.isfinite(loss) for loss in losses)
    return code is None and finite


def main():
    parts = dict(shards=shards, demo=demo, draw=draw, score=score, sample=sample, exact=exact,
                 large=large)
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=parts, help="the part to run")
    p.add_argument("--seconds", type=float, default=90, help="training time of the part demo")
    p.add_argument("--zero", nargs="+", default=["1"], help="ZeRO stages of the part large")
    args = p.parse_args()
    import kit
    parts[args.part](kit, args)


if __name__ == "__main__":
    main()

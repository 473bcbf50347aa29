"""Parts of the kit that run the repository's own commands, as a user would.

    shards    the demo's data, for training and for validation
    demo      train_gpu.py trains the demo until a time is over; SIGTERM ends it, and it saves
    draw      sample.py draws with the bundled demo and with the new one
    score     evaluate.py shapes scores the new demo, or the bundled one
    sample    benchmarks/sample.py at 8 pictures and at 1
    exact     benchmarks/train.py with its distances from float32
    large     train_gpu.py makes some steps of the 2B model with random weights, at each --zero, and
              of latents that prepare_data.py encode has written before
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

import summary

# Not yet torch, which only "large" needs in this process.
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a large red circle above a small blue square", "three small green stars",
           "a big yellow star on a black background", "two purple squares and two yellow circles"]

LARGE = ["--preset", "fusedit/large-scale"]
TINY = ["benchmarks/gpu/tiny.py"]
TINY_FLAGS = ["--rounds", 1, "--no-compile", "--dtype", "float32", "--image-size", 16]


def start(*argv):
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT)


def run(*argv):
    """Run a program of the repository; ends this process if it fails."""
    if code := start(*argv).wait():
        raise SystemExit(f"{argv[0]} has failed with exit code {code}")


def shards(kit, _):
    """80,000 pictures take 16 cores 15 seconds."""
    n, held_out = (200, 40) if kit.SMALL else (80_000, 512)
    for folder, count, seed in (("val", held_out, 7), ("shards", n, 0)):
        run("prepare_data.py", "shapes", kit.WORK / f"{folder}.tmp", "-n", count, "--seed", seed,
            "--overwrite")
        (kit.WORK / f"{folder}.tmp").rename(kit.WORK / folder)


def demo(kit, args):
    """The README's command, at a batch for a GPU; fails if the loss does not fall."""
    out = kit.WORK / "demo"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--preset", "demo", "--data", kit.WORK / "shards", "--val-data", kit.WORK / "val",
             "--out", out, "--lr", "2e-3", "--beta2", "0.99", "--ema-every", 5, "--compile"]
    if kit.SMALL:
        flags += ["--batch", 16, "--steps", 6, "--log-every", 1, "--save-every", 3, "--val-every",
                  3, "--sample-every", 3, "--val-samples", 16, "--sample-steps", 2, "--workers", 1]
    else:
        flags += ["--batch", 512, "--steps", 100_000, "--warmup-steps", 100, "--log-every", 25,
                  "--save-every", 400, "--val-every", 400, "--sample-every", 400,
                  "--val-samples", 512]
    process = start("train_gpu.py", *flags)
    try:
        code = process.wait(min(args.seconds, kit.seconds_left() - 20) if not kit.SMALL else None)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    rows = summary.rows(out / "metrics.jsonl")
    shutil.copy(out / "metrics.jsonl", kit.OUT / "demo.jsonl")
    logged, last = [r for r in rows if "loss" in r], (out / "latest").read_text().strip()
    first, end = logged[0]["loss"], logged[-1]["loss"]
    late = logged[len(logged) // 2:]
    kit.record("demo", steps=logged[-1]["step"], first_loss=first, last_loss=end, saved=last,
               images_per_s=statistics.median(r["images_per_s"] for r in late),
               best_images_per_s=max(r["images_per_s"] for r in late),
               memory_gb=logged[-1]["memory_gb"])
    if code or not math.isfinite(end) or not kit.SMALL and end > 0.9 * first:
        raise SystemExit(f"exit code {code}, loss {first} to {end}")


def newest(kit):
    """The demo that was just trained, or the bundled one."""
    own = kit.WORK / "demo"
    return own if (own / "latest").exists() else ROOT / "demo"


def draw(kit, _):
    shutil.rmtree(kit.WORK / "samples", ignore_errors=True)
    few = ["--steps", 2] if kit.SMALL else []
    models = dict(bundled=ROOT / "demo", new=newest(kit))
    if kit.SMALL:
        del models["bundled"]
    for name, model in models.items():
        out = kit.WORK / "samples" / name
        run("sample.py", "--model", model, "--num-images", 2, "--grid", "--out", out, *few,
            *(word for prompt in PROMPTS for word in ("--prompt", prompt)))
        shutil.copy(out / "grid.png", kit.OUT / "grid.png")
        kit.record("draw", name=name, pictures=len([*out.glob("*.png")]) - 1)


def score(kit, _):
    out, model = kit.WORK / "score", newest(kit)
    shutil.rmtree(out, ignore_errors=True)
    few = ["-n", 6, "--steps", 2] if kit.SMALL else ["-n", 300, "--batch-size", 150]
    run("evaluate.py", "shapes", "--model", model, "--out", out, *few)
    found = json.loads(next(out.glob("*/shapes.json")).read_text())
    kit.record("score", model=model.name, **{k: v for k, v in found.items() if k != "rows"})


def sample(kit, _):
    program, found = ["benchmarks/sample.py", *LARGE, "--steps", 10, "--rounds", 2], {}
    if kit.SMALL:
        program = [*TINY, "sample", *TINY_FLAGS, "--steps", 2]
    for n in (1,) if kit.SMALL else (8, 1):
        path = kit.WORK / f"sample-{n}.json"
        run(*program, "--batch", n, "--out", path)
        found[n] = json.loads(path.read_text())
        (kit.OUT / "sample.json").write_text(json.dumps(found, indent=1) + "\n")


def exact(kit, _):
    """benchmarks/train.py with its distances from float32: the small model, and the 2B."""
    ways = {"31.5 M": ["benchmarks/train.py", "--batch", 32, "--rounds", 3],
            "2B": ["benchmarks/train.py", *LARGE, "--batch", 2, "--rounds", 1]}
    if kit.SMALL:
        ways = {"tiny": [*TINY, "train", *TINY_FLAGS, "--batch", 1]}
    for name, program in ways.items():
        path = kit.WORK / "exact.json"
        run(*program, "--out", path)
        kit.record("exact", name=name, exactness=json.loads(path.read_text())["exactness"])


# ------------------------------------------------------------------------------ the 2B model


def large(kit, args):
    """All ways for which there is time; fails if one makes no step, or the loss is not finite."""
    import random_model
    folder, failed = kit.WORK / "random", []
    random_model.make(folder)
    (kit.OUT / "large.jsonl").unlink(missing_ok=True)
    ways = [(f"zero {stage}", ["--zero", stage, "--no-latents"]) for stage in args.zero]
    ways += [("zero 1, latents", ["--latents"])]
    if not kit.SMALL:
        ways += [("zero 1, memory budget 0.7, micro-batch 12", [
            "--no-latents", "--memory-budget", 0.7, "--micro-batch", 12, "--batch", 24])]
    for name, flags in ways:
        if kit.seconds_left() < 45:
            print(f"{name}: no time left")
            continue
        if "--latents" in flags:
            size = ["--image-size", 32] if kit.SMALL else []
            run("prepare_data.py", "encode", folder / "shards", "--vae", folder / "vae",
                "--compile", "--workers", 2, *size)
        good = steps(kit, folder, name, flags)
        if not good and (kit.seconds_left() > 0 or name == ways[0][0]):   # else it had no time
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def steps(kit, folder, name, more):
    """Some steps of a run, which is then killed: a checkpoint would be 32 GB. Was it right?"""
    out, begin, enough = kit.WORK / "large", time.monotonic(), 2 if kit.SMALL else 5
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--preset", "fusedit/large-scale", "--base", folder / "gemma", "--data",
             folder / "shards", "--out", out, "--steps", 1000, "--log-every", 1, "--save-every",
             100_000, "--sample-every", 0, "--compile", "--set", f"vae={folder / 'vae'}"]
    sizes = ["--batch", 32, "--micro-batch", 8]
    if kit.SMALL:
        flags += ["image_size=32"]          # the last flag is --set
        sizes = ["--batch", 4, "--micro-batch", 2, "--workers", 1]
    process = start("train_gpu.py", *flags, *sizes, *more)
    rows = []
    while process.poll() is None and kit.seconds_left() > 0 and len(rows) < enough:
        time.sleep(0.3)
        rows = [r for r in summary.rows(out / "metrics.jsonl") if "loss" in r]
    code = process.poll()
    process.kill()
    process.wait()
    if kit.CUDA:                            # its data processes see that within 5 seconds, and have
        time.sleep(6)                       # a share in the GPU's memory until then
    with open(kit.OUT / "large.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(dict(row, name=name)) + "\n")
    if not rows:
        error = f"no step was made in {time.monotonic() - begin:.0f} s; exit code {code}"
        print(f"{name}: {error}")
        kit.record("large", name=name, error=error)
        return False
    late = rows[1:] or rows                 # the first one compiles
    row = dict(steps=len(rows), losses=[r["loss"] for r in rows], memory_gb=rows[-1]["memory_gb"],
               images_per_s=statistics.median(r["images_per_s"] for r in late),
               utilisation=rows[-1].get("mfu", rows[-1].get("utilisation")),
               seconds=time.monotonic() - begin)
    kit.record("large", name=name, **row)
    print(f"{name}: {row}", flush=True)
    return code is None and all(x is not None and math.isfinite(x) for x in row["losses"])


def main():
    ways = dict(shards=shards, demo=demo, draw=draw, score=score, sample=sample, exact=exact,
                large=large)
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=ways)
    p.add_argument("--seconds", type=float, default=90, help="of the demo's training")
    p.add_argument("--zero", nargs="+", default=["1"], help="stages of large")
    args = p.parse_args()
    import kit
    ways[args.part](kit, args)


if __name__ == "__main__":
    main()

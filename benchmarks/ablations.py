"""Asks the paper's questions again in the world of coloured shapes, with seeds and intervals.

    python benchmarks/ablations.py runs/ablations --sweep-lr        choose the learning rates
    python benchmarks/ablations.py runs/ablations --images 100000 --seeds 0 1 2
    python benchmarks/ablations.py runs/ablations --report

Every design point (benchmarks/ablation_points.py) is trained once per seed: on the same number of
images, in the same order, with the same noise. Its images for the prompts of `evaluate.py shapes`
are scored by the same pixel detector. Each finished run is a line of OUT/runs.jsonl. The same
command resumes: it skips the runs that are there. --report draws a table and a figure of them.

A first try, of a few minutes on a CPU:

    python benchmarks/ablations.py runs/try --points baseline no-time --seeds 0 1 --images 640 \
        --prompts 60 --no-compile
"""
import argparse
import json
from pathlib import Path
from typing import NamedTuple

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import ablation_report
import torch
from ablation_points import BASELINE, POINTS, Point, check, choose, family
from ablation_readers import make_reader
from ablation_training import Execution, Settings, make_scenes, new_model, run_point, train
from filelock import FileLock

from fusedit import FuseDiTError
from fusedit_lib import backend, cli
from fusedit_lib.evaluation import results
from fusedit_lib.files import atomic_write, read_json, read_jsonl

RATES = (1e-3, 2e-3, 4e-3)                  # tried by --sweep-lr
DEFAULT_RATE = 2e-3                         # that of the demo, without --lr and --sweep-lr
SWEEP_IMAGES = 20_000


class Run(NamedTuple):
    """A design point with a seed."""
    name: str                               # of the point
    point: Point
    seed: int
    lr: float                               # learning rate


# ---------------------------------------------------------------------------- runs.jsonl
def read_runs(out):
    """The finished runs of an OUT, as a list of dicts."""
    path = out / "runs.jsonl"
    if not path.exists():
        return []
    return read_jsonl(path)


def append_run(out, row):
    """Add a finished run to OUT/runs.jsonl, which other processes may be writing, too."""
    path = out / "runs.jsonl"
    with FileLock(out / ".runs.lock"):
        runs = read_runs(out)
        if any((run["point"], run["seed"]) == (row["point"], row["seed"]) for run in runs):
            print("another process has finished this run in the meantime: its result is kept")
            return
        lines = [json.dumps(run) + "\n" for run in [*runs, row]]
        with atomic_write(path) as tmp:
            tmp.write_text("".join(lines))


def check_settings(rows, settings, out):
    """Raise FuseDiTError unless the rows, finished runs or sweeps of OUT, have these settings.

    settings: {name: value} of the settings that must agree.
    """
    for row in rows:
        for name, value in settings.items():
            if row[name] != value:
                flag = f"--{name.replace('_', '-')}"
                raise FuseDiTError(f"the runs in {out} have {flag} {row[name]}, not {value}: "
                                   f"give {flag} {row[name]}, or choose another OUT")


def finished(rows, run):
    """True if a Run is in the rows of runs.jsonl.

    Raises FuseDiTError if it was made with other fields, another reader or another rate.
    """
    for row in rows:
        if (row["point"], row["seed"]) != (run.name, run.seed):
            continue
        now = dict(changes=run.point.changes, reader=run.point.reader, lr=run.lr)
        for key, value in json.loads(json.dumps(now)).items():         # a tuple becomes a list
            if row[key] != value:
                raise FuseDiTError(
                    f"{run.name}, seed {run.seed} has already been trained with {key} {row[key]}, "
                    f"not {value}: choose another OUT, or delete its line from runs.jsonl to train "
                    "it again")
        return True
    return False


def compact(rows):
    """Score, categories and verdicts of a run, from the rows of its prompts.

    The verdicts are one digit per prompt, 1 if its image is right, in the order of
    scenes.evaluation_prompts.
    """
    result = results.summarise(rows)
    verdicts = "".join(str(row["right"]) for row in rows)
    return dict(score=result["overall"], categories=result["categories"], verdicts=verdicts)


# ---------------------------------------------------------------------------- learning rates
def read_rates(out):
    """{family: its sweep} from OUT/rates.json; empty if there was no --sweep-lr."""
    path = out / "rates.json"
    if not path.exists():
        return {}
    return read_json(path)


def sweep_settings(settings):
    """The Settings that sweeps and runs of an OUT must have in common, as a dict."""
    return {name: getattr(settings, name) for name in ("batch", "dtype", "reader_steps")}


def rate_of(point, rates, lr):
    """The learning rate of a point: --lr, or the best one of its family's sweep, or the demo's."""
    if lr is not None:
        return lr
    if family(point) in rates:
        return rates[family(point)]["best"]
    return DEFAULT_RATE


def write_rate(out, family_name, chosen):
    """Put the sweep of a family into OUT/rates.json, which other processes may be writing, too."""
    with FileLock(out / ".rates.lock"):
        rates = read_rates(out) | {family_name: chosen}
        with atomic_write(out / "rates.json") as tmp:
            tmp.write_text(json.dumps(rates, indent=1) + "\n")


def sweep(points, bases, scenes, settings, images, args):
    """Train the first point of each family at three rates; writes OUT/rates.json.

    The rate with the lowest loss at the end is chosen. A family that has been swept with the same
    point, number of images and seed is skipped.
    """
    shared = sweep_settings(settings)
    swept = set()
    for name, point in points.items():
        if family(point) in swept:
            continue
        swept.add(family(point))
        wanted = dict(point=name, images=images, seed=args.seeds[0])
        earlier = read_rates(args.out).get(family(point), {})
        if wanted.items() <= earlier.items():
            print(f"{family(point)}: swept already, best rate {earlier['best']:g}")
            continue
        losses = {}
        for lr in RATES:
            model = new_model(point, bases[point.reader], settings.dtype, args.seeds[0],
                              scenes.pixels.device)
            trained = train(model, scenes, settings, images, lr, args.seeds[0], args.execution)
            if args.execution.compile:
                torch.compiler.reset()
            losses[f"{lr:g}"] = trained.loss
            print(f"{family(point)}: {name} at {lr:g}: loss {trained.loss:.4f}", flush=True)
        finite = {lr: loss for lr, loss in losses.items() if loss < float("inf")}
        if not finite:
            raise FuseDiTError(f"{name} diverges at every rate of {', '.join(losses)}: lower RATES "
                               "in benchmarks/ablations.py")
        best = float(min(finite, key=finite.get))
        write_rate(args.out, family(point),
                   wanted | shared | dict(losses=losses, best=best))
    print(f"{args.out}/rates.json: runs use these rates from now on")


# ---------------------------------------------------------------------------- all runs
def missing_runs(points, args):
    """The Runs that runs.jsonl does not have. All points have a seed before any has the next."""
    rates = read_rates(args.out)
    runs = read_runs(args.out)
    missing = []
    for seed in args.seeds:
        for name, point in points.items():
            run = Run(name, point, seed, rate_of(point, rates, args.lr))
            if not finished(runs, run):
                missing.append(run)
    return missing


def train_all(missing, bases, scenes, settings, args):
    """Train and score the missing Runs."""
    for number, run in enumerate(missing, 1):
        title = f"{run.name}, seed {run.seed}"
        print(f"{title}: run {number} of {len(missing)}, learning rate {run.lr:g}", flush=True)
        folder = None
        if args.save_models:
            folder = args.out / "models" / f"{run.name}-seed-{run.seed}"
        measured = run_point(run.point, bases[run.point.reader], scenes, settings, run.lr,
                             run.seed, args.execution, folder)
        scored = compact(measured.pop("rows"))
        row = dict(point=run.name, seed=run.seed, **settings._asdict(), lr=run.lr,
                   **run.point._asdict(), **measured, **scored)
        append_run(args.out, row)
        print(f"{title}: loss {row['loss']:.4f}, score {row['score']:.3f}, "
              f"{row['images_per_s']:,.0f} images/s", flush=True)


def prepare(args, points, distinct, device):
    """The readers of the points, {name: folder}, and `distinct` Scenes. Raises FuseDiTError.

    Readers that OUT does not have yet are trained.
    """
    for name, point in points.items():                     # finds a wrong value before training
        try:
            check(point)
        except FuseDiTError as e:
            raise FuseDiTError(f"point {name}: {e}") from None
    bases = {}
    for point in points.values():
        if point.reader not in bases:
            bases[point.reader] = make_reader(point.reader, args.out, args.reader_steps, device)
    first = next(iter(points.values()))
    model = new_model(first, bases[first.reader], args.dtype, 0, device)
    kernel = backend.check_attention(model, None, device, backend.torch_dtype(args.dtype))
    if kernel:
        print(kernel)
    return bases, make_scenes(distinct, model, device)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter,
                                epilog=f"design points: {', '.join(POINTS)}")
    p.add_argument("out", type=Path, metavar="OUT", help="folder for runs.jsonl and the readers")
    group = p.add_argument_group("what to do")
    group.add_argument("--points", nargs="+", metavar="NAME", default=[],
                       help="design points to train (default: all; they are listed below)")
    group.add_argument("--seeds", nargs="+", type=cli.natural, metavar="N", default=[0, 1, 2],
                       help="seeds of the weights, the order of the images and the noise")
    group.add_argument("--sweep-lr", nargs="?", type=cli.positive, const=SWEEP_IMAGES, default=None,
                       metavar="IMAGES",
                       help="instead of the runs, train the first of the points of each family, "
                            f"for IMAGES images ({SWEEP_IMAGES:,}), at the learning rates "
                            f"{', '.join(f'{rate:g}' for rate in RATES)}; later runs use the best")
    group.add_argument("--report", action="store_true",
                       help="instead of training, write OUT/report.md and OUT/report.png, and "
                            "print the table")
    group.add_argument("--against", default=BASELINE, metavar="NAME",
                       help="with --report, the design point that the others are compared with")

    group = p.add_argument_group("training, the same for all runs in OUT")
    group.add_argument("--images", type=cli.positive, default=100_000, metavar="N",
                       help="number of images that each run is trained on, rounded down to whole "
                            "batches")
    group.add_argument("--batch", type=cli.positive, default=32, metavar="N",
                       help="number of images in a step")
    group.add_argument("--distinct", type=cli.positive, default=200_000, metavar="N",
                       help="number of different scenes; the images of a run are drawn from them")
    group.add_argument("--prompts", type=cli.positive, default=600, metavar="N",
                       help="number of prompts to score, those of `evaluate.py shapes -n N`")
    group.add_argument("--lr", type=float, metavar="RATE",
                       help=f"learning rate of all runs (default: that chosen by --sweep-lr, or "
                            f"{DEFAULT_RATE:g})")
    group.add_argument("--reader-steps", type=cli.positive, default=1200, metavar="N",
                       help="training steps of the readers that do not come with the repository; "
                            "the bundled one was trained for 1200")
    group.add_argument("--dtype", **cli.DTYPE,
                       help="precision; auto is bf16 where the device has it natively, otherwise "
                            "float32")
    group = p.add_argument_group("execution")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="compile the blocks of both towers, once per run (default: only on a "
                            "CPU, since on a GPU a CUDA graph makes the steps fast already)")
    group.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction,
                       help="record the training step as one CUDA graph (default: on a GPU)")
    group.add_argument("--save-models", action="store_true",
                       help="keep each model in OUT/models, for sample.py and evaluate.py")
    return p.parse_args()


def main():
    args = parse_args()
    args.out = args.out.resolve()
    if args.report:
        ablation_report.report(read_runs(args.out), read_rates(args.out), args.out, args.against)
        return
    points = choose(args.points)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.lr is not None and args.lr <= 0:
        raise FuseDiTError(f"--lr {args.lr:g} must be above 0")
    images = args.sweep_lr or args.images
    if images < args.batch:
        raise FuseDiTError(f"{images} images are less than a batch of {args.batch}: give more "
                           "--images or a smaller --batch")
    device, dtype = cli.pick_dtype(args)
    if device.index:
        torch.cuda.set_device(device)       # a CUDA graph records on the current device
    if args.compile is None:
        args.compile = device.type == "cpu"
    if args.compile:
        backend.check_compiler(device)
    if args.cuda_graph is None:
        args.cuda_graph = device.type == "cuda"
    if args.cuda_graph and device.type != "cuda":
        raise FuseDiTError("--cuda-graph needs a GPU")
    args.execution = Execution(args.compile, args.cuda_graph)
    torch.set_float32_matmul_precision("high")
    backend.configure(device, dtype)
    distinct = min(args.distinct, args.images)
    settings = Settings(args.images, args.batch, distinct, args.prompts, args.dtype,
                        args.reader_steps)
    rows = [*read_runs(args.out), *read_rates(args.out).values()]
    check_settings(rows, sweep_settings(settings), args.out)
    if not args.sweep_lr:
        check_settings(read_runs(args.out), settings._asdict(), args.out)
    args.out.mkdir(parents=True, exist_ok=True)

    if args.sweep_lr:
        bases, scenes = prepare(args, points, min(args.distinct, args.sweep_lr), device)
        sweep(points, bases, scenes, settings, args.sweep_lr, args)
        return
    missing = missing_runs(points, args)
    if missing:
        bases, scenes = prepare(args, points, distinct, device)
        train_all(missing, bases, scenes, settings, args)
    print(f"next: python benchmarks/ablations.py {args.out} --report")


if __name__ == "__main__":
    cli.run(main, "--batch")

"""Benchmarks: sample a model on fixed prompts, score the pictures, compare models.

    python evaluate.py shapes                                      # the demo, 600 prompts
    python evaluate.py shapes --guidance 1,2,3,6 --steps 10,25     # a sweep, with a figure
    torchrun --nproc-per-node 8 evaluate.py geneval --prompts evaluation_metadata.jsonl --model ...
    python evaluate.py fid --real photos --fake evaluation/mjhq-my-model/guidance-6-steps-25/images
    python evaluate.py report a=evaluation/shapes-a b=evaluation/shapes-b

What samples writes DIR/guidance-G-steps-S/: run.json, and images/ as the official scorer of the
benchmark wants it. The noise of a picture follows from the seed, the prompt's place and the
picture's number alone, and the same command goes on where a stopped one was.
"""
import argparse
import os
import random
import re
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

from PIL import Image
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib import backend, cli
from fusedit_lib.cli import Help, SPAN, announce, open_model, positive, run, uint32
from fusedit_lib.evaluation import figures, metrics, results
from fusedit_lib.evaluation.benchmarks import dpg, geneval, mjhq, shapes
from fusedit_lib.evaluation.drawing import begun_dtype, claim, paint
from fusedit_lib.evaluation.results import compare, dpg_score, geneval_score, report
from fusedit_lib.files import atomic_write
from fusedit_lib.pretrained import last_checkpoint
from fusedit_lib.shapes import detector, render, scenes

ROOT = Path(__file__).parent


# ---- drawing -------------------------------------------------------------------------------------

def evaluate(args):
    """Draw a benchmark at every --guidance and --steps; score what this file can score."""
    work = args.work(args)
    if not work.prompts:
        raise FuseDiTError(f"there is no prompt in {args.prompts}")
    sweep = len(args.steps) * len(args.guidance or [0]) > 1 and args.name == "shapes"
    if sweep:
        import matplotlib  # noqa: F401     says now, not after the drawing, that it is missing
    path = Path(last_checkpoint(args.model))
    name = "-".join(path.parts[-2:] if path.name.startswith("step-") else path.parts[-1:])
    top = args.out or Path("evaluation") / f"{args.name}-{name}"
    if args.dtype == "auto":
        args.dtype = begun_dtype(top)
    model, vae, device = open_model(args)
    if backend.rank_and_world()[0] == 0:
        announce(args, model, work.prompts)
    guidance = args.guidance if isinstance(args.guidance, list) else [args.guidance]
    span = [*args.guidance_span]
    during = "-span-{:g}-{:g}".format(*span) * (span != [0, 1])
    runs = [argparse.Namespace(**vars(args) | dict(
        guidance=g, steps=steps, out=top / f"guidance-{g:g}{during}-steps-{steps}"))
        for g in guidance for steps in args.steps]
    for one, settings in [(one, claim(one, work, model)) for one in runs]:
        if not paint(one, work, model, vae, device, settings):
            continue                        # the process that ends last goes on
        print(f"{len(work.prompts)} prompts, {work.images} of each: {one.out}/images")
        if args.name == "shapes":
            score_shapes(one, settings)
        else:
            to = dict(out=one.out.resolve(), size=settings["size"])
            print("next:", *(line.format(**to) for line in NEXT[args.name]), sep="\n    ")
    scores = [one.out / "shapes.json" for one in runs]
    if sweep and all(path.exists() for path in scores):
        name = "-".join(["sweep-guidance", *(f"{g:g}" for g in guidance), "steps"])
        figures.sweep([results.load(path) for path in scores],
                     top / f"{name}-{'-'.join(map(str, args.steps))}.png")


# ---- scoring -------------------------------------------------------------------------------------

def score_shapes(args, settings):
    """shapes.json and shapes.png, which follow from the pictures, and so may be written again."""
    rows, pictures = [], []
    for k, (category, said, prompt) in enumerate(scenes.evaluation_prompts(args.n, args.seed)):
        pictures.append(Image.open(args.out / "images" / f"{k:05}.png").convert("RGB"))
        why = detector.mismatch(said, detector.detect(pictures[-1]))
        rows.append(dict(category=category, prompt=prompt, right=int(not why), why=why))
    results.write(results.scored("shapes", rows, settings), args.out / "shapes.json", over=True)
    with atomic_write(args.out / "shapes.png") as tmp:
        figures.sheet(scenes.CATEGORIES, rows, pictures).save(tmp, "PNG")


def ground_truth(args):
    """The detector's own score: scenes of every kind, drawn exactly, must be read back whole."""
    wrong = 0
    for i in tqdm(range(args.n), unit="picture", desc="reading", disable=None):
        rng = random.Random(f"ground truth {args.seed} {i}")
        scene = scenes.random_scene(rng)
        picture = render.render(scene, scenes.layout(scene, rng))
        if why := detector.mismatch(scene, detector.detect(picture)):
            wrong += 1
            tqdm.write(f"wrong: {why}; drawn: {scenes.caption(scene, rng)}")
    print(f"detector: {args.n - wrong} of {args.n} ground-truth renders read back right "
          f"({1 - wrong / args.n:.2%})")


def fid(args):
    """Frechet and kernel distance between two folders of pictures."""
    device = backend.pick_device(args.device)
    label, prepare, network = metrics.extractor(args.features, device, args.inception)
    paths = [metrics.pictures(folder) for folder in (args.real, args.fake)]
    x, y = (metrics.features(some, prepare, network, device, args.batch_size, args.workers)
            for some in paths)
    distance, kid = metrics.frechet(x, y), metrics.kid(x, y)
    print(f"{label:<26}{distance:10.4f}   {len(x)} real, {len(y)} drawn: compare with as many\n"
          f"{'KID x 1000':<26}{1000 * kid:10.4f}   without bias, of any number")
    result = dict(benchmark="distance", label=label, distance=distance, kid=kid, real=len(x),
                  fake=len(y), folders=[str(args.real), str(args.fake)])
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    results.write(result, args.out or args.fake.parent / f"{name}.json")


# ---- the command line ----------------------------------------------------------------------------

NEXT = dict(  # the scorers of GenEval and ELLA are theirs: README says how to have them
    geneval=("python geneval/evaluation/evaluate_images.py {out}/images --outfile "
             "{out}/results.jsonl --model-path DETECTOR",
             "python evaluate.py geneval-score {out}/results.jsonl"),
    dpg=("(cd ELLA && PYTHONHASHSEED=0 accelerate launch dpg_bench/compute_dpg_bench.py "
         "--image-root-path {out}/images --resolution {size} --pic-num 4 --res-path {out}/dpg.txt)",
         "python evaluate.py dpg-score {out}/dpg.txt"),
    mjhq=("python evaluate.py fid --real REAL --fake {out}/images",))


def numbers(kind):
    """argparse's type of a list such as 2,4,6."""
    def parsed(text):
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    parsed.__name__ = f"list of {kind.__name__}"
    return parsed


def sampler(commands, name, work, about, prompts=None):
    """A benchmark that draws, and the flags that all of these share."""
    p = commands.add_parser(name, formatter_class=Help, help=about, description=work.__doc__)
    p.set_defaults(command=evaluate, name=name, work=work, negative="", gif=False, prompts=None)
    a = p.add_argument
    if prompts:
        a("--prompts", type=Path, required=True, metavar="PATH", help=prompts)
    a("--model", default=str(ROOT / "demo"), help="what sample.py takes")
    a("--seed", type=uint32, default=0, help="of the pictures' noise (and of shapes' prompts)")
    a("--steps", type=numbers(positive), default="25", help="Euler steps; a list is a sweep")
    a("--guidance", type=numbers(float), help="how strictly to follow the prompt, a list is a "
      "sweep; if not given, the model's own (6 in the paper)")
    a("--guidance-span", **SPAN, help="noise levels at which guidance is on; fewer: faster")
    a("--batch-size", type=positive, default=32, help="pictures drawn at once, at most")
    a("--out", type=Path, metavar="DIR", help="if not given, evaluation/BENCHMARK-MODEL")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; torchrun's GPUs by itself")
    a("--dtype", **cli.DTYPE, help="auto: bf16 where the device has it, else float32")
    a("--compile", action="store_true", help="compile the model: faster, after a minute")
    a("--no-ema", action="store_true", help="a checkpoint's raw, not averaged weights")
    return a


def score_commands(parsers):
    """geneval-score, dpg-score, compare and report, of evaluate.py."""
    def add(name, command, about):
        p = parsers.add_parser(name, formatter_class=Help, help=about, description=command.__doc__)
        p.set_defaults(command=command)
        return p.add_argument
    for name, command, file in (("geneval-score", geneval_score, "results.jsonl"),
                                ("dpg-score", dpg_score, "the file of its --res-path")):
        a = add(name, command, "the table, from the official scorer's file")
        a("results", type=Path, metavar="FILE", help=file)
        a("--out", type=Path, metavar="FILE", help="if not given, a JSON file beside it")
    a = add("compare", compare, "two models on the same prompts, with a paired test")
    a("a", type=Path, metavar="A.json")
    a("b", type=Path, metavar="B.json")
    a = add("report", report, "several models in one table and one figure")
    a("results", nargs="+", metavar="NAME=PATH", help="a result, or a folder of them; a run's "
      "folder gives its validation loss and speed. Equal NAMEs share a row")
    a("--out", type=Path, default=Path("report.md"), metavar="FILE.md", help="and FILE.png")


def arguments(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = top.add_subparsers(required=True, metavar="BENCHMARK")
    a = sampler(commands, "shapes", shapes, "coloured shapes, judged by an exact pixel detector")
    a("-n", type=positive, default=600, help="prompts, spread evenly over the categories")
    a("--ground-truth", action="store_const", const=ground_truth, dest="command", help="score the "
      "detector instead of a model: draw n scenes exactly and read them back")
    sampler(commands, "geneval", geneval, "objects, counts, colours, places: the official layout",
            "GenEval's prompts/evaluation_metadata.jsonl")
    sampler(commands, "dpg", dpg, "long prompts: the official layout",
            "ELLA's folder dpg_bench/prompts of .txt files")
    sampler(commands, "mjhq", mjhq, "30,000 pictures for FID", "MJHQ-30K's meta_data.json")
    p = commands.add_parser("fid", formatter_class=Help, help="distance of two folders of pictures",
                            description=metrics.__doc__)
    p.set_defaults(command=fid)
    a = p.add_argument
    a("--real", type=Path, required=True, metavar="DIR", help="pictures, also in folders below")
    a("--fake", type=Path, required=True, metavar="DIR", help="the drawn ones")
    a("--features", default="inception", metavar="NAME", help="inception (FID), efficientnet-lite0 "
      "(no download), or a vision model of transformers: a folder or a hub id")
    a("--inception", type=Path, default=Path.home() / ".cache/fusedit", metavar="DIR",
      help=f"folder of {metrics.INCEPTION}")
    a("--batch-size", type=positive, default=64, help="pictures at once")
    a("--workers", type=positive, default=os.cpu_count(), help="threads that read pictures")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    a("--out", type=Path, metavar="FILE", help="if not given, fid.json (or fd-NAME.json) beside "
      "the folder --fake")
    score_commands(commands)
    return top.parse_args(argv)


def main():
    args = arguments()
    args.command(args)


if __name__ == "__main__":
    run(main, "--batch-size")

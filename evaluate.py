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
import hashlib
import io
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import threads  # isort: skip (before torch)
import numpy as np
from PIL import Image
from tqdm import tqdm

import cli
import metrics
import report
from cli import SPAN, Help, announce, open_model, positive, run, uint32
from demo import detector, render, scenes
from fusedit import FuseDiTError
from sample import draw, notes
from weights import atomic_write, last_checkpoint

ROOT = Path(__file__).parent


# ---- what is drawn -------------------------------------------------------------------------------

class Work(NamedTuple):
    """A benchmark's prompts; of each, a file a picture, or one file for a grid of all."""
    prompts: list[str]
    files: list[list[str]]
    images: int = 1                         # of a prompt
    texts: dict[str, str] = {}              # more files, and what is in them


def geneval(args):
    """GenEval (arXiv 2310.11513): NUMBER/metadata.jsonl and NUMBER/samples/NUMBER.png."""
    rows = [line for line in read(args.prompts).splitlines() if line.strip()]
    for n, row in enumerate(rows, 1):
        found = parse(args.prompts, row, f"line {n}")
        if not all(isinstance(found.get(key), str) for key in ("tag", "prompt")):
            raise FuseDiTError(f"{args.prompts} line {n} has no tag or no prompt: is it GenEval's "
                               "prompts/evaluation_metadata.jsonl?")
    return Work([json.loads(row)["prompt"] for row in rows],
                [[f"{k:05}/samples/{i:04}.png" for i in range(4)] for k in range(len(rows))], 4,
                {f"{k:05}/metadata.jsonl": row + "\n" for k, row in enumerate(rows)})


def dpg(args):
    """DPG-Bench (arXiv 2403.05135): NAME.png of NAME.txt, four pictures in two rows."""
    texts = {path.stem: read(path).strip() for path in sorted(args.prompts.glob("*.txt"))}
    return Work(list(texts.values()), [[f"{name}.png"] for name in texts], 4)


def mjhq(args):
    """MJHQ-30K (arXiv 2402.17245): CATEGORY/NAME.jpg, as the folder of real ones is."""
    rows = parse(args.prompts, read(args.prompts), "the file")
    bad = [name for name, row in rows.items() if not isinstance(row, dict)
           or not all(isinstance(row.get(key), str) for key in ("category", "prompt"))
           or not re.fullmatch(r"[^./\\][^/\\]*/[^./\\][^/\\]*", f"{row['category']}/{name}")]
    if bad:
        raise FuseDiTError(f"{args.prompts}: {bad[0]} has no category or prompt, or no plain name: "
                           "is it MJHQ-30K's meta_data.json?")
    return Work([row["prompt"] for row in rows.values()],
                [[f"{row['category']}/{name}.jpg"] for name, row in rows.items()])


def shapes(args):
    """Held-out scenes of the demo's world, in GenEval's categories (demo/scenes.py). A picture is
    right if it holds exactly the objects that the prompt names, as it names them, and no other."""
    prompts = scenes.evaluation_prompts(args.n, args.seed)
    return Work([p for *_, p in prompts], [[f"{k:05}.png"] for k in range(len(prompts))])


def read(path):
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FuseDiTError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def parse(path, text, where):
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FuseDiTError(f"{path}: {where} is no JSON of the form {{...}}")
    return found


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
    if cli.rank_and_world()[0] == 0:
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
    results = [one.out / "shapes.json" for one in runs]
    if sweep and all(path.exists() for path in results):
        name = "-".join(["sweep-guidance", *(f"{g:g}" for g in guidance), "steps"])
        report.sweep([report.load(path) for path in results],
                     top / f"{name}-{'-'.join(map(str, args.steps))}.png")


def begun_dtype(top):
    """--dtype of the pictures that are there already, which may be another machine's, or auto."""
    for path in top.glob("*/run.json"):
        return cli.dtype(parse(path, read(path), "the file").get("dtype", "auto"))
    return "auto"


def identity(model):
    """A short name of a model's weights: of some 64 values of every tensor, to the bit."""
    whole = hashlib.sha256()
    for name, tensor in model.named_parameters():
        some = tensor.detach().flatten()[::max(1, tensor.numel() // 64)].float().cpu()
        whole.update(name.encode() + some.numpy().tobytes())
    return whole.hexdigest()[:16]


def claim(args, work, model):
    """The settings, written to OUT/run.json, or found there the same; raises FuseDiTError."""
    prompts = hashlib.sha256(json.dumps([work.prompts, work.files]).encode()).hexdigest()[:16]
    said = dict(benchmark=args.name, model=args.model, weights=identity(model), prompts=prompts,
                images=work.images, size=model.config.image_size, seed=args.seed, steps=args.steps,
                guidance=args.guidance, dtype=str(next(model.dit.parameters()).dtype)[6:])
    if [*args.guidance_span] != [0, 1]:
        said |= dict(guidance_span=args.guidance_span)
    path = args.out / "run.json"            # looked for last: another process may just write it
    taken = args.out.exists() and any(p.name[0] != "." for p in args.out.iterdir())
    if path.exists():
        before = parse(path, read(path), "the file")
        other = [f"{k} {before.get(k)}, now {v}" for k, v in said.items()
                 if k != "model" and before.get(k) != v]           # it may have moved
        if other:
            raise FuseDiTError(f"{args.out} holds pictures drawn otherwise ({'; '.join(other)}): "
                               "give another --out, or delete it")
        return before
    if taken:
        raise FuseDiTError(f"{args.out} is not empty and has no run.json: give another --out")
    write(path, (json.dumps(said, indent=1) + "\n").encode())
    return said


def picture_seed(seed, prompt, image):
    """The seed of a picture's noise, which sample.py --seed takes, too."""
    return int(np.random.SeedSequence((seed, prompt, image)).generate_state(1)[0])


def paint(args, work, model, vae, device, settings):
    """Draw what is missing in OUT/images of this process's share; is all there now, by its doing?

    A batch is always of the same pictures, whoever draws it and whatever of it is there, since sums
    of other batches may differ in their last bit, and a picture then by a level. So of a batch that
    was cut short all is drawn again; the files that are there stay.
    """
    rank, world = cli.rank_and_world()
    paths = [[args.out / "images" / file for file in files] for files in work.files]
    each, size = max(1, args.batch_size // work.images), args.batch_size
    share = [range(len(paths))[i:i + each] for i in range(0, len(paths), each)][rank::world]
    clean({path for group in share for k in group for path in paths[k]} | set(
        () if rank else [args.out / "run.json", *(args.out / "images" / f for f in work.texts)]),
        args.out)
    for name, text in work.texts.items() if rank == 0 else ():
        if not (args.out / "images" / name).exists():
            write(args.out / "images" / name, text.encode())
    batches, done = [], 0
    for group in share:
        places = [(k, i) for k in group for i in range(work.images)]
        for part in [places[at:at + size] for at in range(0, len(places), size)]:
            if all(paths[k][i % len(paths[k])].exists() for k, i in part):
                done += len(part)
            else:
                batches.append(part)
    jobs = [[(work.prompts[k], picture_seed(args.seed, k, i)) for k, i in part] for part in batches]
    side, begin = model.config.image_size // (vae.factor if vae else 1), time.monotonic()
    drawn = draw(jobs, model, vae, (side, side), args, device, done, quiet=rank > 0)
    places = [place for part in batches for place in part]
    with ThreadPoolExecutor(4) as pool:     # a PNG takes as long as some steps of a GPU
        saved, row, seeds = [], [], []      # the last two: of a grid, so far
        for (k, i), (prompt, seed, picture, _) in zip(places, drawn, strict=True):
            saved = [job for job in saved if not job.done() or job.result()]   # raises its error
            if len(paths[k]) == work.images:
                saved.append(pool.submit(save, picture, paths[k][i], notes(prompt, seed, args)))
                continue
            row, seeds = [*row, picture], [*seeds, str(seed)]
            if len(row) == work.images:
                info = notes(prompt, " ".join(seeds), args)
                saved.append(pool.submit(save, two_rows(row), paths[k][0], info))
                row, seeds = [], []
        for job in saved:
            job.result()
    if batches and not done and world == 1:                # else it is no speed of the whole
        speed = round(sum(map(len, batches)) / (time.monotonic() - begin), 3)
        settings |= dict(images_per_s=speed, device=str(device))
        write(args.out / "run.json", (json.dumps(settings, indent=1) + "\n").encode())
    return bool(batches or rank == 0) and all(path.exists() for part in paths for path in part)


def clean(paths, out):
    """Delete what a killed run had half written of these."""
    for half in out.rglob(".*.tmp"):
        if half.with_name(half.name[1:].rsplit(".", 2)[0]) in paths:
            half.unlink()


def two_rows(pictures):
    """Four pictures on one, in reading order, as DPG-Bench's scorer cuts them out again."""
    w, h = pictures[0].size
    page = Image.new("RGB", (2 * w, 2 * h))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % 2 * w, i // 2 * h))
    return page


def save(picture, path, info):
    """As a PNG with its notes, or a JPEG that loses little; a file that is there is left alone."""
    if not path.exists():
        data, png = io.BytesIO(), path.suffix == ".png"
        picture.save(data, **dict(format="PNG", pnginfo=info) if png else dict(
            format="JPEG", quality=95, subsampling=0))
        write(path, data.getvalue())


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        tmp.write_bytes(data)


# ---- scoring -------------------------------------------------------------------------------------

def score_shapes(args, settings):
    """shapes.json and shapes.png, which follow from the pictures, and so may be written again."""
    rows, pictures = [], []
    for k, (category, said, prompt) in enumerate(scenes.evaluation_prompts(args.n, args.seed)):
        pictures.append(Image.open(args.out / "images" / f"{k:05}.png").convert("RGB"))
        why = detector.verdict(said, detector.read(pictures[-1]))
        rows.append(dict(category=category, prompt=prompt, right=int(not why), why=why))
    report.write(report.scored("shapes", rows, settings), args.out / "shapes.json", over=True)
    with atomic_write(args.out / "shapes.png") as tmp:
        report.sheet(scenes.CATEGORIES, rows, pictures).save(tmp, "PNG")


def ground_truth(args):
    """The detector's own score: scenes of every kind, drawn exactly, must be read back whole."""
    wrong = 0
    for i in tqdm(range(args.n), unit="picture", desc="reading", disable=None):
        rng = random.Random(f"ground truth {args.seed} {i}")
        scene = scenes.draw_scene(rng)
        picture = render.render(scene, scenes.place(scene, rng))
        if why := detector.verdict(scene, detector.read(picture)):
            wrong += 1
            tqdm.write(f"wrong: {why}; drawn: {scenes.caption(scene, rng)}")
    print(f"detector: {args.n - wrong} of {args.n} ground-truth renders read back right "
          f"({1 - wrong / args.n:.2%})")


def fid(args):
    """Frechet and kernel distance between two folders of pictures."""
    device = cli.pick_device(args.device)
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
    report.write(result, args.out or args.fake.parent / f"{name}.json")


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
    report.commands(commands)
    return top.parse_args(argv)


def main():
    args = arguments()
    args.command(args)


if __name__ == "__main__":
    run(main, "--batch-size")

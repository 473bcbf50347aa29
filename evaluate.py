"""Benchmarks: sample a model on a fixed set of prompts and score the pictures.

    python evaluate.py shapes                          # the demo, 600 prompts
    python evaluate.py shapes --model runs/demo --guidance 4 --out evaluation/g4
    python evaluate.py shapes --ground-truth -n 2000   # the detector on true renders

Each benchmark writes NAME.json (scores, settings, every verdict) and NAME.png (a sheet of
pictures with pass and fail marks) to --out, and prints a table.
"""
import argparse
import json
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cli import Help, open_model, positive, run, uint32
from demo import detector, render, scenes
from sample import draw, warn
from weights import atomic_write, untaken

PASS, FAIL = (20, 150, 60), (205, 30, 40)
CELL, LABEL = 132, 40                                      # of the sheet, in pixels


# ---- shapes: GenEval's categories on the demo's world --------------------------------------------

def shapes(args) -> None:
    """Held-out prompts by category; a picture is right if it holds what was said and no more."""
    prompts = scenes.evaluation_prompts(args.n, args.seed)
    results, pictures = [], []
    for (category, said, prompt), picture in zip(prompts, paint(args, [p for *_, p in prompts]),
                                                 strict=True):
        why = detector.verdict(said, detector.read(picture))
        results.append(dict(category=category, prompt=prompt, right=not why, why=why))
        pictures.append(picture)
    finish(args, "shapes", scenes.CATEGORIES, results, pictures)


def ground_truth(args) -> None:
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


# ---- what every benchmark needs ------------------------------------------------------------------

def paint(args, prompts: list[str]):
    """A picture of every prompt, in order; prompt k is drawn with seed --seed + k."""
    model, vae, device = open_model(args)
    args.out.mkdir(parents=True, exist_ok=True)            # fails now rather than after the drawing
    warn(model, prompts)
    jobs = [(prompt, args.seed + k) for k, prompt in enumerate(prompts)]
    side = model.config.image_size // (vae.factor if vae else 1)
    for _, _, picture, _ in draw(jobs, model, vae, (side, side), args, device):
        yield picture


def finish(args, name: str, categories, results: list[dict], pictures: list) -> None:
    """Scores by category and overall (their mean, as in GenEval): table, JSON, sheet."""
    rights = {c: [r["right"] for r in results if r["category"] == c] for c in categories}
    scores = {c: sum(r) / len(r) for c, r in rights.items() if r}
    overall = sum(scores.values()) / len(scores)
    settings = {k: getattr(args, k) for k in ("model", "n", "seed", "steps", "guidance")}
    text = json.dumps(dict(benchmark=name, overall=overall, categories=scores, settings=settings,
                           prompts=results), indent=1)
    path = untaken(args.out / f"{name}.json", ".png")
    with atomic_write(path) as tmp:
        tmp.write_text(text + "\n")
    with atomic_write(path.with_suffix(".png")) as tmp:
        sheet(categories, results, pictures).save(tmp, "PNG")
    for category, score in scores.items():
        print(f"{category:<16}{score:6.3f}   {sum(rights[category])} of {len(rights[category])}")
    print(f"{'overall':<16}{overall:6.3f}   the mean of the categories")
    print(f"wrote {path} and {path.with_suffix('.png').name}")


def sheet(categories, results: list[dict], pictures: list, columns: int = 10) -> Image.Image:
    """The first pictures of every category, a row each; a frame and a mark say right or wrong."""
    page = Image.new("RGB", (columns * CELL, len(categories) * (CELL + LABEL)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for row, category in enumerate(categories):
        shown = [(r, p) for r, p in zip(results, pictures) if r["category"] == category]
        for column, (result, picture) in enumerate(shown[:columns]):
            x, y = column * CELL, row * (CELL + LABEL)
            colour, side = PASS if result["right"] else FAIL, CELL - 8
            pen.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), fill=colour)
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 4))
            mark(pen, x + CELL - 16, y + 4, result["right"], colour)
            pen.text((x + 3, y + CELL), textwrap.fill(result["prompt"], 24, max_lines=3),
                     "black", font, spacing=1)
    return page


def mark(pen: ImageDraw.ImageDraw, x: int, y: int, right: bool, colour) -> None:
    pen.rectangle((x - 1, y, x + 11, y + 12), fill=colour)
    strokes = [((1, 6), (4, 10), (10, 2))] if right else [((2, 2), (9, 10)), ((9, 2), (2, 10))]
    for stroke in strokes:
        pen.line([(x + a, y + b) for a, b in stroke], "white", 2)


# ---- the command line ----------------------------------------------------------------------------

def arguments(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = top.add_subparsers(required=True, metavar="BENCHMARK")
    p = commands.add_parser(
        "shapes", formatter_class=Help, help="coloured shapes, judged by an exact pixel detector",
        description="Sample prompts in GenEval's categories, held out of training where they can "
        "be (demo/scenes.py): " + ", ".join(scenes.CATEGORIES) + ". A picture is right if it holds "
        "exactly the objects the prompt names, as it names them, and no other.",
        epilog="example:\n  python evaluate.py shapes --model runs/demo -n 600 --out evaluation")
    a = p.add_argument
    p.set_defaults(command=shapes, negative="", gif=False)
    a("--model", default=str(Path(__file__).parent / "demo"), help="what sample.py takes")
    a("-n", type=positive, default=600, help="prompts, spread evenly over the categories")
    a("--seed", type=uint32, default=0, help="of the prompts and of their noise")
    a("--steps", type=positive, default=25, help="Euler steps")
    a("--guidance", type=float, help="how strictly to follow the prompt; if not given, the "
      "model's own")
    a("--batch-size", type=positive, default=32, help="pictures drawn at once")
    a("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder for the results")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    a("--dtype", choices=["float32", "bfloat16"], help="unless given, bfloat16 on a GPU only")
    a("--no-ema", action="store_true", help="a checkpoint's raw, not averaged weights")
    a("--ground-truth", action="store_true", help="score the detector instead of a model: draw "
      "n scenes exactly and read them back")
    return top.parse_args(argv)


def main():
    args = arguments()
    if args.ground_truth:
        args.command = ground_truth
    args.command(args)


if __name__ == "__main__":
    run(main, "--batch-size")

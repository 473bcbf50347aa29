"""A new shape for the demo: draw captioned images of moons, and score a model's moons.

    python examples/finetune_demo.py images moons                   # moons/000.png, moons/000.txt
    python examples/finetune_demo.py score --model runs/moons       # 120 prompts

The demo has never seen a moon, and its tokenizer does not know the word. docs/finetuning.md
teaches it the shape from a folder of 500 images, as one would use a folder of one's own.
"""
import argparse
import random
from pathlib import Path
from typing import NamedTuple

from fusedit_lib import threads
threads.limit_spinning()                    # before torch is imported

from PIL import Image

from fusedit import FuseDiTError
from fusedit_lib import cli, sampling
from fusedit_lib.evaluation import figures, results
from fusedit_lib.shapes import detector, render, scenes
from fusedit_lib.shapes.scenes import Scene

SHAPES = (*scenes.SHAPES, "moon")           # that the detector tells apart
KINDS = ("single", "counting", "two", "position")          # of scenes; see scenes.random_scene
IMAGES = 500
PROMPTS = 120


# ---- scenes with moons ---------------------------------------------------------------------------

class Sample(NamedTuple):
    kind: str                               # one of KINDS
    image: Image.Image                      # 32 x 32
    description: Scene                      # the scene that the caption describes
    caption: str


def moon_sample(split: str, i: int) -> Sample:
    """Sample number i of a split, "training" or "evaluation". All kinds are equally frequent."""
    rng = random.Random(f"moons {split} {i}")
    kind = KINDS[i % len(KINDS)]
    scene = moon_scene(rng, kind)
    image = render.render(scene, scenes.layout(scene, rng))
    description = scenes.omit_defaults(scene, rng)
    return Sample(kind, image, description, scenes.caption(description, rng))


def moon_scene(rng: random.Random, kind: str) -> Scene:
    """A random full scene in which one group's objects are moons.

    The others form no composition that is held out of the demo's training.
    """
    while True:
        scene = scenes.random_scene(rng, kind)
        groups = list(scene.groups)
        moons = groups.pop(rng.randrange(len(groups)))._replace(shape="moon")
        if not scenes.is_held_out(scene._replace(groups=tuple(groups))):
            groups.insert(rng.randint(0, len(groups)), moons)
            return scene._replace(groups=tuple(groups))


def evaluation_samples(n: int) -> list[Sample]:
    """n samples whose captions, the prompts of the score, are not among those of the images."""
    seen = {moon_sample("training", i).caption for i in range(IMAGES)}
    samples = (moon_sample("evaluation", i) for i in range(4 * n))
    return [sample for sample in samples if sample.caption not in seen][:n]


# ---- commands ------------------------------------------------------------------------------------

def images_command(args):
    """Draw a folder of images with captions: KEY.png and KEY.txt."""
    if args.out.exists():
        raise FuseDiTError(f"{args.out} exists: choose another folder, or remove it")
    args.out.mkdir(parents=True)
    for i in range(args.n):
        sample = moon_sample("training", i)
        sample.image.save(args.out / f"{i:03}.png")
        (args.out / f"{i:03}.txt").write_text(sample.caption + "\n")
    print(f"wrote {args.n} images with captions to {args.out}")


def score_command(args):
    """Draw an image for each prompt, and print the share that shows exactly what it describes."""
    loaded = cli.open_model(args.model, args.device, args.dtype, not args.no_ema, args.compile)
    samples = evaluation_samples(args.n)
    prompts = [sample.caption for sample in samples]
    cli.announce(loaded, prompts)
    images = []
    for seeds in sampling.batches_of(range(len(prompts)), 32):
        batch = [prompts[seed] for seed in seeds]
        images += sampling.generate(loaded.model, batch, seeds)

    rows = []
    for sample, image in zip(samples, images, strict=True):
        mistake = detector.mismatch(sample.description, detector.detect(image, SHAPES))
        rows.append(dict(category=sample.kind, prompt=sample.caption, right=int(not mistake),
                         why=mistake))
    results.print_result(results.make_result("moons", rows, dict(model=loaded.path)))
    if args.grid:
        figures.verdict_grid(KINDS, rows, images).save(args.grid)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    commands = parser.add_subparsers(required=True)

    images = commands.add_parser("images", help="draw images with captions",
                                 formatter_class=cli.HelpFormatter)
    images.add_argument("out", type=Path, help="folder for the images")
    images.add_argument("-n", type=cli.positive, default=IMAGES, help="number of images")
    images.set_defaults(command=images_command)

    score = commands.add_parser("score", help="score a model's moons",
                                formatter_class=cli.HelpFormatter)
    score.add_argument("-n", type=cli.positive, default=PROMPTS, help="number of prompts")
    score.add_argument("--grid", type=Path, help="PNG file for some of the images, with verdicts")
    cli.add_model_flags(score)
    score.set_defaults(command=score_command)
    return parser


def main():
    args = make_parser().parse_args()
    args.command(args)


if __name__ == "__main__":
    cli.run(main, "")

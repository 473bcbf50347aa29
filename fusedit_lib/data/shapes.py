"""Shapes: the demo's data set, rendered images of coloured shapes with generated captions."""
import random
from functools import partial
from typing import NamedTuple

from PIL import Image

from fusedit_lib.data import packing
from fusedit_lib.data.images import encode_png
from fusedit_lib.data.items import in_chunks, output_settings
from fusedit_lib.shapes import render, scenes


class CaptionedScene(NamedTuple):
    image: Image.Image
    captions: list[str]                     # two, each of which omits different details


def captioned_scene(seed: int, image_size: int, i: int) -> CaptionedScene:
    """Scene number i of a seed, drawn with a side of image_size pixels.

    It depends only on the arguments, so any process can draw it.
    """
    rng = random.Random(f"shapes {seed} {i}")
    scene = scenes.training_scene(rng)
    discs = scenes.layout(scene, rng)
    image = render.render(scene, discs, image_size)
    captions = []
    for _ in range(2):
        captions.append(scenes.caption(scenes.omit_defaults(scene, rng), rng))
    return CaptionedScene(image, captions)


def shapes_sample(seed: int, image_size: int, i: int) -> dict:
    """Sample number i of a seed: captioned_scene as the files of a shard."""
    image, captions = captioned_scene(seed, image_size, i)
    return {"__key__": f"{i:09d}", "image.png": encode_png(image),
            "synthetic_caption.txt": captions[0].encode(),
            "original_caption.txt": captions[1].encode()}


def shapes(args):
    """Run `prepare_data.py shapes`."""
    if packing.begin(args, **output_settings(args)):
        jobs = in_chunks(range(args.n), args.shard_size)
        make = partial(shapes_sample, args.seed, args.image_size)
        packing.pack(args, "shapes", jobs, make, total=args.n)

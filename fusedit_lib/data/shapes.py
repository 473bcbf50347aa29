"""TODO."""
import random
from functools import partial

from fusedit_lib.data import packing
from fusedit_lib.data.images import png
from fusedit_lib.data.items import cut, said

# ---- shapes --------------------------------------------------------------------------------------

def shapes_sample(seed: int, image_size: int, i: int) -> dict:
    """Picture number i of a seed, whoever draws it: two phrasings of what may be said of it."""
    from fusedit_lib.shapes import render, scenes
    rng = random.Random(f"shapes {seed} {i}")
    scene = scenes.training_scene(rng)
    picture = render.render(scene, scenes.layout(scene, rng), image_size)
    captions = [scenes.caption(scenes.omit_defaults(scene, rng), rng) for _ in range(2)]
    return {"__key__": f"{i:09d}", "image.png": png(picture),
            "synthetic_caption.txt": captions[0].encode(),
            "original_caption.txt": captions[1].encode()}


def shapes(args):
    if packing.begin(args, **said(args)):
        packing.pack(args, "shapes", cut(range(args.n), args.shard_size),
                     partial(shapes_sample, args.seed, args.image_size), total=args.n)

"""Scores the scorer of the emoji benchmark: which emoji it takes changed real images for."""
import io
import random

import numpy as np
import torch
from PIL import Image, ImageFilter

from fusedit_lib.evaluation import emoji

IMAGES = 200                                # per change, unless -n is given


# ---- changes -------------------------------------------------------------------------------------

def at_resolution(image, divisor):
    """A square PIL image, downscaled by the divisor and upscaled again."""
    side = image.width
    small = image.resize((side // divisor, side // divisor), Image.Resampling.BICUBIC)
    return small.resize((side, side), Image.Resampling.BICUBIC)


def shift(image):
    """The image, moved by a sixteenth to the right and down."""
    moved = Image.new("RGB", image.size, "white")
    moved.paste(image, (image.width // 16, image.width // 16))
    return moved


def shrink_and_blur(image):
    """The image at 85 % of its size, in the centre, blurred."""
    side = round(0.85 * image.width)
    margin = (image.width - side) // 2
    smaller = Image.new("RGB", image.size, "white")
    smaller.paste(image.resize((side, side), Image.Resampling.BICUBIC), (margin, margin))
    return smaller.filter(ImageFilter.GaussianBlur(image.width / 64))


def jpeg(image):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=20)
    return Image.open(data).convert("RGB")


def noisy(image):
    """The image with Gaussian noise, a tenth of the range of values."""
    noise = np.random.default_rng(0).normal(0, 25, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


CHANGES = {
    "half resolution": lambda image: at_resolution(image, 2),
    "a quarter": lambda image: at_resolution(image, 4),
    "shifted": shift,
    "smaller, blurred": shrink_and_blur,
    "JPEG, quality 20": jpeg,
    "noise": noisy,
}


def changed(pixels, change):
    """Apply a change of PIL images to an image, uint8 [3,H,W]."""
    image = change(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- scores --------------------------------------------------------------------------------------

def score(gallery, n, seed):
    """Print how often n changed real images are taken for themselves.

    The last lines ask for an emoji in one style and show the real image of the other style, which
    only has the meaning in common. Its style is therefore always wrong.
    """
    numbers = random.Random(f"emoji scorer {seed}").sample(
        range(len(gallery.images)), min(n, len(gallery.images)))
    prompts = []
    drawn = []
    for name, change in CHANGES.items():
        for number in numbers:
            prompts.append(emoji.pair_prompt(gallery.images[number], name))
            drawn.append(changed(gallery.pixels[number], change))
    for number in numbers:
        image = gallery.images[number]
        for style in gallery.of_style:
            if style != image.style and image.concept in gallery.of_style[style]:
                category = f"as {emoji.STYLES[style]}"
                prompts.append(emoji.pair_prompt(image, category)._replace(style=style))
                drawn.append(gallery.pixels[number])
    verdicts = emoji.judge(prompts, drawn, gallery)
    emoji.print_result(emoji.make_result(verdicts, {}))

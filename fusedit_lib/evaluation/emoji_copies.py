"""Copies of training images: how near drawn emoji are to the images that a model was trained on.

Distances are root mean squares of the differences of pixels, from 0 to 255. A drawn image is a near
copy of its nearest training image if its distance to it is less than NEAR_COPY times the distance
from there to the nearest training image of another concept.
"""
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

from fusedit_lib.data.emoji_captions import STYLES
from fusedit_lib.evaluation.emoji_gallery import held_out_categories
from fusedit_lib.files import atomic_write

NEAR_COPY = 0.5
SHOWN = 10                                  # images of each category in the figure
COLUMNS = 3                                 # of the figure, each with four images
CELL = 100                                  # pixels: side of an image in the figure
GAP = 24                                    # pixels between columns
LABEL = 44                                  # pixels: height of the text below an image


# ---- distances -----------------------------------------------------------------------------------

def distances(a, b):
    """Root mean squares [n,m] of the differences between pixels a [n,D] and b [m,D]."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist") / a.shape[1] ** 0.5


def flat_pixels(images):
    """float32 [n,D] from uint8 images [3,H,W]."""
    return torch.stack(list(images)).flatten(1).float()


def copy_ratios(drawn, gallery):
    """For each image, uint8 [3,H,W], its distance to the nearest training image in units of the
    distance from there to the nearest training image of another concept."""
    numbers = [k for k, image in enumerate(gallery.images) if image.part == "train"]
    training = flat_pixels(gallery.pixels[k] for k in numbers)
    to_training, nearest = distances(flat_pixels(drawn), training).min(1)

    # Each concept as an integer, to compare them all at once.
    concepts = {image.concept: number for number, image in enumerate(gallery.images)}
    concepts = torch.tensor([concepts[gallery.images[k].concept] for k in numbers])
    found, place = nearest.unique(return_inverse=True)
    between = distances(training[found], training)
    same = concepts[found][:, None] == concepts
    spacing = between.masked_fill(same, torch.inf).min(1).values
    return (to_training / spacing[place].clamp(min=1e-3)).tolist()


def add_ratios(rows, drawn, gallery):
    """Add the copy ratio of its image, uint8 [3,H,W], to each row."""
    for row, ratio in zip(rows, copy_ratios(drawn, gallery), strict=True):
        row["copy_ratio"] = round(ratio, 4)


def print_copies(rows, gallery):
    """Print the share of near copies in each category of the rows, and among real images."""
    ratios = {}
    for row in rows:
        ratios.setdefault(row["category"], []).append(row["copy_ratio"])
    for category, numbers in held_out_categories(gallery.images).items():
        if numbers:
            real = [gallery.pixels[number] for number in numbers]
            ratios[f"real, {category}"] = copy_ratios(real, gallery)
    print("near copies of training images:")
    for name, values in ratios.items():
        copies = sum(value < NEAR_COPY for value in values)
        median = sorted(values)[len(values) // 2]
        print(f"{name:<18}{copies / len(values):6.3f}   {copies} of {len(values)}, median ratio "
              f"{median:.2f}")


# ---- the figure ----------------------------------------------------------------------------------

def draw_nearest(rows, drawn, gallery, path):
    """Draw images beside their three nearest training images; a frame marks near copies."""
    shown = []
    for category in dict.fromkeys(row["category"] for row in rows):
        some = [k for k, row in enumerate(rows) if row["category"] == category]
        shown += some[:SHOWN]
    lines = -(-len(shown) // COLUMNS)
    width = COLUMNS * (4 * CELL + GAP)
    grid = Image.new("RGB", (width, lines * (CELL + LABEL)), "white")
    pen = ImageDraw.Draw(grid)
    for place, k in enumerate(shown):
        column, line = divmod(place, lines)
        x = column * (4 * CELL + GAP)
        y = line * (CELL + LABEL)
        draw_image(grid, pen, x, y, drawn[k], rows[k]["prompt"])
        if rows[k]["copy_ratio"] < NEAR_COPY:
            pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="red", width=2)
        for number in rows[k]["training"]:
            x += CELL
            image = gallery.images[number]
            text = f"{image.label} ({STYLES[image.style]})"
            draw_image(grid, pen, x, y, gallery.pixels[number], text)
    with atomic_write(path) as tmp:
        grid.save(tmp, "PNG")
    print(path)


def draw_image(grid, pen, x, y, pixels, text):
    """Draw one image, uint8 [3,H,W], with a text below; x, y: its upper-left corner."""
    side = CELL - 8
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    grid.paste(image.resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 4))
    text = textwrap.fill(text, 17, max_lines=3, placeholder="...")
    pen.text((x + 4, y + CELL), text, "black", ImageFont.load_default(10), spacing=1)

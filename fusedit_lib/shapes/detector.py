"""Pixels as a scene again, and whether they are what a caption says.

No learning: the background is the colour of most of the border; what differs from it falls into
connected components; each takes the nearest named colour of its interior, and the shape whose
silhouette, scaled to the same area, overlaps it best. Exact on rendered scenes, and tolerant of
the soft edges, tints and specks of a model's drawing.
"""
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fusedit_lib.shapes.render import draw_shape
from fusedit_lib.shapes.scenes import COLOURS, SHAPES, SIDE, Disc, Scene, stands

PALETTE = np.array(list(COLOURS.values()), np.float32)     # [colours, 3]
NAMES = tuple(COLOURS)
S = int(SIDE)                                              # every picture is judged at 64 x 64
UNLIKE = 45.0          # RGB distance from the background at which a pixel is something else
MIN_AREA = 16          # pixels; a speck below it is ignored (the smallest shape has about 90)
MIN_OVERLAP = 0.6      # intersection over union with the best silhouette, or it is no shape
MIN_SHARE = 0.6        # of an object's interior in one colour, or it has no colour
LARGE = 10.6           # radius from which an object is large
TEMPLATE = 128         # side of a silhouette; its disc of radius 1 is inscribed


class Seen(NamedTuple):
    """One object found; "?" where it has no clear shape or colour."""
    shape: str
    colour: str
    size: str
    disc: Disc
    overlap: float


class Reading(NamedTuple):
    objects: tuple[Seen, ...]
    background: str


def silhouettes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Filled outlines [shapes, 128, 128], their areas for radius 1, their centroids [shapes, 2]."""
    masks = []
    for shape in SHAPES:
        image = Image.new("L", (TEMPLATE, TEMPLATE))
        middle = SIDE / 2
        draw_shape(ImageDraw.Draw(image), shape, Disc(middle, middle, middle), TEMPLATE / SIDE, 1)
        masks.append(np.asarray(image, bool))
    masks = np.stack(masks)
    half = TEMPLATE / 2
    grid = (np.arange(TEMPLATE) + 0.5) / half - 1          # unit coordinates of the pixels
    areas = masks.sum((1, 2))
    centroids = np.stack([masks.sum(1) @ grid, masks.sum(2) @ grid], 1) / areas[:, None]
    return masks, areas / half ** 2, centroids


MASKS, AREAS, CENTROIDS = silhouettes()


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask [64, 64], as masks, specks left out."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:                                            # each pixel takes its region's largest
        wide = np.pad(labels, 1)
        spread = np.maximum.reduce([labels, wide[:-2, 1:-1], wide[2:, 1:-1],
                                    wide[1:-1, :-2], wide[1:-1, 2:]]) * mask
        if (spread == labels).all():
            break
        labels = spread
    found, counts = np.unique(labels[mask], return_counts=True)
    return [labels == label for label, n in zip(found, counts) if n >= MIN_AREA]


def grow(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 1)
    return (mask | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:])


def nearest(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of every pixel [..., 3]."""
    return ((pixels[..., None, :] - PALETTE) ** 2).sum(-1).argmin(-1)


def read(image: Image.Image) -> Reading:
    """Everything the detector sees in a picture."""
    if image.size != (S, S):
        image = image.resize((S, S), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.convert("RGB"), np.float32)  # [64, 64, 3]
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])
    votes = nearest(border)
    ground = np.bincount(votes, minlength=len(NAMES)).argmax()
    tint = np.median(border[votes == ground], axis=0)      # as it was really painted
    away = np.linalg.norm(pixels - tint, axis=-1)          # [64, 64]
    regions = components(away > UNLIKE)
    objects = tuple(look(pixels, region, tint, away) for region in regions)
    return Reading(objects, NAMES[ground])


def look(pixels: np.ndarray, region: np.ndarray, tint: np.ndarray, away: np.ndarray) -> Seen:
    """Colour, shape and size of one connected region."""
    interior = ~grow(~region)
    if interior.sum() < 30:                                # small or thin: what stands out most
        interior = region & (away >= np.quantile(away[region], 0.7))
    votes = np.bincount(nearest(pixels[interior]), minlength=len(NAMES))
    colour = NAMES[votes.argmax()] if votes.max() >= MIN_SHARE * votes.sum() else "?"
    paint = np.median(pixels[interior], axis=0) - tint     # how much of each pixel is painted
    cover = ((pixels - tint) @ paint / max(float(paint @ paint), 1.0)).clip(0, 1) * grow(region)
    shape, disc, overlap = silhouette(cover)
    return Seen(shape, colour, "large" if disc.r >= LARGE else "small", disc, overlap)


def silhouette(cover: np.ndarray) -> tuple[str, Disc, float]:
    """The shape that best overlaps a coverage map [64, 64] in [0, 1]: name, disc, overlap."""
    area = cover.sum()
    centres = np.arange(S) + 0.5
    cx, cy = cover.sum(0) @ centres / area, cover.sum(1) @ centres / area
    best = ("?", Disc(float(cx), float(cy), float(np.sqrt(area / 2))), 0.0)
    for k, shape in enumerate(SHAPES):
        for stretch in (0.94, 1.0, 1.06):
            r = np.sqrt(area / AREAS[k]) * stretch
            x, y = cx - CENTROIDS[k, 0] * r, cy - CENTROIDS[k, 1] * r
            painted = sampled(MASKS[k], (centres - x) / r, (centres - y) / r)
            overlap = np.minimum(painted, cover).sum() / np.maximum(painted, cover).sum()
            if overlap > best[2]:
                best = (shape, Disc(float(x), float(y), float(r)), float(overlap))
    return best if best[2] >= MIN_OVERLAP else ("?", *best[1:])


def sampled(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A silhouette at unit coordinates x [W], y [H]; nothing outside it."""
    columns, rows = (np.floor((v + 1) * TEMPLATE / 2).astype(int) for v in (x, y))
    inside = ((rows >= 0) & (rows < TEMPLATE))[:, None] & ((columns >= 0) & (columns < TEMPLATE))
    return mask[rows.clip(0, TEMPLATE - 1)[:, None], columns.clip(0, TEMPLATE - 1)] * inside


# ---- is it what was asked for --------------------------------------------------------------------

def verdict(said: Scene, reading: Reading) -> str:
    """"" if the picture holds what was said and nothing else; otherwise the first thing wrong."""
    wanted = [g for g in said.groups for _ in range(g.count)]
    if len(reading.objects) != len(wanted):
        return f"{len(reading.objects)} objects, not {len(wanted)}"
    if said.background and reading.background != said.background:
        return f"background {reading.background}, not {said.background}"
    matches = [order for order in permutations(reading.objects)
               if all(seen.shape == g.shape and g.colour in (None, seen.colour)
                      and g.size in (None, seen.size) for g, seen in zip(wanted, order))]
    if not matches:
        return "saw " + ", ".join(sorted(f"{o.size} {o.colour} {o.shape}"
                                         for o in reading.objects))
    if said.relation and not any(stands(said.relation, a.disc, b.disc) for a, b in matches):
        return f"not {said.relation}"
    return ""

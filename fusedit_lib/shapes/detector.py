"""Recovers the scene from an image, and compares it with the description in the caption.

Nothing is learned. The background is the most frequent colour of the border. Pixels that differ
from it form connected regions. Each region is an object: its colour is the nearest named colour of
its interior, and its shape is the one whose silhouette, scaled to the same area, overlaps it best.
This method is exact on rendered scenes, and it tolerates the soft edges, tints and specks of
generated images.
"""
import functools
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fusedit_lib.shapes.render import draw_shape
from fusedit_lib.shapes.scenes import (
    COLOURS,
    SHAPES,
    SIDE,
    Disc,
    Group,
    Scene,
    relation_holds,
)

COLOUR_NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()), np.float32)     # [colours, 3]
PIXELS = int(SIDE)                      # images are resized to 64 x 64
FOREGROUND_DISTANCE = 45.0              # RGB distance of foreground pixels from the background
MIN_AREA = 16                           # pixels; smaller regions are specks, not objects
MIN_INTERIOR = 30                       # pixels; below this, a region's strongest colours are used
MIN_OVERLAP = 0.6                       # intersection over union with the best silhouette
MIN_COLOUR_SHARE = 0.6                  # of the interior's pixels that have the same nearest colour
LARGE_RADIUS = 10.6                     # objects of this radius or more are large
TEMPLATE = 128                          # side of a silhouette; its inscribed disc has radius 1
RADIUS_FACTORS = (0.94, 1.0, 1.06)      # tried on the radius estimated from the area
UNKNOWN = "?"


class DetectedObject(NamedTuple):
    shape: str                          # "?" if no silhouette overlaps the object well enough
    colour: str                         # "?" if the object has no single colour
    size: str
    disc: Disc
    overlap: float                      # with the best silhouette, from 0 to 1


class Detection(NamedTuple):
    objects: tuple[DetectedObject, ...]
    background: str


class Silhouette(NamedTuple):
    """A filled shape, cut off at the square from -1 to 1."""
    shape: str
    mask: np.ndarray                    # [128, 128], bool
    area: float                         # of the shape with radius 1
    x: float                            # centroid
    y: float


class Fit(NamedTuple):
    """The silhouette that overlaps a region best."""
    shape: str
    disc: Disc
    overlap: float


# ---------------------------------------------------------------------------- from image to scene
def detect(image: Image.Image, shapes: tuple[str, ...] = SHAPES) -> Detection:
    """The objects and the background of an image of any size. shapes: those to tell apart."""
    if image.size != (PIXELS, PIXELS):
        image = image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.convert("RGB"), np.float32)                # [64, 64, 3]

    # the background: the most frequent colour of the border, with its exact tint in this image
    border = _border(pixels)
    names = nearest_colours(border)
    background = np.bincount(names, minlength=len(COLOUR_NAMES)).argmax()
    tint = np.median(border[names == background], axis=0)

    distance = np.linalg.norm(pixels - tint, axis=-1)                    # [64, 64]
    regions = connected_regions(distance > FOREGROUND_DISTANCE)
    objects = [detect_object(pixels, region, tint, distance, shapes) for region in regions]
    return Detection(tuple(objects), COLOUR_NAMES[background])


def _border(pixels):
    """The pixels [n, 3] of the border, which is two pixels wide."""
    top = pixels[:2].reshape(-1, 3)
    bottom = pixels[-2:].reshape(-1, 3)
    left = pixels[2:-2, :2].reshape(-1, 3)
    right = pixels[2:-2, -2:].reshape(-1, 3)
    return np.concatenate([top, bottom, left, right])


def nearest_colours(pixels: np.ndarray) -> np.ndarray:
    """Index [...] of the nearest colour of PALETTE for pixels [..., 3]."""
    distances = ((pixels[..., None, :] - PALETTE) ** 2).sum(-1)
    return distances.argmin(-1)


def _neighbours(x):
    """The image x [64, 64] shifted by one pixel in all four directions and padded with zeros."""
    padded = np.pad(x, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def connected_regions(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask [64, 64], each as a mask, without specks."""
    # Every pixel starts with a unique label and repeatedly takes the largest of its neighbours'
    # labels, until all pixels of a region have the same label.
    labels = np.arange(1, mask.size + 1).reshape(mask.shape)
    labels = np.where(mask, labels, 0)
    while True:
        largest = np.maximum.reduce([labels, *_neighbours(labels)])
        largest = np.where(mask, largest, 0)
        if (largest == labels).all():
            break
        labels = largest

    values, areas = np.unique(labels[mask], return_counts=True)
    return [labels == value for value, area in zip(values, areas, strict=True) if area >= MIN_AREA]


def dilate(mask: np.ndarray) -> np.ndarray:
    """The mask extended by all adjacent pixels."""
    return np.logical_or.reduce([mask, *_neighbours(mask)])


def detect_object(pixels: np.ndarray, region: np.ndarray, tint: np.ndarray,
                  distance: np.ndarray, shapes: tuple[str, ...] = SHAPES) -> DetectedObject:
    """Determine the colour, shape and size of one region.

    pixels: the image [64, 64, 3]. region: bool [64, 64]. tint: the background's colour [3].
    distance: of every pixel from the tint [64, 64].
    """
    # colour: of the interior or, in a small or thin region, of the pixels that differ most
    interior = ~dilate(~region)
    if interior.sum() < MIN_INTERIOR:
        interior = region & (distance >= np.quantile(distance[region], 0.7))
    counts = np.bincount(nearest_colours(pixels[interior]), minlength=len(COLOUR_NAMES))
    colour = UNKNOWN
    if counts.max() >= MIN_COLOUR_SHARE * counts.sum():
        colour = COLOUR_NAMES[counts.argmax()]

    # coverage: the share of each pixel that belongs to the object, from its mix of both colours
    direction = np.median(pixels[interior], axis=0) - tint
    length = max(float(direction @ direction), 1.0)
    coverage = ((pixels - tint) @ direction / length).clip(0, 1)
    coverage = np.where(dilate(region), coverage, 0)

    fit = best_silhouette(coverage, shapes)
    size = "small"
    if fit.disc.r >= LARGE_RADIUS:
        size = "large"
    return DetectedObject(fit.shape, colour, size, fit.disc, fit.overlap)


# ---------------------------------------------------------------------------- shapes
@functools.cache
def silhouettes(shapes: tuple[str, ...] = SHAPES) -> tuple[Silhouette, ...]:
    """The silhouettes of the shapes, in their order."""
    half = TEMPLATE / 2
    centre = SIDE / 2
    coordinates = (np.arange(TEMPLATE) + 0.5) / half - 1                 # of the pixel centres
    found = []
    for shape in shapes:
        image = Image.new("L", (TEMPLATE, TEMPLATE))
        disc = Disc(centre, centre, centre)
        draw_shape(ImageDraw.Draw(image), shape, disc, TEMPLATE / SIDE, 1)
        mask = np.asarray(image, bool)
        area = mask.sum()
        x = mask.sum(0) @ coordinates / area
        y = mask.sum(1) @ coordinates / area
        found.append(Silhouette(shape, mask, area / half ** 2, x, y))
    return tuple(found)


def best_silhouette(coverage: np.ndarray, shapes: tuple[str, ...] = SHAPES) -> Fit:
    """The silhouette that best overlaps a coverage map [64, 64] with values from 0 to 1."""
    centres = np.arange(PIXELS) + 0.5
    area = coverage.sum()
    centroid_x = coverage.sum(0) @ centres / area
    centroid_y = coverage.sum(1) @ centres / area
    disc = Disc(float(centroid_x), float(centroid_y), float(np.sqrt(area / 2)))
    best = Fit(UNKNOWN, disc, 0.0)
    for silhouette in silhouettes(shapes):
        for factor in RADIUS_FACTORS:
            r = np.sqrt(area / silhouette.area) * factor
            x = centroid_x - silhouette.x * r
            y = centroid_y - silhouette.y * r
            covered = sample_mask(silhouette.mask, (centres - x) / r, (centres - y) / r)
            intersection = np.minimum(covered, coverage).sum()
            union = np.maximum(covered, coverage).sum()
            overlap = intersection / union
            if overlap > best.overlap:
                disc = Disc(float(x), float(y), float(r))
                best = Fit(silhouette.shape, disc, float(overlap))
    if best.overlap < MIN_OVERLAP:
        return best._replace(shape=UNKNOWN)
    return best


def sample_mask(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values [H, W] of a silhouette's mask at coordinates x [W] and y [H]; False outside it."""
    columns = np.floor((x + 1) * TEMPLATE / 2).astype(int)
    rows = np.floor((y + 1) * TEMPLATE / 2).astype(int)
    columns_inside = (columns >= 0) & (columns < TEMPLATE)
    rows_inside = (rows >= 0) & (rows < TEMPLATE)
    values = mask[rows.clip(0, TEMPLATE - 1)[:, None], columns.clip(0, TEMPLATE - 1)]
    return values & rows_inside[:, None] & columns_inside


# ---------------------------------------------------------------------------- against a caption
def mismatch(description: Scene, detection: Detection) -> str:
    """The first difference between an image and its caption; "" if there is none.

    The image has to contain everything that the caption describes and nothing else.
    """
    wanted = [group for group in description.groups for _ in range(group.count)]
    objects = detection.objects
    if len(objects) != len(wanted):
        return f"{len(objects)} objects, not {len(wanted)}"
    if description.background not in (None, detection.background):
        return f"background {detection.background}, not {description.background}"

    # all ways to assign the detected objects to the described ones
    assignments = [order for order in permutations(objects) if _all_match(wanted, order)]
    if not assignments:
        names = sorted(f"{o.size} {o.colour} {o.shape}" for o in objects)
        return "detected " + ", ".join(names)
    if description.relation:
        if not any(relation_holds(description.relation, a.disc, b.disc) for a, b in assignments):
            return f"not {description.relation}"
    return ""


def _all_match(wanted, objects):
    return all(_matches(group, o) for group, o in zip(wanted, objects, strict=True))


def _matches(group: Group, detected: DetectedObject):
    """True if a detected object agrees with everything that is mentioned about a group."""
    if detected.shape != group.shape:
        return False
    if group.colour not in (None, detected.colour):
        return False
    return group.size in (None, detected.size)

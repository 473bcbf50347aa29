"""Draws scenes: flat shapes on a flat background, anti-aliased by drawing at 4 times the size."""
import math

from PIL import Image, ImageDraw

from fusedit_lib.shapes.scenes import COLOURS, SIDE, Disc, Scene

SUPERSAMPLE = 4


def _star_outline(outer=1.04, inner=0.47, points=5):
    outline = []
    for k in range(2 * points):
        radius = inner
        if k % 2 == 0:
            radius = outer
        angle = math.pi * (k / points - 0.5)
        outline.append((radius * math.cos(angle), radius * math.sin(angle) + 0.06))
    return outline


def _heart_outline(steps=48):
    outline = []
    for k in range(steps):
        a = 2 * math.pi * k / steps
        x = 0.95 * math.sin(a) ** 3
        height = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        outline.append((x, 0.08 - height / 16.5))
    return outline


def _cross_outline(long=0.93, wide=0.34):
    corners = [(wide, -long), (wide, -wide), (long, -wide)]
    outline = []
    for _ in range(4):
        outline += corners
        corners = [(-y, x) for x, y in corners]            # a quarter turn
    return outline


def _moon_outline(outer=0.98, inner=0.66, right=0.54, steps=24):
    """A crescent: a circle without the part that a smaller one, moved to the right, covers."""
    x = (right ** 2 + outer ** 2 - inner ** 2) / (2 * right)     # where the two circles meet
    start = math.acos(x / outer)
    end = math.acos((x - right) / inner)
    outline = []
    for k in range(steps + 1):                                   # the outer arc, round the left
        a = start + (2 * math.pi - 2 * start) * k / steps
        outline.append((outer * math.cos(a) + 0.1, outer * math.sin(a)))
    for k in range(1, steps):                                    # and back along the inner one
        a = 2 * math.pi - end - (2 * math.pi - 2 * end) * k / steps
        outline.append((inner * math.cos(a) + right + 0.1, inner * math.sin(a)))
    return outline


# Polygons around (0, 0), about the size of a disc of radius 1; y points down. The moon is not one
# of the demo's shapes: examples/finetune_demo.py teaches it.
OUTLINES = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -0.9), (0.98, 0.75), (-0.98, 0.75)],
    "star": _star_outline(),
    "heart": _heart_outline(),
    "cross": _cross_outline(),
    "moon": _moon_outline(),
}
CIRCLE_RADIUS = 0.92                    # in the same units; a circle is drawn as an ellipse


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, disc: Disc, scale: float, fill) -> None:
    """Draw a shape into its disc. scale: pixels per unit of the disc (1/64 of the image's side)."""
    r = disc.r * scale
    x = disc.x * scale - 0.5                               # Pillow puts pixel centres at integers
    y = disc.y * scale - 0.5
    if shape == "circle":
        radius = CIRCLE_RADIUS * r
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    else:
        draw.polygon([(x + px * r, y + py * r) for px, py in OUTLINES[shape]], fill)


def render(scene: Scene, discs: list[Disc], image_size: int = 32) -> Image.Image:
    """Draw a full scene whose objects are at `discs` (see scenes.layout)."""
    side = image_size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), COLOURS[scene.background])
    draw = ImageDraw.Draw(image)
    objects = [group for group in scene.groups for _ in range(group.count)]
    for group, disc in zip(objects, discs, strict=True):
        draw_shape(draw, group.shape, disc, side / SIDE, COLOURS[group.colour])
    return image.reduce(SUPERSAMPLE)

"""A scene as pixels: flat shapes on a flat ground, drawn four times too large and averaged down."""
import math

from PIL import Image, ImageDraw

from fusedit_lib.shapes.scenes import COLOURS, SIDE, Disc, Scene

SUPERSAMPLE = 4


def _star(outer=1.04, inner=0.47, points=5):
    radii = [outer, inner] * points
    turns = [math.pi * (k / points - 0.5) for k in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a) + 0.06) for r, a in zip(radii, turns)]


def _heart(steps=48):
    curve = [2 * math.pi * k / steps for k in range(steps)]
    return [(0.95 * math.sin(a) ** 3, 0.08 - (13 * math.cos(a) - 5 * math.cos(2 * a)
             - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16.5) for a in curve]


def _cross(long=0.93, wide=0.34):
    quarter = [(wide, -long), (wide, -wide), (long, -wide)]
    return [p for k in range(4) for x, y in quarter
            for p in [((x, y), (-y, x), (-x, -y), (y, -x))[k]]]


OUTLINES = {  # polygons about (0, 0) inside a disc of radius 1, y down; the circle is an ellipse
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -0.9), (0.98, 0.75), (-0.98, 0.75)],
    "star": _star(), "heart": _heart(), "cross": _cross(),
}
CIRCLE = 0.92                                              # its radius, likewise


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, disc: Disc, scale: float, fill) -> None:
    """One shape in its disc (1/64 picture), `scale` pixels to the unit."""
    x, y, r = (v * scale for v in disc)
    x, y = x - 0.5, y - 0.5                                # Pillow counts from pixel centres
    if shape == "circle":
        draw.ellipse((x - CIRCLE * r, y - CIRCLE * r, x + CIRCLE * r, y + CIRCLE * r), fill)
    else:
        draw.polygon([(x + px * r, y + py * r) for px, py in OUTLINES[shape]], fill)


def render(scene: Scene, discs: list[Disc], image_size: int = 32) -> Image.Image:
    """The picture of a full scene whose objects stand in `discs`."""
    side = image_size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), COLOURS[scene.background])
    draw = ImageDraw.Draw(image)
    drawn = [g for g in scene.groups for _ in range(g.count)]
    for group, disc in zip(drawn, discs, strict=True):
        draw_shape(draw, group.shape, disc, side / SIDE, COLOURS[group.colour])
    return image.reduce(SUPERSAMPLE)

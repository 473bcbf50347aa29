"""Image files of every mode and format that Pillow can write, and others, with their pixels.

The expected pixels are computed here from the numbers that a file stores, without Pillow's
conversions.
"""
import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from fusedit_lib.data import images

SIDE = 16                                   # of the images: the tiny model's, so none is resized

# The four quadrants of an image have these colours, grey levels and alphas.
COLOURS = np.array([
    (200, 30, 40),
    (20, 180, 60),
    (30, 60, 220),
    (240, 230, 10),
], np.uint8)
GREYS = np.array([10, 80, 160, 250], np.uint8)
ALPHAS = np.array([255, 128, 0, 64], np.uint8)
CLEAR = np.array([0, 255, 255, 255])        # alphas of an image whose first quadrant is transparent
WIDE_GREYS = np.array([2760, 20480, 41215, 65535], np.uint16)


# ---- pixels and what they should become ----------------------------------------------------------

def quadrants(values):
    """[4,...] values of the quadrants -> [16,16,...] pixels."""
    rows = values.reshape(2, 2, *values.shape[1:])
    return rows.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)


def on_white(colours, alphas=ALPHAS):
    """Colours [4,3] with their alphas [4] on a white background."""
    share = alphas[:, None] / 255
    return np.rint(colours * share + 255 * (1 - share))


def grey_colours(greys):
    return np.repeat(greys[:, None], 3, 1)


def inks():
    """CMYK [4,4] of COLOURS, with some black ink, and the colours [4,3] that these inks give."""
    black = np.array([0, 51, 102, 0])
    cmy = 255 - COLOURS.astype(int)
    colours = (255 - cmy) * (255 - black[:, None]) / 255
    return np.concatenate([cmy, black[:, None]], 1).astype(np.uint8), colours


def ycbcr():
    """YCbCr [4,3] of COLOURS, by the formula of JFIF."""
    r, g, b = COLOURS.T.astype(float)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb = 128 + (b - y) / 1.772
    cr = 128 + (r - y) / 1.402
    return np.rint(np.stack([y, cb, cr], 1)).clip(0, 255).astype(np.uint8)


def palette_image(mode="P"):
    pixels = quadrants(np.arange(4, dtype=np.uint8))
    image = Image.fromarray(pixels)
    image.putpalette(COLOURS.tobytes())
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(quadrants(ALPHAS)))
    return image


def with_alpha(colours):
    return np.concatenate([colours, ALPHAS[:, None]], 1)


def premultiplied(colours):
    return with_alpha(np.rint(colours * (ALPHAS[:, None] / 255)).astype(np.uint8))


def from_bytes(mode, values):
    return Image.frombytes(mode, (SIDE, SIDE), quadrants(values).tobytes())


def images_of_all_modes():
    """{mode: (image, expected colours [4,3])} of the modes that have 8 bits or are 16-bit grey."""
    cmyk, printed = inks()
    greys = grey_colours(GREYS)
    high_bytes = grey_colours(WIDE_GREYS >> 8)
    two = np.array([0, 255, 255, 0], np.uint8)
    lab = np.array([
        (0, 0, 0),
        (136, 0, 0),
        (255, 0, 0),
        (54, 0, 0),
    ], np.uint8)
    hsv = np.array([
        (0, 255, 255),
        (85, 255, 255),
        (0, 0, 80),
        (0, 0, 255),
    ], np.uint8)
    of_hsv = np.array([
        (255, 0, 0),
        (0, 255, 0),
        (80, 80, 80),
        (255, 255, 255),
    ])
    of_lab = grey_colours(np.array([0, 127, 255, 50]))
    return {
        "1": (from_bytes("L", two).convert("1"), grey_colours(two)),
        "L": (from_bytes("L", GREYS), greys),
        "LA": (from_bytes("LA", np.stack([GREYS, ALPHAS], 1)), on_white(greys)),
        "La": (from_bytes("La", premultiplied(greys)[:, 2:]), on_white(greys)),
        "P": (palette_image(), COLOURS),
        "PA": (palette_image("PA"), on_white(COLOURS)),
        "RGB": (from_bytes("RGB", COLOURS), COLOURS),
        "RGBX": (from_bytes("RGBX", with_alpha(COLOURS)), COLOURS),
        "RGBA": (from_bytes("RGBA", with_alpha(COLOURS)), on_white(COLOURS)),
        "RGBa": (from_bytes("RGBa", premultiplied(COLOURS)), on_white(COLOURS)),
        "CMYK": (from_bytes("CMYK", cmyk), printed),
        "YCbCr": (from_bytes("YCbCr", ycbcr()), COLOURS),
        "HSV": (from_bytes("HSV", hsv), of_hsv),
        "LAB": (from_bytes("LAB", lab), of_lab),
        "I;16": (from_bytes("I;16", WIDE_GREYS.astype("<u2")), high_bytes),
        "I;16L": (from_bytes("I;16L", WIDE_GREYS.astype("<u2")), high_bytes),
        "I;16B": (from_bytes("I;16B", WIDE_GREYS.astype(">u2")), high_bytes),
    }


# ---- files ---------------------------------------------------------------------------------------

class Case(NamedTuple):
    name: str                               # of a file, with its suffix
    data: bytes
    expected: np.ndarray                    # [16,16,3]
    tolerance: float                        # largest difference of a pixel


def png_chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_with_transparent_colour(bits, colour_type, values, transparent):
    """A PNG whose pixels are values [4,...], in numbers of `bits` bits; one of them is clear."""
    rows = b""
    for row in quadrants(np.array(values)).reshape(SIDE, -1):
        text = "".join(f"{value:0{bits}b}" for value in row)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour_type, 0, 0, 0)
    clear = struct.pack(f">{len(transparent)}H", *transparent)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"tRNS", clear)
            + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))


def grey_tiff(order, bits, strip, sample_format=1):
    """A TIFF of grey pixels in one strip. order: "<" or ">"."""
    tags = [
        (256, 3, SIDE),                     # width
        (257, 3, SIDE),                     # height
        (258, 3, bits),
        (259, 3, 1),                        # no compression
        (262, 3, 1),                        # 0 is black
        (273, 4, 8 + 2 + 10 * 12 + 4),      # the strip's position, after these 10 tags
        (277, 3, 1),                        # samples per pixel
        (278, 3, SIDE),                     # rows per strip
        (279, 4, len(strip)),
        (339, 3, sample_format),            # 2: signed
    ]
    data = struct.pack(f"{order}2sHI", {"<": b"II", ">": b"MM"}[order], 42, 8)
    data += struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(order + {3: "Hxx", 4: "I"}[kind], value)
        data += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    return data + struct.pack(f"{order}I", 0) + strip


# Pillow drops the alpha channel, clips 16 bits, or swaps their bytes when it writes these.
CHANGED_WHEN_WRITTEN = {
    "RGBA": ("BMP", "DIB", "PPM", "GIF"),
    "LA": ("GIF",),
    "I;16": ("AVIF", "GIF", "WEBP"),
    "I;16L": ("AVIF", "GIF", "WEBP"),
    "I;16B": ("AVIF", "GIF", "WEBP", "JPEG2000"),
}
OPTIONS = {"JPEG": dict(quality=100, subsampling=0), "WEBP": dict(lossless=True),
           "AVIF": dict(quality=100, subsampling="4:4:4")}


def saved(image, name, **more):
    buffer = io.BytesIO()
    image.save(buffer, name, **OPTIONS.get(name, {}), **more)
    return buffer.getvalue()


def saved_cases():
    """A Case for every format and mode that Pillow can write. (ICNS has no images of 16 pixels.)"""
    Image.init()
    cases = []
    for name in sorted(images.FORMATS.keys() & Image.SAVE.keys() - {"ICNS"}):
        suffix = images.FORMATS[name].split()[0]
        tolerance = 6 if name in ("JPEG", "AVIF") else 2
        for mode, (image, colours) in images_of_all_modes().items():
            if name in CHANGED_WHEN_WRITTEN.get(mode, ()):
                continue
            try:
                data = saved(image, name)
            except (OSError, ValueError, KeyError):        # the format does not have this mode
                continue
            file_name = f"{mode.replace(';', '')}-{name}{suffix}"
            cases.append(Case(file_name, data, quadrants(colours), tolerance))
    return cases


def special_cases():
    """[(name, data, colours [4,3])] of files that Pillow does not write."""
    wide = quadrants(WIDE_GREYS)
    high = grey_colours(WIDE_GREYS >> 8)
    twelve = np.array([0, 0x123, 0x800, 0xFFF])
    packed = bytes.fromhex("".join(f"{value:03x}" for value in quadrants(twelve).reshape(-1)))
    palette = palette_image()
    black = Image.new("RGB", (SIDE, SIDE))
    animation = saved(palette, "GIF", save_all=True, append_images=[black])
    return [
        ("12-bit.tif", grey_tiff("<", 12, packed), grey_colours(twelve >> 4)),
        ("little.tif", grey_tiff("<", 16, wide.astype("<u2").tobytes()), high),
        ("big.tif", grey_tiff(">", 16, wide.astype(">u2").tobytes()), high),
        ("wide.pgm", b"P5 16 16 65535\n" + wide.astype(">u2").tobytes(), high),
        ("ten-bit.pgm", b"P5 16 16 1023\n" + (wide >> 6).astype(">u2").tobytes(), high),
        ("two-frames.gif", animation, COLOURS),
    ]


def transparent_cases():
    """[(name, data, colours [4,3])] of files with a transparent colour: that of quadrant 0."""
    cases = []
    two = np.array([0, 1, 2, 3])
    four = np.array([1, 5, 9, 15])
    for bits, greys, high in [
        (2, two, two * 85),
        (4, four, four * 17),
        (8, GREYS, GREYS),
        (16, WIDE_GREYS, WIDE_GREYS >> 8),
    ]:
        data = png_with_transparent_colour(bits, 0, greys, greys[:1])
        cases.append((f"clear-grey-{bits}.png", data, on_white(grey_colours(high), CLEAR)))

    expected = on_white(COLOURS, CLEAR)
    deep = COLOURS.astype(int) * 256 + 77
    palette = palette_image()
    clear = dict(transparency=0)
    alphas = dict(transparency=ALPHAS.tobytes())
    return cases + [
        ("clear-rgb-8.png", png_with_transparent_colour(8, 2, COLOURS, COLOURS[0]), expected),
        ("clear-rgb-16.png", png_with_transparent_colour(16, 2, deep, deep[0]), expected),
        ("clear-index.png", saved(palette, "PNG", **clear), expected),
        ("clear-gif.gif", saved(palette, "GIF", **clear), expected),
        ("clear-palette.png", saved(palette, "PNG", **alphas), on_white(COLOURS)),
    ]


def turned_cases():
    """Images with each EXIF orientation, which is undone when they are read."""
    cases = []
    upright = quadrants(COLOURS)
    for name in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
        for orientation in range(1, 9):
            stored = upright
            if orientation > 4:
                stored = stored.swapaxes(0, 1)
            if orientation in (3, 4, 6, 7):
                stored = stored[::-1]
            if orientation in (2, 3, 7, 8):
                stored = stored[:, ::-1]
            exif = Image.Exif()
            exif[0x112] = orientation
            image = Image.fromarray(np.ascontiguousarray(stored))
            file_name = f"turned-{orientation}-{name}{images.FORMATS[name].split()[0]}"
            cases.append(Case(file_name, saved(image, name, exif=exif), upright, 6))
    return cases


def all_cases():
    special = [Case(name, data, quadrants(np.array(colours)), 2)
               for name, data, colours in special_cases() + transparent_cases()]
    return saved_cases() + special + turned_cases()

"""Images: from a file to a square of pixels for training, and from any file to one in a shard."""
import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# What Pillow may decode. Not EPS, for which it runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}

# Formats whose files are stored in shards as they are, where that is possible, and their suffix.
STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

LONGEST_JPEG = 65500                        # pixels of the longer side that libjpeg can write


class Skip(Exception):
    """The reason why an input is left out of a data set; the other inputs are packed."""


# ---------------------------------------------------------------------------- for training
def read_square(data, size, crop="center", rng=None):
    """Decode the bytes of an image file to uint8 [3,size,size].

    crop: "center" or "random", for which rng is a random.Random. Raises whatever Pillow raises for
    a broken file, and DecompressionBombWarning from 90 megapixels.
    """
    image = open_safely(data)
    image.draft("RGB", (size, size))        # a JPEG is decoded at the smallest scale that suffices
    pixels = np.array(square(image, size, crop, rng))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def square(image, size, crop, rng):
    """A PIL image in RGB and upright, its shorter side resized to `size`, cropped to a square.

    Transparent parts become white. Pillow's bicubic filter widens when it shrinks an image, so
    nothing aliases; it is sharper than a box filter at odd ratios and rings less than Lanczos.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size == (size, size):
        return image

    side = min(image.size)
    free_x = image.width - side
    free_y = image.height - side
    if crop == "random":
        left = rng.randint(0, free_x)
        top = rng.randint(0, free_y)
    else:
        left = free_x / 2
        top = free_y / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def open_safely(data):
    """Open the bytes of an image file without decoding it. From 90 megapixels, raise an error.

    A small file that decodes to a huge image may be an attack (a decompression bomb).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


# ---------------------------------------------------------------------------- for shards
class ImageRules(NamedTuple):
    """Which images are packed, and how they are stored."""
    size: int               # of the shorter side, in pixels, if it is longer; 0: leave it as it is
    quality: int            # of a JPEG that is encoded again
    min_size: int           # images with a shorter side below it are skipped
    max_aspect: float       # and those with a larger ratio of longer to shorter side


def image_rules(args):
    """The ImageRules that the flags ask for."""
    return ImageRules(args.size, args.quality, args.min_size, args.max_aspect)


def open_image(data, rules):
    """Open the bytes of an image file without decoding it; raise Skip if it is not wanted."""
    if not data:
        raise Skip("empty file")
    try:
        image = open_safely(data)
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip("over 90 megapixels") from None
    except Exception:                       # Pillow raises a dozen kinds on broken files
        raise Skip("not an image") from None

    short, long = sorted(image.size)
    if short < rules.min_size:
        raise Skip(f"shorter side below {rules.min_size} pixels")
    if long > rules.max_aspect * short:
        raise Skip(f"longer than {rules.max_aspect:g} times its shorter side")
    if 0 < rules.size < short and long * rules.size > LONGEST_JPEG * short:
        raise Skip("longer than a JPEG can be")
    return image


def pack_image(data, rules):
    """(suffix, bytes) of the file to store for the bytes of an image file; raises Skip.

    The bytes stay as they are wherever possible. Every image is decoded to its end, to find files
    that are cut short. A JPEG that stays as it is is decoded at an eighth of its size, which takes
    hardly longer than reading it.
    """
    image = open_image(data, rules)
    kind = image.format
    if kind == "MPO":                       # a phone's JPEG with a second image behind the first
        kind = "JPEG"
    shrink = 0 < rules.size < min(image.size)
    keep = not shrink and can_keep(image, kind)

    try:
        if kind == "JPEG" and shrink:
            image.draft(None, (rules.size, rules.size))
        elif kind == "JPEG":
            image.draft("L", (1, 1))
        image.load()
        if keep:
            return STORED[kind], data
        if image.mode == "F":
            raise Skip("floating-point image")
        ImageOps.exif_transpose(image, in_place=True)
        image = to_common_mode(image)
    except (Skip, MemoryError):
        raise
    except Exception:
        raise Skip("damaged or cut short") from None

    if not shrink:
        return "png", encode_png(image)
    scale = rules.size / min(image.size)
    size = [max(rules.size, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    if image.mode not in ("RGB", "L"):      # transparency, which a JPEG cannot store
        return "png", encode_png(image)
    return "jpg", encode_jpeg(image, rules.quality)


def can_keep(image, kind):
    """Whether a file can be stored as it is: a still image of 8 bits in one of the formats."""
    if kind not in STORED or image.mode[0] in "IF":        # I and F have 16 and 32 bits
        return False
    return kind == "JPEG" or getattr(image, "n_frames", 1) == 1


def to_common_mode(image):
    """The image in RGB, RGBA, L or LA: 8 bits, which every reader of JPEG and PNG knows."""
    if image.mode[0] == "I":                # 16 bits, which Pillow itself would clip at 255
        return image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("RGB", "RGBA", "L", "LA"):
        return image
    return image.convert("RGB")


def encode_jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

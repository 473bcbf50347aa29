"""Decodes image files to squares of pixels for training, and prepares image files for shards."""
import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# The formats that Pillow may decode. EPS is excluded because Pillow runs Ghostscript to decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}

# Formats whose files are stored in shards unchanged where possible, and their suffixes.
STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

LONGEST_JPEG = 65500                        # longest side in pixels that libjpeg can write

# How images are resized. Pillow's filters widen when they downscale an image, so there is no
# aliasing. Bicubic is sharper than a box filter at odd ratios and rings less than Lanczos; bilinear
# is what the published code uses, and gives the same pixels (see resize_shorter_side).
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Skip(Exception):
    """Raised to leave an input out of a data set; its message is the reason."""


# ---------------------------------------------------------------------------- for training
def read_square(data, size, crop="center", rng=None, resize="bicubic"):
    """Decode the bytes of an image file to uint8 [3,size,size].

    crop: "center" or "random"; the latter uses rng, a random.Random. resize: a key of FILTERS.
    Raises whatever Pillow raises for a broken file, and DecompressionBombWarning for images over 90
    megapixels.
    """
    image = open_safely(data)
    if resize == "bicubic":
        image.draft("RGB", (size, size))    # decodes a JPEG at the smallest sufficient scale
    pixels = np.array(square(image, size, crop, rng, resize))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def square(image, size, crop, rng, resize="bicubic"):
    """Turn a PIL image upright, convert it to RGB and crop and resize it to size x size.

    Transparent parts become white. With "bicubic", a square of the image is resized; its corner may
    lie between pixels. With "bilinear", the image is resized and then cropped at a whole pixel, as
    in the published code (data.py:24-25).
    """
    image = upright_rgb(image)
    if image.size == (size, size):
        return image

    if resize == "bilinear":
        image = resize_shorter_side(image, size, resize)
        corner = square_corner(image, crop, rng)
        left, top = map(round, corner)      # a half to the even number, as torchvision rounds
        return image.crop((left, top, left + size, top + size))
    left, top = square_corner(image, crop, rng)
    side = min(image.size)
    return image.resize((size, size), FILTERS[resize], (left, top, left + side, top + side))


def upright_rgb(image):
    """Turn a PIL image upright and convert it to RGB; transparent parts become white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


def square_corner(image, crop, rng):
    """(left, top) of the largest square in an image: the central one, or a random one."""
    free_x = image.width - min(image.size)
    free_y = image.height - min(image.size)
    if crop == "random":
        return rng.randint(0, free_x), rng.randint(0, free_y)
    return free_x / 2, free_y / 2


def resize_shorter_side(image, size, resize):
    """Resize a PIL image until its shorter side has `size` pixels.

    resize: "bicubic" rounds the longer side, "bilinear" rounds it down, as torchvision's Resize
    does, which the published code uses.
    """
    short, long = sorted(image.size)
    if resize == "bilinear":
        long = int(size * long / short)
    else:
        long = max(size, round(long * (size / short)))
    if image.width <= image.height:
        return image.resize((size, long), FILTERS[resize])
    return image.resize((long, size), FILTERS[resize])


def open_safely(data):
    """Open the bytes of an image file without decoding it.

    Raises an error for an image over 90 megapixels, because a small file that decodes to a huge
    image may be an attack (a decompression bomb).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


# ---------------------------------------------------------------------------- for shards
class ImageRules(NamedTuple):
    """The rules for selecting and storing images."""
    size: int               # larger images are downscaled to this shorter side; 0: never
    quality: int            # of JPEGs that are re-encoded
    min_size: int           # images whose shorter side is below this are skipped
    max_aspect: float       # images with a larger ratio of longer to shorter side are skipped
    resize: str = "bicubic"                 # the filter to downscale with, a key of FILTERS
    min_words: int = 0      # captions with fewer words are left out
    max_words: int = 0      # captions with more words are left out; 0: none
    skip_duplicates: bool = False           # skip images with the pixels of an earlier one


def image_rules(args):
    """The ImageRules given by the flags."""
    return ImageRules(**{name: getattr(args, name) for name in ImageRules._fields})


def open_image(data, rules):
    """Open the bytes of an image file without decoding it. Raises Skip if the rules exclude it."""
    if not data:
        raise Skip("empty file")
    try:
        image = open_safely(data)
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip("over 90 megapixels") from None
    except Exception:                       # Pillow raises many kinds of errors on broken files
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
    """Convert the bytes of an image file to (suffix, bytes) of the file to store; raises Skip.

    The bytes are kept unchanged where possible. Every image is decoded completely in order to find
    truncated files. A JPEG that is kept is decoded at an eighth of its size, which takes only
    slightly longer than reading it.
    """
    image = open_image(data, rules)
    kind = image.format
    if kind == "MPO":                       # a phone's JPEG with a second image after the first
        kind = "JPEG"
    shrink = 0 < rules.size < min(image.size)
    keep = not shrink and can_keep(image, kind)

    try:
        if kind == "JPEG" and not shrink:
            image.draft("L", (1, 1))
        elif kind == "JPEG" and rules.resize == "bicubic":
            image.draft(None, (rules.size, rules.size))
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
    image = resize_shorter_side(image, rules.size, rules.resize)
    if image.mode not in ("RGB", "L"):      # has transparency, which a JPEG cannot store
        return "png", encode_png(image)
    return "jpg", encode_jpeg(image, rules.quality)


def can_keep(image, kind):
    """True if a file can be stored unchanged: a still 8-bit image in one of the STORED formats."""
    if kind not in STORED or image.mode[0] in "IF":        # I and F have 16 and 32 bits
        return False
    return kind == "JPEG" or getattr(image, "n_frames", 1) == 1


def to_common_mode(image):
    """Convert an image to 8-bit RGB, RGBA, L or LA, which every JPEG or PNG decoder supports."""
    if image.mode[0] == "I":                # 16 bits, which Pillow's conversion would clip at 255
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

"""TODO."""
import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"        # no EPS: it runs programs


# ------------------------------------------------------------------------------ to which batch

def square(image, size, crop, rng):
    """The picture in RGB and upright, its shorter side resized to `size`, cut to a square.

    Bicubic, which Pillow widens when it shrinks a picture, so that nothing aliases: sharper
    than a box filter at odd ratios, and with less ringing than Lanczos.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")       # see-through parts show white, not what they hide
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (size, size):
        return image
    side = min(image.size)
    x, y = image.width - side, image.height - side
    x, y = (rng.randint(0, x), rng.randint(0, y)) if crop == "random" else (x / 2, y / 2)
    return image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))


def read_square(data, size, crop="center", rng=None):
    """A picture's file as uint8 [3,size,size]; raises whatever Pillow does on broken files."""
    with warnings.catch_warnings():         # a decompression bomb is an error from 90 megapixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.draft("RGB", (size, size))        # of a JPEG's 8 x 8 blocks, as much as is needed
    return torch.from_numpy(np.array(square(image, size, crop, rng))).permute(2, 0, 1)


class Skip(Exception):
    """Why an item is left out; the rest is packed."""


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}     # kept as they are where they can


# ---- a picture -----------------------------------------------------------------------------------

class Rules(NamedTuple):
    """Which pictures are taken, and what is made of them."""
    size: int                               # of the shorter side, at most; 0: as it is
    quality: int                            # of a JPEG that is written anew
    min_size: int                           # of the shorter side; below: skipped
    max_aspect: float                       # longer side / shorter side; above: skipped


def rules(args):
    return Rules(args.size, args.quality, args.min_size, args.max_aspect)


def opened(data, rules):
    """A picture's file, opened but not decoded, or Skip where it is not wanted."""
    if not data:
        raise Skip("empty file")
    try:
        with warnings.catch_warnings():     # from 90 megapixels; what is large may be an attack
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
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
    if 0 < rules.size < short and long * rules.size > 65500 * short:
        raise Skip("longer than a JPEG can be")
    return image


def picture(data, rules):
    """(suffix, bytes) of a picture's file, or Skip. The bytes stay wherever they can.

    Every picture is decoded to its end, or it could be cut short; a JPEG that stays as it is at
    an eighth of its size, where little but the reading is left.
    """
    image = opened(data, rules)
    kind = "JPEG" if image.format == "MPO" else image.format    # a telephone's, with two pictures
    shrinks = 0 < rules.size < min(image.size)
    keep = kind in STORED and not shrinks and image.mode[0] not in "IF" and (   # 16, 32 bits
        kind == "JPEG" or getattr(image, "n_frames", 1) == 1)
    try:
        if kind == "JPEG":
            image.draft(None if shrinks else "L", (rules.size, rules.size) if shrinks else (1, 1))
        image.load()
        if keep:
            return STORED[kind], data
        if image.mode == "F":
            raise Skip("floating-point image")
        ImageOps.exif_transpose(image, in_place=True)
        image = plain(image)
    except (Skip, MemoryError):
        raise
    except Exception:
        raise Skip("damaged or cut short") from None
    if shrinks:
        scale = rules.size / min(image.size)
        image = image.resize([max(rules.size, round(n * scale)) for n in image.size],
                             Image.Resampling.BICUBIC)
    box = io.BytesIO()
    if image.mode in ("RGB", "L") and shrinks:
        image.save(box, "JPEG", quality=rules.quality)
        return "jpg", box.getvalue()
    image.save(box, "PNG", compress_level=1)
    return "png", box.getvalue()


def plain(image):
    """In one of the modes that every reader of JPEG and PNG knows, of 8 bits."""
    if image.mode[0] == "I":                # 16 bits, which Pillow itself would cut off at 255
        return image.convert("I").point(lambda v: v / 256).convert("L")
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "RGBA", "L", "LA") else image.convert("RGB")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

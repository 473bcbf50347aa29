"""Opens image files safely, converts them to 8-bit RGB, and prepares them for training and shards.

Packing, training, `check`, `encode` and `fid` all open image files with open_image() and convert
them with decode() and to_rgb(), so that a file has the same pixels everywhere.
"""
import contextlib
import io
import logging
import os
import re
import threading
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# The formats that Pillow may decode, in the order in which they are tried, and their suffixes. TGA
# is last because its files have no signature. Left out are EPS and WMF, which Pillow decodes by
# running Ghostscript and Windows' GDI; BUFR, GRIB, HDF5 and MPEG, which it recognises but cannot
# decode; IPTC, which may contain a file of any format; FITS, SPIDER and MCIDAS, which store
# measurements; GBR, which stores brushes; and IM and IMT, which are obsolete.
FORMATS = {
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif .tiff",
    "AVIF": ".avif .avifs",
    "JPEG2000": ".jp2 .j2k .jpx .jpf .jpc .j2c",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "ICO": ".ico",
    "CUR": ".cur",
    "ICNS": ".icns",
    "DIB": ".dib",
    "PSD": ".psd",
    "QOI": ".qoi",
    "DDS": ".dds",
    "BLP": ".blp",
    "FTEX": ".ftc .ftu",
    "PCX": ".pcx",
    "DCX": ".dcx",
    "SGI": ".sgi .rgb .rgba .bw",
    "SUN": ".ras",
    "FLI": ".fli .flc",
    "PCD": ".pcd",
    "MSP": ".msp",
    "XBM": ".xbm",
    "XPM": ".xpm",
    "PIXAR": ".pxr",
    "TGA": ".tga .icb .vda .vst",
}


class Plugin(NamedTuple):
    """A package that teaches Pillow a format."""
    name: str                               # of the format, in reasons
    format: str                             # Pillow's name for the format
    suffixes: str
    signature: re.Pattern                   # matches the start of a file
    module: str
    register: str                           # a function of the module; "": importing it is enough
    package: str                            # for pip


PLUGINS = (
    Plugin(
        name="HEIC",
        format="HEIF",
        suffixes=".heic .heif .hif",
        signature=re.compile(rb".{4}ftyp(.{4}){0,12}(hei|hev)", re.DOTALL),
        module="pillow_heif",
        register="register_heif_opener",
        package="pillow-heif",
    ),
    Plugin(
        name="JPEG XL",
        format="JXL",
        suffixes=".jxl",
        signature=re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n"),
        module="pillow_jxl",
        register="",
        package="pillow-jxl-plugin",
    ),
)

# The suffixes of image files. A file that has one is packed, or its report says why not.
SUFFIXES = set(" ".join([*FORMATS.values(), *(plugin.suffixes for plugin in PLUGINS)]).split())

# Formats whose files are stored in shards unchanged where possible, and their suffixes.
STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

LONGEST_JPEG = 65500                        # longest side in pixels that libjpeg can write

# How images are resized. Pillow's filters widen when they downscale an image, so there is no
# aliasing. Bicubic is sharper than a box filter at odd ratios and rings less than Lanczos; bilinear
# is what the published code uses, and gives the same pixels (see resize_shorter_side).
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Skip(Exception):
    """Raised to leave an input out of a data set; its message is the reason."""


# ---------------------------------------------------------------------------- opening
def open_image(data):
    """Open the bytes of an image file without decoding it; returns a PIL image.

    Raises Skip for a file that is not an image; for an image over 90 megapixels, because a small
    file that decodes to a huge image may be an attack (a decompression bomb); and for an image of
    signed or 32-bit values, since nothing says which of them is white.
    """
    if not data:
        raise Skip("empty file")
    try:
        image = open_with_pillow(data)
    except (Skip, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip("over 90 megapixels") from None
    except Exception:                       # Pillow raises many kinds of errors on broken files
        raise Skip("not an image") from None

    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Skip("over 90 megapixels")
    if 0 in image.size:
        raise Skip("not an image")
    if image.mode == "F":
        raise Skip("floating-point image")
    if stored_mode(image) in ("I;16S", "I;16BS"):
        raise Skip("signed 16-bit image")
    if image.mode == "I" and image.format != "PPM":        # a PPM has at most 16 bits
        raise Skip("32-bit image")
    return image


def open_with_pillow(data):
    """Open the bytes of an image file with Pillow or one of the PLUGINS."""
    try:
        return Image.open(io.BytesIO(data), formats=pillow_formats())
    except UnidentifiedImageError:
        for plugin in PLUGINS:
            if plugin.signature.match(data):
                register(plugin)
                return Image.open(io.BytesIO(data), formats=[plugin.format])
        raise


@cache
def pillow_formats():
    """The FORMATS that this version of Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@cache
def register(plugin):
    """Import a plugin and register its format; raises Skip if it is not installed."""
    try:
        module = import_module(plugin.module)
    except ImportError:
        raise Skip(f"{plugin.name} image: pip install {plugin.package}") from None
    if plugin.register:
        getattr(module, plugin.register)()


# ---------------------------------------------------------------------------- converting
def decode(image):
    """Decode an image of open_image(): returns it upright, with 8 bits, as L, LA, RGB or RGBA.

    Of an animation, it is the first frame. Raises Skip if the image is damaged.
    """
    raw_mode = stored_mode(image)           # unknown after decoding
    try:
        if image.format == "TIFF":
            with silent_stderr():
                image.load()
        image.load()
        turn_upright(image)
        return to_8_bits(image, raw_mode)
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip("over 90 megapixels") from None         # inside of an icon
    except Exception:                       # Pillow raises many kinds of errors on broken files
        raise Skip("damaged or cut short") from None


@contextlib.contextmanager
def silent_stderr():
    """A context in which C code writes nothing to stderr. libtiff reports each error there.

    It is for one thread at a time: the descriptor belongs to the whole process.
    """
    with STDERR_LOCK, open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


STDERR_LOCK = threading.Lock()


def stored_mode(image):
    """Pillow's name for the pixels of a file, such as "I;12" or "RGB;16B", if it is known."""
    tile = getattr(image, "tile", None)
    if not tile:
        return image.mode
    arguments = tile[0][3]
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return arguments


def turn_upright(image):
    """Turn an image as its EXIF block says, in place. A damaged block is ignored, with a note."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:                       # of many kinds
        warnings.warn(DAMAGED_EXIF, ImageNote, stacklevel=2)


def to_8_bits(image, raw_mode):
    """Convert a decoded image to 8-bit L, LA, RGB or RGBA, which every PNG decoder supports."""
    if image.mode[0] == "I":
        return grey_of_16_bits(image, raw_mode)
    if image.mode in ("La", "RGBa"):        # premultiplied with the alpha channel
        return image.convert(image.mode.upper())
    if image.mode in ("LA", "RGBA"):
        return image
    if "transparency" in image.info:
        # The transparent colour of a PNG has the bits of the file, unlike Pillow's pixels.
        colour = image.info["transparency"]
        if raw_mode in ("L;2", "L;4"):
            image.info["transparency"] = colour * (85 if raw_mode == "L;2" else 17)
        elif raw_mode == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in colour)
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB"):
        return image
    rgb = image.convert("RGB")
    if image.mode in ("CMYK", "LAB"):
        # The profile is that of the former channels, or, for LAB, Pillow's own, which contains the
        # time: it would make the bytes of a packed PNG depend on it.
        rgb.info.pop("icc_profile", None)
    return rgb


def grey_of_16_bits(image, raw_mode):
    """The upper 8 bits of a grey image of 16 bits, whose conversion by Pillow clips at 255."""
    values = np.asarray(image)
    bits = 12 if raw_mode == "I;12" else 16
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return grey


def to_rgb(image):
    """Convert an image of decode() to RGB. Transparent parts become white."""
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


def read_image(data):
    """Read the bytes of an image file as an upright RGB image; raises Skip."""
    return to_rgb(decode(open_image(data)))


# ---------------------------------------------------------------------------- notes
DAMAGED_EXIF = "damaged EXIF block, ignored"


class ImageNote(UserWarning):
    """A warning of this file about an image that is readable but flawed."""


class Notes:
    """Collects notes on images that are readable but flawed, in place of Pillow's warnings.

        with Notes() as notes:
            image = decode(open_image(data))
            kinds = notes.take()            # such as ["damaged EXIF block, ignored"]

    Each thread has its own notes, but only one thread may enter the context.
    """

    def __init__(self):
        self.by_thread = {}
        self.context = warnings.catch_warnings()

    def __enter__(self):
        self.context.__enter__()
        warnings.filterwarnings("always", module=r"(PIL|pillow_heif|pillow_jxl)\b")
        warnings.filterwarnings("always", category=ImageNote)
        self.show = warnings.showwarning
        warnings.showwarning = self.record
        logging.getLogger("PIL").addHandler(SILENT)        # Pillow logs some errors that it raises
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def record(self, message, category, filename, *more):
        """Replaces warnings.showwarning: records Pillow's warnings and passes on all others."""
        package = Path(filename).parent.name
        if category is not ImageNote and package not in ("PIL", "pillow_heif", "pillow_jxl"):
            self.show(message, category, filename, *more)
        elif not issubclass(category, (DeprecationWarning, Image.DecompressionBombWarning)):
            kinds = self.by_thread.setdefault(threading.get_ident(), {})
            kinds[note_kind(str(message))] = None

    def take(self):
        """The kinds of notes, each once, that this thread has caused since the last call."""
        return list(self.by_thread.pop(threading.get_ident(), {}))


SILENT = logging.NullHandler()


def note_kind(message):
    """The kind of note for a warning of Pillow. It does not depend on the numbers of one file."""
    if re.search(r"EXIF|Metadata|\b[Tt]ag\b|Truncated File Read", message):
        return DAMAGED_EXIF
    return "Pillow: " + re.sub(r"\d+", "N", message.split("\n")[0])


# ---------------------------------------------------------------------------- for training
def read_square(data, size, crop="center", rng=None, resize="bicubic"):
    """Decode the bytes of an image file to uint8 [3,size,size]; raises Skip.

    crop: "center" or "random"; the latter uses rng, a random.Random. resize: a key of FILTERS.
    """
    image = open_image(data)
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
    image = to_rgb(decode(image))
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


def check_rules(image, rules):
    """Raise Skip if the rules exclude an image, which need not be decoded."""
    short, long = sorted(image.size)
    if short < rules.min_size:
        raise Skip(f"shorter side below {rules.min_size} pixels")
    if long > rules.max_aspect * short:
        raise Skip(f"longer than {rules.max_aspect:g} times its shorter side")
    if 0 < rules.size < short and long * rules.size > LONGEST_JPEG * short:
        raise Skip("longer than a JPEG can be")


def pack_image(data, rules):
    """Convert the bytes of an image file to (suffix, bytes) of the file to store; raises Skip.

    The bytes are kept unchanged where possible. Every image is decoded completely in order to find
    truncated files. A JPEG that is kept is decoded at an eighth of its size, which takes only
    slightly longer than reading it.
    """
    image = open_image(data)
    check_rules(image, rules)
    kind = image.format
    if kind == "MPO":                       # a phone's JPEG with a second image after the first
        kind = "JPEG"
    shrink = 0 < rules.size < min(image.size)
    keep = not shrink and can_keep(image, kind)

    if kind == "JPEG" and not shrink:
        image.draft("L", (1, 1))
    elif kind == "JPEG" and rules.resize == "bicubic":
        image.draft(None, (rules.size, rules.size))
    image = decode(image)
    if keep:
        return STORED[kind], data
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


def encode_jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

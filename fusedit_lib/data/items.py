"""The inputs to packing: items, ranges of lines in a file, and folders of images.

The module of a data set (cc12m.py, sa1b.py, journeydb.py, folder.py, emoji.py) assigns items to
shards; packing.py does the rest. Items are read by the process that packs them.
"""
import hashlib
import os
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from fusedit import FuseDiTError
from fusedit_lib.data.filters import PackedImage, pixel_hash, select_captions
from fusedit_lib.data.images import SUFFIXES, Skip, pack_image

# Kinds of files in a folder; see list_files.
IMAGE = "image"
FILE = "file"
FOLDER = "folder"
UNREADABLE = "folder cannot be read"

# Flags that do not affect the contents of the shards, and `run`, the function of the command.
NOT_OUTPUT_SETTINGS = {"out", "overwrite", "workers", "run", "packages", "registry"}

# Flags that were added later, with their defaults. A default is not among the settings, so that a
# run that was started without the flag can be resumed.
LATER_FLAGS = {"resize": "bicubic", "image_column": None, "caption_column": None,
               "image_root": None, "min_words": 0, "max_words": 0, "skip_duplicates": False}


# ---------------------------------------------------------------------------- one item
class Item(NamedTuple):
    """An image to pack, with its captions. str(item) is its name in the report."""
    name: str
    image: Path | bytes | Skip      # a file, the bytes of a file, or the reason for having none
    captions: dict                  # kind, such as "synthetic_caption" -> text, which may be empty,
                                    # or a list of texts, if the image has several captions
    key: str = ""                   # of the sample; "": use the name
    number: int = 0                 # position in the input, if the items are shuffled

    def __str__(self):
        return self.name


def make_sample(rules, item):
    """Convert an Item to a sample, a dict for WebDataset's TarWriter; raises Skip.

    rules: ImageRules. Entries that are not written to the tar: `__notes__`, and `__image__`, a
    PackedImage, if duplicates are skipped.
    """
    if isinstance(item.image, Skip):
        raise item.image
    if not any(item.captions.values()):     # checked first, since decoding the image takes longer
        raise Skip("no caption")
    captions, notes = select_captions(item.captions, rules)
    data = item.image
    if isinstance(data, Path):
        data = read_image_file(data)
    suffix, packed = pack_image(data, rules)
    key = item.key or item.name
    key = key.replace("/", "_").replace(".", "_")          # a dot would end the key
    sample = {"__key__": key, f"image.{suffix}": packed, **encode_captions(captions)}
    sample["__notes__"] = notes
    if rules.skip_duplicates:
        sample["__image__"] = PackedImage(item.name, pixel_hash(data), item.number)
    return sample


def encode_captions(captions):
    """{"KIND.txt": bytes} of the captions that are not empty, one per line; raises Skip.

    captions: {kind: text or list of texts}. A line holds the words of a text, joined by spaces.
    """
    files = {}
    for kind, texts in captions.items():
        if not isinstance(texts, list):
            texts = [texts]
        lines = [" ".join((text or "").split()) for text in texts]
        text = "\n".join(filter(None, lines))
        if text:
            try:
                files[f"{kind}.txt"] = text.encode()
            except UnicodeEncodeError:      # JSON can hold half of a surrogate pair ("\ud83d")
                raise Skip("caption is not Unicode") from None
    if not files:
        raise Skip("no caption")
    return files


def read_image_file(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        reason = "broken link" if path.is_symlink() else "image not found"
        raise Skip(reason) from None
    except OSError as e:
        raise Skip(f"cannot be read: {e.strerror or 'invalid name'}") from None
    except ValueError:                      # a name that no file can have
        raise Skip("cannot be read: invalid name") from None


# ---------------------------------------------------------------------------- files and folders
class LineRange:
    """Consecutive lines of a file. Iterating yields (line number, bytes) of non-blank lines."""

    def __init__(self, path, first, start, stop):
        self.path = path
        self.first = first                  # number of the first line, counted from 1
        self.start = start                  # position of the first byte
        self.stop = stop                    # position after the last byte

    def __iter__(self):
        with open(self.path, "rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start)
        for number, line in enumerate(text.split(b"\n"), self.first):
            if line.strip():
                yield number, line


def split_lines(path, size):
    """Split a file of any length into LineRanges of `size` lines, without storing its text.

    Returns the LineRanges and the number of non-blank lines.
    """
    parts = []
    number = 0                              # lines read so far
    not_blank = 0                           # non-blank lines among them
    first = 1                               # number of the current part's first line
    start = 0                               # position of that line's first byte
    position = 0
    with open(path, "rb") as file:
        for line in file:
            number += 1
            position += len(line)
            if line.strip():
                not_blank += 1
            if number % size == 0:
                parts.append(LineRange(path, first, start, position))
                first = number + 1
                start = position
    if position > start:
        parts.append(LineRange(path, first, start, position))
    return parts, not_blank


def list_files(folder, above=()):
    """Yield (relative path, kind) of everything in and below `folder`, one folder at a time.

    kind: IMAGE (by its suffix), FILE, or a phrase for what is not looked into: hidden files and
    folders, since they belong to the system or to an interrupted download; links that lead nowhere
    or back; folders that cannot be read, whose kind begins with UNREADABLE. above: the real paths
    of the folders that led to `folder`, which differ from those in its own path where links did.
    """
    above = (*above, os.path.realpath(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as e:
        yield ".", f"{UNREADABLE}: {e.strerror}"
        return
    for entry in entries:
        name = entry.name
        kind = entry_kind(entry, above)
        if kind != FOLDER:
            yield name, kind
            continue
        for below, kind in list_files(Path(entry.path), above):
            yield os.path.normpath(f"{name}/{below}"), kind


def entry_kind(entry, above):
    """The kind of an os.DirEntry; above: the real paths of its folder and those that led to it."""
    is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
    try:
        is_file = entry.is_file()
        is_folder = entry.is_dir()
    except OSError:                         # a link to itself
        is_file = is_folder = False
    if entry.name.startswith("."):
        return "hidden folder" if is_folder else "hidden file"
    if is_folder:
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if any(f"{folder}/".startswith(f"{target}/") for folder in above):
                return "link to a folder above it"
        return FOLDER
    if is_image and (is_file or entry.is_symlink()):       # packing reports a broken link
        return IMAGE
    if is_file:
        return FILE
    return "broken link" if entry.is_symlink() else "neither file nor folder"


def list_images(folder, others):
    """Yield the relative path of every image file in or below `folder`, in order.

    others: a Counter of all other files, by suffix or, if they are not looked into, by kind.
    """
    for name, kind in list_files(folder):
        if kind.startswith(UNREADABLE):
            raise FuseDiTError(f"{kind}: {folder / name}")
        if kind == IMAGE:
            yield name
        elif kind == FILE:
            others[suffix_of(name)] += 1
        else:
            others[kind] += 1


def suffix_of(name):
    """The suffix of a file's name in lower case, as it is counted."""
    return os.path.splitext(name)[1].lower() or "no suffix"


def require_exists(*paths):
    """Raise FuseDiTError if one of the paths does not exist."""
    for path in paths:
        if not path.exists():
            raise FuseDiTError(f"no such file or folder: {path}")


def as_stored(path):
    """The path with its names in the Unicode form that they have on disk, if that differs.

    macOS writes letters and their accents as two characters, and a keyboard as one.
    """
    if path.exists() or path == path.parent:
        return path
    parent = as_stored(path.parent)
    for entry in parent.iterdir() if parent.is_dir() else ():
        if normalize("NFC", entry.name) == normalize("NFC", path.name):
            return entry
    return path


# ---------------------------------------------------------------------------- settings of a run
def output_settings(args, **more):
    """The settings that determine a command's output: some of its flags, and `more`.

    packing.begin compares them with those of an interrupted run.
    """
    settings = {}
    for name, value in vars(args).items():
        is_default = name in LATER_FLAGS and value == LATER_FLAGS[name]
        if name not in NOT_OUTPUT_SETTINGS and not is_default:
            settings[name] = value
    return settings | more


def digest(parts):
    """The SHA-1 of all parts as text, in hexadecimal digits."""
    sha1 = hashlib.sha1()
    for part in parts:
        sha1.update(f"{part}\n".encode(errors="surrogatepass"))
    return sha1.hexdigest()


def in_chunks(items, size):
    """Slices of `size` items each; the last one may be shorter."""
    return [items[start:start + size] for start in range(0, len(items), size)]

"""What prepare_data.py packs: the paper's data sets, a folder, emoji, drawn shapes.

Each function settles which items make up which shard, and how an item becomes a sample; packing.py
does the rest. Items are read where they are packed, by a process that holds one shard's.
"""
import hashlib
from pathlib import Path
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.data.images import SUFFIXES, Skip, picture


def sample(key, suffix, data, captions):
    """A sample of captions by kind, of which those that are empty are left out."""
    texts = {kind: " ".join(text.split()) for kind, text in captions.items() if text}
    if not any(texts.values()):
        raise Skip("no caption")
    try:                                    # JSON can hold half an emoji ("\ud83d")
        texts = {f"{kind}.txt": text.encode() for kind, text in texts.items() if text}
    except UnicodeEncodeError:
        raise Skip("caption is not Unicode") from None
    return {"__key__": key.replace("/", "_").replace(".", "_"), f"image.{suffix}": data, **texts}


def read_file(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Skip("image is not there") from None
    except (OSError, ValueError) as e:      # ValueError: a name that no file can have
        raise Skip(f"cannot be read: {getattr(e, 'strerror', None) or 'its name'}") from None


class Item(NamedTuple):
    """A picture to pack and its captions by kind; as text, its name in the report."""
    name: str
    image: Path | bytes | Skip              # where it is, its file's bytes, or why there is none
    captions: dict
    key: str = ""

    def __str__(self):
        return self.name


def item_sample(how, item):
    if isinstance(item.image, Skip):
        raise item.image
    if not any(item.captions.values()):     # before the picture, which is dearer
        raise Skip("no caption")
    data = item.image if isinstance(item.image, bytes) else read_file(item.image)
    return sample(item.key or item.name, *picture(data, how), item.captions)


# ---- lists that are read in parts ----------------------------------------------------------------

class Lines:
    """Some lines of a file, by the bytes where they stand: read where they are packed."""

    def __init__(self, path, first, start, stop):
        self.path, self.first, self.start, self.stop = path, first, start, stop

    def __iter__(self):
        with open(self.path, "rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start)
        for n, line in enumerate(text.split(b"\n"), self.first):
            if line.strip():
                yield n, line


def cut_lines(path, size):
    """(parts of `size` lines, the number of lines that are not empty) of a file of any length."""
    parts, start, at, n, full = [], 0, 0, 0, 0
    with open(path, "rb") as file:
        for line in file:
            at, n, full = at + len(line), n + 1, full + bool(line.strip())
            if n % size == 0:
                parts.append(Lines(path, n - size + 1, start, at))
                start = at
    return parts + [Lines(path, n - n % size + 1, start, at)] * (at > start), full


def listing(folder):
    """Every image file below a folder, in order, as paths relative to it; a folder at a time."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):       # what a killed download was at, or a system's
            continue
        if path.is_dir():
            for name in listing(path):
                yield f"{path.name}/{name}"
        elif path.suffix.lower() in SUFFIXES:
            yield path.name


def need(*paths):
    for path in paths:
        if not path.exists():
            raise FuseDiTError(f"no such file or folder: {path}")


def said(args, **more):
    """What of the flags decides the output."""
    return {k: v for k, v in vars(args).items()
            if k not in ("out", "overwrite", "workers", "run", "packages", "registry")} | more


def digest(parts):
    """A short name of all that the parts say."""
    whole = hashlib.sha1()
    for part in parts:
        whole.update(f"{part}\n".encode(errors="surrogatepass"))
    return whole.hexdigest()


def cut(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]

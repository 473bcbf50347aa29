"""TODO."""
import contextlib
import json
import math
import os
import random
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fusedit import FuseDiTError


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as tmp`: write tmp; path then appears whole, or not at all."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{random.SystemRandom().getrandbits(40)}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def untaken(path, *others):
    """path (a Path), or NAME_2, NAME_3, ...: the first that is no file, nor with other suffixes."""
    new, n = path, 2
    while any(new.with_suffix(s).exists() for s in (path.suffix, *others)):
        new, n = path.with_stem(f"{path.stem}_{n}"), n + 1
    return new


def save_file(tensors, path, metadata):
    """Safetensors' own, but readable by all whom the umask lets: theirs is the owner's alone."""
    open(path, "wb").close()               # a file as the umask makes it
    mode = os.stat(path).st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    os.chmod(path, mode)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise FuseDiTError(f"cannot read {path} ({e}): is {Path(path).parent} a whole model "
                           "folder?") from None


def weight_files(folder, stem):
    index = Path(folder) / f"{stem}.safetensors.index.json"
    shards = read_json(index)["weight_map"].values() if index.exists() else [f"{stem}.safetensors"]
    return [Path(folder) / name for name in sorted(set(shards))]


def tensor_files(folder, stem="model"):
    """{tensor name: (open file, its name there)} of stem.safetensors, whole or in shards."""
    tensors = {}
    for path in weight_files(folder, stem):
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as e:
            raise FuseDiTError(f"{path} is missing, truncated or corrupt ({e}): copy or download "
                               "it again") from None
        for name in file.keys():
            whole, _, place = name.partition("[")          # a TPU host writes NAME[0:8,0:512]
            if place:
                tensors.setdefault(whole, (Pieces(), whole))[0].add(place, file, name)
            else:
                tensors[name] = file, name
    return tensors


class Pieces:
    """A tensor that lies in several files or names, to be read as from one safetensors file."""
    def __init__(self):
        self.parts = []                     # (its slices, file, name)

    def add(self, place, file, name):
        rows = (map(int, part.split(":")) for part in place.rstrip("]").split(","))
        self.parts.append((tuple(slice(*row) for row in rows), file, name))
        self.metadata = file.metadata

    def get_slice(self, _):
        return self

    def get_shape(self):
        return [max(s.stop for s in dim) for dim in zip(*(p[0] for p in self.parts), strict=True)]

    def get_tensor(self, name):
        whole, missing = None, math.prod(self.get_shape())
        for place, file, part in self.parts:
            piece = file.get_tensor(part)
            whole = piece.new_empty(self.get_shape()) if whole is None else whole
            whole[place] = piece
            missing -= piece.numel()
        if missing:
            raise FuseDiTError(f"{name} lacks some of its pieces: is a file of its folder missing?")
        return whole


def sync(path):
    """Make a file's bytes, or a folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def rows(path):
    """The rows of a metrics.jsonl, of which a killed run may have left half a line."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found

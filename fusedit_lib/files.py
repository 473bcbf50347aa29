"""Atomic writes, file names, JSON, and safetensors that are split over several files."""
import contextlib
import functools
import json
import math
import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from fusedit import FuseDiTError

# ---- writing -------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as tmp`: write to tmp, which replaces path if nothing fails."""
    path = Path(path)
    # SystemRandom: processes that set the same random seed must not pick the same name.
    tmp = path.with_name(f".{path.name}.{random.SystemRandom().getrandbits(40)}.tmp")
    try:
        yield tmp
        fsync(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def fsync(path):
    """Flush a file's contents, or a folder's entries, to disk, so that they survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def atomic_folder(out, names, what, overwrite):
    """`with atomic_folder(...) as tmp`: write to the folder tmp, which becomes `out`, a Path.

    If anything fails, `out` is left unchanged. Raises FuseDiTError unless `out` is new, empty, or,
    with overwrite, a folder of files with these names only. what: such a folder, in words.
    """
    check_replaceable(out, names, what, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        tmp.mkdir()
        yield tmp
        if out.exists():
            os.replace(out, old)
        os.replace(tmp, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(out, names, what, overwrite):
    """Raise FuseDiTError unless atomic_folder may write to `out`."""
    if not out.exists():
        return
    if out.is_dir():
        found = {path.name for path in out.iterdir()}
        if not found or (overwrite and found <= set(names)):
            return
    remedy = "give a new folder or --overwrite"
    if overwrite:
        remedy = f"give a new folder, since --overwrite only replaces {what}"
    raise FuseDiTError(f"{out} is not empty: {remedy}")


def file_stem(text, characters=60):
    """A file name without a suffix, made of the letters and digits of a text in any script.

    They are lower-case and in NFC. A hyphen stands for anything between them. The name has at most
    this many characters, and at most 200 bytes in UTF-8, which leaves 55 of the usual 255 for what
    is added to it; a letter is never cut off from its combining marks. Without a letter or digit,
    the name is "empty" for an empty text, and otherwise "symbols".
    """
    letters = []                            # each with its marks; "-" between words
    for char in unicodedata.normalize("NFC", text.lower()):
        category = unicodedata.category(char)
        after_letter = letters and letters[-1] != "-"
        if char.isalnum():
            letters.append(char)
        elif category == "Cf" or "\ufe00" <= char <= "\ufe0f":
            continue                        # invisible: joiners, text directions, emoji styles
        elif category in ("Mn", "Mc") and after_letter:    # vowel signs, accents
            letters[-1] += char
        elif after_letter:
            letters.append("-")

    if letters and letters[-1] == "-":
        letters.pop()

    name = ""
    for letter in letters:
        longer = name + letter
        if len(longer) > characters or len(longer.encode()) > 200:
            break
        name = longer
    if not name:
        name = "symbols" if text.strip() else "empty"
    return name


def unused_path(path, *other_suffixes):
    """The first of path, NAME_2, NAME_3, ... that is not taken with any of the suffixes."""
    candidate = path
    number = 2
    while any(candidate.with_suffix(s).exists() for s in (path.suffix, *other_suffixes)):
        candidate = path.with_stem(f"{path.stem}_{number}")
        number += 1
    return candidate


def save_file(tensors, path, metadata):
    """safetensors' save_file, but with the usual permissions of a new file.

    safetensors creates files that only their owner can read. metadata: {str: str}.
    """
    open(path, "wb").close()
    permissions = os.stat(path).st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    os.chmod(path, permissions)


# ---- reading -------------------------------------------------------------------------------------

def read_json(path):
    """The contents of a JSON file in a model folder or a run; raises FuseDiTError."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise FuseDiTError(f"cannot read {path} ({e}): is {Path(path).parent} a complete model "
                           "folder?") from None


def read_jsonl(path):
    """The JSON objects in a file with one per line.

    A line truncated when the process was killed is skipped.
    """
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def stored_variant(folder, stem="model"):
    """The variant that is stored instead of stem.safetensors: ".fp16" for stem.fp16.safetensors.

    "" if stem.safetensors or its index exists, or if there is no variant or more than one.
    """
    folder = Path(folder)
    found = []
    for variant in ("", ".fp16", ".bf16", ".fp32"):
        if index_path(folder, stem, variant).exists():
            found.append(variant)
        elif (folder / f"{stem}{variant}.safetensors").exists():
            found.append(variant)
    if "" in found or len(found) != 1:
        return ""
    return found[0]


def index_path(folder, stem, variant):
    """The file that names the shards of a variant, as transformers and diffusers call it."""
    return Path(folder) / f"{stem}.safetensors.index{variant}.json"


def safetensors_paths(folder, stem="model"):
    """The files that make up stem.safetensors: that file, or the shards that its index names.

    If only a variant is stored, they are those of the variant.
    """
    variant = stored_variant(folder, stem)
    index = index_path(folder, stem, variant)
    if not index.exists():
        return [Path(folder) / f"{stem}{variant}.safetensors"]
    names = read_json(index)["weight_map"].values()
    return [Path(folder) / name for name in sorted(set(names))]


@functools.cache
def say_once(line):
    """Print a line on stderr, on rank 0 only, unless this process has printed it before."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def missing_file(path, stem):
    """FuseDiTError for a missing safetensors file, which names the weights that there are."""
    others = []
    for other in sorted(path.parent.glob("*")):
        if other.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
            others.append(other.name)
    text = f"{path} is missing: copy or download it"
    if others:
        text += (f" ({path.parent.name} has {', '.join(others[:4])}; only {stem}.safetensors, or "
                 f"a single variant such as {stem}.fp16.safetensors, is loaded)")
    return FuseDiTError(text)


def open_tensors(folder, stem="model"):
    """{tensor name: (open file, its name there)} of stem.safetensors, in one file or in shards.

    No tensor is read yet. file.get_tensor(name) reads one, and file.get_slice(name)[slices] a part
    of one. For a tensor that several hosts of a TPU run have written in slices, a SlicedTensor
    takes the place of the file. Raises FuseDiTError.
    """
    tensors = {}
    variant = stored_variant(folder, stem)
    if variant:
        say_once(f"{folder} has no {stem}.safetensors: using its variant {variant[1:]}")
    for path in safetensors_paths(folder, stem):
        if not path.exists():
            raise missing_file(path, stem)
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as e:
            raise FuseDiTError(f"{path} is truncated or corrupt ({e}): copy or download it "
                               "again") from None
        for stored_name in file.keys():
            name, bracket, ranges = stored_name.partition("[")     # NAME[0:8,0:512]
            if not bracket:
                tensors[name] = file, name
                continue
            if name not in tensors:
                tensors[name] = SlicedTensor(name, file.metadata), name
            bounds = [text.split(":") for text in ranges.rstrip("]").split(",")]
            slices = tuple(slice(int(start), int(stop)) for start, stop in bounds)
            tensors[name][0].add(slices, file, stored_name)
    return tensors


class SlicedTensor:
    """A tensor stored in slices, with the methods of an open safetensors file that contains it."""

    def __init__(self, name, metadata):
        self.name = name
        self.metadata = metadata
        self.slices = []                    # a tuple of slice objects for each part
        self.sources = []                   # (open file, name there), in the same order

    def add(self, slices, file, name):
        """Add the part in `slices`, a tuple with a slice for each dimension."""
        self.slices.append(slices)
        self.sources.append((file, name))

    def get_slice(self, _):
        return self

    def get_shape(self):
        dimensions = zip(*self.slices, strict=True)
        return [max(s.stop for s in dimension) for dimension in dimensions]

    def get_tensor(self, _):
        return self[tuple(slice(0, size) for size in self.get_shape())]

    def __getitem__(self, box):
        """The values in a box, a tuple of slices. What lies outside of it is not read."""
        values = None
        found = 0
        for slices, (file, name) in zip(self.slices, self.sources, strict=True):
            common = overlap(slices, box)
            if common is None:
                continue
            part = file.get_slice(name)[shifted(common, slices)]
            if values is None:
                values = torch.empty([s.stop - s.start for s in box], dtype=part.dtype)
            values[shifted(common, box)] = part
            found += part.numel()
        if found != math.prod(s.stop - s.start for s in box):
            raise FuseDiTError(f"{self.name} lacks some of its slices: is a file missing from its "
                               "folder?")
        return values


def overlap(a, b):
    """The box that two boxes, tuples of slices, have in common, or None."""
    common = []
    for s, t in zip(a, b, strict=True):
        start = max(s.start, t.start)
        stop = min(s.stop, t.stop)
        if start >= stop:
            return None
        common.append(slice(start, stop))
    return tuple(common)


def shifted(box, outer):
    """A box whose positions are counted from the start of another box, which contains it."""
    return tuple(slice(s.start - t.start, s.stop - t.start)
                 for s, t in zip(box, outer, strict=True))


class InMemoryTensor:
    """A tensor in memory, with the methods of an open safetensors file that contains it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def metadata(self):
        return {}

    def get_slice(self, _):
        return self

    def get_shape(self):
        return list(self.tensor.shape)

    def get_tensor(self, _):
        return self.tensor

    def __getitem__(self, slices):
        return self.tensor[slices]


def tensors_below(prefix, tensors):
    """The tensors whose names start with a prefix, which is removed."""
    return {name.removeprefix(prefix): stored for name, stored in tensors.items()
            if name.startswith(prefix)}


def tensors_within(prefix, tensors):
    """The tensors with a prefix added to their names."""
    return {prefix + name: stored for name, stored in tensors.items()}


def read_tensor(tensors, name):
    """One of the tensors that open_tensors has found."""
    file, stored_name = tensors[name]
    return file.get_tensor(stored_name)


# ---- loading into a module -----------------------------------------------------------------------

def check_tensors(module, tensors, source, hint=""):
    """Raise FuseDiTError unless tensors (of open_tensors) match the module's names and shapes."""
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    stored = {}
    for name, (file, stored_name) in tensors.items():
        stored[name] = tuple(file.get_slice(stored_name).get_shape())

    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unexpected" for name in stored if name not in expected]
    problems += [f"{name} is {stored[name]}, not {shape}" for name, shape in expected.items()
                 if stored.get(name, shape) != shape]
    if problems:
        text = "; ".join(problems[:4])
        if len(problems) > 4:
            text += f"; and {len(problems) - 4} more"
        raise FuseDiTError(f"the weights in {source} do not fit its config.json: {text}{hint}")


def assign_tensors(module, tensors, device, dtype):
    """Replace a module's tensors, which may be on the meta device, with the stored ones.

    With device "meta" nothing is read.
    """
    if device == "meta":
        return
    state = {}
    for name in module.state_dict():
        state[name] = read_tensor(tensors, name).to(device, dtype)
    module.load_state_dict(state, assign=True)

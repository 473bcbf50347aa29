"""What is in shards, and what is wrong with them; their index; a sheet of samples to look at."""
import hashlib
import io
import random
import sys
import textwrap
import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.images import FORMATS, read_square
from fusedit_lib.data.shards import ends_well, read_sample
from fusedit_lib.files import atomic_write

CAPTIONS = "synthetic_caption", "original_caption"


class Found(NamedTuple):
    """What one shard holds: numbers a sample, so that millions of samples fit into memory."""
    entry: dict                             # of index.json
    sizes: np.ndarray                       # int32 [samples, 2]: width, height
    words: np.ndarray                       # int32 [samples, 2]: of CAPTIONS; -1: there is none
    keys: np.ndarray                        # uint64 [samples]: the first bytes of a hash
    formats: Counter
    problems: list                          # (what is wrong, with which sample)


def look(path):
    """Read a shard whole."""
    entry = packing.index_entry(path)
    offsets, sizes, words, keys, formats, problems = entry["offsets"], [], [], [], Counter(), []
    with open(path, "rb") as tar:
        for i in range(len(offsets) - 1):
            key, files = read_sample(tar, offsets, i)
            words.append([len(files[f"{kind}.txt"].decode(errors="replace").split())
                          if f"{kind}.txt" in files else -1 for kind in CAPTIONS])
            keys.append(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()))
            size, kind, wrong = look_at(files)
            sizes.append(size)
            formats[kind] += 1
            if max(words[-1]) < 1:
                wrong = wrong or "no caption"
            if wrong:
                problems.append((wrong, f"{key} of {path.name}"))
        if not ends_well(tar, offsets[-1]):
            problems.append(("the shard is damaged or cut short",
                             f"{path.name} at byte {offsets[-1]:,}, after {len(keys)} samples"))
    return Found(entry, np.array(sizes, np.int32).reshape(-1, 2), np.array(words, np.int32
                 ).reshape(-1, 2), np.array(keys, np.uint64), formats, problems)


def look_at(files):
    """(size, format, what is wrong or None) of a sample's picture, decoded to its end."""
    name = next((k for k in files if k.startswith("image.")), None)
    if name is None:
        return (0, 0), "none", "no image"
    size, kind = (0, 0), "unknown"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(files[name]), formats=FORMATS)
        size, kind = image.size, image.format
        image.draft("L", (1, 1))            # a JPEG at an eighth: little but the reading is left
        image.load()
    except MemoryError:
        raise
    except Exception:                       # Pillow raises a dozen kinds on broken files
        return size, kind, "damaged image"
    return size, kind, None


def shards_of(folder):
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FuseDiTError(f"no *.tar in {folder}, which must be a folder of them")
    return tars


def check(args):
    tars = shards_of(args.folder)
    found, seen = {}, 0
    with tqdm(unit="image", desc="reading", disable=None, smoothing=0.05) as bar:
        for event in packing.in_parallel(look, tars, args.workers):
            if event:
                found[event[0]], seen = event[1], seen + len(event[1].keys)
                bar.total = seen * len(tars) // len(found)
                bar.update(seen - bar.n)
    found = [found[path] for path in tars]
    problems = Counter(what for f in found for what, _ in f.problems)
    tell(found, problems)
    twice, examples = duplicates(tars, found)
    for what, n in problems.items():
        who = [name for f in found for kind, name in f.problems if kind == what]
        print(f"{n} x {what}: {', '.join(who[:5])}" + (f" and {n - 5} more" if n > 5 else ""))
    if twice:
        print(f"{twice} keys come more than once, as {', '.join(examples)}")
    print(repair(args.folder, [f.entry for f in found]))
    if args.grid:
        sheet(args.grid, tars, found)
    return 1 if problems or twice else 0


def tell(found, problems):
    """Counts, sizes, resolutions and lengths on stdout."""
    samples, size = sum(len(f.keys) for f in found), sum(f.entry["bytes"] for f in found)
    formats = sum((f.formats for f in found), Counter())
    print(f"{samples:,} samples in {len(found)} shards, {size / 1e9:.3f} GB, of which "
          f"{sum(problems.values()):,} problems; "
          + ", ".join(f"{n:,} {kind}" for kind, n in formats.most_common()))
    sizes = np.concatenate([f.sizes for f in found])
    sizes = sizes[sizes[:, 0] > 0]
    if len(sizes):
        short, aspect = sizes.min(1), sizes.max(1) / sizes.min(1)
        print(f"shorter side: {spread(short)} pixels; longer / shorter: {spread(aspect)}")
    for kind, n in zip(CAPTIONS, np.concatenate([f.words for f in found]).T, strict=True):
        print(f"{kind}: {(n >= 0).sum():,}" + (f", of {spread(n[n >= 0])} words"
                                               if (n >= 0).any() else ""))


def spread(n):
    low, middle, high = np.percentile(n, [5, 50, 95])
    return (f"{n.min():.4g} to {n.max():.4g}, median {middle:.4g}, 90 % from {low:.4g} to "
            f"{high:.4g}")


def duplicates(tars, found):
    """How many keys more than one sample has, and five of them."""
    every = np.concatenate([f.keys for f in found])
    hashes, counts = np.unique(every, return_counts=True)
    again, names = hashes[counts > 1], []
    for one in again[:5]:
        k = next(k for k, f in enumerate(found) if one in f.keys)
        with open(tars[k], "rb") as tar:
            at = int(np.flatnonzero(found[k].keys == one)[0])
            names.append(read_sample(tar, found[k].entry["offsets"], at)[0])
    return len(again), names


# ---- the index -----------------------------------------------------------------------------------

def index(args):
    tars, entries = shards_of(args.folder), {}
    with tqdm(total=len(tars), unit="shard", desc="indexing", disable=None) as bar:
        for event in packing.in_parallel(packing.index_entry, tars, args.workers):
            if event:
                entries[event[0]] = event[1]
                bar.update()
    entries = [entries[path] for path in tars]
    for entry in entries:
        with open(args.folder / entry["name"], "rb") as tar:
            if not ends_well(tar, entry["offsets"][-1]):
                print(f"{entry['name']} is damaged or cut short at byte "
                      f"{entry['offsets'][-1]:,}, after {entry['samples']} samples",
                      file=sys.stderr)
    if not sum(e["samples"] for e in entries):
        raise FuseDiTError(f"{args.folder}: no sample in any of {len(tars)} shards")
    print(f"{packing.write_index(args.folder, entries)} samples in {len(tars)} shards: "
          f"{args.folder}/index.json")


def repair(folder, entries):
    """Write index.json and offsets.npy where they are not what they should be; says so."""
    index = packing.read_json_or_none(folder / "index.json")
    try:
        same = [packing.same_shard(e) for e in index["shards"]] == [
            packing.same_shard(e) for e in entries] and np.array_equal(
                np.load(folder / "offsets.npy"), np.concatenate([e["offsets"] for e in entries]))
    except (TypeError, KeyError, AttributeError, OSError, ValueError):
        same = False                        # there is none, or what is there is something else
    if same:
        return f"{folder}/index.json is right"
    packing.write_index(folder, entries)
    return f"{folder}/index.json was {'wrong' if index else 'missing'}: written anew"


# ---- a sheet -------------------------------------------------------------------------------------

def sheet(out, tars, found, columns=6, rows=4, side=192, lines=4):
    """Samples from anywhere, with what is said of them, as one picture."""
    places = [(path, f.entry["offsets"], i) for path, f in zip(tars, found, strict=True)
              for i in range(0, len(f.keys), max(1, len(f.keys) // (columns * rows)))]
    places = random.Random(0).sample(places, min(len(places), columns * rows))
    font, high = ImageFont.load_default(12), side + 15 * lines + 8
    page = Image.new("RGB", (columns * (side + 8) + 8, -(-len(places) // columns) * high + 8),
                     "white")
    for n, (path, offsets, i) in enumerate(places):
        x, y = n % columns * (side + 8) + 8, n // columns * high + 8
        with open(path, "rb") as tar:
            key, files = read_sample(tar, offsets, i)
        text = next((files[f"{k}.txt"].decode(errors="replace") for k in CAPTIONS
                     if f"{k}.txt" in files), "(no caption)")
        try:
            data = next(v for k, v in files.items() if k.startswith("image."))
            page.paste(Image.fromarray(read_square(data, side).movedim(0, -1).numpy()), (x, y))
        except Exception:
            text = f"({key} cannot be drawn) {text}"
        ImageDraw.Draw(page).multiline_text((x, y + side + 2), "\n".join(textwrap.wrap(
            text, 31, max_lines=lines, placeholder=" ...")), "black", font)
    with atomic_write(out) as tmp:
        page.save(tmp, "PNG")
    print(f"{len(places)} samples drawn: {out}")

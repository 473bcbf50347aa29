"""`prepare_data.py check`: reports the contents and problems of shards and draws samples."""
import functools
import hashlib
import random
import sys
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from fusedit_lib.data import packing
from fusedit_lib.data.images import Notes, Skip, decode, open_image, read_square
from fusedit_lib.data.index import list_tars, print_layout_problems, repair_index, scan_shard
from fusedit_lib.data.layout import (
    LayoutCounts,
    LayoutError,
    caption_lines,
    find_captions,
    find_image,
    general_name,
    pick_caption,
)
from fusedit_lib.data.shards import ends_well, read_sample
from fusedit_lib.files import atomic_write

EXAMPLES = 5                                # number of examples printed for each problem


class Problem(NamedTuple):
    """Something wrong with a sample or a shard."""
    kind: str                               # such as "no caption"
    where: str                              # names the sample or the shard


class ShardContents(NamedTuple):
    """A summary of a shard: a few numbers per sample, so that millions fit in memory."""
    path: Path
    entry: dict                             # packing.index_entry
    sizes: np.ndarray                       # int32 [samples,2] width and height; 0: unknown
    counts: LayoutCounts                    # of its images and captions, and of what is missing
    words: dict                             # {source of captions: int32, words of each caption}
    keys: np.ndarray                        # uint64 [samples] a hash of the key
    formats: Counter                        # number of samples by image format
    problems: list                          # of Problem, besides those of `counts`
    notes: list                             # of Problem: flaws of images that are readable


# ------------------------------------------------------------------------------ reading

def check_image(data):
    """Decode the bytes of an image completely; returns (size, format, problem or "").

    data: None for a sample without an image.
    """
    if data is None:
        return (0, 0), "none", ""
    size = (0, 0)
    kind = "unknown"
    try:
        image = open_image(data)
        size = image.size
        kind = image.format
        image.draft("L", (1, 1))            # decodes a JPEG at 1/8 of its size, reading all of it
        decode(image)
    except Skip as reason:
        return size, kind, str(reason)
    return size, kind, ""


def count_words(files, caption_key):
    """{source: words of each of its captions} of a sample; {} if it has none."""
    try:
        captions = find_captions(files, caption_key)
    except LayoutError:                     # which scan_shard has counted
        return {}
    words = {}
    for source, text in captions.items():
        words[general_name(source)] = [len(line.split()) for line in caption_lines(text)]
    return words


def read_shard(path, image_key, caption_key):
    """Read a shard completely; returns its ShardContents."""
    entry, counts = scan_shard(path, image_key, caption_key)
    offsets = entry["offsets"]
    sizes = []
    words = {}
    keys = []
    formats = Counter()
    problems = []
    notes = []
    with open(path, "rb") as tar, Notes() as image_notes:
        for i in range(len(offsets) - 1):
            key, files = read_sample(tar, offsets, i)
            key_hash = hashlib.blake2b(key.encode(), digest_size=8).digest()
            keys.append(int.from_bytes(key_hash))
            for source, lengths in count_words(files, caption_key).items():
                words.setdefault(source, []).extend(lengths)
            try:
                data = files[find_image(files, image_key)]
            except LayoutError:             # which scan_shard has counted
                data = None
            size, kind, problem = check_image(data)
            kinds = image_notes.take()
            if not problem:
                notes += [Problem(note, f"{key} of {path.name}") for note in kinds]
            sizes.append(size)
            formats[kind] += 1
            if problem:
                problems.append(Problem(problem, f"{key} of {path.name}"))
        if not ends_well(tar, offsets[-1]):
            where = f"{path.name} at byte {offsets[-1]:,}, after {len(keys)} samples"
            problems.append(Problem("damaged or truncated shard", where))
    return ShardContents(
        path=path,
        entry=entry,
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        counts=counts,
        words={source: np.array(lengths, np.int32) for source, lengths in words.items()},
        keys=np.array(keys, np.uint64),
        formats=formats,
        problems=problems,
        notes=notes,
    )


def read_shards(tars, args):
    """The ShardContents of every tar, in the same order, with a progress bar."""
    read = partial(read_shard, image_key=args.image_key, caption_key=args.caption_key)
    contents = {}
    samples = 0
    bar = tqdm(unit="image", desc="reading", disable=None, smoothing=0.05)
    with bar, packing.in_parallel(read, tars, args.workers) as events:
        for event in events:
            if event:
                path, shard = event
                contents[path] = shard
                samples += len(shard.keys)
                bar.total = samples * len(tars) // len(contents)       # an estimate
                bar.update(samples - bar.n)
    return [contents[path] for path in tars]


# ------------------------------------------------------------------------------ the command

def check(args):
    """Run `prepare_data.py check`; returns the exit code, 1 if there are problems.

    Prints a report, repairs the index and, if args.grid (a Path) is set, draws samples.
    """
    shards = read_shards(list_tars(args.folder), args)
    problems = sum((shard.problems for shard in shards), [])
    counts = LayoutCounts()
    for shard in shards:
        counts.merge(shard.counts)
    total = len(problems) + counts.problems.total()
    print_contents(shards, total)
    print(counts.summary())
    print_problems(problems)
    print_problems(sum((shard.notes for shard in shards), []))
    print_layout_problems(counts, sys.stdout)
    repeated, examples = duplicate_keys(shards)
    if repeated:
        print(f"{repeated} keys occur more than once, such as {', '.join(examples)}")
    if counts.samples and not counts.usable:
        print(f"{args.folder}/index.json is not written: {counts.unusable()}")
    else:
        if counts.too_few():
            print(counts.too_few())
        print(repair_index(args.folder, [shard.entry for shard in shards]))
    if args.grid:
        write_image_grid(args.grid, shards, args)
    if total or repeated:
        return 1
    return 0


def print_problems(problems):
    """Print, for each kind of Problem, their number and the names of the first few."""
    by_kind = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem.where)
    for kind, names in by_kind.items():
        more = ""
        if len(names) > EXAMPLES:
            more = f" and {len(names) - EXAMPLES} more"
        print(f"{len(names)} x {kind}: {', '.join(names[:EXAMPLES])}{more}")


def print_contents(shards, problems):
    """Print counts, formats, image sizes and caption lengths; problems: the number of problems."""
    samples = sum(len(shard.keys) for shard in shards)
    size = sum(shard.entry["bytes"] for shard in shards)
    formats = sum((shard.formats for shard in shards), Counter())
    formats = ", ".join(f"{count:,} {kind}" for kind, count in formats.most_common())
    print(f"{samples:,} samples in {len(shards)} shards, {size / 1e9:.3f} GB, {problems:,} "
          f"problems; {formats}")

    sizes = np.concatenate([shard.sizes for shard in shards])
    sizes = sizes[sizes[:, 0] > 0]
    if len(sizes):
        shorter = sizes.min(1)
        aspect = sizes.max(1) / shorter
        print(f"shorter side: {distribution(shorter)} pixels; longer / shorter: "
              f"{distribution(aspect)}")

    words = {}
    for shard in shards:
        for source, lengths in shard.words.items():
            words.setdefault(source, []).append(lengths)
    for source, parts in words.items():
        lengths = np.concatenate(parts)
        name = source.removesuffix(".txt")
        print(f"{name}: {len(lengths):,}, length {distribution(lengths)} words")


def distribution(values):
    """The range, median and central 90 % of numbers, as text."""
    low, median, high = np.percentile(values, [5, 50, 95])
    return (f"{values.min():.4g} to {values.max():.4g}, median {median:.4g}, 90 % from {low:.4g} "
            f"to {high:.4g}")


def duplicate_keys(shards):
    """(number of keys that occur more than once, the first few of them)"""
    hashes = np.concatenate([shard.keys for shard in shards])
    hashes, counts = np.unique(hashes, return_counts=True)
    repeated = hashes[counts > 1]
    examples = []
    for key_hash in repeated[:EXAMPLES]:
        shard = next(shard for shard in shards if key_hash in shard.keys)
        i = int(np.flatnonzero(shard.keys == key_hash)[0])
        key, _ = read_shard_sample(shard, i)
        examples.append(key)
    return len(repeated), examples


def read_shard_sample(shard, i):
    """(key, files) of sample i of a ShardContents."""
    with open(shard.path, "rb") as tar:
        return read_sample(tar, shard.entry["offsets"], i)


# ------------------------------------------------------------------------------ image grid

CAPTION_LINES = 4
LINE_HEIGHT = 15                            # pixels, at a font size of 12
MARGIN = 8

# Fonts with letters of many scripts. Pillow looks for them where the system keeps its fonts.
FONTS = "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"


@functools.cache
def caption_font():
    """The first of FONTS that the system has, or Pillow's own, which has little beyond ASCII."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, 11)
        except OSError:
            continue
    return ImageFont.load_default(12)


def wrap_to_width(text, font, width):
    """The first CAPTION_LINES lines of a text, none wider than `width` pixels."""
    lines = []
    while text and len(lines) < CAPTION_LINES:
        end = min(len(text), width)         # no letter is narrower than a pixel
        while font.getlength(text[:end]) > width:
            end -= 1
        if end < len(text) and " " in text[:end + 1].strip():
            end = text.rindex(" ", 0, end + 1)
        lines.append(text[:end])
        text = text[end:].strip()
    if text:
        lines[-1] = lines[-1][:-3] + "..."
    return lines


def draw_sample(page, corner, side, sample, args):
    """Draw a sample's image with a caption below, both as in training. Returns the caption.

    corner: (x, y) of its upper-left corner; sample: (key, files).
    """
    key, files = sample
    try:
        texts = list(find_captions(files, args.caption_key).values())
        text = pick_caption(texts[0], "random", random.Random(key))
    except LayoutError as e:
        text = f"({e})"
    try:
        data = files[find_image(files, args.image_key)]
        pixels = read_square(data, side)    # [3,side,side]
        page.paste(Image.fromarray(pixels.movedim(0, -1).numpy()), corner)
    except (Skip, LayoutError) as e:
        text = f"({key} cannot be drawn: {e}) {text}"
    x, y = corner
    font = caption_font()
    lines = wrap_to_width(text, font, side)
    ImageDraw.Draw(page).multiline_text((x, y + side + 2), "\n".join(lines), "black", font)
    return text


def write_image_grid(out, shards, args, columns=6, rows=4, side=192):
    """Write a PNG of random samples, each side x side pixels, and print what it shows."""
    count = columns * rows
    # at least `count` of each shard (all of a smaller one), evenly spaced
    candidates = []
    for shard in shards:
        samples = len(shard.keys)
        stride = max(1, samples // count)
        candidates += [(shard, i) for i in range(0, samples, stride)]
    chosen = random.Random(0).sample(candidates, min(len(candidates), count))

    cell_width = side + MARGIN
    cell_height = side + LINE_HEIGHT * CAPTION_LINES + MARGIN
    used_rows = -(-len(chosen) // columns)
    size = (columns * cell_width + MARGIN, used_rows * cell_height + MARGIN)
    page = Image.new("RGB", size, "white")
    for n, (shard, i) in enumerate(chosen):
        row, column = divmod(n, columns)
        corner = (column * cell_width + MARGIN, row * cell_height + MARGIN)
        sample = read_shard_sample(shard, i)
        caption = draw_sample(page, corner, side, sample, args)
        # The terminal shows scripts that the font lacks.
        print(f"row {row + 1}, column {column + 1}: {sample[0]} of {shard.path.name}: "
              f"{textwrap.shorten(caption, 100)}")
    with atomic_write(out) as tmp:
        page.save(tmp, "PNG")
    print(f"image grid of {len(chosen)} samples: {out}")

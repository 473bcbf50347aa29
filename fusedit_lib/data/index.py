"""Writes and repairs the index.json and offsets.npy of a shard folder: `prepare_data.py index`.

shards.py, which reads the two files, describes their contents.
"""
import os
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.layout import NOT_ADJACENT, REMEDIES, REPEATED, LayoutCounts
from fusedit_lib.data.shards import ends_well, scan_tar


class ScannedShard(NamedTuple):
    """A shard's entry in the index (packing.index_entry), and what its samples contain."""
    entry: dict
    counts: LayoutCounts


class FilesInTar(dict):
    """The files of a TarSample as {extension: bytes}, each read from an open tar when needed."""

    def __init__(self, tar, sample):
        super().__init__(sample.files)
        self.tar = tar

    def __getitem__(self, extension):
        offset, size = super().__getitem__(extension)
        return os.pread(self.tar.fileno(), size, offset)


def scan_shard(path, image_key, caption_key):
    """The ScannedShard of a tar. Its captions are read, its images are not."""
    counts = LayoutCounts()
    samples, end = scan_tar(path)
    keys = set()
    with open(path, "rb") as tar:
        for sample in samples:
            where = f"{sample.key} of {path.name}"
            counts.add(where, FilesInTar(tar, sample), image_key, caption_key)
            if sample.repeated:
                counts.add_problem(REPEATED, f"{sample.key}.{sample.repeated[0]} of {path.name}")
            if sample.key in keys:
                counts.add_problem(NOT_ADJACENT, where)
            keys.add(sample.key)
    offsets = np.array([*(sample.offset for sample in samples), end])
    return ScannedShard(packing.index_entry(path, offsets), counts)


def print_layout_problems(counts, file):
    """Print, for each kind of problem with the layout, a line with its remedy."""
    for kind, count in counts.problems.most_common():
        examples = ", ".join(counts.examples[kind])
        if count > len(counts.examples[kind]):
            examples += f" and {count - len(counts.examples[kind]):,} more"
        print(f"{count:,} x {kind}: {examples}. {REMEDIES[kind]}", file=file)


def list_tars(folder):
    """The sorted tars of a folder (a Path). Raises FuseDiTError if there are none."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FuseDiTError(f"no *.tar in {folder}: give a folder of shards")
    return tars


def index(args):
    """Run `prepare_data.py index`: write both files for the tars of args.folder.

    Prints what the samples contain. Damaged tars are reported on stderr and indexed up to the
    damage. Raises FuseDiTError, without writing, if no sample can be trained on.
    """
    tars = list_tars(args.folder)
    scan = partial(scan_shard, image_key=args.image_key, caption_key=args.caption_key)
    scanned = {}
    bar = tqdm(total=len(tars), unit="shard", desc="indexing", disable=None)
    with bar, packing.in_parallel(scan, tars, args.workers) as events:
        for event in events:
            if event:
                path, shard = event
                scanned[path] = shard
                bar.update()
    entries = [scanned[path].entry for path in tars]
    counts = LayoutCounts()
    for path in tars:
        counts.merge(scanned[path].counts)

    for path, entry in zip(tars, entries, strict=True):
        end = entry["offsets"][-1]
        with open(path, "rb") as tar:
            whole = ends_well(tar, end)
        if not whole:
            print(f"{path.name} is damaged or truncated at byte {end:,}, after "
                  f"{entry['samples']} samples", file=sys.stderr)
    if not counts.samples:
        raise FuseDiTError(f"{args.folder}: no samples in any of {len(tars)} shards")
    if not counts.usable:
        raise FuseDiTError(f"{args.folder}: {counts.unusable()}")
    print_layout_problems(counts, sys.stderr)
    if counts.too_few():
        print(counts.too_few(), file=sys.stderr)
    samples = packing.write_index(args.folder, entries)
    print(counts.summary())
    print(f"{samples} samples in {len(tars)} shards: {args.folder}/index.json")


def is_correct(folder, index, entries):
    """True if `index` (the content of index.json) and offsets.npy agree with `entries`."""
    try:
        listed = [packing.same_shard(shard) for shard in index["shards"]]
        stored = np.load(folder / "offsets.npy")
    except (TypeError, KeyError, AttributeError, OSError, ValueError):
        return False                        # a file is missing or has some other content
    actual = [packing.same_shard(entry) for entry in entries]
    offsets = np.concatenate([entry["offsets"] for entry in entries])
    return listed == actual and np.array_equal(stored, offsets)


def repair_index(folder, entries):
    """Rewrite both files if they are missing or wrong; returns a line that reports this.

    entries: packing.index_entry of each tar of the folder.
    """
    index = packing.read_json_or_none(folder / "index.json")
    if is_correct(folder, index, entries):
        return f"{folder}/index.json is correct"
    packing.write_index(folder, entries)
    problem = "missing"
    if index:
        problem = "wrong"
    return f"{folder}/index.json was {problem} and has been rewritten"

"""Writes and repairs the index.json and offsets.npy of a shard folder: `prepare_data.py index`.

shards.py, which reads the two files, describes their contents.
"""
import sys

import numpy as np
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.shards import ends_well


def list_tars(folder):
    """The sorted tars of a folder (a Path). Raises FuseDiTError if there are none."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FuseDiTError(f"no *.tar in {folder}: give a folder of shards")
    return tars


def index(args):
    """Run `prepare_data.py index`: write both files for the tars of args.folder.

    Damaged tars are reported on stderr and indexed up to the damage. Raises FuseDiTError if no
    sample can be read at all.
    """
    tars = list_tars(args.folder)
    entries = {}
    with tqdm(total=len(tars), unit="shard", desc="indexing", disable=None) as bar:
        for event in packing.in_parallel(packing.index_entry, tars, args.workers):
            if event:
                path, entry = event
                entries[path] = entry
                bar.update()
    entries = [entries[path] for path in tars]

    for path, entry in zip(tars, entries, strict=True):
        end = entry["offsets"][-1]
        with open(path, "rb") as tar:
            whole = ends_well(tar, end)
        if not whole:
            print(f"{path.name} is damaged or truncated at byte {end:,}, after "
                  f"{entry['samples']} samples", file=sys.stderr)
    if not any(entry["samples"] for entry in entries):
        raise FuseDiTError(f"{args.folder}: no samples in any of {len(tars)} shards")
    samples = packing.write_index(args.folder, entries)
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

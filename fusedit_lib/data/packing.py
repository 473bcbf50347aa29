"""The engine under prepare_data.py: items to shards, on all cores, in one go or in ten.

    settings = packing.begin(args, ...)                    # a new OUT, or one that was begun so
    packing.pack(args, name, shards, make)

A Shard is one job of one process: its items, in order, through make(item) into a tar. Which items
a shard has is settled before the first one is packed, so its bytes depend on nothing else, least
of all on the number of processes. OUT/.progress holds a record of each finished shard: a run that
was killed goes on with the others. At last report.json says what became of every input,
index.json lists the shards for the loader, and OUT/.progress goes.
"""
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from fusedit import FuseDiTError
from fusedit_lib.data.images import Skip
from fusedit_lib.data.shards import sample_offsets
from fusedit_lib.files import atomic_write

OURS = re.compile(r"\.?(index\.json|offsets\.npy|report\.json|[a-z0-9-]+-\d{6}"
                  r"\.(tar|latents\.safetensors))(\.\d+\.tmp)?|\.progress")


class Shard(NamedTuple):
    """One job: what goes into one tar, a list or what yields the items where they are packed."""
    path: Path
    items: object


# ---- a shard, by one process ---------------------------------------------------------------------

packed = multiprocessing.Value("q")         # items so far, of all processes


def start_process(parent):
    """Ctrl-C is the parent's to handle; and no worker outlives it, whatever kills it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def write_shard(make, shard):
    """Write a tar of make(item) -> sample, and then its record: with that, the shard is done."""
    skipped, inputs, last = [], 0, None
    with atomic_write(shard.path) as tmp:
        with open(tmp, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for item in shard.items:
                inputs += 1
                try:
                    sample = make(item)
                    if sample["__key__"] == last:          # who reads would take them for one
                        raise Skip("same key as the one before")
                    tar.write(sample)
                    last = sample["__key__"]
                except Skip as why:
                    skipped.append((str(why), str(item)))
                with packed.get_lock():
                    packed.value += 1
    entry = index_entry(shard.path)
    if not entry["samples"]:
        shard.path.unlink()
    with atomic_write(record(shard)) as tmp:
        tmp.write_text(json.dumps(entry | dict(offsets=entry["offsets"].tolist(), inputs=inputs,
                                               skipped=skipped)))


def index_entry(path):
    """A tar's name, samples, bytes, and the offsets of its samples."""
    offsets = sample_offsets(path)
    return dict(name=path.name, samples=len(offsets) - 1, bytes=path.stat().st_size,
                offsets=offsets)


def record(shard):
    return shard.path.parent / ".progress" / f"{shard.path.stem}.json"


def finished(shard):
    """The record of a finished shard, or None."""
    try:
        entry = json.loads(record(shard).read_text())
        return entry if not entry["samples"] or (
            shard.path.stat().st_size == entry["bytes"]) else None
    except (OSError, ValueError):
        return None


def in_parallel(function, jobs, workers):
    """function(job) of all jobs, on `workers` processes, in any order.

    Yields about three times a second, and after every job: (job, result), or None meanwhile.
    """
    if workers == 1 or not jobs:            # in this process
        for job in jobs:
            yield job, function(job)
        return
    workers = min(workers, len(jobs))
    fork = multiprocessing.get_context("fork")             # they share `packed`, and start at once
    with ProcessPoolExecutor(workers, fork, start_process, [os.getpid()]) as pool:
        waiting = {pool.submit(function, job): job for job in jobs}
        try:
            while waiting:
                for future in wait(waiting, 0.3, FIRST_COMPLETED)[0]:
                    yield waiting.pop(future), future.result()
                yield None
        except BrokenProcessPool:
            raise FuseDiTError("a worker died (out of memory?): lower --workers") from None
        except BaseException:               # Ctrl-C, a full disk: do not wait for the others
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- the whole run -------------------------------------------------------------------------------

def begin(args, **settings):
    """Open OUT for a run whose output `settings` decide. Returns False where all is done already.

    A run that stopped goes on if its settings were these. Nothing else is touched, unless
    --overwrite is given, and then only what a run has written.
    """
    out, progress = args.out, args.out / ".progress"
    said = json.loads(json.dumps(settings, default=str))
    if out.exists() and not out.is_dir():
        raise FuseDiTError(f"{out} is a file; OUT must be a folder")
    found = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if args.overwrite:
        found = [name for name in found if not OURS.fullmatch(name)]
        if not found:
            remove(out)
    elif "index.json" in found and read(out / "report.json", "settings") == said:
        shutil.rmtree(progress, ignore_errors=True)
        print(f"{out} is finished: {read(out / 'report.json', 'outputs')} images, by this command")
        return False
    elif "index.json" not in found and (before := read(progress / "settings.json")) is not None:
        if before != said:
            other = ", ".join(f"{k} {before.get(k)}, now {said.get(k)}"
                              for k in sorted(before | said) if before.get(k) != said.get(k))
            raise FuseDiTError(f"{out} was begun otherwise ({other}): go on as it was begun, give "
                               "a new folder, or --overwrite")
        for name in found:                  # what a killed run was at
            if name.endswith(".tmp") and OURS.fullmatch(name):
                (out / name).unlink()
        return True
    if found and found != [".progress"]:
        state = "finished shards" if "index.json" in found else f"{found[0]}, not a run to go on"
        raise FuseDiTError(f"{out} is not empty (it holds {state}); give a new folder" + (
            ", as --overwrite only replaces shards" if args.overwrite else
            " or --overwrite, which replaces shards and what lists them"))
    progress.mkdir(parents=True, exist_ok=True)
    with atomic_write(progress / "settings.json") as tmp:
        tmp.write_text(json.dumps(said))
    return True


def read(path, key=None):
    """The content of a JSON file, or of its one key; None where there is none."""
    try:
        content = json.loads(path.read_text())
        return content if key is None else content.get(key)
    except (OSError, ValueError):
        return None


def remove(out):
    """Delete what a run has written, and nothing else."""
    for path in out.iterdir() if out.is_dir() else ():
        if path.name == ".progress":
            shutil.rmtree(path)
        elif OURS.fullmatch(path.name):
            path.unlink()


def pack(args, name, jobs, make, skipped=(), total=None, **more):
    """Pack the jobs (items of each shard) that are not packed yet; then report and index.

    skipped: [(why, key)] of inputs that came into no shard. total: of all items, where it is
    known. more: what else report.json is to say.
    """
    shards = [Shard(args.out / f"{name}-{k:06d}.tar", items) for k, items in enumerate(jobs)]
    before = {shard.path: entry for shard in shards if (entry := finished(shard))}
    todo = [shard for shard in shards if shard.path not in before]
    have, done = sum(e["inputs"] for e in before.values()), len(before)
    if done:
        print(f"{done} of {len(shards)} shards are packed already", file=sys.stderr)
    packed.value = have
    try:
        with tqdm(total=total, initial=have, unit="image", desc="packing", smoothing=0.05,
                  disable=None) as bar:
            for event in in_parallel(partial(write_shard, make), todo, args.workers):
                done += event is not None
                if not total and done:      # as many in the others as in those that are done
                    bar.total = packed.value * len(shards) // done
                bar.update(packed.value - bar.n)
    except BaseException:
        done = sum(finished(shard) is not None for shard in shards)
        print(f"stopped; {done} of {len(shards)} shards are packed, and the same command goes on "
              "from there", file=sys.stderr)
        raise
    finish(args.out, [finished(shard) for shard in shards], skipped, more)


def finish(out, entries, skipped, more):
    """report.json, offsets.npy and, last of all, index.json."""
    outputs = sum(e["samples"] for e in entries)
    inputs = len(skipped) + sum(e["inputs"] for e in entries)
    skipped = [*skipped, *(skip for entry in entries for skip in entry["skipped"])]
    assert inputs == outputs + len(skipped)
    reasons = Counter(why for why, _ in skipped).most_common()
    keys = {why: [key for reason, key in skipped if reason == why] for why, _ in reasons}
    tell(keys)
    settings = read(out / ".progress" / "settings.json")
    if not outputs:
        remove(out)
        raise FuseDiTError(f"nothing to pack: all {len(skipped)} were skipped, see above")
    with atomic_write(out / "report.json") as tmp:
        tmp.write_text(json.dumps(dict(
            settings=settings, inputs=inputs, outputs=outputs, skipped=dict(reasons)) | more | dict(
            skipped_keys=keys), indent=1) + "\n")
    entries = [e for e in entries if e["samples"]]
    write_index(out, entries)
    shutil.rmtree(out / ".progress")
    print(f"{inputs} inputs = {outputs} images in {len(entries)} shards + {len(skipped)} skipped: "
          f"{out}/*.tar, {out}/report.json")


def write_index(out, entries):
    """offsets.npy and then index.json, of index_entry's dicts; returns the number of samples.

    Latents that an index.json knows of shards that are the same stay known.
    """
    with atomic_write(out / "offsets.npy") as tmp, open(tmp, "wb") as file:
        np.save(file, np.concatenate([e["offsets"] for e in entries]))
    known = {same_shard(e): e["latents"] for e in read(out / "index.json", "shards") or ()
             if "latents" in e}
    entries = [dict(zip(("name", "samples", "bytes"), same_shard(e), strict=True)) | (
        dict(latents=known[same_shard(e)]) if same_shard(e) in known else {}) for e in entries]
    samples = sum(e["samples"] for e in entries)
    with atomic_write(out / "index.json") as tmp:
        tmp.write_text(json.dumps(dict(shards=entries, samples=samples), indent=1) + "\n")
    return samples


def same_shard(entry):
    return entry["name"], entry["samples"], entry["bytes"]


def tell(skipped):
    """Say on stderr how many inputs were left out, why, and which were the first."""
    for why, keys in skipped.items():
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        print(f"skipped {len(keys)}: {why}: {', '.join(keys[:5])}{more}", file=sys.stderr)

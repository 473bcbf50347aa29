"""Packs items into shards for prepare_data.py, in parallel, and resumes interrupted runs.

    if packing.begin(args, **settings):          # a new OUT, or an interrupted run to resume
        packing.pack(args, name, jobs, make)

Each process packs one shard at a time: it converts the shard's items, in order, to samples with
make(item) and writes them to a tar. Items are assigned to shards before packing begins, so the
bytes of a shard depend only on its items and not, for example, on the number of processes.

OUT/.progress contains a record of every finished shard. After an interruption, the next run reads
these records and packs only the remaining shards. At the end, report.json accounts for every input,
index.json lists the shards for the data loader, and OUT/.progress is deleted.

To skip duplicates, every image is packed first, and OUT/.progress contains the hash of its pixels.
When all shards are packed, those with an image that an earlier input has shown are written again,
without it. So the bytes again depend only on the items.
"""
import contextlib
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
from fusedit_lib.backend import printable
from fusedit_lib.data.filters import DUPLICATE, find_duplicates, read_images, write_images
from fusedit_lib.data.images import Notes, Skip
from fusedit_lib.data.shards import read_sample, sample_offsets
from fusedit_lib.files import atomic_write, fsync

# The names of everything that a run writes to OUT, including temporary files.
OUTPUT_NAME = re.compile(
    r"\.?(index\.json|offsets\.npy|report\.json|[a-z0-9-]+-\d{6}\.(tar|latents\.safetensors))"
    r"(\.\d+\.tmp)?|\.progress")

# An empty file in OUT/.progress, if the run has created OUT.
NEW_FOLDER = "new-folder"

# The number of items that all processes together have packed or skipped so far. pack() creates this
# shared counter before it forks the workers, which inherit it.
_items_done = None


class ShardJob(NamedTuple):
    """A tar to be written by one process."""
    path: Path
    items: object      # iterable; if lazy, the process that packs the shard reads it


# ---------------------------------------------------------------------------- one shard
def write_shard(make, skip_duplicates, shard):
    """Write the tar of a ShardJob and then its record, which marks the shard as finished.

    make(item) returns a sample, a dict for WebDataset's TarWriter, or raises Skip. Names that begin
    with "__" are not written to the tar: see make_sample.
    """
    skipped = []
    noted = []
    images = []                             # PackedImages, to skip duplicates
    inputs = 0
    several = []                            # [number of the sample, name of its input]
    with Notes() as notes, atomic_write(shard.path) as tmp:
        with open_tar(tmp) as tar:
            last_key = None
            samples = 0
            for item in shard.items:
                inputs += 1
                try:
                    sample = make(item)
                    if sample["__key__"] == last_key:      # they would be read as one sample
                        raise Skip("same key as the one before")
                    tar.write(sample)
                    last_key = sample["__key__"]
                    if has_several_captions(sample):
                        several.append([samples, str(item)])
                    samples += 1
                    kinds = notes.take() + sample.get("__notes__", [])
                    noted += [(kind, str(item)) for kind in kinds]
                    if skip_duplicates:
                        images.append(sample["__image__"])
                except Skip as reason:
                    skipped.append((str(reason), str(item)))
                    notes.take()            # a skipped image has no notes
                with _items_done.get_lock():
                    _items_done.value += 1

    if skip_duplicates:
        with atomic_write(images_path(shard)) as tmp:
            write_images(images, tmp)
    write_record(shard, inputs=inputs, skipped=skipped, notes=noted, several_captions=several)


def leave_out(job):
    """Write the tar and the record of a finished shard again, without some of its samples.

    job: (ShardJob, {sample: name in the report}).
    """
    shard, duplicates = job
    record = read_record(shard)
    # A run that is killed below packs this shard again, since the tar would not match the record.
    record_path(shard).unlink()
    fsync(record_path(shard).parent)
    several = [[i, name] for i, name in record["several_captions"] if i not in duplicates]
    with atomic_write(shard.path) as tmp:
        with open(shard.path, "rb") as file, open_tar(tmp) as tar:
            for i in range(record["samples"]):
                if i not in duplicates:
                    key, files = read_sample(file, record["offsets"], i)
                    tar.write({"__key__": key, **files})
    skipped = record["skipped"] + [(DUPLICATE, name) for name in duplicates.values()]
    images = read_images(images_path(shard))
    gone = {images[i].name for i in duplicates}
    notes = [(kind, name) for kind, name in record["notes"] if name not in gone]
    write_record(shard, inputs=record["inputs"], skipped=skipped, notes=notes,
                 several_captions=several, without_duplicates=True)


@contextlib.contextmanager
def open_tar(path):
    """Open a new tar for writing samples, with a TarWriter."""
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        yield tar


def write_record(shard, **entries):
    """Write the record of a ShardJob whose tar is complete: its index entry and other entries.

    A shard without samples has a record but no tar.
    """
    record = index_entry(shard.path)
    if record["samples"] == 0:
        shard.path.unlink()
    record["offsets"] = record["offsets"].tolist()
    with atomic_write(record_path(shard)) as tmp:
        tmp.write_text(json.dumps(record | entries))


def has_several_captions(sample):
    """True if a caption file of a sample holds several captions, one per line."""
    return any(name.endswith(".txt") and b"\n" in data for name, data in sample.items())


def index_entry(path, offsets=None):
    """A tar's entry in the index: its name, samples, bytes and offsets [samples + 1].

    offsets: sample_offsets of the tar, if they are known.
    """
    if offsets is None:
        offsets = sample_offsets(path)
    size = path.stat().st_size
    return dict(name=path.name, samples=len(offsets) - 1, bytes=size, offsets=offsets)


def record_path(shard):
    return shard.path.parent / ".progress" / f"{shard.path.stem}.json"


def images_path(shard):
    """The file of the PackedImages that the shard had before duplicates were left out."""
    return shard.path.parent / ".progress" / f"{shard.path.stem}.images.json"


def read_record(shard):
    """The record of a ShardJob, or None if the shard is not finished."""
    try:
        record = json.loads(record_path(shard).read_text())
        if record["samples"] > 0 and shard.path.stat().st_size != record["bytes"]:
            return None
    except (OSError, ValueError):
        return None
    return record


# ---------------------------------------------------------------------------- worker processes
def start_worker(parent):
    """Set up a worker process: it leaves Ctrl-C to its parent, and exits when the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, args=[parent], daemon=True).start()


def exit_with_parent(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def in_parallel(function, jobs, workers):
    """Call function(job) for all jobs in `workers` processes, in any order.

    Returns a context manager, which gives an iterator. It ends the processes when the `with` block
    is left, also by an exception between two results. The iterator yields (job, result) for every
    finished job and, about three times a second, None to let the caller update a progress bar. With
    one worker, all jobs run in this process.
    """
    return contextlib.closing(results_in_parallel(function, jobs, workers))


def results_in_parallel(function, jobs, workers):
    """The iterator of in_parallel."""
    if workers == 1 or not jobs:
        for job in jobs:
            yield job, function(job)
        return

    workers = min(workers, len(jobs))
    fork = multiprocessing.get_context("fork")             # starts fast and shares _items_done
    with ProcessPoolExecutor(workers, fork, start_worker, [os.getpid()]) as pool:
        try:
            waiting = {pool.submit(function, job): job for job in jobs}
            while waiting:
                finished, _ = wait(waiting, 0.3, FIRST_COMPLETED)
                for future in finished:
                    yield waiting.pop(future), future.result()
                yield None
        except BrokenProcessPool:
            raise FuseDiTError("a worker died (out of memory?): lower --workers") from None
        except BaseException:               # Ctrl-C or a full disk: do not wait for other jobs
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------------------- starting a run
def begin(args, **settings):
    """Prepare OUT for a run whose output is determined by `settings`; False if OUT is complete.

    An interrupted run with the same settings is resumed. Otherwise OUT must be empty. With
    --overwrite, it may contain the output of an earlier run, which is deleted. Raises FuseDiTError
    if OUT contains anything else.
    """
    out = args.out
    progress = out / ".progress"
    settings = json.loads(json.dumps(settings, default=str))    # as if read from JSON
    if out.exists() and not out.is_dir():
        raise FuseDiTError(f"{out} is a file; OUT must be a folder")
    names = []
    if out.is_dir():
        names = sorted(path.name for path in out.iterdir())

    is_new = not out.is_dir()
    if args.overwrite:
        names = [name for name in names if not OUTPUT_NAME.fullmatch(name)]
        if not names:
            remove_output(out)
    elif "index.json" in names:
        report = read_json_or_none(out / "report.json") or {}
        if report.get("settings") == settings:
            shutil.rmtree(progress, ignore_errors=True)
            print(f"{out} is already complete: {report['outputs']} images with these settings")
            return False
    else:
        earlier = read_json_or_none(progress / "settings.json")
        if earlier is not None:
            check_same_settings(out, earlier, settings)
            remove_temporary_files(out)
            return True

    if names not in ([], [".progress"]):
        raise not_empty_error(out, names, args.overwrite)
    progress.mkdir(parents=True, exist_ok=True)
    if is_new:
        (progress / NEW_FOLDER).touch()
    with atomic_write(progress / "settings.json") as tmp:
        tmp.write_text(json.dumps(settings))
    return True


def started_seed(args):
    """The seed of the run that OUT holds, finished or not; None if there is none to resume."""
    if args.overwrite:
        return None
    for folder in (args.out, args.out / "train"):          # OUT/train: of `prepare_data.py emoji`
        report = read_json_or_none(folder / "report.json") or {}
        settings = read_json_or_none(folder / ".progress" / "settings.json")
        settings = settings or report.get("settings") or {}
        if "seed" in settings:
            return settings["seed"]
    return None


def check_same_settings(out, earlier, settings):
    """Raise FuseDiTError with the differences if two runs have different settings."""
    if earlier == settings:
        return
    differences = []
    for name in sorted(earlier | settings):
        before = earlier.get(name)
        now = settings.get(name)
        if before != now:
            differences.append(f"{name} {before}, now {now}")
    raise FuseDiTError(f"{out} was started with other settings ({', '.join(differences)}): use "
                       "the original settings to resume it, or give a new folder or --overwrite")


def not_empty_error(out, names, overwrite):
    content = f"{names[0]}, which does not belong to an interrupted run"
    if "index.json" in names:
        content = "finished shards"
    remedy = "give a new folder or --overwrite, which replaces shards and their index and report"
    if overwrite:
        remedy = "give a new folder, since --overwrite only replaces shards"
    return FuseDiTError(f"{out} is not empty (it contains {content}): {remedy}")


def read_json_or_none(path):
    """The object in a JSON file; None if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def remove_output(out):
    """Delete everything that a run has written to OUT and nothing else.

    Nor is OUT itself left, if it is empty and the run has created it.
    """
    if not out.is_dir():
        return
    is_new = (out / ".progress" / NEW_FOLDER).exists()
    for path in out.iterdir():
        if path.name == ".progress":
            shutil.rmtree(path)
        elif OUTPUT_NAME.fullmatch(path.name):
            path.unlink()
    if is_new:
        with contextlib.suppress(OSError):  # it is not empty
            out.rmdir()


def remove_temporary_files(out):
    """Delete the temporary files of a killed run."""
    for path in list(out.iterdir()):
        if path.name.endswith(".tmp") and OUTPUT_NAME.fullmatch(path.name):
            path.unlink()


# ---------------------------------------------------------------------------- the whole run
def pack(args, name, jobs, make, skipped=(), total=None, **more):
    """Pack the shards that are not finished yet, then write the report and the index.

    name: the tars are named NAME-000000.tar, NAME-000001.tar, ... jobs: an iterable of items for
    each shard. make: see write_shard. skipped: [(reason, key)] of inputs that belong to no shard.
    total: the number of items in all shards, if known. more: further entries of report.json.
    """
    global _items_done
    skip_duplicates = "skip_duplicates" in args and args.skip_duplicates   # not a flag of `shapes`
    shards = []
    for k, items in enumerate(jobs):
        shards.append(ShardJob(args.out / f"{name}-{k:06d}.tar", items))
    records = {shard.path: read_record(shard) for shard in shards}
    todo = [shard for shard in shards if records[shard.path] is None]
    finished = len(shards) - len(todo)
    if finished:
        print(f"{finished} of {len(shards)} shards are already packed", file=sys.stderr)

    earlier_inputs = sum(record["inputs"] for record in records.values() if record is not None)
    _items_done = multiprocessing.get_context("fork").Value("q", earlier_inputs)
    bar = tqdm(total=total, initial=earlier_inputs, unit="image", desc="packing", smoothing=0.05,
               disable=None)
    try:
        write = partial(write_shard, make, skip_duplicates)
        with bar, in_parallel(write, todo, args.workers) as results:
            for result in results:
                if result is not None:
                    finished += 1
                if not total and finished:  # estimate the total from the finished shards
                    bar.total = _items_done.value * len(shards) // finished
                bar.update(_items_done.value - bar.n)
        if skip_duplicates:
            leave_out_duplicates(shards, args.workers)
    except BaseException:
        finished = sum(read_record(shard) is not None for shard in shards)
        print(f"stopped: {finished} of {len(shards)} shards are packed; repeat the command to "
              "resume", file=sys.stderr)
        raise
    finish(args.out, [read_record(shard) for shard in shards], skipped, more)


def leave_out_duplicates(shards, workers):
    """Remove all images with the pixels of an earlier input from the finished shards."""
    jobs = []
    duplicates = find_duplicates([images_path(shard) for shard in shards])
    for shard, samples in zip(shards, duplicates, strict=True):
        if samples and "without_duplicates" not in read_record(shard):
            jobs.append((shard, samples))
    bar = tqdm(total=len(jobs), unit="shard", desc="leaving out duplicates", disable=None)
    with bar, in_parallel(leave_out, jobs, workers) as results:
        for result in results:
            bar.update(result is not None)


def finish(out, records, skipped, more):
    """Write report.json, offsets.npy and finally index.json; then delete OUT/.progress."""
    outputs = sum(record["samples"] for record in records)
    inputs = len(skipped) + sum(record["inputs"] for record in records)
    skipped = list(skipped)
    noted = []
    for record in records:
        skipped += record["skipped"]
        noted += record.get("notes", [])    # records of earlier versions have none
    assert inputs == outputs + len(skipped)

    keys = keys_by_reason(skipped)
    note_keys = keys_by_reason(noted)
    print_keys("skipped", keys)
    print_keys("noted", note_keys)
    if not outputs:
        remove_output(out)
        raise FuseDiTError(f"nothing to pack: all {len(skipped)} inputs were skipped, for the "
                           "reasons above")

    settings = read_json_or_none(out / ".progress" / "settings.json")
    report = dict(settings=settings, inputs=inputs, outputs=outputs,
                  skipped={reason: len(names) for reason, names in keys.items()},
                  notes={note: len(names) for note, names in note_keys.items()})
    several = []
    for record in records:                  # records of earlier versions lack the entry
        several += [name for _, name in record.get("several_captions", [])]
    if several:
        report["several_captions"] = len(several)
        print(f"{len(several)} images have several captions: {first_few(several)}; training draws "
              "one line at every visit (--caption-pick whole takes the whole text)")
    report |= more
    report["skipped_keys"] = keys
    report["note_keys"] = note_keys
    with atomic_write(out / "report.json") as tmp:
        tmp.write_text(json.dumps(report, indent=1) + "\n")

    records = [record for record in records if record["samples"]]
    write_index(out, records)
    shutil.rmtree(out / ".progress")
    print(f"{inputs} inputs = {outputs} images in {len(records)} shards + {len(skipped)} skipped: "
          f"{out}/*.tar, {out}/report.json")


def keys_by_reason(pairs):
    """{reason: keys} of pairs (reason, key), the most frequent reason first."""
    counts = Counter(reason for reason, _ in pairs)
    keys = {reason: [] for reason, _ in counts.most_common()}
    for reason, key in pairs:
        keys[reason].append(key)
    return keys


def print_keys(verb, keys):
    """Print to stderr, for each reason, the number of inputs and the first few of them.

    verb: "skipped" or "noted". keys: {reason: keys of the inputs}.
    """
    for reason, names in keys.items():
        print(f"{verb} {len(names)}: {printable(reason)}: {first_few(names)}", file=sys.stderr)


def first_few(names):
    """The first five names and the number of others, for a message of one line."""
    text = printable(", ".join(names[:5]))
    if len(names) > 5:
        text += f" and {len(names) - 5} more"
    return text


def write_index(out, entries):
    """Write offsets.npy and then index.json from index_entry's dicts; returns the sample count.

    The latents that an earlier index.json lists for a shard stay listed if the shard is unchanged.
    """
    with atomic_write(out / "offsets.npy") as tmp, open(tmp, "wb") as file:
        np.save(file, np.concatenate([entry["offsets"] for entry in entries]))

    known_latents = {}
    with contextlib.suppress(TypeError, KeyError):         # index.json of another program, or none
        for entry in read_json_or_none(out / "index.json")["shards"]:
            if "latents" in entry:
                known_latents[same_shard(entry)] = entry["latents"]

    shards = []
    for entry in entries:
        shard = dict(name=entry["name"], samples=entry["samples"], bytes=entry["bytes"])
        if same_shard(entry) in known_latents:
            shard["latents"] = known_latents[same_shard(entry)]
        shards.append(shard)
    samples = sum(shard["samples"] for shard in shards)
    with atomic_write(out / "index.json") as tmp:
        tmp.write_text(json.dumps(dict(shards=shards, samples=samples), indent=1) + "\n")
    return samples


def same_shard(entry):
    """The values that identify a shard: index entries with equal values list the same shard."""
    return entry["name"], entry["samples"], entry["bytes"]

"""Finds the WebDataset shards that a pattern names, and reads single samples from them.

A shard is a tar in which the files of a sample are adjacent, such as KEY.image.png and
KEY.synthetic_caption.txt; layout.py lists other names that are read. Two files beside the shards
describe them:

    index.json     name, samples and bytes of each shard and, if there are any, its VAE latents
    offsets.npy    the offset of each sample (optional; without it, a shard is scanned when opened)

`prepare_data.py index` writes both.
"""
import contextlib
import functools
import glob
import io
import json
import math
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand
from safetensors import SafetensorError, safe_open
from webdataset.gopen import gopen

from fusedit import FuseDiTError
from fusedit_lib.data.cache import ShardCache, check_limits, raise_file_limit
from fusedit_lib.folders import vae_fingerprint

LATENTS_SUFFIX = ".latents.safetensors"     # replaces .tar in the name of a shard's latents
SPARE = 8                                   # shards kept open or copied beyond those needed
RETRY_SECONDS = 600                         # time after which an unreadable shard is tried again


class Shard(NamedTuple):
    """A shard as described by index.json."""
    path: str                               # file or URL of the tar
    samples: int
    bytes: int | None                       # size of the tar, if the index contains it
    latents: dict | None                    # vae, image_size and bytes of the latents beside it
    first: int                              # number of samples in the folder's earlier shards


# ------------------------------------------------------------------------------ index.json

def is_url(path):
    return "://" in path


def load_index(folder):
    """The content of index.json in a folder or under a URL."""
    if is_url(folder):
        with gopen(f"{folder}/index.json") as file:
            return json.load(file)
    return json.loads(Path(folder, "index.json").read_text())


@functools.lru_cache
def read_index(folder):
    """{tar name: Shard} from the index.json of a folder or URL; a Shard's path is just its name.

    Raises FuseDiTError if index.json is missing or invalid.
    """
    shards = {}
    first = 0
    try:
        for entry in load_index(folder)["shards"]:
            name = entry["name"]
            shards[name] = Shard(name, entry["samples"], entry.get("bytes"), entry.get("latents"),
                                 first)
            first += entry["samples"]
    except Exception as e:                  # each kind of URL raises different errors
        raise FuseDiTError(f"cannot read {folder}/index.json, the list of its shards ({e}): "
                           f"`python prepare_data.py index {folder}` writes it") from None
    return shards


# ------------------------------------------------------------------------------ --data patterns

def shard_paths(path):
    """The tars that a file, folder, glob or URL names; [] if there are none.

    A URL ending in / names a whole folder.
    """
    if is_url(path):
        folder, _, name = path.rpartition("/")
        if name:
            return [path]
        return [f"{folder}/{tar}" for tar in read_index(folder)]
    if os.path.isfile(path):
        return [path]
    pattern = path
    if os.path.isdir(path):
        pattern = os.path.join(glob.escape(path), "*.tar")
    return sorted(glob.glob(pattern))


def paths_of_part(part):
    """The tars that a --data pattern without "::" names. Raises FuseDiTError if some are missing.

    part: may contain {000..012} or {a,b}, all of which must exist.
    """
    tars = []
    missing = []
    names = list(braceexpand(part))
    for name in names:
        found = shard_paths(name)
        tars += found
        if not found:
            missing.append(name)
    if missing and len(missing) < len(names):
        raise FuseDiTError(f"{len(missing)} of the {len(names)} names in {part} do not exist: "
                           f"{first_few(missing)}")
    if missing and os.path.isdir(part):
        raise FuseDiTError(f"no file matches {part}/*.tar: the shards of a folder must be tars in "
                           "it, not in a folder below it")
    if missing:
        raise FuseDiTError(f"no file matches {part}: give a folder of shards or, in quotes, a "
                           "pattern such as 'FOLDER/*.tar'")
    return tars


def first_few(paths):
    """The first three paths, as text."""
    text = ", ".join(paths[:3])
    if len(paths) > 3:
        text += f" and {len(paths) - 3} more"
    return text


def expand_shards(pattern):
    """A list with a Shard for every tar that a --data pattern names.

    pattern: files, folders, globs, {000..012} ranges and URLs, joined by "::". Raises FuseDiTError
    if it matches nothing, if an index.json does not list a tar, or if there are no samples.
    """
    shards = []
    unlisted = {}                           # {folder: names that its index.json does not list}
    for part in pattern.split("::"):
        for tar in paths_of_part(part):
            folder, _, name = tar.rpartition("/")
            folder = folder or "."
            index = read_index(folder)
            if name in index:
                shards.append(index[name]._replace(path=tar))
            else:
                unlisted.setdefault(folder, []).append(name)
    if unlisted:
        folder, names = next(iter(unlisted.items()))
        raise FuseDiTError(f"{folder}/index.json does not list {first_few(names)}: `python "
                           f"prepare_data.py index {folder}` rewrites it")
    if sum(shard.samples for shard in shards) == 0:
        raise FuseDiTError(f"--data {pattern}: index.json lists no samples")
    return shards


def can_read_latents(shards, run, config, rank):
    """True if the run can train on the latents that `prepare_data.py encode` wrote beside shards.

    If there are latents, rank 0 prints whether they are used and, if not, why.
    """
    known = [shard.latents for shard in shards if shard.samples]
    if not config.vae or not run.latents or not any(known):
        return False
    problem = latents_problem(known, run, config)
    if rank == 0:
        message = "reading the latents beside the shards instead of the images"
        if problem:
            message = f"the latents beside the shards are not used: {problem}"
        print(message, file=sys.stderr)
    return not problem


def latents_problem(known, run, config):
    """The reason why a run cannot use the latents of its shards, or "".

    known: latents of every Shard that has samples.
    """
    if run.crop == "random":
        return "--crop random needs the images"
    if not all(known):
        return "some shards have no latents"
    wanted = dict(vae=vae_fingerprint(config.vae), image_size=config.image_size, resize=run.resize,
                  image_key=run.image_key)
    for latents in known:
        # as before latents named their filter and the extension of the images
        made_with = {"resize": "bicubic", "image_key": ""} | latents
        for key, value in wanted.items():
            if made_with.get(key) != value:
                return f"their {key} is {made_with.get(key) or 'unset'}, not {value or 'unset'}"
    return ""


# ------------------------------------------------------------------------------ samples in a tar

class TarSample(NamedTuple):
    """The files of a sample in a tar, which are adjacent."""
    key: str                                # with its folder, as in WebDataset
    offset: int                             # of the header of its first file
    files: dict                             # {extension: (offset of the content, bytes)}
    repeated: list                          # extensions that occur more than once


def split_name(name):
    """(key, extension) of a file in a tar, as WebDataset divides its name.

    The key is the name up to the first dot after the last slash. It is "" for a file that belongs
    to no sample: a hidden file, such as ._1.jpg of macOS, or one whose name has no dot.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    first, dot, extension = base.partition(".")
    if not first or not dot:
        return "", ""
    return f"{folder}{slash}{first}", extension.lower()


def scan_tar(path):
    """(the TarSamples of a tar in order, the offset of the end of the last one).

    A damaged tar yields the samples before the damage; ([], 0) if nothing can be read.
    """
    samples = []
    end = 0
    with contextlib.suppress(tarfile.ReadError), tarfile.open(path, "r:") as tar:
        for member in tar:
            key, extension = split_name(member.name)
            if key and member.isfile():
                if not samples or samples[-1].key != key:
                    samples.append(TarSample(key, member.offset, {}, []))
                files = samples[-1].files
                if extension in files:
                    samples[-1].repeated.append(extension)
                files[extension] = member.offset_data, member.size
            end = tar.offset
            tar.members.clear()             # tarfile would keep all members in memory
    if samples and end > os.path.getsize(path):
        end = samples.pop().offset          # the last sample is incomplete
    return samples, end


def sample_offsets(path):
    """The byte offset of each sample in a tar and the end of the last one: int64 [samples + 1].

    A damaged tar yields the samples before the damage; [0] if nothing can be read.
    """
    samples, end = scan_tar(path)
    return np.array([*(sample.offset for sample in samples), end])


def ends_well(file, end):
    """True if an open tar has its end marker, a block of zeros, at offset `end`."""
    file.seek(end)
    return file.read(512) == bytes(512)


def read_sample(file, offsets, i):
    """(key, {"image.jpg": bytes, ...}) of sample i of an open tar. Raises ValueError if damaged."""
    size = int(offsets[i + 1] - offsets[i])
    data = os.pread(file.fileno(), size, int(offsets[i]))
    sample_key = ""
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                if key and member.isfile():
                    sample_key = key
                    files[extension] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, AttributeError) as e:
        raise ValueError(f"a damaged tar ({e})") from None
    return sample_key, files


# ------------------------------------------------------------------------------ open shards

class OpenShard(NamedTuple):
    """A shard that has been opened, or the reason why it could not be opened."""
    file: Any = None                        # the tar; None: it cannot be read
    offsets: Any = None                     # of its samples [samples + 1]
    latents: Any = None                     # safetensors slice [samples,2*C,h,w], if they are read
    whole: Any = None                       # [samples]: 0 where an image could not be encoded
    problem: str = ""                       # reason why it cannot be read
    expires: float = math.inf               # time.monotonic() at which to try again


class ShardReader:
    """Reads samples of shards by number. Remote shards are copied to a local cache.

    At most keep + SPARE shards are open at a time: those that are being read, and some more. The
    size of the cache is bounded by deleting the oldest copies.
    """

    def __init__(self, shards, keep, cache, latents=False, keep_on_host=0,
                 on_progress=lambda: None):
        """shards: from expand_shards; keep: the number of shards that are read at a time.

        cache: a folder, or "" for one in the temporary folder. keep_on_host: the number of shards
        that all processes with this cache read at a time; 0: this process alone uses it.
        on_progress: called while a shard is copied, see ShardCache.
        """
        self.shards = shards
        self.keep = keep
        self.latents = latents
        kept = 2 * (keep_on_host or keep) + SPARE          # those in use, the next ones, and more
        if latents:
            kept *= 2                       # there are two files per shard
        self.cache = ShardCache(cache, kept, on_progress)
        self.opened = {}                    # {number: OpenShard}, in the order of their last use
        raise_file_limit()                  # many systems allow 1,024 unless asked for more

    def files(self, number):
        """[(path or URL, bytes or None)] of a shard and, if latents are read, of its latents."""
        shard = self.shards[number]
        files = [(shard.path, shard.bytes)]
        if self.latents:
            latents = shard.path.removesuffix(".tar") + LATENTS_SUFFIX
            files.append((latents, (shard.latents or {}).get("bytes")))
        return files

    def local_files(self, number):
        """Local paths of a shard and, if latents are read, of its latents."""
        local = []
        for path, size in self.files(number):
            if is_url(path):
                path = self.cache.fetch(path, size)
            local.append(path)
        return local

    def check_space(self):
        """Raise FuseDiTError if the cache has no room for the remote shards that it will hold."""
        sizes = []
        for number in range(len(self.shards)):
            sizes += [size for path, size in self.files(number) if is_url(path)]
        if sizes:
            self.cache.check_space(sizes)

    def copy(self, number):
        """Copy a remote shard, and find its samples."""
        tar, *_ = self.local_files(number)
        self.cache.offsets(tar, sample_offsets)

    def try_open(self, number):
        """Open a shard. Returns an OpenShard. Raises any error that occurs."""
        tar, *latents_files = self.local_files(number)
        file = open(tar, "rb")
        latents = whole = None
        for path in latents_files:
            open(path, "rb").close()        # safe_open reports any error as a missing file
            tensors = safe_open(path, "pt")
            latents = tensors.get_slice("latents")
            whole = tensors.get_tensor("whole")
        return OpenShard(file, self.offsets(number, tar), latents, whole)

    def offsets(self, number, tar):
        """The offsets of a shard's samples, int64 [samples + 1]. A tar without them is scanned."""
        if is_url(self.shards[number].path):
            return self.cache.offsets(tar, sample_offsets)
        offsets = self.known_offsets(number, tar)
        if offsets is None:
            offsets = sample_offsets(tar)
        return offsets

    def known_offsets(self, number, tar):
        """A shard's offsets from the offsets.npy beside it.

        Returns None if there is no such file or it does not match the index.
        """
        path = Path(tar).with_name("offsets.npy")
        if not path.exists():
            return None
        offsets = np.load(path, mmap_mode="r")
        index = read_index(str(path.parent))
        if len(offsets) != sum(shard.samples + 1 for shard in index.values()):
            return None
        # The file has samples + 1 numbers for each shard.
        shard = self.shards[number]
        begin = shard.first + list(index).index(Path(shard.path).name)
        # A slice would keep the file open, for each of the open shards.
        return offsets[begin:begin + shard.samples + 1].copy()

    def open(self, number):
        """Open a shard, with retries if it is remote. Returns an OpenShard.

        If the shard cannot be read, OpenShard.problem holds the reason. Raises FuseDiTError if
        that is not the shard's fault: too many open files, or a full disk.
        """
        waits = [0]
        if is_url(self.shards[number].path):
            waits = [1, 10, 0]
        for wait in waits:
            try:
                return self.try_open(number)
            except (OSError, ValueError, RuntimeError, tarfile.TarError, SafetensorError) as e:
                check_limits(e, self.cache.folder)
                problem = f"{type(e).__name__}: {e}"
                time.sleep(wait)
        return OpenShard(problem=problem, expires=time.monotonic() + RETRY_SECONDS)

    def read(self, number, i):
        """{"image.jpg": bytes, ...} of sample i of a shard; with "latents" if they are read.

        "latents": [2*C,h,w], or None if the image could not be encoded. Raises ValueError if the
        shard or sample cannot be read.
        """
        shard = self.opened.pop(number, None)
        if shard is None or time.monotonic() > shard.expires:
            while len(self.opened) >= self.keep + SPARE:
                unused = next(iter(self.opened))           # for the longest time
                del self.opened[unused]
            shard = self.open(number)
        self.opened[number] = shard

        if shard.file is None:
            raise ValueError(f"the shard cannot be read ({shard.problem})")
        readable = len(shard.offsets) - 1
        if i >= readable:
            raise ValueError(f"only {readable} samples of the shard can be read")
        try:
            _, files = read_sample(shard.file, shard.offsets, i)
        except OSError:                     # a network disk may have failed: reopen the file later
            del self.opened[number]
            raise
        if self.latents:
            files["latents"] = None
            if shard.whole[i]:
                files["latents"] = shard.latents[i]
        return files

"""TODO."""
import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from webdataset.gopen import gopen

from fusedit import FuseDiTError
from fusedit_lib.files import atomic_write
from fusedit_lib.pretrained import vae_fingerprint

LATENTS = ".latents.safetensors"            # of a shard, in place of its .tar

# ------------------------------------------------------------------------------ which shards

@functools.lru_cache
def read_index(folder):
    """{tar name: (samples, bytes, latents, number of the first sample)} of an index.json."""
    try:
        if "://" in folder:
            with gopen(f"{folder}/index.json") as f:
                index = json.load(f)
        else:
            index = json.loads(Path(folder, "index.json").read_text())
        shards = [(s["name"], s["samples"], s.get("bytes"), s.get("latents"))
                  for s in index["shards"]]
    except Exception as e:                  # of a dozen openers, or of a list that is none
        raise FuseDiTError(f"cannot read {folder}/index.json, the list of its shards ({e}): "
                           f"`python prepare_data.py index {folder}` writes one") from None
    first = np.cumsum([0] + [n for _, n, *_ in shards]).tolist()
    return {name: (*known, at) for (name, *known), at in zip(shards, first, strict=False)}


def expand_shards(pattern):
    """Every shard that --data's pattern names: [(path or url, samples, bytes, latents, first)]."""
    shards = []
    for path in (p for part in pattern.split("::") for p in braceexpand(part)):
        if "://" in path:
            folder, _, name = path.rpartition("/")
            found = [f"{folder}/{n}" for n in ([name] if name else read_index(folder))]
        else:
            inside = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
            found = [path] if os.path.isfile(path) else sorted(glob.glob(inside))
            if not found:
                raise FuseDiTError(f"--data: no file matches {inside}; `python prepare_data.py "
                                   "shapes DIR -n 10000` makes shards to begin with")
        for tar in found:
            folder, _, name = tar.rpartition("/")
            if name not in read_index(folder or "."):
                raise FuseDiTError(f"{folder or '.'}/index.json does not list {name}: `python "
                                   f"prepare_data.py index {folder or '.'}` writes it anew")
            shards.append((tar, *read_index(folder or ".")[name]))
    if not sum(n for _, n, *_ in shards):
        raise FuseDiTError(f"--data {pattern}: its index.json counts no samples")
    return shards


def encoded(shards, run, config, rank):
    """Whether to train on the latents beside the shards, which `prepare_data.py encode` wrote."""
    known = [latents for _, count, _, latents, _ in shards if count]
    if not config.vae or not run.latents or not any(known):
        return False
    want = dict(vae=vae_fingerprint(config.vae), image_size=config.image_size)
    why = "--crop random needs the pictures" if run.crop == "random" else (
        "some shards have none" if not all(known) else next((
            f"they are of {k} {latents.get(k)}, not {want[k]}" for latents in known for k in want
            if latents.get(k) != want[k]), None))
    if rank == 0:
        print(f"latents beside the shards are not read: {why}" if why else
              "reading the latents beside the shards, not their pictures", file=sys.stderr)
    return not why


# ------------------------------------------------------------------------------ from which bytes

def sample_offsets(path):
    """Where in a tar each sample begins, and where the last one ends: int64 [samples + 1].

    A damaged tar ends before the damage, of an unreadable one nothing is left: [0].
    """
    offsets, last, end = [], None, 0
    with contextlib.suppress(tarfile.ReadError), tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key = folder, name.partition(".")[0]           # a sample's files stand together
            if member.isfile() and key != last:
                offsets.append(member.offset)
                last = key
            end = tar.offset
            tar.members.clear()             # else it remembers all of them
    if offsets and end > os.path.getsize(path):
        end = offsets.pop()                 # of the last sample only a part is there
    return np.array([*offsets, end])


def ends_well(file, end):
    """Whether what a tar ends with, zeros, stands where its last sample ends."""
    file.seek(end)
    return file.read(512) == bytes(512)


def read_sample(file, offsets, i):
    """(key, its files as {"image.jpg": bytes, ...}) of a tar's sample; raises ValueError."""
    data = os.pread(file.fileno(), int(offsets[i + 1] - offsets[i]), int(offsets[i]))
    key, files = "", {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    key, _, ext = member.name.rpartition("/")[2].partition(".")
                    files[ext] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, AttributeError) as e:
        raise ValueError(f"a damaged tar ({e})") from None
    return key, files


class Tars:
    """Samples of shards by number. Remote shards are copied here, and the oldest copies go."""

    def __init__(self, shards, keep, cache, latents=False):
        self.shards, self.keep, self.latents, self.opened = shards, keep, latents, {}
        self.cache = Path(cache or Path(tempfile.gettempdir(), "fusedit-shards"))

    def fetch(self, url, size):
        """The local copy of a remote file; one process copies it and the others wait."""
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"{hashlib.sha1(url.encode()).hexdigest()}.tar"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with FileLock(self.cache / "lock"):
                    have = sorted(self.cache.glob("*.tar"), key=os.path.getmtime)
                    for old in have[:-3 * (1 + self.latents) * self.keep]:
                        old.unlink()        # who still reads it keeps it
                with atomic_write(path) as tmp, gopen(url) as source, open(tmp, "wb") as copy:
                    shutil.copyfileobj(source, copy)
                    if size not in (None, copy.tell()):
                        raise OSError(f"{copy.tell()} of {size} bytes arrived")
            os.utime(path)
        return path

    def files(self, shard):
        """Where on this machine a shard is and, if they are read, its latents."""
        path, _, size, latents, _ = self.shards[shard]
        beside = path.removesuffix(".tar") + LATENTS, (latents or {}).get("bytes")
        return [self.fetch(p, n) if "://" in p else p
                for p, n in [(path, size), beside][:1 + self.latents]]

    def open(self, shard):
        """(file, offsets, latents and which are whole) of a shard, or (None, why it is not)."""
        path, count, _, _, first = self.shards[shard]
        for wait in (1, 10, 0) if "://" in path else (0,):
            try:
                local, *beside = self.files(shard)
                beside = [safe_open(p, "pt") for p in beside]
                beside = [(f.get_slice("latents"), f.get_tensor("whole")) for f in beside]
                known = Path(local).with_name("offsets.npy")
                if known.exists():
                    every, index = np.load(known, mmap_mode="r"), read_index(str(known.parent))
                    if len(every) == sum(n + 1 for n, *_ in index.values()):   # each with its end
                        at = first + list(index).index(Path(path).name)
                        return open(local, "rb"), every[at:at + count + 1], *beside
                return open(local, "rb"), sample_offsets(local), *beside
            except (OSError, ValueError, tarfile.TarError, SafetensorError) as e:
                problem = f"{type(e).__name__}: {e}"
                time.sleep(wait)
        return None, problem

    def read(self, shard, i):
        """The files of a sample, {"image.jpg": bytes, ...}; "latents" too; raises ValueError."""
        if time.monotonic() > self.opened.get(shard, (0, 0))[0]:
            while len(self.opened) >= 2 * self.keep:       # this pool and, at its end, the next
                del self.opened[next(iter(self.opened))]
            found = self.open(shard)        # what is missing may come back, in ten minutes
            self.opened[shard] = math.inf if found[0] else time.monotonic() + 600, *found
        _, file, offsets, *beside = self.opened[shard]
        if file is None:
            raise ValueError(f"the shard cannot be read ({offsets})")
        if i + 1 >= len(offsets):
            raise ValueError(f"the shard holds {len(offsets) - 1} samples that can be read")
        try:
            files = read_sample(file, offsets, i)[1]
        except OSError:                     # of a network disk: look again
            del self.opened[shard]
            raise
        for latents, whole in beside:
            files["latents"] = latents[i] if whole[i] else None
        return files

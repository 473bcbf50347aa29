"""WebDataset shards to training batches, in an order that is a function of the seed alone.

A shard is a tar of KEY.image.png (or jpg, webp), KEY.synthetic_caption.txt and, if there is one,
KEY.original_caption.txt. index.json beside the shards says how many samples each one holds, so
that any place of the run is found at once, with no replay of what came before it:

    place in the run -> data set, epoch, place in it -> shard, sample -> pixels, words, noise

Whoever asks for a place, whichever rank or worker, gets the same pixels, words and noise.
"""
import atexit
import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from braceexpand import braceexpand
from filelock import FileLock
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, get_worker_info
from webdataset.gopen import gopen

import fusedit
import speed
from fusedit import FuseDiTError
from weights import ClipTokenizer, atomic_write, fingerprint

CYCLE = 1000                                # places over which data sets keep their shares exactly
AHEAD = 20_000                              # places before their turn, remote shards are copied
FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"        # no EPS: it runs programs
LATENTS = ".latents.safetensors"            # of a shard, in place of its .tar
HANGS = 1800                                # seconds for a batch, after which a worker gives up

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
    want = dict(vae=fingerprint(config.vae), image_size=config.image_size)
    why = "--crop random needs the pictures" if run.crop == "random" else (
        "some shards have none" if not all(known) else next((
            f"they are of {k} {latents.get(k)}, not {want[k]}" for latents in known for k in want
            if latents.get(k) != want[k]), None))
    if rank == 0:
        print(f"latents beside the shards are not read: {why}" if why else
              "reading the latents beside the shards, not their pictures", file=sys.stderr)
    return not why


# ------------------------------------------------------------------------------ in which order

class Order:
    """The sample at a place of one data set: a function of the seed and of nothing else.

    In each epoch every sample comes once. The shards are shuffled and dealt out in pools of
    `pool`, and the samples of a pool are shuffled among themselves: a reader has a few shards
    open at a time, and nobody holds a list of all samples.
    """

    def __init__(self, counts, seed, pool):
        self.counts, self.seed, self.pool = np.array(counts), seed, pool
        self.total = int(self.counts.sum())

    def shuffled(self, n, *which):
        # numpy keeps what RandomState gives for a seed as it is, for good
        return np.random.RandomState([self.seed, *which]).permutation(n)

    @functools.lru_cache(16)
    def epoch(self, e):
        """Its shards in order, and the place in it at which each one begins."""
        order = self.shuffled(len(self.counts), e)
        return order, np.concatenate([[0], np.cumsum(self.counts[order])])

    @functools.lru_cache(16)
    def mix(self, e, first):
        """The samples, in order, of the pool that begins with the first-th shard of an epoch."""
        begins = self.epoch(e)[1]
        last = min(first + self.pool, len(self.counts))
        return begins[first] + self.shuffled(begins[last] - begins[first], e, first)

    def __getitem__(self, place):
        """(shard, number of the sample in it)"""
        e, at = divmod(place, self.total)
        order, begins = self.epoch(e)
        first = (np.searchsorted(begins, at, "right") - 1) // self.pool * self.pool
        at = self.mix(e, first)[at - begins[first]]
        nth = np.searchsorted(begins, at, "right") - 1
        return int(order[nth]), int(at - begins[nth])


class Mixture:
    """Several data sets in fixed shares: of every 1000 places each has its own, spread out."""

    def __init__(self, sets, weights, seed, pool):
        """sets: lists of expand_shards."""
        self.orders = [Order([n for _, n, *_ in s], seed, pool) for s in sets]
        self.begin = np.cumsum([0] + [len(s) for s in sets]).tolist()      # first shard of each
        ends = np.round(np.cumsum(weights) / sum(weights) * CYCLE).astype(int)
        self.share = np.diff(ends, prepend=0)
        if not self.share.all():
            raise FuseDiTError(f"--data-weights: less than one in {CYCLE} is never read")
        self.slots = np.random.RandomState([seed]).permutation(np.repeat(range(len(sets)),
                                                                         self.share))
        self.nth = np.array([(self.slots[:i] == s).sum() for i, s in enumerate(self.slots)])

    def __getitem__(self, place):
        cycle, slot = divmod(place, CYCLE)
        which = self.slots[slot]
        shard, i = self.orders[which][cycle * int(self.share[which]) + int(self.nth[slot])]
        return self.begin[which] + shard, i


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


# ------------------------------------------------------------------------------ to which batch

def square(image, size, crop, rng):
    """The picture in RGB and upright, its shorter side resized to `size`, cut to a square.

    Bicubic, which Pillow widens when it shrinks a picture, so that nothing aliases: sharper
    than a box filter at odd ratios, and with less ringing than Lanczos.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")       # see-through parts show white, not what they hide
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (size, size):
        return image
    side = min(image.size)
    x, y = image.width - side, image.height - side
    x, y = (rng.randint(0, x), rng.randint(0, y)) if crop == "random" else (x / 2, y / 2)
    return image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))


def decode(files, run, size, rng):
    """(pixels uint8 [3,H,W], or latents, and caption) of a sample's files; raises ValueError."""
    name = next((k for k in files if k.startswith("image.")), None)
    kinds = ["synthetic_caption.txt", "original_caption.txt"]
    if rng.random() < run.original_caption_rate:
        kinds.reverse()
    kind = next((k for k in kinds if k in files), None)
    if name is None or kind is None:
        raise ValueError("no image" if name is None else "no caption")
    caption = files[kind].decode("utf-8").strip()
    pixels = files["latents"] if "latents" in files else read_square(files[name], size, run.crop,
                                                                      rng)
    if pixels is None:
        raise ValueError("damaged image")
    return pixels, "" if rng.random() < run.caption_drop else caption


def read_square(data, size, crop="center", rng=None):
    """A picture's file as uint8 [3,size,size]; raises whatever Pillow does on broken files."""
    with warnings.catch_warnings():         # a decompression bomb is an error from 90 megapixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.draft("RGB", (size, size))        # of a JPEG's 8 x 8 blocks, as much as is needed
    return torch.from_numpy(np.array(square(image, size, crop, rng))).permute(2, 0, 1)


class Batches(Dataset):
    """Micro-batch m of a rank, for any m: no state is kept, so a run can go on anywhere.

    Pixels uint8 [B,3,H,W], or latents, a VAE's mean and log variance [B,2*C,h,w]; ids and mask
    [B,T], captions, noise [B,1,C,h,w] (with a VAE also its own, [B,2,C,h,w]), normal [B] for the
    noise level, clip [B,77] if the model has CLIP's vector; bad: what could not be read, by name.
    """

    def __init__(self, run, config, tokenizer, micro, times=1, rank=0, world=1):
        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.micro, self.times, self.rank, self.world = micro, times, rank, world
        if not run.data:
            raise FuseDiTError("--data is missing: say what to train on, --data 'shards/*.tar'")
        sets = [expand_shards(p) for p in run.data]
        if run.data_weights and len(run.data_weights) != len(sets):
            raise FuseDiTError(f"--data-weights has {len(run.data_weights)} numbers for the "
                               f"{len(sets)} data sets of --data")
        if not run.data_weights:            # as one: each sample once in an epoch of them all
            sets = [sum(sets, [])]
        self.shards = sum(sets, [])
        said = json.dumps([(os.path.basename(s[0]), s[1]) for s in self.shards])
        self.digest = hashlib.sha1(said.encode()).hexdigest()
        self.order = Mixture(sets, run.data_weights or [1], run.seed, run.mix_shards)
        self.asked, self.clip = {}, config.clip and ClipTokenizer(config.clip)
        self.latents = encoded(self.shards, run, config, rank)
        self.tars = Tars(self.shards, run.mix_shards * len(sets), run.cache, self.latents)
        # one length for all batches, as XLA wants it; train_gpu.py cuts them
        self.pad_to = fusedit.token_ids(tokenizer, [""], config)[1]

    def __len__(self):
        return sum(s[1] for s in self.shards)

    def ahead(self, place):
        """Begin to copy the remote shard of a place that comes later, while others are read."""
        shard, _ = self.order[place]
        if "://" in self.shards[shard][0] and shard not in self.asked:
            self.asked[shard] = None
            while len(self.asked) > 4 * self.tars.keep:
                del self.asked[next(iter(self.asked))]
            def fetch():
                with contextlib.suppress(Exception):       # who needs it says what is wrong
                    self.tars.files(shard)
            threading.Thread(target=fetch, daemon=True).start()

    def sample(self, place, bad):
        """(pixels, caption, noise) of a place. A bad sample is named, and a near one stands in."""
        rng = random.Random(f"{self.run.seed} {place}")
        c, side = self.config, self.config.image_size // (8 if self.config.vae else 1)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        noise = (torch.randn((), generator=noise),
                 torch.randn(1 + bool(c.vae), c.in_channels, side, side, generator=noise))
        for attempt in range(100):
            shard, i = self.order[place]
            try:
                pixels, caption = decode(self.tars.read(shard, i), self.run, c.image_size, rng)
                return pixels, caption, *noise
            except MemoryError:
                raise
            except Exception as e:          # broken files raise anything in Pillow's decoders
                why = str(e).split(" <")[0] or type(e).__name__
            problem = f"sample {i} of {self.shards[shard][0]}: {why}"
            bad += [problem] * (not attempt)    # each place counts once, whatever stood in
            place += 1 + rng.randrange(CYCLE)   # near it: of a shard that is open already
        raise FuseDiTError(f"100 samples in a row cannot be read; the last is {problem}")

    def __getitem__(self, m):
        if get_worker_info() is None:
            return self.batch(m)
        signal.alarm(HANGS)                 # ends the worker, and so the run
        try:
            return self.batch(m)
        finally:
            signal.alarm(0)

    def batch(self, m):
        step, i = divmod(m, self.times)
        first = step * self.run.batch + (i * self.world + self.rank) * self.micro
        try:
            bad = []
            self.ahead(first + AHEAD)
            pixels, captions, normal, noise = zip(*[self.sample(first + j, bad)
                                                    for j in range(self.micro)], strict=True)
        except FuseDiTError as e:           # raised in a worker, it would arrive as a traceback
            return {"error": str(e)}
        ids, mask = fusedit.tokenize(self.tokenizer, captions, self.config, self.pad_to)
        pixels = torch.stack([p.movedim(0, -1) for p in pixels]).movedim(-1, 1)  # as they lie
        batch = dict(pixels=pixels, ids=ids, mask=mask, captions=captions, bad=bad,
                     normal=torch.stack(normal), noise=torch.stack(noise))
        return batch | dict(clip=self.clip(captions)) if self.clip else batch


def start_worker(_):
    """Ctrl-C and SIGTERM are the launcher's to handle: it needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def load_batches(batches, which, workers, device=None):
    """The micro-batches `which` (a range), made ahead of time by worker processes, from now on.

    Call it before there is an optimizer: a worker keeps a copy of all that this process has.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork

    def stream():
        pin = device is not None and device.type == "cuda"
        made = iter(DataLoader(batches, batch_size=None, sampler=which, num_workers=workers,
                               pin_memory=pin, worker_init_fn=start_worker,
                               prefetch_factor=4 if workers else None))
        # torch's handler of a worker's death raises wherever the run is just then; without it the
        # error comes from next(made), which looks every 5 seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if workers:                         # torch's event takes a lock that a dead worker may hold
            over, processes = threading.Event(), made._workers
            made._workers_done_event = SimpleNamespace(
                is_set=over.is_set, set=lambda: over.set() or [w.kill() for w in processes])
        yield
        try:
            for batch in made:
                if "error" in batch:
                    raise FuseDiTError(batch["error"])
                yield batch
        except (RuntimeError, OSError, EOFError) as e:     # of a pipe that broke in the middle
            if not workers or isinstance(e, RuntimeError) and not any(
                    who in str(e) for who in ("DataLoader worker", "Pin memory thread")):
                raise
            raise FuseDiTError(f"a data process died ({str(e).splitlines()[0]}): out of memory? "
                               "Then lower --workers. Or did a batch take over "
                               f"{HANGS / 60:g} minutes?") from e
        finally:
            made = None                     # ends the workers
    started = stream()
    next(started)
    atexit.register(started.close)          # else Python would wait for the workers forever
    return started


def tensors(batches, bad):
    """Of each batch the tensors alone; its list of bad samples is appended to `bad`."""
    for batch in batches:
        bad.append(batch["bad"])
        yield {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}


def text_length(mask, device):
    """How many tokens a batch's text needs: its longest caption, in quarters of the full length.

    Few lengths, since a compiled model compiles anew for some of them; XLA would for all. On a GPU
    as speed.on_tiles says.

    mask: [B,T] of all tokens, on the CPU, so that nothing waits for the device.
    """
    full, most = mask.shape[1], int(mask.sum(1).max())
    if device.type == "cuda":
        return speed.on_tiles(most, full, device)
    unit = -(-full // 32) * 8               # attention kernels like multiples of 8
    return min(full, -(-most // unit) * unit)


def to_device(batch, device, cut_text=False):
    """(pixels in [-1, 1] or latents, ids, mask, clip's tokens or None, normal, noises) there.

    cut_text: to text_length, and on the device: what is cut before is no longer in one piece, and
    such a copy makes the CPU wait.
    """
    length = text_length(batch["mask"], device) if cut_text else None
    pixels, ids, mask, clip, normal, noise = (
        batch[k].to(device, non_blocking=True) if k in batch else None
        for k in ("pixels", "ids", "mask", "clip", "normal", "noise"))
    if length:
        ids, mask = ids[:, :length], mask[:, :length]
    pixels = pixels.float() if pixels.dtype != torch.uint8 else pixels.float().div_(127.5).sub_(1)
    return pixels.contiguous(), ids, mask, clip, normal, noise.unbind(1)

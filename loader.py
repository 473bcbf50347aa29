"""WebDataset shards to training batches, made by worker processes ahead of time.

A shard is a tar of KEY.image.png (or jpg, webp), KEY.synthetic_caption.txt and, if there is one,
KEY.original_caption.txt. Workers decode, crop and tokenize whole batches, so that the launcher
only moves them to its device: uint8 pixels, token ids, mask.
"""
import atexit
import glob
import io
import itertools
import os
import random
import signal
import sys

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import fusedit
from fusedit import FuseDiTError


def expand_shards(patterns):
    """Every shard that the patterns name, and at least one for each."""
    shards = []
    for pattern in itertools.chain(*(p.split("::") for p in patterns)):
        for path in braceexpand(pattern):
            inside = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
            url = "://" in path or os.path.isfile(path)
            found = [path] if url else sorted(glob.glob(inside))
            if not found:
                raise FuseDiTError(f"--data: no file matches {inside}; `python prepare_data.py "
                                   "shapes DIR -n 10000` makes shards to begin with")
            shards += found
    if not shards:
        raise FuseDiTError("--data is missing: say what to train on, --data 'shards/*.tar'")
    return shards


def read_samples(shards, stream, streams, seed, warn):
    """Endless raw samples of one of the streams that a run's data is read in.

    Every epoch deals all shards out, in a new order that all streams agree on. Where there are
    fewer shards than streams, one goes to several, and each takes its part of the samples.
    """
    parts = -(-streams // len(shards))
    units = list(itertools.product(shards, range(parts)))
    empty = 0                               # epochs without a sample, one after the other
    for epoch in itertools.count():
        order, found = list(units), 0
        random.Random(f"{seed} {epoch}").shuffle(order)
        for shard, part in order[stream::streams]:
            samples = wds.tarfile_samples(iter([{"url": shard}]), handler=warn)
            for sample in itertools.islice(samples, part, None, parts):
                found += 1
                yield sample
        empty = 0 if found else empty + 1   # of a small shard, a stream's part may be empty
        if empty == 100:
            raise FuseDiTError(f"no samples in {shard}: a shard is a tar of KEY.image.png (or jpg, "
                               "webp) and KEY.synthetic_caption.txt")


def square(image, size, crop, rng):
    """The picture in RGB, its shorter side resized to `size`, cut to a square.

    Bicubic, which Pillow widens when it shrinks a picture, so that nothing aliases: sharper
    than a box filter at odd ratios, and with less ringing than Lanczos.
    """
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")       # see-through parts show white, not what they hide
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size == (size, size):
        return image
    side = min(image.size)
    x, y = image.width - side, image.height - side
    x, y = (rng.randint(0, x), rng.randint(0, y)) if crop == "random" else (x / 2, y / 2)
    return image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))


def decode(sample, run, size, rng):
    """(pixels uint8 [H,W,3], caption) of a raw sample; raises ValueError or OSError."""
    name = next((k for k in sample if k.startswith("image.")), None)
    kinds = ["synthetic_caption.txt", "original_caption.txt"]
    if rng.random() < run.original_caption_rate:
        kinds.reverse()
    kind = next((k for k in kinds if k in sample), None)
    if name is None or kind is None:
        raise ValueError("no image" if name is None else "no caption")
    image = Image.open(io.BytesIO(sample[name]))
    image.draft("RGB", (2 * size, 2 * size))  # a huge JPEG is decoded at a fraction of its size
    caption = "" if rng.random() < run.caption_drop else sample[kind].decode("utf-8").strip()
    return np.asarray(square(image, size, run.crop, rng)), caption


class Batches(IterableDataset):
    """Endless micro-batches of a rank: pixels uint8 [B,3,H,W], ids and mask [B,T], captions.

    Micro-batch m of the run comes from stream m % (ranks x workers), whichever rank trains on
    it: 2 ranks with a worker each see what 1 rank with 2 workers sees, in the same order.
    """

    def __init__(self, run, config, tokenizer, micro_batch, rank, world, start):
        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.shards, self.seed = expand_shards(run.data), f"{run.seed} {start}"
        # one length for all batches: a compiled model would compile again for every new one
        self.pad_to = fusedit.token_ids(tokenizer, [""], config)[1]
        self.skipped = self.in_a_row = self.bad = 0

    def warn(self, problem, where="part of a shard"):
        """Count what cannot be read, name the first few, and stop when that is everything."""
        self.skipped, self.in_a_row, self.bad = self.skipped + 1, self.in_a_row + 1, self.bad + 1
        why = f"{where}: {str(problem).split(' <')[0] or type(problem).__name__}"
        if self.bad in (1, 2, 3, 10, 100, 1000, 10_000, 100_000):
            print(f"skipped {why} ({self.bad} so far by this worker)", file=sys.stderr)
        if self.in_a_row == 1000:
            raise FuseDiTError(f"1000 samples in a row cannot be read; the last is {why}")
        return True                         # tells webdataset to go on

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        stream, streams = worker * self.world + self.rank, self.world * workers
        rng = random.Random(f"{self.seed} {stream}")
        raw = read_samples(self.shards, stream, streams, self.seed, self.warn)
        mixed = wds.filters.shuffle(self.run.shuffle, initial=self.run.shuffle, rng=rng)(raw)
        try:
            while True:
                yield self.batch(mixed, rng)
        except FuseDiTError as e:           # raised in a worker, it would arrive as a traceback
            yield {"error": str(e)}

    def batch(self, samples, rng):
        pixels, captions, self.skipped = [], [], 0
        while len(pixels) < self.micro_batch:
            sample = next(samples)
            try:
                image, caption = decode(sample, self.run, self.config.image_size, rng)
            except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as e:
                self.warn(e, f"{sample['__key__']} of {sample['__url__']}")
                continue
            pixels.append(image)
            captions.append(caption)
            self.in_a_row = 0
        ids, mask = fusedit.tokenize(self.tokenizer, captions, self.config, self.pad_to)
        pixels = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
        return dict(pixels=pixels, ids=ids, mask=mask, captions=captions, skipped=self.skipped)


def start_worker(_):
    """Ctrl-C and SIGTERM are the launcher's to handle: it needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def load_batches(batches, workers, pin):
    """The batches, made ahead of time by worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork

    def stream():
        for batch in DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin,
                                worker_init_fn=start_worker,
                                prefetch_factor=4 if workers else None):
            if "error" in batch:
                raise FuseDiTError(batch["error"])
            yield batch
    made = stream()
    atexit.register(made.close)             # else Python would wait for the workers forever
    return made


def to_device(batch, device):
    """(pixels in [-1, 1], ids, mask) there; the pixels travel as uint8, a quarter of the bytes."""
    pixels, ids, mask = (batch[k].to(device, non_blocking=True) for k in ("pixels", "ids", "mask"))
    return pixels.float().div_(127.5).sub_(1), ids, mask

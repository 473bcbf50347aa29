"""Speed of loading training batches from shards of JPEGs, compared with a plain Pillow loop.

    OMP_NUM_THREADS=1 python benchmarks/loader.py           one core, 1 minute
    python benchmarks/loader.py --workers 16                also with workers, as in training

The images are those of data.py, 768 x 512 at 193 kB each. A batch contains all that training needs:
pixels, token ids and noise. "decode" only decodes the whole images with libjpeg, which the plain
loop has to do as well.
"""
import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import numpy as np
import torch
from common import finish, machine
from data import folder_of, pack, photo
from PIL import Image

import fusedit
from fusedit_lib import cli
from fusedit_lib.data.batches import Batches, load_batches
from fusedit_lib.pretrained import load_tokenizer, open_gemma
from fusedit_lib.train.config import RunConfig

PHOTOS = 128


def plain(data, size):
    """Pixels [3,size,size] of a JPEG's bytes, as a simple training script would load them."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    scaled = [round(side * scale) for side in image.size]
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    x = (image.width - size) // 2
    y = (image.height - size) // 2
    image = image.crop((x, y, x + size, y + size))
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)


class Loading:
    """Ways to turn the photos into training images of one size."""

    def __init__(self, photos, shards, size, batch):
        self.photos = photos
        self.size = size
        self.batch = batch
        run = RunConfig(data=(str(shards),), batch=batch)
        config = fusedit.preset("fusedit", image_size=size)
        gemma = open_gemma("demo/gemma")
        tokenizer = load_tokenizer(gemma.tokenizer, gemma.config["vocab_size"])
        self.batches = Batches(run, config, tokenizer, batch)
        self.count = len(photos) // batch   # batches per epoch

    def loader(self):
        for m in range(self.count):
            self.batches[m]

    def plain_loop(self):
        for data in self.photos:
            plain(data, self.size)

    def decode(self):
        for data in self.photos:
            Image.open(io.BytesIO(data)).load()

    def rate_of_workers(self, workers):
        """Images per second with worker processes, timed from the arrival of the first batch."""
        total = 40 * self.count
        stream = load_batches(self.batches, range(total), workers)
        next(stream)
        begin = time.perf_counter()
        for _ in stream:
            pass
        return (total - 1) * self.batch / (time.perf_counter() - begin)


def median_rates(works, images, rounds):
    """{name: images per second}: medians over rounds in which the functions take turns."""
    seconds = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return {name: images / statistics.median(times) for name, times in seconds.items()}


def measure(loading, rounds, workers):
    """Measure and print {method: images per second} at one size."""
    works = {
        "loader": loading.loader,
        "plain loop": loading.plain_loop,
        "decode": loading.decode,
    }
    rates = median_rates(works, len(loading.photos), rounds)
    if workers:
        rates[f"{workers} workers"] = loading.rate_of_workers(workers)
    line = f"to {loading.size} pixels:"
    for name, rate in rates.items():
        line += f"   {name} {rate:.0f} images/s"
    ratio = rates["loader"] / rates["plain loop"]
    print(f"{line}   loader / plain loop {ratio:.2f}")
    return rates


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("--batch", type=cli.positive, default=16, help="number of images per batch")
    p.add_argument("--rounds", type=cli.positive, default=5,
                   help="number of timed runs of each method; the median is reported")
    p.add_argument("--out", type=Path, metavar="FILE.json",
                   help="also write the results to this file")
    p.add_argument("--sizes", type=cli.positive, nargs="+", default=[256, 512],
                   help="training image sizes, in pixels")
    p.add_argument("--workers", type=int, default=0,
                   help="also measure loading with this many worker processes; 0 skips this")
    args = p.parse_args()
    torch.set_num_threads(1)

    photos = [photo(768, 512, seed, 95) for seed in range(PHOTOS)]
    rates = {}
    with tempfile.TemporaryDirectory() as tmp:
        shards = Path(tmp) / "shards"
        pack(folder_of(photos, Path(tmp) / "photos"), shards, 0)
        for size in args.sizes:
            loading = Loading(photos, shards, size, args.batch)
            rates[size] = measure(loading, args.rounds, args.workers)
    finish(args, dict(machine=machine(torch.device("cpu")), images_per_s=rates))


if __name__ == "__main__":
    cli.run(main, "--batch")

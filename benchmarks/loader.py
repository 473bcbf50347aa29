"""Speed of loading training batches from shards of JPEGs, compared with a plain Pillow loop.

    OMP_NUM_THREADS=1 python benchmarks/loader.py           one core, 1 minute
    python benchmarks/loader.py --workers 16                also with workers, as in training

The images are those of data.py, 768 x 512 at 193 kB each. A batch contains all that training needs:
pixels, token ids and noise. "img2dataset" loads the same images from shards with img2dataset's
names. "decode" only decodes the whole images with libjpeg, which the plain loop has to do as well.
"host of 64" loads the batches of one of 64 hosts. Divided by the number of images/s that training
needs on a host, its rate is the reserve of one core: see docs/data.md.
"""
import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
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
from fusedit_lib.data import index
from fusedit_lib.data.batches import Batches, load_batches
from fusedit_lib.pretrained import load_tokenizer, open_gemma
from fusedit_lib.train.config import RunConfig

PHOTOS = 128
HOSTS = 64                                  # of a v5e-256 slice, with 4 chips each


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


def add_file(tar, name, content):
    """Add bytes to an open tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_img2dataset(shards, out):
    """Copy a folder of shards to `out` with img2dataset's names and KEY.json. Returns out."""
    out.mkdir()
    names = {"image.jpg": "jpg", "original_caption.txt": "txt"}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as ours, tarfile.open(out / path.name, "w") as theirs:
            for member in ours:
                key, _, kind = member.name.partition(".")
                content = ours.extractfile(member).read()
                add_file(theirs, f"{key}.{names[kind]}", content)
                if kind == "image.jpg":
                    row = dict(caption="a photograph of noise", url=f"http://host/{key}.jpg",
                               key=key, status="success", error_message=None, width=768,
                               height=512, original_width=768, original_height=512, exif="{}",
                               sha256="0" * 64)
                    add_file(theirs, f"{key}.json", json.dumps(row).encode())
    index.index(Namespace(folder=out, workers=1, image_key="", caption_key=""))
    return out


class Loading:
    """Ways to turn the photos into training images of one size."""

    def __init__(self, photos, shards, size, batch):
        """shards: folders in our layout and in img2dataset's."""
        self.photos = photos
        self.size = size
        self.batch = batch
        config = fusedit.preset("fusedit", image_size=size)
        gemma = open_gemma("demo/gemma")
        tokenizer = load_tokenizer(gemma.tokenizer, gemma.config["vocab_size"])
        runs = [RunConfig(data=(str(folder),), batch=batch) for folder in shards]
        self.batches, self.others = [Batches(run, config, tokenizer, batch) for run in runs]
        run = replace(runs[0], batch=batch * HOSTS)
        self.of_host = Batches(run, config, tokenizer, batch, world=HOSTS)
        self.count = len(photos) // batch   # batches per epoch

    def loader(self):
        for m in range(self.count):
            self.batches[m]

    def host(self):
        for m in range(self.count):
            self.of_host[m]

    def img2dataset(self):
        for m in range(self.count):
            self.others[m]

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


def take_turns(works, rounds):
    """{name: seconds of each round}; in a round, each function runs once."""
    seconds = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def measure(loading, rounds, workers):
    """Measure and print {method: images per second} at one size."""
    works = {
        "loader": loading.loader,
        f"host of {HOSTS}": loading.host,
        "img2dataset": loading.img2dataset,
        "plain loop": loading.plain_loop,
        "decode": loading.decode,
    }
    seconds = take_turns(works, rounds)
    images = len(loading.photos)
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    if workers:
        rates[f"{workers} workers"] = loading.rate_of_workers(workers)
    line = f"to {loading.size} pixels:"
    for name, rate in rates.items():
        line += f"   {name} {rate:.0f} images/s"
    ratio = rates["loader"] / rates["plain loop"]
    pairs = zip(seconds["loader"], seconds["img2dataset"], strict=True)
    other_ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(f"{line}   loader / plain loop {ratio:.2f}   img2dataset / loader {other_ratio:.3f}")
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
        others = as_img2dataset(shards, Path(tmp) / "others")
        for size in args.sizes:
            loading = Loading(photos, [shards, others], size, args.batch)
            rates[size] = measure(loading, args.rounds, args.workers)
    finish(args, dict(machine=machine(torch.device("cpu")), images_per_s=rates))


if __name__ == "__main__":
    cli.run(main, "--batch")

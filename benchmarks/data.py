"""Speed of packing images on one core, and cost of joining CC12M's captions.

    python benchmarks/data.py speed                 images per second; 2 minutes
    python benchmarks/data.py join -n 2000000       memory and time to sort and look up captions

The images are noise with a spectrum that falls off so that their JPEGs are as large as those of
photographs. They have the size of SA-1B's images (2250 x 1500), or of those after packing
(768 x 512).
"""
import argparse
import functools
import io
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import numpy as np
from PIL import Image

import prepare_data
from fusedit_lib.cli import HelpFormatter
from fusedit_lib.data.captions import CaptionTable


# ---------------------------------------------------------------------------- images
def photo(width, height, seed, quality):
    """A JPEG of noise with roughly the spectrum of a photograph."""
    rng = np.random.RandomState(seed)
    row_frequencies = np.fft.fftfreq(height)[:, None]
    column_frequencies = np.fft.rfftfreq(width)[None]
    frequency = np.hypot(row_frequencies, column_frequencies) + 1 / width
    channels = []                           # brightness and two weaker colour differences
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.rand(*frequency.shape))
        noise = np.fft.irfft2(phase / frequency**1.5, (height, width))
        channels.append(noise / noise.std())
    to_rgb = np.array([[1, 0.3, 0.1], [1, -0.1, -0.2], [1, -0.2, 0.3]])
    pixels = np.einsum("kc,chw->hwk", to_rgb, np.array(channels)) * 50 + 128
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def folder_of(photos, folder):
    """Write JPEGs and a caption for each to a new folder. Returns the folder."""
    folder.mkdir()
    for i, data in enumerate(photos):
        (folder / f"{i:04d}.jpg").write_bytes(data)
        (folder / f"{i:04d}.txt").write_text(f"a photograph of noise, number {i}")
    return folder


def pack(folder, out, size):
    """Pack a folder of images with one process."""
    args = prepare_data.parse_args(["folder", str(folder), str(out), "--size", str(size),
                                    "--workers", "1", "--overwrite"])
    args.run(args)


# ---------------------------------------------------------------------------- speed
class SpeedCase(NamedTuple):
    name: str
    photos: list                            # JPEGs
    size: int                               # --size


def speed(args):
    """Compare the speed of packing with that of only decoding and encoding the images."""
    large = [photo(2250, 1500, i, 92) for i in range(24)]
    small = [photo(768, 512, i, 95) for i in range(128)]
    print(f"one core; JPEGs of {mean_kb(large):.0f} kB (2250 x 1500) and {mean_kb(small):.0f} kB "
          "(768 x 512)")
    cases = [SpeedCase("2250 x 1500 to 512", large, 512),
             SpeedCase("768 x 512 kept", small, 0),
             SpeedCase("768 x 512 to 256", small, 256)]
    with tempfile.TemporaryDirectory() as tmp:
        for case in cases:
            many = case.photos * 8          # as in a real shard: start-up takes less of the time
            folder = folder_of(many, Path(tmp) / case.name)
            out = Path(tmp) / f"out {case.name}"
            bound = rate(partial(recode_all, case), len(case.photos))
            packed = rate(partial(pack, folder, out, case.size), len(many))
            print(f"packing {case.name}: {packed:.1f} images/s; decoding and encoding alone: "
                  f"{bound:.1f} images/s; ratio {packed / bound:.2f}")


def rate(work, count, tries=5):
    """Images per second of work(), which handles `count` images: the best of several tries.

    Other processes on the machine only make it slower, so the best try is the least disturbed.
    """
    best = 0
    for _ in range(tries):
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        best = max(best, count / seconds)
    return best


def mean_kb(photos):
    return sum(len(data) for data in photos) / len(photos) / 1e3


def recode_all(case):
    for data in case.photos:
        recode(data, case.size)


def recode(data, size):
    """Decode an image, and encode one of the size that it has after packing."""
    image = Image.open(io.BytesIO(data))
    image.load()
    if size:
        image = shrunk_photo(image.size, size)
    image.save(io.BytesIO(), "JPEG", quality=95)


@functools.cache
def shrunk_photo(size, shorter_side):
    """A decoded image of the size that one of `size` has after packing: resizing is not timed."""
    scale = shorter_side / min(size)
    width, height = (round(side * scale) for side in size)
    return Image.open(io.BytesIO(photo(width, height, 0, 95))).convert("RGB")


# ---------------------------------------------------------------------------- join
def join(args):
    """Sort an imitation of CaptionEmporium's file, and look up the captions of one shard."""
    with tempfile.TemporaryDirectory() as tmp:
        rows = Path(tmp) / "train.jsonl"
        write_captions(rows, args.n)
        memory_before = peak_gb()
        begin = time.perf_counter()
        table = CaptionTable.from_files(rows, "key", "caption_llava", Path(tmp) / "c.duckdb")
        sorting = time.perf_counter() - begin

        begin = time.perf_counter()
        first = args.n // 2
        captions = table.lookup([f"{key:09d}" for key in range(first, first + 5000)])
        lookup = time.perf_counter() - begin
        print(f"{args.n} captions ({rows.stat().st_size / 1e9:.2f} GB): {sorting:.0f} s to sort, "
              f"{lookup:.2f} s to look up {len(captions)}, peak memory {peak_gb():.2f} GB "
              f"({memory_before:.2f} before)")


def write_captions(path, count):
    """Write `count` rows in the format of CaptionEmporium's file, in random order."""
    rng = np.random.RandomState(0)
    words = [f"word{i}" for i in range(5000)]
    order = rng.permutation(count)
    with open(path, "w") as file:
        for start in range(0, count, 1000):
            keys = order[start:start + 1000]
            word_indices = rng.randint(0, 5000, (1000, 75))     # as long as LLaVA-NeXT's captions
            for key, indices in zip(keys, word_indices, strict=False):
                text = " ".join([words[i] for i in indices])
                row = dict(key=f"{key:09d}", url="http://example.org/a.jpg", caption_llava=text,
                           caption_llava_short=text[:90])
                file.write(json.dumps(row) + "\n")


def peak_gb():
    """The peak memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("what", choices=("speed", "join"), help="the benchmark to run")
    parser.add_argument("-n", type=int, default=2_000_000, help="number of captions for join")
    args = parser.parse_args()
    if args.what == "speed":
        speed(args)
    else:
        join(args)


if __name__ == "__main__":
    main()

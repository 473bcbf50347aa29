"""How fast pictures are packed, on one core, and what joining CC12M's captions takes.

    python benchmarks/data.py speed                 images a second; 2 minutes
    python benchmarks/data.py join -n 2000000       memory and time of the join

The pictures are noise that falls with frequency so that their JPEGs have the size of photographs':
as large as SA-1B's (2250 x 1500), and as what is packed of them (768 x 512).
"""
import argparse
import io
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from PIL import Image

import prepare_data
from fusedit_lib.cli import HelpFormatter
from fusedit_lib.data import captions


def photo(width, height, seed, quality):
    """A JPEG of noise with the spectrum, about, of a photograph's."""
    rng = np.random.RandomState(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    noise = [np.fft.irfft2(np.exp(2j * np.pi * rng.rand(*f.shape)) / f**1.5, (height, width))
             for _ in range(3)]             # light and two colours, which are weaker
    mix = np.array([[1, 0.3, 0.1], [1, -0.1, -0.2], [1, -0.2, 0.3]])
    pixels = np.einsum("kc,chw->hwk", mix, np.array([n / n.std() for n in noise])) * 50 + 128
    box = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(box, "JPEG", quality=quality)
    return box.getvalue()


def rate(work, n, tries=5):
    """Images a second, the best of some tries: other work on the machine only slows."""
    best = 0
    for _ in range(tries):
        begin = time.perf_counter()
        work()
        best = max(best, n / (time.perf_counter() - begin))
    return best


def folder_of(photos, folder):
    folder.mkdir()
    for i, data in enumerate(photos):
        (folder / f"{i:04d}.jpg").write_bytes(data)
        (folder / f"{i:04d}.txt").write_text(f"a photograph of noise, number {i}")
    return folder


def pack(folder, out, size):
    args = prepare_data.arguments(["folder", str(folder), str(out), "--size", str(size),
                                   "--workers", "1", "--overwrite"])
    args.run(args)


def recode(data, size):
    """What packing cannot do without: decode the picture, encode one of the size that results."""
    image = Image.open(io.BytesIO(data))
    image.load()
    small = image if not size else small_of(image.size, size)
    small.save(io.BytesIO(), "JPEG", quality=95)


SMALL = {}


def small_of(size, side):
    """A picture of the size that packing would make, ready to be encoded."""
    if (size, side) not in SMALL:
        scale = side / min(size)
        SMALL[size, side] = Image.open(io.BytesIO(photo(
            *(round(n * scale) for n in size), 0, 95))).convert("RGB")
    return SMALL[size, side]


def plain(data, size):
    """The loop that a trainer would begin with."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((x, y, x + size, y + size))
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)


def speed(args):
    torch.set_num_threads(1)
    large = [photo(2250, 1500, i, 92) for i in range(24)]
    small = [photo(768, 512, i, 95) for i in range(128)]
    kb = [sum(map(len, photos)) / len(photos) / 1e3 for photos in (large, small)]
    print(f"one core; JPEGs of {kb[0]:.0f} kB (2250 x 1500) and {kb[1]:.0f} kB (768 x 512)")
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for name, photos, size in (("2250 x 1500 to 512", large, 512), ("768 x 512 kept", small, 0),
                                   ("768 x 512 to 256", small, 256)):
            many = photos * 8               # a shard of a real size: starting is no throughput
            folder = folder_of(many, tmp / name)
            bound = rate(lambda: [recode(data, size) for data in photos], len(photos))
            got = rate(partial(pack, folder, tmp / f"out {name}", size), len(many))
            print(f"packing {name}: {got:.1f} images/s; decoding and encoding alone {bound:.1f}; "
                  f"{got / bound:.2f} of it")


def join(args):
    """A copy of CaptionEmporium's file with n captions, and the captions of a shard of it."""
    with tempfile.TemporaryDirectory() as tmp:
        rows, rng = Path(tmp) / "train.jsonl", np.random.RandomState(0)
        words = [f"word{i}" for i in range(5000)]
        order = rng.permutation(args.n)
        with open(rows, "w") as file:
            for at in range(0, args.n, 1000):
                picks = rng.randint(0, 5000, (1000, 75))   # as long as LLaVA-NeXT's captions
                for key, pick in zip(order[at:at + 1000], picks, strict=False):
                    text = " ".join([words[i] for i in pick])
                    file.write(json.dumps(dict(key=f"{key:09d}", url="http://example.org/a.jpg",
                                               caption_llava=text, caption_llava_short=text[:90]))
                               + "\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        table = captions.Captions.of_files(rows, "key", "caption_llava", Path(tmp) / "c.duckdb")
        built, begin = time.perf_counter() - begin, time.perf_counter()
        found = table.of([f"{k:09d}" for k in range(args.n // 2, args.n // 2 + 5000)])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{args.n} captions ({rows.stat().st_size / 1e9:.2f} GB): {built:.0f} s to sort, "
              f"{time.perf_counter() - begin:.2f} s for {len(found)} of them, peak "
              f"{peak / 1e6:.2f} GB of memory ({before / 1e6:.2f} before)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("what", choices=("speed", "join"))
    parser.add_argument("-n", type=int, default=2_000_000, help="captions of the join")
    arguments = parser.parse_args()
    dict(speed=speed, join=join)[arguments.what](arguments)

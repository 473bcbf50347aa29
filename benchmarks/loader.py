"""How fast training gets its pictures: shards of JPEGs to batches, against a plain loop of Pillow.

    OMP_NUM_THREADS=1 python benchmarks/loader.py           one core, 1 minute
    python benchmarks/loader.py --workers 16                also with data processes, as in training

The pictures are those of data.py, 768 x 512 at 193 kB each. A batch is all that training needs:
pixels, token ids, noise. "decode" is libjpeg's part, of whole pictures, which a loop has to do too.
"""
import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import finish, machine
from data import folder_of, pack, photo, plain
from PIL import Image

import fusedit
from fusedit_lib import cli
from fusedit_lib.data.batches import Batches, load_batches
from fusedit_lib.pretrained import load_tokenizer
from fusedit_lib.train.config import RunConfig


def rates(works, n, rounds):
    """{name: images/s}, medians; all take turns."""
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)
    return {name: n / statistics.median(took) for name, took in times.items()}


def in_processes(source, workers, batches, batch):
    """Images/s of data processes, from when the first batch is there."""
    made = load_batches(source, range(batches), workers)
    next(made)
    begin = time.perf_counter()
    for _ in made:
        pass
    return (batches - 1) * batch / (time.perf_counter() - begin)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("--batch", type=cli.positive, default=16, help="images at once")
    p.add_argument("--rounds", type=cli.positive, default=5, help="of each; medians count")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures there")
    p.add_argument("--sizes", type=cli.positive, nargs="+", default=[256, 512], help="in training")
    p.add_argument("--workers", type=int, default=0, help="data processes; 0: only in this one")
    args = p.parse_args()
    torch.set_num_threads(1)
    words = load_tokenizer(Path(fusedit.__file__).with_name("demo") / "gemma")
    photos, rows = [photo(768, 512, i, 95) for i in range(128)], {}
    with tempfile.TemporaryDirectory() as tmp:
        pack(folder_of(photos, Path(tmp) / "photos"), Path(tmp) / "shards", 0)
        for size in args.sizes:
            run = RunConfig(data=(str(Path(tmp) / "shards"),), batch=args.batch)
            source = Batches(run, fusedit.preset("fusedit", image_size=size), words,
                                    args.batch)
            n = len(photos) // args.batch
            found = rates({
                "loader": lambda source=source: [source[m] for m in range(n)],
                "plain loop": lambda size=size: [plain(data, size) for data in photos],
                "decode": lambda: [Image.open(io.BytesIO(data)).load() for data in photos]},
                len(photos), args.rounds)
            if args.workers:
                found[f"{args.workers} workers"] = in_processes(source, args.workers, 40 * n,
                                                                 args.batch)
            rows[size] = found
            print(f"to {size} pixels:" + "".join(f"   {name} {v:.0f} images/s"
                                                 for name, v in found.items())
                  + f"   loader / plain loop {found['loader'] / found['plain loop']:.2f}")
    finish(args, dict(machine=machine(torch.device("cpu")), images_per_s=rows))


if __name__ == "__main__":
    cli.run(main, "--batch")

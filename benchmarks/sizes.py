"""Cost against size: is there a cliff? And where the time of a step goes. Both as figures.

    python benchmarks/sizes.py sizes.json docs/sizes.png        measures; two CPU cores: 15 minutes
    python benchmarks/sizes.py --shares train.json sample.json docs/shares.png      what these wrote

One size at a time: image tokens, batch, or text tokens (of the batch's longest caption; the
shortest has half), the others as in the middle. Compiled blocks, the DiT alone: a call of it
("forward"), or also its backward pass ("training"). A matrix product takes turns with each.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch
from common import case, clock, machine, product
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fusedit_lib import backend, cli
from fusedit_lib.files import atomic_write

MIDDLE = dict(image=256, batch=8, text=32)
SIZES = dict(image=(256, 512, 1024, 2048, 4096), batch=(1, 2, 4, 8, 16, 32, 64),
             text=(16, 32, 64, 128, 256))
COLORS = dict(forward="#3a6fb0", training="#d0703a")


def inputs(model, image, batch, text, device):
    """x, sigma, ids and mask of a size."""
    c = model.config
    rows = 2 ** (image.bit_length() // 2)                  # 256 tokens: 16 x 16; 512: 32 x 16
    x = torch.randn(batch, c.in_channels, rows * c.patch_size, image // rows * c.patch_size)
    lengths = torch.linspace(text, text // 2, batch).long()
    mask = torch.arange(text) < lengths[:, None]
    ids = torch.randint(1, model.llm.config.vocab_size, (batch, text)) * mask
    return [t.to(device) for t in (x, torch.full([batch], 0.7), ids, mask)]


def measure(model, made, device, dtype, size, seconds=4):
    """Medians of (forward, training), and the share of the matrix rate that each reaches."""
    x, sigma, ids, mask = inputs(model, **size, device=device)
    text = model.encode_ids(ids, mask)

    def forward():
        with torch.no_grad():
            model.dit(x, sigma, text)

    def training():
        model.dit(x, sigma, text).sum().backward()
    multiply, flops = product(made, device, dtype, size["batch"] * size["image"], train=False)
    works, took = dict(forward=forward, training=training, rate=multiply), {}
    for work in [*works.values()] * 2:      # compiles
        work()
    while sum(map(sum, took.values())) < seconds or len(took["rate"]) < 3:
        for name, work in works.items():
            took.setdefault(name, []).append(clock(work, device))
    meta = made.abstract()
    x, sigma, ids, mask = (t.to("meta") for t in (x, sigma, ids, mask))
    text = meta.read(ids, mask)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        meta.dit(x, sigma, text)
    took = {name: statistics.median(times) for name, times in took.items()}
    rate = flops / took.pop("rate")
    cost = dict(forward=count.get_total_flops(), training=3 * count.get_total_flops())
    return {name: dict(seconds=s, used=cost[name] / s / rate) for name, s in took.items()}


def sweep(args):
    device, dtype = cli.pick_dtype(args)
    made = case("small")
    backend.configure(device, dtype)
    model = made.build(device, dtype)
    backend.compile_model(model, None)
    cells = [(what, n) for what, many in SIZES.items() for n in many]
    rows = []
    for what, n in tqdm(cells, unit="size", disable=None):
        size = MIDDLE | {what: n}
        rows.append(dict(size, varied=what, **measure(model, made, device, dtype, size)))
        tqdm.write(f"{what:>6} {n:5}" + "".join(
            f"   {name} {1000 * rows[-1][name]['seconds'] / size['batch']:8.1f} ms an image, "
            f"{rows[-1][name]['used']:4.0%} of the matrix rate" for name in COLORS))
    found = dict(machine=machine(device), dtype=args.dtype, torch=torch.__version__, rows=rows)
    with atomic_write(args.files[0]) as tmp:
        tmp.write_text(json.dumps(found, indent=1) + "\n")
    return found


def draw(found):
    """Above, the time of an image; below, the share of the matrix rate."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", sharey="row")
    about = dict(image="image tokens", batch="batch", text="text tokens")
    for column, what in zip(axes.T, SIZES, strict=True):
        rows = [r for r in found["rows"] if r["varied"] == what]
        sizes = [r[what] for r in rows]
        for name, color in COLORS.items():
            each = [1000 * r[name]["seconds"] / r["batch"] for r in rows]
            column[0].loglog(sizes, each, "o-", color=color, label=name, markersize=4)
            column[1].semilogx(sizes, [100 * r[name]["used"] for r in rows], "o-", color=color,
                               markersize=4)
        column[1].set_xticks(sizes, sizes)
        column[1].minorticks_off()
        column[1].set(xlabel=about[what], ylim=(0, 110))
    axes[0, 0].set_ylabel("ms an image")
    axes[1, 0].set_ylabel("% of the matrix rate")
    axes[0, 0].legend(frameon=False)
    return figure


def draw_shares(files):
    """A bar for each benchmark: which part takes how much of its time."""
    from matplotlib import pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 0.8 * len(files) + 1.2))
    found = {path.stem: json.loads(path.read_text())["shares"] for path in files}
    kinds = sorted({k for s in found.values() for k in s}, key=lambda k: -max(
        s.get(k, 0) / sum(s.values()) for s in found.values()))
    colors = plt.get_cmap("tab10").colors
    for y, (name, parts) in enumerate(found.items()):
        left = 0
        for kind, color in zip(kinds, colors, strict=False):
            width = 100 * parts.get(kind, 0) / sum(parts.values())
            axis.barh(y, width, left=left, color=color, label=kind if y == 0 else None)
            if width > 2.5:
                axis.text(left + width / 2, y, f"{width:.0f} %", ha="center", va="center",
                          color="white", fontsize=9)
            left += width
    axis.set_yticks(range(len(found)), found)
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="% of the time")
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
    return figure


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".json files, and a .png")
    p.add_argument("--shares", action="store_true", help="draw what the other benchmarks wrote")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", **cli.DTYPE, help="auto: bf16 where the device has it, else float32")
    args = p.parse_args()
    *data, picture = args.files
    if picture.suffix != ".png" or not data:
        p.error("name .json files and, last, the .png to draw")
    import matplotlib
    matplotlib.use("Agg")
    figure = draw_shares(data) if args.shares else draw(sweep(args))
    with atomic_write(picture) as tmp:
        figure.savefig(tmp, format="png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    cli.run(main, "the sizes")

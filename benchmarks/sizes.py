"""Figures of the DiT's cost against size, and of how the time of a step is spent.

    python benchmarks/sizes.py sizes.json docs/sizes.png        measures; 15 minutes, two CPU cores
    python benchmarks/sizes.py --shares train.json sample.json docs/shares.png
                                            draws what the other benchmarks wrote with --out

The first figure shows whether the cost jumps at any size. One size varies at a time: image tokens,
batch size, or text tokens (of the longest caption of the batch; the shortest has half as many). The
other two keep their usual values. Only the DiT is measured, with compiled blocks: its forward pass
("forward"), and forward and backward ("training"), alternating with a matrix product.
"""
import argparse
import json
import statistics
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch
from common import case, clock, count_flops, machine, product
from tqdm import tqdm

from fusedit_lib import backend, cli
from fusedit_lib.files import atomic_write

USUAL = dict(image=256, batch=8, text=32)
SIZES = dict(image=(256, 512, 1024, 2048, 4096), batch=(1, 2, 4, 8, 16, 32, 64),
             text=(16, 32, 64, 128, 256))
AXIS_LABELS = dict(image="image tokens", batch="batch", text="text tokens")
COLORS = dict(forward="#3a6fb0", training="#d0703a")


# ---------------------------------------------------------------------------- measuring
class Inputs:
    """Random inputs of the DiT: x [B,C,H,W], sigma [B], ids and mask of the text [B,T]."""

    def __init__(self, config, vocab_size, image, batch, text, device):
        """image, text: numbers of tokens. 256 image tokens are 16 x 16 patches, 512 are 32 x 16."""
        P = config.patch_size
        rows = 2 ** (image.bit_length() // 2)
        columns = image // rows
        lengths = torch.linspace(text, text // 2, batch).long()
        x = torch.randn(batch, config.in_channels, rows * P, columns * P)
        mask = torch.arange(text) < lengths[:, None]
        ids = torch.randint(1, vocab_size, (batch, text)).masked_fill(~mask, 0)
        self.x = x.to(device)
        self.sigma = torch.full([batch], 0.7, device=device)
        self.ids = ids.to(device)
        self.mask = mask.to(device)


def forward_flops(case, inputs):
    """FLOPs of one call of the DiT."""
    model = case.abstract()
    text = model.encode_ids(inputs.ids.to("meta"), inputs.mask.to("meta"))
    x = inputs.x.to("meta")
    sigma = inputs.sigma.to("meta")
    with torch.no_grad():
        _, flops = count_flops(lambda: model.dit(x, sigma, text))
    return flops


def measure(model, case, device, dtype, size, seconds=4):
    """The median seconds, and the share of the matrix rate, of "forward" and of "training".

    size: {"image", "batch", "text"}. seconds: how long to measure.
    """
    inputs = Inputs(model.config, model.llm.config.vocab_size, **size, device=device)
    text = model.encode_ids(inputs.ids, inputs.mask)

    def forward():
        with torch.no_grad():
            model.dit(inputs.x, inputs.sigma, text)

    def training():
        model.dit(inputs.x, inputs.sigma, text).sum().backward()

    multiply, product_flops = product(case, device, dtype, size["batch"] * size["image"],
                                      train=False)
    works = dict(forward=forward, training=training, product=multiply)
    for _ in range(2):                      # compiles
        for work in works.values():
            work()

    took = {name: [] for name in works}
    while sum(map(sum, took.values())) < seconds or len(took["product"]) < 3:
        for name, work in works.items():
            took[name].append(clock(work, device))
    medians = {name: statistics.median(times) for name, times in took.items()}

    rate = product_flops / medians["product"]
    flops = forward_flops(case, inputs)
    costs = dict(forward=flops, training=3 * flops)        # backward costs twice as much as forward
    found = {}
    for name, cost in costs.items():
        found[name] = dict(seconds=medians[name], used=cost / medians[name] / rate)
    return found


def print_row(row):
    text = f"{row['varied']:>6} {row[row['varied']]:5}"
    for name in COLORS:
        ms = 1000 * row[name]["seconds"] / row["batch"]
        text += f"   {name} {ms:8.1f} ms per image, {row[name]['used']:4.0%} of the matrix rate"
    tqdm.write(text)


def sweep(args):
    """Measure all sizes and write the results to the first file."""
    device, dtype = cli.pick_dtype(args)
    small = case("small")
    backend.configure(device, dtype)
    model = small.build(device, dtype)
    backend.compile_model(model, None)
    points = [(varied, value) for varied, values in SIZES.items() for value in values]
    rows = []
    for varied, value in tqdm(points, unit="size", disable=None):
        size = USUAL | {varied: value}
        figures = measure(model, small, device, dtype, size)
        row = dict(size, varied=varied, **figures)
        print_row(row)
        rows.append(row)
    found = dict(machine=machine(device), dtype=args.dtype, torch=torch.__version__, rows=rows)
    with atomic_write(args.files[0]) as tmp:
        tmp.write_text(json.dumps(found, indent=1) + "\n")
    return found


# ---------------------------------------------------------------------------- figures
def draw_sweep(found):
    """A figure of the time per image (above) and the share of the matrix rate (below)."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", sharey="row")
    for column, varied in zip(axes.T, SIZES, strict=True):
        above, below = column
        rows = [row for row in found["rows"] if row["varied"] == varied]
        sizes = [row[varied] for row in rows]
        for name, color in COLORS.items():
            ms = [1000 * row[name]["seconds"] / row["batch"] for row in rows]
            percent = [100 * row[name]["used"] for row in rows]
            above.loglog(sizes, ms, "o-", color=color, label=name, markersize=4)
            below.semilogx(sizes, percent, "o-", color=color, markersize=4)
        below.set_xticks(sizes, sizes)
        below.minorticks_off()
        below.set(xlabel=AXIS_LABELS[varied], ylim=(0, 110))
    axes[0, 0].set_ylabel("ms per image")
    axes[1, 0].set_ylabel("% of the matrix rate")
    axes[0, 0].legend(frameon=False)
    return figure


def percentages(path):
    """{kind: percent of the time} from a file that a benchmark wrote."""
    seconds = json.loads(path.read_text())["shares"]
    total = sum(seconds.values())
    return {kind: 100 * value / total for kind, value in seconds.items()}


def draw_shares(files):
    """A figure with a bar for each benchmark, divided by how its time is spent."""
    from matplotlib import pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 0.8 * len(files) + 1.2))
    found = {path.stem: percentages(path) for path in files}

    # kinds in the order of their largest share
    largest = {}
    for shares in found.values():
        for kind, percent in shares.items():
            largest[kind] = max(percent, largest.get(kind, 0))
    kinds = sorted(sorted(largest), key=largest.get, reverse=True)

    colors = plt.get_cmap("tab10").colors
    for y, shares in enumerate(found.values()):
        left = 0
        for kind, color in zip(kinds, colors, strict=False):
            width = shares.get(kind, 0)
            label = None
            if y == 0:                      # one legend entry per kind
                label = kind
            axis.barh(y, width, left=left, color=color, label=label)
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE",
                   help=".json files, followed by the .png to draw")
    p.add_argument("--shares", action="store_true",
                   help="draw how time is spent, from .json files of other benchmarks")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", **cli.DTYPE,
                   help="precision; auto is bf16 where the device has it natively, else float32")
    args = p.parse_args()
    *data, image = args.files
    if image.suffix != ".png" or not data:
        p.error("give .json files, followed by the .png to draw")

    import matplotlib
    matplotlib.use("Agg")
    if args.shares:
        figure = draw_shares(data)
    else:
        figure = draw_sweep(sweep(args))
    with atomic_write(image) as tmp:
        figure.savefig(tmp, format="png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    cli.run(main, "the sizes")

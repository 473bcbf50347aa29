"""Draw a run's loss, validation and throughput: python -m fusedit_lib.train.plot runs/demo"""
import argparse
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib import cli
from fusedit_lib.files import atomic_write, read_jsonl
from fusedit_lib.train.validation import LEVELS

# ------------------------------------------------------------------------------ plot

def plot(folder):
    """Loss, validation and throughput of a run to plot.png in its folder; returns its path."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise FuseDiTError(f"{folder} has no metrics.jsonl: name a run's folder, as runs/demo")
    if not (table := read_jsonl(path)):
        raise FuseDiTError(f"{path} is empty: the run has not logged yet")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def curve(axis, key, **style):
        xy = [(r["step"], r[key]) for r in table if r.get(key) is not None]
        axis.plot(*zip(*xy, strict=True), **style) if xy else None
    figure, (loss, val, speed) = plt.subplots(3, 1, figsize=(8, 10), sharex=True,
                                              layout="constrained")
    curve(loss, "loss", lw=0.8, label="training")
    curve(loss, "val_loss", marker=".", label="validation, averaged weights")
    loss.set(ylabel="loss", yscale="log", title=str(folder))
    for sigma in LEVELS:
        curve(val, f"val_{sigma:.4f}", marker=".", label=f"$\\sigma$ {sigma:.2f}")
    val.set(ylabel="validation loss at a noise level", yscale="log")
    curve(speed, "images_per_s", lw=0.8)
    speed.set(ylabel="images/s", xlabel="step", ylim=(0, None))
    for axis in (loss, val):
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "1235" else "")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", ncols=2)
        else:
            axis.text(0.5, 0.5, "no --val-data", transform=axis.transAxes, ha="center")
    for axis in (loss, val, speed):
        axis.grid(alpha=0.3)
    with atomic_write(png := Path(folder) / "plot.png") as tmp:
        figure.savefig(tmp, format="png", dpi=120)
    return png


def main():
    parser = argparse.ArgumentParser(description="Look at a run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    print(plot(parser.parse_args().run))


if __name__ == "__main__":
    cli.run(main, "the number of points")

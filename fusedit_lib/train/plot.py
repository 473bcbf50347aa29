"""Plots a run's loss, validation loss and throughput: python -m fusedit_lib.train.plot runs/demo"""
import argparse
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib import cli
from fusedit_lib.files import atomic_write, read_jsonl
from fusedit_lib.train.changes import describe_change
from fusedit_lib.train.validation import VALIDATION_SIGMAS


def read_metrics(folder):
    """The rows of a run folder's metrics.jsonl; raises FuseDiTError if there are none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise FuseDiTError(f"{folder} has no metrics.jsonl: give a run folder, such as runs/demo")
    table = read_jsonl(path)
    if not table:
        raise FuseDiTError(f"{path} is empty: the run has not logged anything yet")
    return table


def draw_curve(axis, table, name, **style):
    """Draw a metric over steps, if any row has it."""
    points = [(row["step"], row[name]) for row in table if row.get(name) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, **style)


def draw_changes(axes, table):
    """Draw a labelled line where --resume-with has changed settings. The first axis has labels."""
    for row in table:
        if "changed" not in row:
            continue
        for axis in axes:
            axis.axvline(row["step"], color="gray", ls="--", lw=0.8)
        axes[0].annotate(describe_change(row["changed"]), (row["step"], 1), xytext=(3, -3),
                         xycoords=("data", "axes fraction"), textcoords="offset points",
                         rotation=90, va="top", fontsize="x-small", color="gray")


def log_tick(value, _):
    """Tick label of a logarithmic axis, for 1, 2, 3 and 5 times a power of ten."""
    leading_digit = f"{value:e}"[0]
    if leading_digit in "1235":
        return f"{value:g}"
    return ""


def finish_loss_axis(axis):
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(log_tick)
    axis.yaxis.set_minor_formatter(log_tick)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small", ncols=2)
    else:
        axis.text(0.5, 0.5, "no --val-data", transform=axis.transAxes, ha="center")


def plot(folder):
    """Plot a run's metrics to plot.png in its folder; returns the path of the image.

    Raises FuseDiTError if the folder has no metrics.
    """
    table = read_metrics(folder)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (loss, val, speed) = plt.subplots(3, 1, figsize=(8, 10), sharex=True,
                                              layout="constrained")

    draw_curve(loss, table, "loss", lw=0.8, label="training")
    draw_curve(loss, table, "val_loss", marker=".", label="validation, EMA weights")
    loss.set_title(str(folder))
    loss.set_ylabel("loss")
    finish_loss_axis(loss)

    for sigma in VALIDATION_SIGMAS:
        label = f"$\\sigma$ {sigma:.2f}"
        draw_curve(val, table, f"val_{sigma:.4f}", marker=".", label=label)
    val.set_ylabel("validation loss per noise level")
    finish_loss_axis(val)

    draw_curve(speed, table, "images_per_s", lw=0.8)
    speed.set_ylabel("images/s")
    speed.set_xlabel("step")
    speed.set_ylim(0, None)

    draw_changes((loss, val, speed), table)
    for axis in (loss, val, speed):
        axis.grid(alpha=0.3)
    path = Path(folder) / "plot.png"
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
    return path


def main():
    parser = argparse.ArgumentParser(description="Plot a run's metrics to plot.png in its folder.")
    parser.add_argument("run", type=Path, help="run folder")
    print(plot(parser.parse_args().run))


if __name__ == "__main__":
    cli.run(main, "")

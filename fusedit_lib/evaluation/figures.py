"""Draws figures: comparisons of models, sweeps over sampler settings, and images with verdicts."""
import textwrap
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from fusedit_lib.files import atomic_write

RIGHT_COLOUR = (20, 150, 60)                # of the frame around an image
WRONG_COLOUR = (205, 30, 40)
CELL = 132                                  # pixels: side of an image with its frame
LABEL = 40                                  # pixels: height of the prompt below the image

TEXT_COLOUR = "#333333"
LINE_COLOUR = "#e4e4e4"
DOT_COLOUR = "#2a6fbb"


class Measurement(NamedTuple):
    """One measured value of a model."""
    measure: str                            # name of the measure
    value: float
    interval: list[float] | None            # low, high (95 %)
    higher_is_better: bool


# ---- charts --------------------------------------------------------------------------------------

def new_figure(columns, width, height):
    """Create a figure of width x height inches with one row of axes. Returns (figure, axes)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, grid = plt.subplots(1, columns, figsize=(width, height), squeeze=False,
                                layout="constrained")
    axes = grid[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=LINE_COLOUR, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=TEXT_COLOUR, length=0)
    return figure, axes


def save_figure(figure, path):
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)


def compare_models(table, models, path):
    """Draw one chart per measure, in which each model is a dot with its interval.

    table: {measure: {model: Measurement}}; models: their names, from top to bottom.
    """
    width = 1.2 + 2.6 * len(table)
    height = 1.3 + 0.35 * len(models)
    figure, axes = new_figure(len(table), width, height)
    for axis, (measure, by_model) in zip(axes, table.items(), strict=True):
        for y, model in enumerate(models):
            if model in by_model:
                draw_dot(axis, by_model[model], y)
        axis.set_yticks(range(len(models)), [""] * len(models))
        axis.set(ylim=(len(models) - 0.5, -0.7))
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)             # more labels would touch each other
        better = "lower"
        if next(iter(by_model.values())).higher_is_better:
            better = "higher"
        axis.set_title(f"{measure} ({better} is better)", fontsize=9, color=TEXT_COLOUR)
    axes[0].set_yticks(range(len(models)), models)
    save_figure(figure, path)


def draw_dot(axis, measurement, y):
    value = measurement.value
    if measurement.interval:
        axis.plot(measurement.interval, [y, y], color=DOT_COLOUR, lw=2)
    axis.plot(value, y, "o", color=DOT_COLOUR)
    axis.annotate(f"{value:.4g}", (value, y), (0, 6), textcoords="offset points", ha="center",
                  color=TEXT_COLOUR, fontsize=8)


def sweep(results, path):
    """Plot scores against guidance, with one line per number of steps, and vice versa.

    results: those of the shapes benchmark, one per point of the sweep. A chart is omitted if its
    horizontal axis would have only one value.
    """
    names = {"guidance": "guidance", "steps": "Euler steps"}
    charts = []
    for x, line in (("guidance", "steps"), ("steps", "guidance")):
        if len({result["settings"][x] for result in results}) > 1:
            charts.append((x, line))

    figure, axes = new_figure(len(charts), 5.2 * len(charts), 3.8)
    for axis, (x, line) in zip(axes, charts, strict=True):
        draw_sweep_lines(axis, results, x, line)
        axis.set_xlabel(names[x], color=TEXT_COLOUR)
        axis.set_ylabel("score, with 95 % interval", color=TEXT_COLOUR)
        if x == "steps":
            ticks = sorted({result["settings"]["steps"] for result in results})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.legend(title=names[line], frameon=False, fontsize=8, title_fontsize=8)
    save_figure(figure, path)
    print(path)


def draw_sweep_lines(axis, results, x, line):
    """Plot scores against setting `x`, with one line per value of setting `line`."""
    from matplotlib import colormaps
    values = sorted({result["settings"][line] for result in results})
    for i, value in enumerate(values):
        points = [result for result in results if result["settings"][line] == value]
        points.sort(key=lambda result: result["settings"][x])
        places = [result["settings"][x] for result in points]
        scores = [result["overall"] for result in points]
        lows = [result["intervals"]["overall"][0] for result in points]
        highs = [result["intervals"]["overall"][1] for result in points]
        colour = colormaps["viridis"](0.85 * i / max(1, len(values) - 1))
        axis.plot(places, scores, "o-", color=colour, ms=4, lw=1.6, label=f"{value:g}")
        axis.fill_between(places, lows, highs, color=colour, alpha=0.12, lw=0)


# ---- images with verdicts ------------------------------------------------------------------------

def verdict_grid(categories, rows, images, columns=10):
    """An image grid whose rows show the first images of each category.

    A frame and a mark show whether an image is correct. rows: dicts with category, prompt and
    right, one per image.
    """
    size = (columns * CELL, len(categories) * (CELL + LABEL))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for line, category in enumerate(categories):
        shown = []
        for row, image in zip(rows, images, strict=True):
            if row["category"] == category:
                shown.append((row, image))
        for column, (row, image) in enumerate(shown[:columns]):
            draw_verdict(grid, pen, column * CELL, line * (CELL + LABEL), row, image)
    return grid


def draw_verdict(grid, pen, x, y, row, image):
    """Draw one framed image with its mark and prompt; x, y: its upper-left corner."""
    colour = WRONG_COLOUR
    strokes = [((2, 2), (9, 10)), ((9, 2), (2, 10))]       # a cross
    if row["right"]:
        colour = RIGHT_COLOUR
        strokes = [((1, 6), (4, 10), (10, 2))]             # a tick

    pen.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), fill=colour)
    side = CELL - 8
    grid.paste(image.resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 4))

    left = x + CELL - 16
    top = y + 4
    pen.rectangle((left - 1, top, left + 11, top + 12), fill=colour)
    for stroke in strokes:
        pen.line([(left + dx, top + dy) for dx, dy in stroke], "white", 2)

    text = textwrap.fill(row["prompt"], 24, max_lines=3)
    pen.text((x + 3, y + CELL), text, "black", ImageFont.load_default(10), spacing=1)

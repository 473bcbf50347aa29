"""TODO."""
import textwrap

from PIL import Image, ImageDraw, ImageFont

from fusedit_lib.files import atomic_write

PASS, FAIL = (20, 150, 60), (205, 30, 40)
CELL, LABEL = 132, 40                                      # of the sheet, in pixels
INK, GRID, BLUE = "#333333", "#e4e4e4", "#2a6fbb"


# ---- pictures ------------------------------------------------------------------------------------

def axes(plt, count, width, height):
    fig, found = plt.subplots(1, count, figsize=(width, height), squeeze=False,
                              layout="constrained")
    for axis in found[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, length=0)
    return fig, found[0]


def keep(fig, path):
    with atomic_write(path) as tmp:
        fig.savefig(tmp, format="png", dpi=120)


def figure(table, better, models, path):
    """A panel a measure: a dot a model, with its interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, panels = axes(plt, len(table), 1.2 + 2.6 * len(table), 1.3 + 0.35 * len(models))
    for axis, (measure, row) in zip(panels, table.items(), strict=True):
        for y, model in enumerate(models):
            if model in row:
                value, interval = row[model]
                axis.plot(interval or [], [y] * len(interval or []), color=BLUE, lw=2)
                axis.plot(value, y, "o", color=BLUE)
                axis.annotate(f"{value:.4g}", (value, y), (0, 6), textcoords="offset points",
                              ha="center", color=INK, fontsize=8)
        axis.set_yticks(range(len(models)), models if axis is panels[0] else [""] * len(models))
        axis.set(ylim=(len(models) - 0.5, -0.7))
        axis.margins(x=0.25)
        axis.set_title(f"{measure} ({'more' if better[measure] else 'less'} is better)", fontsize=9,
                       color=INK)
    keep(fig, path)


def sweep(results, path):
    """Score against guidance, a line a number of steps, and against steps, a line a guidance."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    points = {(r["settings"]["guidance"], r["settings"]["steps"]): (
        r["overall"], r["intervals"]["overall"]) for r in results}
    names = ["guidance", "Euler steps"]
    shown = [i for i in (0, 1) if len({key[i] for key in points}) > 1]
    fig, panels = axes(plt, len(shown), 5.2 * len(shown), 3.8)
    for axis, i in zip(panels, shown, strict=True):
        lines = sorted({key[1 - i] for key in points})
        for n, line in enumerate(lines):
            colour = plt.get_cmap("viridis")(0.85 * n / max(1, len(lines) - 1))
            x = sorted(key[i] for key in points if key[1 - i] == line)
            y, sure = zip(*(points[(v, line) if i == 0 else (line, v)] for v in x), strict=True)
            axis.plot(x, y, "o-", color=colour, ms=4, lw=1.6, label=f"{line:g}")
            axis.fill_between(x, *zip(*sure, strict=True), color=colour, alpha=0.12, lw=0)
        axis.set_xlabel(names[i], color=INK)
        axis.set_ylabel("score, with 95 % interval", color=INK)
        if i == 1:
            axis.set_xscale("log")
            axis.set_xticks(x, [f"{v:g}" for v in x])
            axis.minorticks_off()
        axis.legend(title=names[1 - i], frameon=False, fontsize=8, title_fontsize=8)
    keep(fig, path)
    print(path)


def sheet(categories, rows, pictures, columns=10):
    """The first pictures of every category, a row each; a frame and a mark say right or wrong."""
    page = Image.new("RGB", (columns * CELL, len(categories) * (CELL + LABEL)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for line, category in enumerate(categories):
        shown = [(r, p) for r, p in zip(rows, pictures, strict=True) if r["category"] == category]
        for column, (row, picture) in enumerate(shown[:columns]):
            x, y = column * CELL, line * (CELL + LABEL)
            colour, side = PASS if row["right"] else FAIL, CELL - 8
            pen.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), fill=colour)
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 4))
            mark(pen, x + CELL - 16, y + 4, row["right"], colour)
            pen.text((x + 3, y + CELL), textwrap.fill(row["prompt"], 24, max_lines=3),
                     "black", font, spacing=1)
    return page


def mark(pen, x, y, right, colour):
    pen.rectangle((x - 1, y, x + 11, y + 12), fill=colour)
    strokes = [((1, 6), (4, 10), (10, 2))] if right else [((2, 2), (9, 10)), ((9, 2), (2, 10))]
    for stroke in strokes:
        pen.line([(x + a, y + b) for a, b in stroke], "white", 2)

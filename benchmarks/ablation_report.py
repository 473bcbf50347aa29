"""The table and the figure of ablations.py, with intervals over seeds and prompts.

A score varies for two reasons: the prompts are a sample of all prompts, and another seed would have
given another model. An interval adds both. The prompts are resampled by the bootstrap of
evaluate.py. The spread between seeds is estimated from all points together, since a single point
has few seeds, and enters by Student's t. A difference is taken between images of the same prompt
and the same seed.
"""
import statistics
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from ablation_points import POINTS

import fusedit
from fusedit import FuseDiTError
from fusedit_lib.evaluation import figures, metrics, results
from fusedit_lib.evaluation.figures import Measurement
from fusedit_lib.files import atomic_write
from fusedit_lib.shapes import scenes

HEADER = ("point", "seeds", "parameters", "images/s", "loss", "score", "95 % interval",
          "difference", "p", "")


class Spread(NamedTuple):
    """The spread between seeds of the same point, beyond the chance in single verdicts.

    The logit of a score is taken to vary equally at all points. A score s then varies by
    s (1 - s) times as much: one near 0 or 1 varies little.
    """
    logit_variance: float
    degrees: float                          # of freedom; 0: no point has two seeds

    def variance(self, score):
        """The variance between seeds of a point with this score."""
        return self.logit_variance * (score * (1 - score)) ** 2


class Comparison(NamedTuple):
    """A point compared with another, on the seeds and prompts that both have."""
    difference: float
    interval: list[float]                   # 95 %
    p: float


# ---------------------------------------------------------------------------- statistics
def verdicts(runs):
    """The verdicts of a point's runs, an array [seeds, prompts]: 1 if the image is right."""
    return np.array([[int(digit) for digit in run["verdicts"]] for run in runs])


def by_category(values):
    """{category: the columns of its prompts} of an array [seeds, prompts]."""
    count = len(scenes.CATEGORIES)          # evaluation_prompts takes the categories in turn
    found = scenes.CATEGORIES[:values.shape[1]]
    return {category: values[:, k::count] for k, category in enumerate(found)}


def overall(values):
    """The mean of the categories' means of an array [seeds, prompts]."""
    return float(np.mean([columns.mean() for columns in by_category(values).values()]))


def seed_spread(by_point):
    """The Spread of {point: runs}.

    Each point with several seeds gives an estimate. They are weighted by what they say about the
    logit: a point with scores near 0 says little, and adds as little to the degrees of freedom
    (Satterthwaite's formula).
    """
    variances, weights, degrees = [], [], []
    for runs in by_point.values():
        if len(runs) > 1:
            values = verdicts(runs)
            chance = values.var(0, ddof=1).mean() / values.shape[1]
            score = overall(values)
            variances.append(statistics.variance(run["score"] for run in runs) - chance)
            weights.append((score * (1 - score)) ** 2)
            degrees.append(len(runs) - 1)

    total = np.dot(degrees, weights)
    if total == 0:                          # a single seed, or no verdict that differs
        return Spread(0.0, sum(degrees))
    logit_variance = np.dot(degrees, variances) / total
    return Spread(max(0.0, logit_variance), total ** 2 / np.dot(degrees, np.square(weights)))


def draws(values, bounds, variance, degrees):
    """Draws of a score, or of a difference of two, that vary with the prompts and the seeds.

    values: [seeds, prompts], between the two bounds. variance: between seeds, estimated with these
    degrees of freedom.
    """
    rng = np.random.default_rng(0)
    means = {category: columns.mean(0) for category, columns in by_category(values).items()}
    drawn = metrics.overall_means(rng, means, bounds)
    if degrees:
        deviation = (variance / len(values)) ** 0.5
        drawn = drawn + deviation * rng.standard_t(degrees, len(drawn))
    return np.clip(drawn, *bounds)


def percentiles(drawn):
    low, high = np.percentile(drawn, (2.5, 97.5))
    return [float(low), float(high)]


def score_interval(runs, spread):
    values = verdicts(runs)
    variance = spread.variance(overall(values))
    return percentiles(draws(values, (0, 1), variance, spread.degrees))


def compare(runs, others, spread):
    """The Comparison of a point's runs with another's, or None if they have no seed in common."""
    by_seed = {run["seed"]: run for run in others}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs:
        return None
    own, others = (verdicts(side) for side in zip(*pairs, strict=True))
    differences = own - others
    variance = spread.variance(overall(own)) + spread.variance(overall(others))
    drawn = draws(differences, (-1, 1), variance, spread.degrees)
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + len(drawn)))
    return Comparison(overall(differences), percentiles(drawn), p)


def claim(comparison, spread):
    """The claim that a Comparison allows, in words."""
    if not spread.degrees:
        return "not tested: one seed"
    if comparison.p >= 0.05:
        return "no difference seen"
    return "better" if comparison.difference > 0 else "worse"


# ---------------------------------------------------------------------------- the table
def table_row(name, runs, others, spread):
    """The cells of a point's row; others: the runs that it is compared with."""
    first = runs[0]
    title = name
    if first["control"]:
        title += f" (as many parameters as {first['control']})"
    speed = statistics.median(run["images_per_s"] for run in runs)
    loss = statistics.mean(run["loss"] for run in runs)
    score = statistics.mean(run["score"] for run in runs)
    cells = [title, str(len(runs)), f"{first['parameters'] / 1e6:.2f} M", f"{speed:,.0f}",
             f"{loss:.4f}", f"{score:.3f}", results.format_interval(score_interval(runs, spread))]
    comparison = None
    if runs is not others:
        comparison = compare(runs, others, spread)
    if comparison is None:
        return [*cells, "", "", ""]
    low, high = comparison.interval
    difference = f"{comparison.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    p = f"{comparison.p:.4f}" if spread.degrees else ""
    return [*cells, difference, p, claim(comparison, spread)]


def markdown(rows):
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def categories_table(by_point):
    """The mean score of each point in each category as Markdown."""
    lines = [["point", *scenes.CATEGORIES], ["---"] * (1 + len(scenes.CATEGORIES))]
    for name, runs in by_point.items():
        groups = by_category(verdicts(runs))
        scores = [f"{columns.mean():.3f}" for columns in groups.values()]
        lines.append([name, *scores])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notes(runs, spread, against):
    """The sentences below the table."""
    first = runs[0]
    devices = sorted({run["device"] for run in runs})
    text = (f"Each run: {first['images']:,} images of {first['distinct']:,} scenes in batches of "
            f"{first['batch']}, {first['dtype']}; {first['prompts']} prompts. Trained on "
            f"{', '.join(devices)}.")
    if len(devices) > 1:
        text += (" On different devices the speeds are not comparable, and a seed gives other "
                 "noise.")
    text += f"\n\nDifferences and p values are relative to {against}, over seeds and prompts."
    if spread.degrees:
        deviation = spread.variance(0.5) ** 0.5
        text += (" The standard deviation between seeds, without the chance in single verdicts, "
                 f"is {deviation:.3f} at a score of 0.5 ({spread.degrees:.1f} degrees of freedom) "
                 "and lower near 0 and 1.")
    else:
        text += (" Every point has one seed, so the intervals do not contain the spread between "
                 "seeds, and nothing can be claimed: train more --seeds.")
    return text + (" Of 20 points that are equally good, up to one is expected to have p < 0.05 "
                   "by chance.\n")


def rates_table(rates):
    """The sweep of learning rates as Markdown; empty if there was none."""
    if not rates:
        return "\nThere was no sweep of the learning rate (--sweep-lr).\n"
    lines = ["\n| family | swept with | loss by learning rate | chosen |\n|---|---|---|---|\n"]
    for family, swept in rates.items():
        losses = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in swept["losses"].items())
        lines.append(f"| {family} | {swept['point']}, {swept['images']:,} images | {losses} | "
                     f"{swept['best']:g} |\n")
    return "".join(lines)


def in_order(runs):
    """{point: its runs}, in the order of POINTS."""
    found = defaultdict(list)
    for run in runs:
        found[run["point"]].append(run)
    known = [name for name in POINTS if name in found]
    return {name: found[name] for name in [*known, *sorted(found.keys() - POINTS.keys())]}


def report(runs, rates, out, against):
    """Write out/report.md and out/report.png, and print the former. Raises FuseDiTError."""
    import matplotlib  # noqa: F401         if it is missing, fail now rather than at the end
    if not runs:
        raise FuseDiTError(f"{out} has no finished runs: train some first, without --report")
    by_point = in_order(runs)
    if against not in by_point:
        raise FuseDiTError(f"{out} has no runs of {against!r} to compare with; "
                           f"{fusedit.suggest(against, by_point)}")
    spread = seed_spread(by_point)
    rows = [table_row(name, own, by_point[against], spread) for name, own in by_point.items()]
    text = (f"{markdown(rows)}\n{notes(runs, spread, against)}\n{categories_table(by_point)}"
            f"{rates_table(rates)}")
    with atomic_write(out / "report.md") as tmp:
        tmp.write_text(text, "utf-8")
    draw(by_point, spread, out / "report.png")
    print(f"{text}\n{out}/report.md and report.png")


def draw(by_point, spread, path):
    """Draw the scores with their intervals, and the losses."""
    scores = {}
    losses = {}
    for name, runs in by_point.items():
        score = statistics.mean(run["score"] for run in runs)
        loss = statistics.mean(run["loss"] for run in runs)
        scores[name] = Measurement("score", score, score_interval(runs, spread), True)
        losses[name] = Measurement("loss", loss, None, False)
    figures.compare_models({"score": scores, "loss": losses}, list(by_point), path)

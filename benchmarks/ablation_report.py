"""The table and the figure of ablations.py, with intervals over seeds and prompts.

A score varies for two reasons: the prompts are a sample of all prompts, and another seed would have
given another model. An interval adds both. The prompts are resampled by the bootstrap of
evaluate.py. The spread between seeds is estimated from all points together, since a single point
has few seeds. A difference is taken between the images of the same prompt.
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

SEED_DRAWS = 10                             # for each draw of the prompts

HEADER = ("point", "seeds", "parameters", "images/s", "loss", "score", "95 % interval",
          "difference", "p", "")


class Spread(NamedTuple):
    """The spread of the scores between seeds of the same point.

    The logit of a score is taken to vary equally at all points. So the standard deviation of a
    score s is s (1 - s) times that of its logit: a score near 0 or 1 varies little.
    """
    observed: float                         # variance between the logits of a point's seeds
    chance: float                           # the part of it that is chance in single verdicts
    degrees: float                          # of freedom; 0: the spread is not known

    def deviation(self):
        """The standard deviation of a logit, without chance."""
        return max(0.0, self.observed - self.chance) ** 0.5

    def draw_deviations(self, rng, count):
        """Draw standard deviations of a logit, without chance, that agree with the observed."""
        observed = self.observed * self.degrees / rng.chisquare(self.degrees, count)
        return np.maximum(0, observed - self.chance) ** 0.5


class Comparison(NamedTuple):
    """A point compared with another on the same prompts."""
    difference: float
    interval: list[float]                   # 95 %
    p: float


# ---------------------------------------------------------------------------- statistics
def verdicts(runs):
    """The verdicts of a point's runs, an array [seeds, prompts]: 1 if the image is right."""
    return np.array([[int(digit) for digit in run["verdicts"]] for run in runs])


def by_category(values):
    """{category: the values of its prompts} of an array [..., prompts]."""
    count = len(scenes.CATEGORIES)          # evaluation_prompts takes the categories in turn
    found = scenes.CATEGORIES[:values.shape[-1]]
    return {category: values[..., k::count] for k, category in enumerate(found)}


def overall(values):
    """The mean of the categories' means of an array [..., prompts]."""
    return float(np.mean([columns.mean() for columns in by_category(values).values()]))


def seed_spread(by_point):
    """The Spread of {point: runs}.

    Each point with several seeds gives an estimate. They are weighted by what they say about the
    logit: a point with scores near 0 says little, and adds as little to the degrees of freedom
    (Satterthwaite's formula). Chance in single verdicts is known from the prompts about which the
    seeds disagree. The bootstrap over prompts includes it already.
    """
    variances, chances, weights, degrees = [], [], [], []
    for runs in by_point.values():
        if len(runs) > 1:
            values = verdicts(runs)
            score = overall(values)
            variances.append(statistics.variance(run["score"] for run in runs))
            chances.append(values.var(0, ddof=1).mean() / values.shape[1])
            weights.append((score * (1 - score)) ** 2)
            degrees.append(len(runs) - 1)

    total = np.dot(degrees, weights)
    if total == 0:                          # no point with two seeds and a score between 0 and 1
        return Spread(0.0, 0.0, 0.0)
    return Spread(observed=np.dot(degrees, variances) / total,
                  chance=np.dot(degrees, chances) / total,
                  degrees=total ** 2 / np.dot(degrees, np.square(weights)))


def draws(values, bounds, spread, scale):
    """Draws of a score, or of a difference of two, that vary with the prompts and the seeds.

    values: [prompts], means over the seeds, between the two bounds. scale: the standard deviation
    of these means between seeds, divided by that of one logit.
    """
    rng = np.random.default_rng(0)
    drawn = metrics.overall_means(rng, by_category(values), bounds)
    if spread.degrees:
        drawn = np.repeat(drawn, SEED_DRAWS)
        deviations = scale * spread.draw_deviations(rng, len(drawn))
        drawn = drawn + deviations * rng.standard_normal(len(drawn))
    return np.clip(drawn, *bounds)


def seed_scale(values):
    """The scale for draws() of a score. values: [seeds, prompts]."""
    score = overall(values)
    return score * (1 - score) / len(values) ** 0.5


def percentiles(drawn):
    low, high = np.percentile(drawn, (2.5, 97.5))
    return [float(low), float(high)]


def score_interval(runs, spread):
    values = verdicts(runs)
    return percentiles(draws(values.mean(0), (0, 1), spread, seed_scale(values)))


def compare(runs, others, spread):
    """The Comparison of a point's runs with another's."""
    own, others = verdicts(runs), verdicts(others)
    scale = np.hypot(seed_scale(own), seed_scale(others))
    differences = own.mean(0) - others.mean(0)
    drawn = draws(differences, (-1, 1), spread, scale)
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + len(drawn)))
    return Comparison(overall(differences), percentiles(drawn), p)


def claim(comparison, spread):
    """The claim that a Comparison allows, in words."""
    if not spread.degrees:
        return "not tested"
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
    if runs is others:
        return [*cells, "", "", ""]
    comparison = compare(runs, others, spread)
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
        text += (" The standard deviation between seeds, without the chance in single verdicts, "
                 f"is {0.25 * spread.deviation():.3f} at a score of 0.5 ({spread.degrees:.1f} "
                 "degrees of freedom) and lower near 0 and 1.")
    else:
        text += (" The spread between seeds is not known, so the intervals do not contain it, and "
                 "nothing can be claimed: train more --seeds. (Points that are never right do not "
                 "help.)")
    return text + (" Of 20 points that are equally good, one on average has p < 0.05 by "
                   "chance.\n")


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

"""The table and the figure of ablations.py, with intervals over seeds and prompts.

A score varies for two reasons: the prompts are a sample of all prompts, and another seed would have
given another model. An interval adds both. The prompts are resampled by the bootstrap of
evaluate.py. The spread between seeds is estimated from all points together, since a single point
has few seeds. A difference is taken between images of the same prompt and the same seed.
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

SEED_DRAWS = 10                             # of the seeds, for each draw of the prompts

HEADER = ("point", "seeds", "parameters", "images/s", "loss", "score", "95 % interval",
          "difference", "p", "claim")


class Spread(NamedTuple):
    """A spread of the scores between seeds of the same point.

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


class Spreads(NamedTuple):
    """The two spreads of an experiment."""
    alone: Spread                           # of a point's scores
    paired: Spread                          # without what a seed does to all points


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
    """{category: the values of its prompts} of an array [..., prompts]."""
    count = len(scenes.CATEGORIES)          # evaluation_prompts takes the categories in turn
    found = scenes.CATEGORIES[:values.shape[-1]]
    return {category: values[..., k::count] for k, category in enumerate(found)}


def overall(values):
    """The mean of the categories' means of an array [..., prompts]."""
    return float(np.mean([columns.mean() for columns in by_category(values).values()]))


def seed_spreads(by_point):
    """The Spreads of {point: runs}.

    A seed gives all points the same images in the same order with the same noise. So it may be a
    good or a bad one for all of them. This cancels when equally good points are compared.
    """
    return Spreads(seed_spread(by_point, paired=False), seed_spread(by_point, paired=True))


def seed_spread(by_point, paired):
    """The Spread of the runs' scores around a linear model, with a mean for each point.

    paired: the model also has an effect of each seed on the logit, the same for all points.

    The residuals are M s, where s are the scores and M projects onto what the model leaves over.
    The score of a point has a slope of score (1 - score) in its logit. With D, the squares of these
    slopes, the expected sum of the squared residuals is trace(M D) times the variance of a logit,
    and Satterthwaite's degrees of freedom are trace(M D)^2 / trace(M D M D). Chance in single
    verdicts is known from the prompts about which the seeds of a point disagree. The bootstrap over
    prompts includes it already.
    """
    scores, slopes, chances, points, seeds = [], [], [], [], []
    for point, runs in by_point.items():
        values = verdicts(runs)
        score = overall(values)
        chance = 0.0
        if len(runs) > 1:
            chance = values.var(0, ddof=1).mean() / values.shape[1]
        for run in runs:
            scores.append(run["score"])
            slopes.append(score * (1 - score))
            chances.append(chance)
            points.append(point)
            seeds.append(run["seed"])

    model = indicators(points)
    if paired:
        effects = indicators(seeds) * np.array(slopes)[:, None]
        model = np.hstack([model, effects])
    left_over = np.eye(len(scores)) - model @ np.linalg.pinv(model)
    weighted = left_over * np.square(slopes)
    total = np.trace(weighted)
    if total < 1e-9:                        # no two seeds, or no image that is right
        return Spread(0.0, 0.0, 0.0)
    return Spread(observed=scores @ left_over @ scores / total,
                  chance=np.trace(left_over * chances) / total,
                  degrees=total ** 2 / np.trace(weighted @ weighted))


def indicators(labels):
    """The matrix of dummy variables [labels, different labels]."""
    return np.array([[float(label == other) for other in sorted(set(labels))] for label in labels])


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


def score_interval(runs, spreads):
    values = verdicts(runs)
    return percentiles(draws(values.mean(0), (0, 1), spreads.alone, seed_scale(values)))


def compare(runs, others, spreads):
    """The Comparison of a point's runs with another's, or None if they have no seed in common.

    The interval is for the seeds that were used: a better seed may change a score of 0.5 more than
    one of 0.1. The p value is for points that are equally good, for which this cancels.
    """
    by_seed = {run["seed"]: run for run in others}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs:
        return None
    own, others = (verdicts(side) for side in zip(*pairs, strict=True))
    scale = np.hypot(seed_scale(own), seed_scale(others))
    differences = own.mean(0) - others.mean(0)
    drawn = draws(differences, (-1, 1), spreads.paired, scale)
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + len(drawn)))
    return Comparison(overall(differences), percentiles(drawn), p)


def claim(comparison, spreads):
    """The claim that a Comparison allows, in words."""
    if not spreads.paired.degrees:
        return "not tested"
    if comparison.p >= 0.05:
        return "no difference seen"
    return "better" if comparison.difference > 0 else "worse"


# ---------------------------------------------------------------------------- the table
def table_row(name, runs, others, spreads):
    """The cells of a point's row; others: the runs that it is compared with."""
    first = runs[0]
    title = name
    if first["control"]:
        title += f" (as many parameters as {first['control']})"
    speed = statistics.median(run["images_per_s"] for run in runs)
    loss = statistics.mean(run["loss"] for run in runs)
    score = statistics.mean(run["score"] for run in runs)
    cells = [title, str(len(runs)), f"{first['parameters'] / 1e6:.2f} M", f"{speed:,.0f}",
             f"{loss:.4f}", f"{score:.3f}", results.format_interval(score_interval(runs, spreads))]
    comparison = None
    if runs is not others:
        comparison = compare(runs, others, spreads)
    if comparison is None:
        return [*cells, "", "", ""]
    low, high = comparison.interval
    difference = f"{comparison.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    p = ""
    if spreads.paired.degrees:
        p = f"{comparison.p:.3f}" if comparison.p >= 0.001 else "< 0.001"
    return [*cells, difference, p, claim(comparison, spreads)]


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


def notes(runs, spreads, against):
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
    if spreads.paired.degrees:
        text += (" The standard deviation between seeds at a score of 0.5 is "
                 f"{0.25 * spreads.alone.deviation():.3f}, or "
                 f"{0.25 * spreads.paired.deviation():.3f} ({spreads.paired.degrees:.1f} degrees "
                 "of freedom) without what a seed does to all points. (Chance in single verdicts "
                 "is not included. Scores near 0 and 1 vary less.)")
    else:
        text += (" The spread between seeds is not known, so nothing can be claimed, and the "
                 "differences are without it: train more --seeds of several points. (Points that "
                 "are never right do not help.)")
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
    spreads = seed_spreads(by_point)
    rows = [table_row(name, own, by_point[against], spreads) for name, own in by_point.items()]
    text = (f"{markdown(rows)}\n{notes(runs, spreads, against)}\n{categories_table(by_point)}"
            f"{rates_table(rates)}")
    with atomic_write(out / "report.md") as tmp:
        tmp.write_text(text, "utf-8")
    draw(by_point, spreads, out / "report.png")
    print(f"{text}\n{out}/report.md and report.png")


def draw(by_point, spreads, path):
    """Draw the scores with their intervals, and the losses."""
    scores = {}
    losses = {}
    for name, runs in by_point.items():
        score = statistics.mean(run["score"] for run in runs)
        loss = statistics.mean(run["loss"] for run in runs)
        scores[name] = Measurement("score", score, score_interval(runs, spreads), True)
        losses[name] = Measurement("loss", loss, None, False)
    figures.compare_models({"score": scores, "loss": losses}, list(by_point), path)

"""Puts the results of several models into one Markdown table and one figure."""
import statistics
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib import files
from fusedit_lib.evaluation import figures
from fusedit_lib.evaluation.figures import Measurement
from fusedit_lib.evaluation.results import DPG_PROMPTS, format_interval, load
from fusedit_lib.files import atomic_write, unused_path

BENCHMARKS = {"geneval": "GenEval", "dpg": "DPG-Bench"}    # their names in the table


def report(sources, out):
    """Put the results of several models into one Markdown table and one figure.

    Each source is NAME=PATH or PATH, where PATH is a result, a folder of results, or the folder of
    a training run. The table is written to a .md file, and the figure to a .png file beside it.
    """
    import matplotlib  # noqa: F401         if it is missing, fail now rather than at the end
    if out.suffix != ".md":
        raise FuseDiTError(f"--out {out}: the table must be a .md file; the figure is saved beside "
                           "it")

    table = {}                              # {measure: {model: Measurement}}
    for source in sources:
        model, path = parse_source(source)
        for file in result_files(path):
            for measurement in read_measurements(file):
                by_model = table.setdefault(measurement.measure, {})
                if by_model.setdefault(model, measurement) != measurement:
                    raise FuseDiTError(
                        f"{file}: {model} already has a different value of "
                        f"{measurement.measure!r}: give individual files or a different NAME=")
    if not table:
        raise FuseDiTError("no results found: give files or folders written by evaluate.py or "
                           "train_*.py")

    models = []                             # in the order of their first appearance in the table
    for by_model in table.values():
        models += [model for model in by_model if model not in models]
    text = markdown(table, models)
    path = unused_path(out, ".png")
    with atomic_write(path) as tmp:
        tmp.write_text(text, "utf-8")
    figure_path = path.with_suffix(".png")
    figures.compare_models(table, models, figure_path)
    print(f"{text}{path} and {figure_path.name}")


def parse_source(text):
    """(model name, path) from NAME=PATH, or from PATH alone, whose stem is then the name."""
    if Path(text).exists():                 # the path may contain "="
        return Path(text).stem, Path(text)
    name, _, path = text.partition("=")
    if not path:
        return Path(text).stem, Path(text)
    return name, Path(path)


def result_files(path):
    """[path] if it is a file, otherwise all files with results in and below this folder."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("*")) if holds_result(file)]


def holds_result(path):
    """True for a metrics.jsonl, or a JSON file that begins like the results of evaluate.py."""
    if path.name == "metrics.jsonl":
        return True
    return path.suffix == ".json" and b'"benchmark"' in path.read_bytes()[:40]


# ---- measurements --------------------------------------------------------------------------------

def read_measurements(path):
    """All Measurements of a training run's metrics.jsonl, a result or a run.json."""
    if path.name == "metrics.jsonl":
        return training_measurements(path)
    result = load(path)
    if result["benchmark"] == "distance":
        return distance_measurements(result)
    if "measures" in result:                # emoji
        return emoji_measurements(result)

    name = BENCHMARKS.get(result["benchmark"], result["benchmark"])
    if "overall" in result:
        if "prompts" in result:
            name += f", {len(result['prompts'])} prompts"
        elif result.get("num_prompts", DPG_PROMPTS) != DPG_PROMPTS:
            name += f", {result['num_prompts']} prompts"
        return [Measurement(name, result["overall"], result["intervals"]["overall"], True)]
    if result.get("images_per_s"):          # a run.json
        measure = f"sampling, images/s ({result['benchmark']})"
        return [Measurement(measure, result["images_per_s"], None, True)]
    return []


def training_measurements(path):
    """The last validation loss and the median speed of a training run."""
    rows = files.read_jsonl(path)
    losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    speeds = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    measurements = []
    if losses:
        measurements.append(Measurement("validation loss", losses[-1], None, False))
    if speeds:
        median = statistics.median_high(speeds)
        measurements.append(Measurement("training, images/s", median, None, True))
    return measurements


def distance_measurements(result):
    """The Frechet and kernel distances. Their names contain the real folder and both numbers
    of images, because Frechet distances are comparable only if these are equal."""
    real = Path(result["folders"][0]).name
    sets = f"{real}, {result['real']} and {result['fake']}"
    label = result["label"]
    kid = "KID"
    if label != "FID":
        kid += label.removeprefix("FD")     # appends the network's name
    return [Measurement(f"{label}, {sets}", result["distance"], None, False),
            Measurement(f"{kid} x 1000, {sets}", 1000 * result["kid"], None, False)]


def emoji_measurements(result):
    """Top-5 of each category of the emoji benchmark, and the style of all."""
    measurements = []
    top_5 = result["measures"]["top-5"]
    for category, score in top_5["categories"].items():
        count = sum(row["category"] == category for row in result["prompts"])
        name = f"emoji, {category}, top-5, {count} prompts"
        measurements.append(Measurement(name, score, top_5["intervals"][category], True))
    style = result["measures"]["style"]
    name = f"emoji, style, {len(result['prompts'])} prompts"
    measurements.append(Measurement(name, style["overall"], style["intervals"]["overall"], True))
    return measurements


# ---- the table -----------------------------------------------------------------------------------

def markdown(table, models):
    """The table as Markdown: a row per model, a column per measure, the best of each in bold."""
    head = [""]
    for measure, by_model in table.items():
        arrow = "↓"
        if higher_is_better(by_model):
            arrow = "↑"
        head.append(f"{measure} {arrow}")
    rows = [head, ["---"] * len(head)]
    for model in models:
        cells = [format_cell(by_model, model) for by_model in table.values()]
        rows.append([model, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def higher_is_better(by_model):
    return next(iter(by_model.values())).higher_is_better


def format_cell(by_model, model):
    """A model's value and interval, bold if it is the best of several; "" if it has none."""
    if model not in by_model:
        return ""
    measurement = by_model[model]
    text = f"{measurement.value:.4g}"
    if measurement.interval:
        text += f" {format_interval(measurement.interval)}"

    values = [other.value for other in by_model.values()]
    best = min(values)
    if higher_is_better(by_model):
        best = max(values)
    if len(values) > 1 and measurement.value == best:
        return f"**{text}**"
    return text

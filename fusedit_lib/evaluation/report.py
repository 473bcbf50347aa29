"""Results of several models in one Markdown table and one figure."""
import statistics
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib import files
from fusedit_lib.evaluation import figures
from fusedit_lib.evaluation.figures import Measurement
from fusedit_lib.evaluation.results import format_interval, load
from fusedit_lib.files import atomic_write, unused_path

BENCHMARKS = {"geneval": "GenEval", "dpg": "DPG-Bench"}    # their names in the table


def report(sources, out):
    """Put the results of several models into one Markdown table and one figure.

    sources: texts NAME=PATH or PATH, where PATH is a result, or a folder with results or with the
    metrics.jsonl of a training run. out: the table's file, NAME.md; the figure is NAME.png.
    """
    import matplotlib  # noqa: F401         fails now, not at the end, if missing
    if out.suffix != ".md":
        raise FuseDiTError(f"--out {out}: the table is a .md file, the figure beside it")

    table = {}                              # {measure: {model: Measurement}}
    for source in sources:
        model, path = parse_source(source)
        for file in result_files(path):
            for measurement in read_measurements(file):
                by_model = table.setdefault(measurement.measure, {})
                if by_model.setdefault(model, measurement) != measurement:
                    raise FuseDiTError(
                        f"{file}: {model} has another {measurement.measure!r} already: name "
                        "single files, or another NAME=")
    if not table:
        raise FuseDiTError("no results there: name files or folders of evaluate.py and train_*.py")

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
    """Name of the model and path, of NAME=PATH, or of a PATH whose stem is the name."""
    if Path(text).exists():                 # whose name may contain a "="
        return Path(text).stem, Path(text)
    name, _, path = text.partition("=")
    if not path:
        return Path(text).stem, Path(text)
    return name, Path(path)


def result_files(path):
    """A file itself; of a folder, all files in it and below that hold results."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("*")) if holds_result(file)]


def holds_result(path):
    """Whether a file is a metrics.jsonl, or JSON that begins as evaluate.py's results do."""
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

    name = BENCHMARKS.get(result["benchmark"], result["benchmark"])
    if "overall" in result:
        if "prompts" in result:
            name += f", {len(result['prompts'])} prompts"
        return [Measurement(name, result["overall"], result["intervals"]["overall"], True)]
    if result.get("images_per_s"):          # a run.json
        measure = f"sampling, images/s ({result['benchmark']})"
        return [Measurement(measure, result["images_per_s"], None, True)]
    return []


def training_measurements(path):
    """Last validation loss and median speed of a training run."""
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
    """Frechet and kernel distance. Only those to the same images, of equal numbers, compare."""
    real = Path(result["folders"][0]).name
    sets = f"{real}, {result['real']} and {result['fake']}"
    label = result["label"]
    kid = "KID"
    if label != "FID":
        kid += label.removeprefix("FD")     # with the network's name
    return [Measurement(f"{label}, {sets}", result["distance"], None, False),
            Measurement(f"{kid} x 1000, {sets}", 1000 * result["kid"], None, False)]


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

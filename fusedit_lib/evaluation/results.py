"""Scores: the official scorers' files read, results of several models compared, table and figures.

A result is a JSON file with its "benchmark". Where prompts are right or wrong it has "overall" (the
mean of the categories, as in GenEval), "categories", their 95 % "intervals", and all "prompts".
"""
import json
from collections import defaultdict
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib import files
from fusedit_lib.evaluation import metrics
from fusedit_lib.evaluation.figures import figure
from fusedit_lib.files import atomic_write, unused_path

GENEVAL = "single_object", "two_object", "counting", "colors", "position", "color_attr"


# ---- a result ------------------------------------------------------------------------------------

def scored(name, rows, settings):
    """The result of rows dict(category, prompt, right from 0 to 1, ...), and a table of it."""
    groups = by_category(rows)
    scores, sure = {c: sum(v) / len(v) for c, v in groups.items()}, metrics.intervals(groups)
    overall = sum(scores.values()) / len(scores)
    for category, score in (scores | dict(overall=overall)).items():
        values = groups.get(category)
        print(f"{category:<16}{score:6.3f}   {span(sure[category])}   " + (
            f"{len(values)} prompts" if values else "the mean of the categories"))
    return dict(benchmark=name, overall=overall, categories=scores, intervals=sure,
                settings=settings, prompts=rows)


def by_category(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row["right"])
    return groups


def span(interval):
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def write(result, path, over=False):
    """As JSON, over or beside another result that has the name already."""
    text = json.dumps(result, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        path = path if over else unused_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as tmp:
            tmp.write_text(text)
    print(path)


def load(path):
    """A result from its file; raises FuseDiTError."""
    try:
        result = json.loads(path.read_text("utf-8"))
        if "overall" in result:
            assert result["intervals"]["overall"] and result["categories"]
        assert result["benchmark"] != "distance" or {"label", "distance", "kid"} <= result.keys()
        return result
    except OSError as e:
        raise FuseDiTError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, TypeError, KeyError, AssertionError):
        raise FuseDiTError(f"{path} is no result of evaluate.py") from None


# ---- the official scorers ------------------------------------------------------------------------

def geneval_score(args):
    """The table of GenEval, from the results.jsonl of its evaluation/evaluate_images.py."""
    found = defaultdict(list)
    for n, line in enumerate(lines(args.results), 1):
        try:
            row = json.loads(line)
            found[row["metadata"], row["tag"], row["prompt"]].append(bool(row["correct"]))
        except (ValueError, TypeError, KeyError):
            raise FuseDiTError(f"{args.results} line {n} is none of GenEval's results") from None
    counts = {len(rights) for rights in found.values()}
    if len(counts) > 1:
        raise FuseDiTError(f"prompts have {min(counts)} to {max(counts)} pictures: the drawing is "
                           "not finished; the same geneval command goes on with it")
    order = sorted(found.items(), key=lambda item: (         # the paper's; the file has none
        GENEVAL.index(item[0][1]) if item[0][1] in GENEVAL else len(GENEVAL), item[0][2]))
    print(f"{len(found)} prompts of GenEval's 553, {max(counts)} pictures of each")
    write(scored("geneval", [dict(category=tag, prompt=prompt, right=sum(v) / len(v)) for
                             (_, tag, prompt), v in order], dict(results=str(args.results))),
          args.out or args.results.with_name("geneval.json"))


def dpg_score(args):
    """DPG-Bench's score and its broad categories, from the file of compute_dpg_bench.py."""
    text = lines(args.results)
    try:
        begin, end = (text.index(f"L{level} category scores:") for level in (1, 2))
        total = float(text[-1].removeprefix("DPG-Bench score: "))
        broad = dict(line.strip().split(": ") for line in text[begin + 1:end])
        # Each picture's line ends with the mean of its four; their mean is the total.
        values = [float(line.rsplit(", ", 1)[1]) for line in text[:begin] if ", " in line]
        assert values
    except (ValueError, IndexError, AssertionError):
        raise FuseDiTError(f"{args.results} is no whole file of compute_dpg_bench.py --res-path "
                           "(its last line is 'DPG-Bench score: ...')") from None
    result = dict(benchmark="dpg", overall=total / 100,
                  categories={name: float(value) / 100 for name, value in broad.items()},
                  intervals=dict(overall=metrics.intervals(dict(all=values))["overall"]),
                  settings=dict(results=str(args.results)))
    print(f"{len(values)} prompts of DPG-Bench's 1,065")
    for name, value in (result["categories"] | dict(overall=result["overall"])).items():
        print(f"{name:<16}{100 * value:6.2f}")
    write(result, args.out or args.results.with_name("dpg.json"))


def lines(path):
    try:
        found = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise FuseDiTError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    if not found:
        raise FuseDiTError(f"{path} is empty")
    return found


# ---- comparing -----------------------------------------------------------------------------------

def compare(args):
    """Is B better than A? Two results of one benchmark on the same prompts, prompt by prompt."""
    a, b = load(args.a), load(args.b)
    keys = [[(row["category"], row["prompt"]) for row in r.get("prompts", ())] for r in (a, b)]
    if a["benchmark"] != b["benchmark"] or keys[0] != keys[1] or not keys[0]:
        raise FuseDiTError(f"{args.a} and {args.b} are not of the same prompts: compare runs of "
                           "one benchmark with the same -n and --seed")
    rows = [dict(category=p["category"], right=q["right"] - p["right"])
            for p, q in zip(a["prompts"], b["prompts"], strict=True)]
    print(f"{'':<16}{'A':>6} {'B':>6}   B - A")
    for category, values in by_category(rows).items():
        print(f"{category:<16}{a['categories'][category]:6.3f} {b['categories'][category]:6.3f}  "
              f"{sum(values) / len(values):+.3f}   {sum(v > 0 for v in values)} prompts better, "
              f"{sum(v < 0 for v in values)} worse")
    mean, interval, p = metrics.paired(by_category(rows))
    print(f"{'overall':<16}{a['overall']:6.3f} {b['overall']:6.3f}  {mean:+.3f}   "
          f"{span(interval)}, p = {p:.4f}: " + (
              f"{'B' if mean > 0 else 'A'} is better" if p < 0.05 else "may well be chance"))


def measures(path):
    """(name, value, interval or None, is more better) of all that a result or a run says."""
    if path.name == "metrics.jsonl":
        rows = files.read_jsonl(path)
        losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        speeds = sorted(row["images_per_s"] for row in rows if row.get("images_per_s"))
        return [("validation loss", losses[-1], None, False)] * bool(losses) + [
            ("training, images/s", speeds[len(speeds) // 2], None, True)] * bool(speeds)
    result = load(path)
    if result["benchmark"] == "distance":        # only of equal numbers and the same real ones
        of = f", {Path(result['folders'][0]).name}, {result['real']} and {result['fake']}"
        kid = "KID" + result["label"][2:] if result["label"] != "FID" else "KID"
        return [(result["label"] + of, result["distance"], None, False),
                (f"{kid} x 1000{of}", 1000 * result["kid"], None, False)]
    if "overall" in result:
        name = result["benchmark"]
        name = dict(geneval="GenEval", dpg="DPG-Bench").get(name, name)
        count = f", {len(result['prompts'])} prompts" if "prompts" in result else ""
        return [(name + count, result["overall"], result["intervals"]["overall"], True)]
    speed = result.get("images_per_s")      # a run.json
    return [(f"sampling, images/s ({result.get('benchmark')})", speed, None, True)] * bool(speed)


def is_result(path):
    return path.name == "metrics.jsonl" or (
        path.suffix == ".json" and b'"benchmark"' in path.read_bytes()[:40])


def report(args):
    """Results of several models in one Markdown table and one figure."""
    import matplotlib  # noqa: F401         says now that it is missing
    if args.out.suffix != ".md":
        raise FuseDiTError(f"--out {args.out}: the table is a .md file, the figure beside it")
    table, better = defaultdict(dict), {}   # {measure: {model: [value, interval]}}
    for said in args.results:
        name, _, path = said.partition("=") if not Path(said).exists() else ("", "", said)
        name, path = (name, Path(path)) if path else (Path(said).stem, Path(said))
        for file in filter(is_result, sorted(path.rglob("*"))) if path.is_dir() else [path]:
            for measure, *found, more in measures(file):
                if table[measure].setdefault(name, found) != found:
                    raise FuseDiTError(f"{file}: {name} has another {measure!r} already: name "
                                       "single files, or another NAME=")
                better[measure] = more
    if not table:
        raise FuseDiTError("no results there: name files or folders of evaluate.py and train_*.py")
    models = list(dict.fromkeys(model for row in table.values() for model in row))
    best = {m: (max if better[m] else min)(v for v, _ in row.values()) for m, row in table.items()}

    def cell(measure, model):
        value, interval = table[measure].get(model, (None, None))
        text = "" if value is None else f"{value:.4g}" + (f" {span(interval)}" if interval else "")
        return f"**{text}**" if value == best[measure] and len(table[measure]) > 1 else text
    head = ["", *(f"{m} {'↑' if better[m] else '↓'}" for m in table)]
    rows = [head, ["---"] * len(head), *([model, *(cell(m, model) for m in table)]
                                         for model in models)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    with atomic_write(path := unused_path(args.out, ".png")) as tmp:
        tmp.write_text(text, "utf-8")
    figure(table, better, models, path.with_suffix(".png"))
    print(f"{text}{path} and {path.with_suffix('.png').name}")

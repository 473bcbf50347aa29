"""Writes, reads and compares results, and makes them from the output of official scorers.

A result is a JSON file that names its "benchmark". The results of shapes, emoji and GenEval also
contain "overall" (the mean of the categories), "categories", their 95 % "intervals", the "settings"
and all "prompts". That of DPG-Bench contains the scorer's own overall score, and "num_prompts"
instead of "prompts".
"""
import json
from collections import defaultdict

from fusedit import FuseDiTError
from fusedit_lib.evaluation import metrics
from fusedit_lib.files import atomic_write, unused_path

# The categories of GenEval, in the order of its paper.
GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_PROMPTS = 553
DPG_PROMPTS = 1065


# ---- a result ------------------------------------------------------------------------------------

def make_result(benchmark, rows, settings):
    """Make a result from rows, one per prompt: dicts with category, prompt and right (0 to 1).

    Prompts that are not independent, such as the same words in two styles, share a "unit".
    """
    scores = summarise(rows)
    return dict(benchmark=benchmark, **scores, settings=settings, prompts=rows)


def summarise(rows, key="right"):
    """"overall", "categories" and "intervals" of a result, from the rows' values of a key."""
    scores = category_means(rows, key)
    overall = sum(scores.values()) / len(scores)
    intervals = metrics.intervals(values_by_category(rows, key))
    return dict(overall=overall, categories=scores, intervals=intervals)


def category_means(rows, key="right"):
    """{category: the mean of the rows' values of a key, in which units have equal weights}."""
    groups = values_by_category(rows, key)
    return {category: sum(values) / len(values) for category, values in groups.items()}


def values_by_category(rows, key="right"):
    """{category: the values of a key, one per prompt or, if rows have units, one per unit}.

    The value of a unit is the mean of its rows.
    """
    units = defaultdict(list)
    for number, row in enumerate(rows):
        unit = row.get("unit", number)      # by default, each row is a unit of its own
        units[row["category"], unit].append(row[key])
    groups = defaultdict(list)
    for (category, _), values in units.items():
        groups[category].append(sum(values) / len(values))
    return groups


def print_result(result):
    """Print a table of the categories' scores with their intervals."""
    groups = values_by_category(result["prompts"])
    for category, score in result["categories"].items():
        interval = format_interval(result["intervals"][category])
        print(f"{category:<16}{score:6.3f}   {interval}   {len(groups[category])} prompts")
    interval = format_interval(result["intervals"]["overall"])
    print(f"{'overall':<16}{result['overall']:6.3f}   {interval}   the mean of the categories")


def format_interval(interval):
    low, high = interval
    return f"[{low:.3f}, {high:.3f}]"


def write(result, path, overwrite=False):
    """Write a result and print its path.

    If overwrite is False, a different file of that name is kept and the result gets a new name.
    """
    text = json.dumps(result, indent=1) + "\n"
    unchanged = path.exists() and path.read_text() == text
    if not unchanged:
        if not overwrite:
            path = unused_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as tmp:
            tmp.write_text(text)
    print(path)


def load(path):
    """Load a result from its file. Raises FuseDiTError."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise FuseDiTError(f"cannot read {path}: {e.strerror}") from None
    except ValueError:
        result = None
    if not is_result(result):
        raise FuseDiTError(f"{path} is not a result of evaluate.py")
    return result


def is_result(value):
    """True if a JSON value has the keys that are read from a result or a run.json."""
    if not isinstance(value, dict) or "benchmark" not in value:
        return False
    if "overall" in value:
        intervals = value.get("intervals")
        if not isinstance(intervals, dict) or not intervals.get("overall"):
            return False
        if not value.get("categories"):
            return False
    if value["benchmark"] == "distance":
        return {"label", "distance", "kid"} <= value.keys()
    return True


# ---- the official scorers ------------------------------------------------------------------------

def geneval_score(path, out=None):
    """Make GenEval's table from the results.jsonl that its evaluation/evaluate_images.py writes."""
    rights = defaultdict(list)              # (metadata, tag, prompt) -> True or False per image
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            rights[row["metadata"], row["tag"], row["prompt"]].append(bool(row["correct"]))
        except (ValueError, TypeError, KeyError):
            raise FuseDiTError(f"{path}: line {number} is not one of GenEval's results") from None
    counts = {len(images) for images in rights.values()}
    if len(counts) > 1:
        raise FuseDiTError(f"prompts have {min(counts)} to {max(counts)} images each: drawing is "
                           "not finished; repeat the geneval command to resume it")

    rows = []
    for (_, tag, prompt), images in rights.items():
        rows.append(dict(category=tag, prompt=prompt, right=sum(images) / len(images)))
    rows.sort(key=geneval_order)            # the file is in no particular order
    print(f"{len(rows)} of GenEval's {GENEVAL_PROMPTS} prompts, {max(counts)} images per prompt")
    result = make_result("geneval", rows, dict(results=str(path)))
    print_result(result)
    missing = [tag for tag in GENEVAL if tag not in result["categories"]]
    if missing:                             # a run with -n: the prompts are sorted by category
        print(f"no prompts of {', '.join(missing)}: the overall score is that of the other "
              "categories, not GenEval's")
    if out is None:
        out = path.with_name("geneval.json")
    write(result, out)


def geneval_order(row):
    """Sort key: the category in the paper's order, then the prompt."""
    tag = row["category"]
    if tag in GENEVAL:
        return GENEVAL.index(tag), row["prompt"]
    return len(GENEVAL), row["prompt"]


def dpg_score(path, out=None):
    """Make DPG-Bench's table of the overall score and the broad categories from the file that its
    compute_dpg_bench.py writes to --res-path."""
    try:
        result, count = parse_dpg(read_lines(path))
    except (ValueError, IndexError):
        raise FuseDiTError(f"{path} is not a complete --res-path file of compute_dpg_bench.py, "
                           "whose last line is 'DPG-Bench score: ...'") from None
    result["settings"] = dict(results=str(path))
    result["num_prompts"] = count
    print(f"{count} of DPG-Bench's {DPG_PROMPTS:,} prompts")
    for name, value in result["categories"].items():
        print(f"{name:<16}{100 * value:6.2f}")
    print(f"{'overall':<16}{100 * result['overall']:6.2f}")
    if out is None:
        out = path.with_name("dpg.json")
    write(result, out)


def parse_dpg(lines):
    """(result without settings, number of prompts). Raises ValueError or IndexError."""
    start = lines.index("L1 category scores:")
    end = lines.index("L2 category scores:")
    total = float(lines[-1].removeprefix("DPG-Bench score: "))
    categories = {}
    for line in lines[start + 1:end]:
        name, value = line.strip().split(": ")
        categories[name] = float(value) / 100

    # A prompt's line ends with the mean of its four images; the mean of these means is the total.
    means = [float(line.rsplit(", ", 1)[1]) for line in lines[:start] if ", " in line]
    if not means:
        raise ValueError("no prompts")
    interval = metrics.intervals(dict(all=means))["overall"]
    result = dict(benchmark="dpg", overall=total / 100, categories=categories,
                  intervals=dict(overall=interval))
    return result, len(means)


def read_lines(path):
    """The non-empty lines of a file. Raises FuseDiTError if there are none."""
    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise FuseDiTError(f"cannot read {path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise FuseDiTError(f"cannot read {path}: {e}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise FuseDiTError(f"{path} is empty")
    return lines


# ---- comparing -----------------------------------------------------------------------------------

def compare(path_a, path_b):
    """Compare two results of one benchmark on the same prompts, and test whether the difference
    between B and A may be due to chance.

    Pairs of prompts are compared or, if prompts share units as those of emoji do, pairs of units.
    """
    a = load(path_a)
    b = load(path_b)
    same_prompts = prompt_keys(a) == prompt_keys(b)
    if a["benchmark"] != b["benchmark"] or not same_prompts or not prompt_keys(a):
        raise FuseDiTError(f"{path_a} and {path_b} do not have the same prompts: compare runs of "
                           "one benchmark with the same -n and --seed")

    if gallery(a) != gallery(b):
        print("A and B were scored with different real images: compare with care")
    counted = "prompts"
    if any("unit" in row for row in a["prompts"]):
        counted = "units"
    rows = []
    for row_a, row_b in zip(a["prompts"], b["prompts"], strict=True):
        rows.append(row_a | dict(right=row_b["right"] - row_a["right"]))
    groups = values_by_category(rows)
    print(f"{'':<16}{'A':>6} {'B':>6}   B - A")
    for category, differences in groups.items():
        mean = sum(differences) / len(differences)
        better = sum(difference > 0 for difference in differences)
        worse = sum(difference < 0 for difference in differences)
        p = metrics.sign_flip_p({category: differences})
        print(f"{category:<16}{a['categories'][category]:6.3f} {b['categories'][category]:6.3f}  "
              f"{mean:+.3f}   {better} {counted} better, {worse} worse, p = {p:.4f}")

    test = metrics.paired_test(groups)
    if test.p >= 0.05:
        verdict = "may be due to chance"
    elif test.mean > 0:
        verdict = "B is better"
    else:
        verdict = "A is better"
    print(f"{'overall':<16}{a['overall']:6.3f} {b['overall']:6.3f}  {test.mean:+.3f}   "
          f"{format_interval(test.interval)}, p = {test.p:.4f}: {verdict}")


def prompt_keys(result):
    """Category and text of each prompt, which must be the same in both results being compared."""
    return [(row["category"], row["prompt"]) for row in result.get("prompts", ())]


def gallery(result):
    """The digest of the real images with which emoji were scored, None for other benchmarks."""
    return result.get("settings", {}).get("gallery")

"""The prompts of each benchmark, and the image files that its official scorer expects.

`evaluate.py BENCHMARK --help` prints the docstring of the benchmark's function.
"""
import json
import re
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.shapes import scenes


class Benchmark(NamedTuple):
    """The prompts to draw and the files for their images, below images/."""
    prompts: list[str]
    files: list[list[str]]                  # for each prompt: a file per image, or one for a grid
    images_per_prompt: int = 1
    texts: list[tuple[str, str]] = []       # for each prompt: another file that the scorer reads,
                                            # as (name, content); or none at all


def geneval(path):
    """GenEval (arXiv 2310.11513). Four images are drawn for each prompt and saved as
    NUMBER/samples/0000.png to 0003.png, with NUMBER/metadata.jsonl."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    prompts = []
    files = []
    texts = []
    for k, line in enumerate(lines):
        row = parse_object(line, f"{path}: line {k + 1}")
        if not has_strings(row, "tag", "prompt"):
            raise FuseDiTError(f"{path}: line {k + 1} has no tag or no prompt: is this GenEval's "
                               "prompts/evaluation_metadata.jsonl?")
        prompts.append(row["prompt"])
        files.append([f"{k:05}/samples/{i:04}.png" for i in range(4)])
        texts.append((f"{k:05}/metadata.jsonl", line + "\n"))
    return Benchmark(prompts, files, 4, texts)


def dpg(folder):
    """DPG-Bench (arXiv 2403.05135). For each prompt NAME.txt, four images are drawn and saved as
    NAME.png, an image grid of two rows."""
    paths = sorted(folder.glob("*.txt"))
    prompts = [read_text(path).strip() for path in paths]
    files = [[f"{path.stem}.png"] for path in paths]
    return Benchmark(prompts, files, 4)


def mjhq(path):
    """MJHQ-30K (arXiv 2402.17245). One image is drawn for each prompt and saved under the name of
    the real image, CATEGORY/NAME.jpg."""
    prompts = []
    files = []
    for name, row in parse_object(read_text(path), str(path)).items():
        if not is_mjhq_row(name, row):
            raise FuseDiTError(f"{path}: {name} has no category or prompt, or is not a plain file "
                               "name: is this MJHQ-30K's meta_data.json?")
        prompts.append(row["prompt"])
        files.append([f"{row['category']}/{name}.jpg"])
    return Benchmark(prompts, files)


def is_mjhq_row(name, row):
    """True if an entry of meta_data.json is complete and names a file below images/."""
    if not isinstance(row, dict) or not has_strings(row, "category", "prompt"):
        return False
    plain_name = r"[^./\\][^/\\]*"          # no separator and no "..", which could leave images/
    return bool(re.fullmatch(f"{plain_name}/{plain_name}", f"{row['category']}/{name}"))


def shapes(n, seed):
    """Scenes of coloured shapes from the demo's world (fusedit_lib/shapes/scenes.py), in GenEval's
    categories and held out of training where possible. An image is correct if it contains exactly
    what the prompt describes."""
    prompts = [prompt for _, _, prompt in scenes.evaluation_prompts(n, seed)]
    files = [[f"{k:05}.png"] for k in range(len(prompts))]
    return Benchmark(prompts, files)


# ---- files ---------------------------------------------------------------------------------------

def read_text(path):
    """Read a UTF-8 file. Raises FuseDiTError."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as e:
        raise FuseDiTError(f"cannot read {path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise FuseDiTError(f"cannot read {path}: {e}") from None


def parse_object(text, source):
    """Parse a JSON object. Raises FuseDiTError, which names `source`, the origin of the text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise FuseDiTError(f"{source} is not a JSON object {{...}}")
    return value


def has_strings(row, *keys):
    """True if the values of all these keys of a dict are strings."""
    return all(isinstance(row.get(key), str) for key in keys)

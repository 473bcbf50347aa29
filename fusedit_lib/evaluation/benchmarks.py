"""TODO."""
import json
import re
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.shapes import scenes

# ---- what is drawn -------------------------------------------------------------------------------

class Work(NamedTuple):
    """A benchmark's prompts; of each, a file a picture, or one file for a grid of all."""
    prompts: list[str]
    files: list[list[str]]
    images: int = 1                         # of a prompt
    texts: dict[str, str] = {}              # more files, and what is in them


def geneval(args):
    """GenEval (arXiv 2310.11513): NUMBER/metadata.jsonl and NUMBER/samples/NUMBER.png."""
    rows = [line for line in read(args.prompts).splitlines() if line.strip()]
    for n, row in enumerate(rows, 1):
        found = parse(args.prompts, row, f"line {n}")
        if not all(isinstance(found.get(key), str) for key in ("tag", "prompt")):
            raise FuseDiTError(f"{args.prompts} line {n} has no tag or no prompt: is it GenEval's "
                               "prompts/evaluation_metadata.jsonl?")
    return Work([json.loads(row)["prompt"] for row in rows],
                [[f"{k:05}/samples/{i:04}.png" for i in range(4)] for k in range(len(rows))], 4,
                {f"{k:05}/metadata.jsonl": row + "\n" for k, row in enumerate(rows)})


def dpg(args):
    """DPG-Bench (arXiv 2403.05135): NAME.png of NAME.txt, four pictures in two rows."""
    texts = {path.stem: read(path).strip() for path in sorted(args.prompts.glob("*.txt"))}
    return Work(list(texts.values()), [[f"{name}.png"] for name in texts], 4)


def mjhq(args):
    """MJHQ-30K (arXiv 2402.17245): CATEGORY/NAME.jpg, as the folder of real ones is."""
    rows = parse(args.prompts, read(args.prompts), "the file")
    bad = [name for name, row in rows.items() if not isinstance(row, dict)
           or not all(isinstance(row.get(key), str) for key in ("category", "prompt"))
           or not re.fullmatch(r"[^./\\][^/\\]*/[^./\\][^/\\]*", f"{row['category']}/{name}")]
    if bad:
        raise FuseDiTError(f"{args.prompts}: {bad[0]} has no category or prompt, or no plain name: "
                           "is it MJHQ-30K's meta_data.json?")
    return Work([row["prompt"] for row in rows.values()],
                [[f"{row['category']}/{name}.jpg"] for name, row in rows.items()])


def shapes(args):
    """Held-out scenes of the demo's world, in GenEval's categories (demo/scenes.py). A picture is
    right if it holds exactly the objects that the prompt names, as it names them, and no other."""
    prompts = scenes.evaluation_prompts(args.n, args.seed)
    return Work([p for *_, p in prompts], [[f"{k:05}.png"] for k in range(len(prompts))])


def read(path):
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FuseDiTError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def parse(path, text, where):
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FuseDiTError(f"{path}: {where} is no JSON of the form {{...}}")
    return found

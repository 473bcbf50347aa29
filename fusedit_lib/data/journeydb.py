"""TODO."""
import json
from functools import partial

from fusedit_lib.data import packing
from fusedit_lib.data.images import Skip, rules
from fusedit_lib.data.items import Item, cut_lines, item_sample, need, said

# ---- JourneyDB -----------------------------------------------------------------------------------

class Annotated:
    """Items of lines of the annotations: the prompt is the caption, and GPT's the other one."""

    def __init__(self, lines, folder):
        self.lines, self.folder = lines, folder

    def __iter__(self):
        for n, line in self.lines:
            try:
                row = json.loads(line)
                name, prompt = row["img_path"].removeprefix("./"), " ".join(row["prompt"].split())
                other = row["Task2"].get("Caption") if isinstance(row.get("Task2"), dict) else None
                other = other if isinstance(other, str) else None
                yield Item(name, self.folder / name, dict(
                    synthetic_caption=prompt, original_caption=other), name.rpartition(".")[0])
            except (ValueError, KeyError, TypeError, AttributeError):
                yield Item(f"line {n}", Skip("not JSON with img_path and prompt"), {})


def journeydb(args):
    need(args.annotations, args.images)
    parts, total = cut_lines(args.annotations, args.shard_size)
    if packing.begin(args, **said(args, rows=total, bytes=args.annotations.stat().st_size)):
        packing.pack(args, "journeydb", [Annotated(part, args.images) for part in parts],
                     partial(item_sample, rules(args)), total=total)

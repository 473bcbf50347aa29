"""JourneyDB: images by Midjourney, with their prompts and captions written by GPT."""
import json
from functools import partial

from fusedit_lib.data import packing
from fusedit_lib.data.images import Skip, image_rules
from fusedit_lib.data.items import (
    Item,
    make_sample,
    output_settings,
    require_exists,
    split_lines,
)


class AnnotatedItems:
    """Iterates over the items in a range of lines of the annotations.

    lines: a LineRange of train_anno_realease_repath.jsonl. folder: contains 000/, 001/, ...
    """

    def __init__(self, lines, folder):
        self.lines = lines
        self.folder = folder

    def __iter__(self):
        for number, line in self.lines:
            try:
                yield annotated_item(json.loads(line), self.folder)
            except (ValueError, KeyError, TypeError, AttributeError):
                reason = Skip("not JSON with img_path")
                yield Item(f"line {number}", reason, captions={})


def annotated_item(row, folder):
    """The Item of one row of the annotations.

    The prompt is stored as the synthetic caption, which training uses by default. GPT's caption is
    stored as the original caption, which is used where there is no prompt.
    """
    name = row["img_path"].removeprefix("./")
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        prompt = None
    gpt_caption = None
    if isinstance(row.get("Task2"), dict):
        gpt_caption = row["Task2"].get("Caption")
    if not isinstance(gpt_caption, str):
        gpt_caption = None
    captions = dict(synthetic_caption=prompt, original_caption=gpt_caption)
    key = name.rpartition(".")[0]
    return Item(name, folder / name, captions, key)


def journeydb(args):
    """Run `prepare_data.py journeydb`."""
    require_exists(args.annotations, args.images)
    parts, total = split_lines(args.annotations, args.shard_size)
    size = args.annotations.stat().st_size
    if packing.begin(args, **output_settings(args, rows=total, bytes=size)):
        jobs = [AnnotatedItems(part, args.images) for part in parts]
        make = partial(make_sample, image_rules(args))
        packing.pack(args, "journeydb", jobs, make, total=total)

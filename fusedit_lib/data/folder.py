"""TODO."""
import csv
import io
import json
import random
from functools import partial
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.images import SUFFIXES, rules
from fusedit_lib.data.items import Item, cut, digest, item_sample, listing, need, said

IMAGE_FIELDS = ("image", "file_name", "filename", "file", "path", "image_path", "name")
CAPTION_FIELDS = ("caption", "original_caption", "text", "prompt", "description")


# ---- a folder of images --------------------------------------------------------------------------

def text_rows(files: dict[str, Path], folder: Path, skipped: list) -> list[dict]:
    """A row for every image, of the .txt with its name; no file is the same as an empty one."""
    rows = []
    for name in list(files):
        path = (folder / name).with_suffix(".txt")
        try:
            rows.append(dict(image=name, caption=path.read_text("utf-8-sig")
                             if path.exists() else ""))
        except UnicodeDecodeError:
            skipped.append(("caption is not UTF-8", path.name))
            del files[name]
    return rows


def file_rows(path: Path, skipped: list) -> list:
    """The rows of a JSON, JSONL or CSV file; a broken line is skipped, a broken file an error."""
    rows = []
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if path.suffix == ".json":
            data = json.loads(text)
            if isinstance(data, list):
                return data
            # {"a.png": "a red fox"} or {"a.png": {"caption": "a red fox"}}
            return [(v if isinstance(v, dict) else {"caption": v}) | {"image": k}
                    for k, v in data.items()]
    except (ValueError, AttributeError, csv.Error) as e:
        raise FuseDiTError(f"cannot read {path} as {path.suffix[1:].upper()} in UTF-8: "
                           f"{e}") from None
    for n, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            skipped.append(("not JSON", f"line {n}"))
    return rows


def folder_items(files: dict[str, Path], rows: list, skipped: list) -> list[Item]:
    """What is to be packed; every row and image that is not goes into `skipped`, with why."""
    by_stem = {name.rsplit(".", 1)[0]: name for name in files}
    items, missing = [], dict(files)

    def field(row, names):
        """The first of the fields that is there, as one line of text; of a list, its first."""
        value = next((row[n] for n in names if row.get(n)), "") if isinstance(row, dict) else ""
        value = value[0] if isinstance(value, list) else value
        return " ".join(value.split()) if isinstance(value, str) else ""

    for n, row in enumerate(rows, 1):
        said = field(row, IMAGE_FIELDS).removeprefix("./")
        name = said if said in files else by_stem.get(said)
        captions = {kind: text for kind, text in [
            ("synthetic_caption", field(row, ["synthetic_caption"])),
            ("original_caption", field(row, CAPTION_FIELDS))] if text}
        if not said:
            skipped.append((f"no image name ({', '.join(IMAGE_FIELDS)})", f"row {n}"))
        elif name is None:
            skipped.append(("image is not there", said))
        elif not captions:
            skipped.append(("no caption", name))
        else:
            items.append(Item(name, files[name], captions, f"{len(items):09d}"))
        missing.pop(name, None)
    skipped += [("no caption", name) for name in missing]
    return items


def folder(args):
    captions, skipped = args.captions or args.images, []
    need(args.images, captions)
    if not captions.is_dir() and captions.suffix not in (".json", ".jsonl", ".csv"):
        raise FuseDiTError(f"CAPTIONS is {captions}; it must end in .json, .jsonl or .csv, or be "
                           "a folder of .txt files")
    files = {name: args.images / name for name in listing(args.images)}
    if not files:
        raise FuseDiTError(f"no images in {args.images} ({', '.join(sorted(SUFFIXES))})")
    rows = (text_rows(files, captions, skipped) if captions.is_dir() else
            file_rows(captions, skipped))
    items = folder_items(files, rows, skipped)
    if packing.begin(args, **said(args, items=digest((i.name, i.captions) for i in items))):
        random.Random(args.seed).shuffle(items)            # a folder is often sorted by kind
        packing.pack(args, "folder", cut(items, args.shard_size),
                     partial(item_sample, rules(args)), skipped, len(items))

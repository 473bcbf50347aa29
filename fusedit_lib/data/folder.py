"""Your own images: a folder of images with captions in one file or in .txt files."""
import csv
import io
import json
import random
from functools import partial
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.images import SUFFIXES, image_rules
from fusedit_lib.data.items import (
    Item,
    digest,
    in_chunks,
    list_images,
    make_sample,
    output_settings,
    require_exists,
)

# Common names for the columns of a caption file.
IMAGE_FIELDS = ("image", "file_name", "filename", "file", "path", "image_path", "name")
CAPTION_FIELDS = ("caption", "original_caption", "text", "prompt", "description")


# ---------------------------------------------------------------------------- rows of captions
def rows_of_text_files(files: dict[str, Path], folder: Path, skipped: list) -> list[dict]:
    """A row for every image, with the text of the .txt file of the same name, or "" if it has none.

    An image whose caption is not UTF-8 is moved from `files` to `skipped`.
    """
    rows = []
    for name in list(files):
        path = (folder / name).with_suffix(".txt")
        caption = ""
        try:
            if path.exists():
                caption = path.read_text("utf-8-sig")
        except UnicodeDecodeError:
            skipped.append(("caption is not UTF-8", path.name))
            del files[name]
        else:
            rows.append(dict(image=name, caption=caption))
    return rows


def rows_of_file(path: Path, skipped: list) -> list:
    """The rows of a .csv, .json or .jsonl file.

    Lines of a .jsonl file that are not JSON are added to `skipped`. Raises FuseDiTError if the file
    cannot be read at all.
    """
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if path.suffix == ".json":
            return rows_of_json(json.loads(text))
    except (ValueError, AttributeError, csv.Error) as e:
        kind = path.suffix[1:].upper()
        raise FuseDiTError(f"cannot read {path} as {kind} in UTF-8: {e}") from None

    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            skipped.append(("not JSON", f"line {number}"))
    return rows


def rows_of_json(content) -> list:
    """Rows from a list of rows, {"a.png": "a red fox"} or {"a.png": {"caption": "a fox"}}."""
    if isinstance(content, list):
        return content
    rows = []
    for name, value in content.items():
        if not isinstance(value, dict):
            value = {"caption": value}
        rows.append(value | {"image": name})
    return rows


def first_text(row, fields) -> str:
    """The first non-empty field of a row, as one line of text, or "".

    If the value is a list, its first element is used. Rows and values of any other type count as
    empty.
    """
    if not isinstance(row, dict):
        return ""
    value = next((row[field] for field in fields if row.get(field)), "")
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, str):
        return ""
    return " ".join(value.split())


# ---------------------------------------------------------------------------- items
def folder_items(files: dict[str, Path], rows: list, skipped: list) -> list[Item]:
    """An Item for every row that names an image and has a caption.

    All other rows, and images that no row names, are added to `skipped` with the reason.
    """
    by_stem = {name.rsplit(".", 1)[0]: name for name in files}  # rows may omit the suffix
    items = []
    without_row = dict(files)
    for number, row in enumerate(rows, 1):
        image = first_text(row, IMAGE_FIELDS).removeprefix("./")
        name = image
        if image not in files:
            name = by_stem.get(image)

        captions = {}
        synthetic = first_text(row, ["synthetic_caption"])
        original = first_text(row, CAPTION_FIELDS)
        if synthetic:
            captions["synthetic_caption"] = synthetic
        if original:
            captions["original_caption"] = original

        if not image:
            skipped.append((f"no image name ({', '.join(IMAGE_FIELDS)})", f"row {number}"))
        elif name is None:
            skipped.append(("image not found", image))
        elif not captions:
            skipped.append(("no caption", name))
        else:
            number = len(items)
            items.append(Item(name, files[name], captions, f"{number:09d}", number))
        without_row.pop(name, None)
    for name in without_row:
        skipped.append(("no caption", name))
    return items


def folder(args):
    """Run `prepare_data.py folder`."""
    captions = args.captions or args.images
    require_exists(args.images, captions)
    if not captions.is_dir() and captions.suffix not in (".json", ".jsonl", ".csv"):
        raise FuseDiTError(f"CAPTIONS is {captions}, but it must be a .json, .jsonl or .csv file "
                           "or a folder of .txt files")
    files = {name: args.images / name for name in list_images(args.images)}
    if not files:
        raise FuseDiTError(f"no images in {args.images} ({', '.join(sorted(SUFFIXES))})")

    skipped = []
    if captions.is_dir():
        rows = rows_of_text_files(files, captions, skipped)
    else:
        rows = rows_of_file(captions, skipped)
    items = folder_items(files, rows, skipped)

    content = digest((item.name, item.captions) for item in items)
    if packing.begin(args, **output_settings(args, items=content)):
        random.Random(args.seed).shuffle(items)            # folders are often sorted by subject
        jobs = in_chunks(items, args.shard_size)
        make = partial(make_sample, image_rules(args))
        packing.pack(args, "folder", jobs, make, skipped, len(items))

"""Your own images: a folder of images with captions in files beside them, or in one file."""
import random
import sys
from collections import Counter
from functools import partial
from pathlib import PurePosixPath

from fusedit import FuseDiTError
from fusedit_lib.backend import printable
from fusedit_lib.data import packing
from fusedit_lib.data.caption_files import (
    CAPTION_FILES,
    kind_of,
    read_caption_file,
    read_text_files,
)
from fusedit_lib.data.columns import CaptionRows
from fusedit_lib.data.image_names import ImageNames, Several, below, clean, composed
from fusedit_lib.data.images import Skip, image_rules
from fusedit_lib.data.items import (
    FILE,
    IMAGE,
    UNREADABLE,
    Item,
    as_stored,
    digest,
    in_chunks,
    list_files,
    make_sample,
    output_settings,
    require_exists,
    suffix_of,
)

# Files of captions in the images' own folder, with names relative to theirs, as in an imagefolder
# of the Hugging Face hub.
METADATA = "metadata.jsonl", "metadata.csv", "metadata.parquet"

NAMES_LISTED = 1000                         # of other files of each kind, in report.json


class Folder:
    """The content of IMAGES."""

    def __init__(self, path):
        self.path = path
        self.images = []                    # names, relative paths
        self.files = []                     # names of other files
        self.metadata = []                  # those of METADATA among them
        self.left_out = []                  # (kind, name) of what is not looked into
        for name, kind in list_files(path):
            if kind == IMAGE:
                self.images.append(name)
            elif kind != FILE:
                self.left_out.append((kind, name))
            else:
                self.files.append(name)
                if PurePosixPath(name).name in METADATA:
                    self.metadata.append(name)

    def caption_files(self):
        """The names of files that could be given as CAPTIONS."""
        return [name for name in self.files if kind_of(PurePosixPath(name)) in CAPTION_FILES]


# ---------------------------------------------------------------------------- captions
def read_captions(args, content):
    """The CaptionRows for the images of a Folder, and the names of caption files in it."""
    rows = CaptionRows()
    columns = (args.image_column, args.caption_column)
    if args.captions is None and content.metadata:
        bases = tuple(name[:name.rfind("/") + 1] for name in content.metadata)
        for name, base in zip(content.metadata, bases, strict=True):
            read_caption_file(args.images / name, rows, *columns, base)
        others = [name for name in content.images if not name.startswith(bases)]
        used = set(content.metadata)
        if others:
            unreadable, text_files = read_text_files(others, args.images, rows, content.images)
            content.images = [name for name in content.images if name not in unreadable]
            used |= text_files
        return rows, used
    if args.captions is not None and not args.captions.is_dir():
        read_caption_file(args.captions, rows, *columns)
        used = {name for name in content.caption_files()
                if (args.images / name).samefile(args.captions)}
        return rows, used

    folder = args.captions or args.images
    unreadable, used = read_text_files(content.images, folder, rows)
    content.images = [name for name in content.images if name not in unreadable]
    named = {row.image for row in rows.rows}
    others = sorted(set(content.caption_files()) - used)
    if not named and not unreadable:
        advice = f"there is no caption file for any image in {folder}"
        if others:
            advice += f"; if {others[0]} holds the captions, give it as CAPTIONS"
        print(advice, file=sys.stderr)
    if folder.samefile(args.images):
        return rows, used
    return rows, set()


# ---------------------------------------------------------------------------- items
def folder_items(content, rows, roots=(), beside=None):
    """(items, names): an Item for every image that has captions, and the ImageNames.

    The rows that name the same image become one item with all their captions. Rows of no image,
    and images without a caption, are added to rows.skipped with the reason. roots: see
    ImageNames; beside: see its find().
    """
    names = ImageNames(content.path, content.images, roots)
    names.find_prefix([row.image for row in rows.rows])
    captions_of = {}                        # image -> {kind: list of texts}, in the rows' order
    without = dict.fromkeys(content.images)                # images without a caption
    not_found = 0
    for row in rows.rows:
        try:
            name = names.find(row.image, row.base, beside)
        except Several as reason:
            rows.skipped.append((str(reason), f"{row.image} ({packing.first_few(reason.names)})"))
            continue
        except Skip as reason:
            rows.skipped.append((str(reason), row.image))
            not_found += 1
            continue
        if not row.captions or not any(row.captions.values()):
            if name not in captions_of:
                without[name] = None
            continue
        without.pop(name, None)
        kinds = captions_of.setdefault(name, {})
        for kind, texts in row.captions.items():
            kinds.setdefault(kind, []).extend(texts)
    if rows.rows and not_found == len(rows.rows):
        raise FuseDiTError(no_row_fits(content, rows, names))
    for root in roots:
        if all(below(clean(row.image), clean(root)) is None for row in rows.rows):
            raise FuseDiTError(f"no name in CAPTIONS begins with --image-root {root}")

    items = []
    for name, kinds in captions_of.items():
        captions = {kind: one_or_several(texts) for kind, texts in kinds.items()}
        number = len(items)
        items.append(Item(name, content.path / name, captions, f"{number:09d}", number))
    for name in without:
        rows.skipped.append(("no caption", name))
    return items, names


def one_or_several(texts):
    """The only text, or the list of those that differ."""
    texts = list(dict.fromkeys(texts))
    return texts[0] if len(texts) == 1 else texts


def no_row_fits(content, rows, names):
    """The error if no row names an image."""
    written = rows.rows[0].image
    first = [*content.images, *content.files][0]
    remedy = "names must be relative to IMAGES"
    for row in rows.rows[:1000]:
        root = names.possible_root(row.image)
        if root is not None:
            remedy = f"if {root} is what IMAGES was called elsewhere, add --image-root {root}"
            break
    end = composed(f"/{written}")
    for image in map(composed, content.images):
        if image.endswith(end):
            remedy = f"give {content.path / image.removesuffix(end)} as IMAGES"
            break
    return (f"none of {len(rows.rows)} rows of {rows.files[0]} names an image in {content.path}: "
            f"the first names {written!r}, and the first file there is {first!r}; {remedy}")


def no_images(content):
    """The error if no file has the suffix of an image."""
    kinds = Counter(suffix_of(name) for name in content.files)
    if ".parquet" in kinds:
        return (f"no images in {content.path}, but .parquet files; if these hold the images: "
                "python prepare_data.py parquet")
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f"no images in {content.path}, by their suffix; it contains {found or 'no files'}"


# ---------------------------------------------------------------------------- the report
def other_files(content, items, used):
    """{kind: number and names} of all that IMAGES contains besides the images.

    used: names of the caption files. Of each kind, at most NAMES_LISTED are named.
    """
    packed = {item.name for item in items}
    names = {}
    for name in content.files:
        if name in used:
            names.setdefault("caption file", []).append(name)
        elif name not in packed:
            names.setdefault(suffix_of(name), []).append(name)
    for kind, name in content.left_out:
        if not kind.startswith(UNREADABLE) and name not in packed:
            names.setdefault(kind, []).append(name)
    return {kind: dict(count=len(found), names=found[:NAMES_LISTED])
            for kind, found in sorted(names.items())}


def captions_report(rows, names):
    """The entry `captions` of report.json: how the captions were read."""
    notes = rows.notes | names.rewritten
    report = dict(files=[str(path) for path in rows.files], rows=len(rows.rows))
    if rows.files:
        report |= dict(columns=dict(rows.used), other_columns=dict(rows.ignored))
    else:
        report["suffixes"] = dict(rows.used)
    report["notes"] = {note: dict(count=len(places), names=places[:NAMES_LISTED])
                       for note, places in notes.items()}
    return report


def print_notes(report, others):
    """Print what a user should know about how the folder was read, a line for each, to stderr."""
    lines = []
    suffixes = report.get("suffixes", {})
    files = report.get("files", [])         # parquet reads none
    if len(files) > 1:
        lines.append(f"from {', '.join(files)}")
    if len(suffixes) > 1:
        lines.append(", ".join(f"{count} {kind} files" for kind, count in suffixes.items()))
    for column, count in report.get("other_columns", {}).items():
        lines.append(f"column {column} is ignored in {count} rows, since another holds the caption "
                     "(--caption-column names the one to use)")
    for note, found in report["notes"].items():
        lines.append(f"{note}: {found['count']}, the first is {found['names'][0]}")
    for line in lines:
        print(f"captions: {printable(line)}", file=sys.stderr)
    kinds = [f"{found['count']} {kind}" for kind, found in others.items() if kind != "caption file"]
    if kinds:
        print(f"other files in IMAGES, not packed: {', '.join(kinds)}", file=sys.stderr)


def folder(args):
    """Run `prepare_data.py folder`."""
    args.images = as_stored(args.images)
    if args.captions is not None:
        args.captions = as_stored(args.captions)
    require_exists(args.images, args.captions or args.images)
    if not args.images.is_dir():
        raise FuseDiTError(f"IMAGES is {args.images}, but it must be a folder (images in a "
                           ".parquet file: python prepare_data.py parquet)")
    content = Folder(args.images)
    if not content.images and not (args.captions and content.files):
        raise FuseDiTError(no_images(content))

    rows, used = read_captions(args, content)
    beside = args.captions and args.captions.parent
    items, names = folder_items(content, rows, args.image_root or (), beside)
    for kind, name in content.left_out:
        if kind.startswith(UNREADABLE):
            rows.skipped.append((kind, name))
    captions = captions_report(rows, names)
    others = other_files(content, items, used)
    print_notes(captions, others)

    settings = digest((item.name, item.captions) for item in items)
    if packing.begin(args, **output_settings(args, items=settings)):
        random.Random(args.seed).shuffle(items)            # folders are often sorted by subject
        jobs = in_chunks(items, args.shard_size)
        make = partial(make_sample, image_rules(args))
        packing.pack(args, "folder", jobs, make, rows.skipped, len(items), captions=captions,
                     other_files=others)

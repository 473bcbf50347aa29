"""Reads captions from a file (a table, JSON, Parquet) or from text files beside the images."""
import codecs
import gzip
import json
import re
from pathlib import PurePosixPath

from fusedit import FuseDiTError
from fusedit_lib.backend import first_line
from fusedit_lib.data.columns import CaptionRow, find_columns, require_columns, texts_of
from fusedit_lib.data.image_names import Several, composed, folded, group
from fusedit_lib.data.items import FILE, list_files
from fusedit_lib.data.tables import read_table

TABLES = ".csv", ".tsv", ".txt"
JSONS = ".json", ".jsonl", ".ndjson"
LINES = ".jsonl", ".ndjson"                 # an object per line
CAPTION_FILES = (*TABLES, *JSONS, ".parquet")

# Files beside the images, in the order in which they are tried: 1.jpg.txt, 1.jpg.caption, ... 1.txt
TEXT_SUFFIXES = ".txt", ".caption", ".json"

OTHER_FILE = "more than one caption file for an image"
OTHER_CASE = "caption files with letters in another case than their image"
NO_IMAGE = "caption file without an image"
NOT_UTF8 = "caption is not UTF-8 (text from Windows: iconv -f WINDOWS-1252 -t UTF-8)"
SEVERAL = "several caption files match the name"


class NotJSON(Exception):
    """Raised for a text that is neither JSON nor JSON Lines."""


# ---------------------------------------------------------------------------- one file
def kind_of(path):
    """The suffix that says what a caption file is, in lower case: captions.JSON.gz is .json."""
    path = PurePosixPath(path.name.lower())
    if path.suffix == ".gz":
        path = path.with_suffix("")
    return path.suffix


def read_caption_file(path, rows, image_column=None, caption_column=None, base=""):
    """Add the rows of a caption file to `rows`, a CaptionRows.

    base: the folder in IMAGES that its names may be relative to, such as "train/". Raises
    FuseDiTError if the file cannot be read, or lacks a column.
    """
    kind = kind_of(path)
    rows.files.append(path)
    if kind == ".parquet":
        read_parquet(path, rows, image_column, caption_column, base)
        rows.require_text(path)
        return
    if kind not in CAPTION_FILES:
        raise FuseDiTError(f"CAPTIONS is {path}, but it must be a {', '.join(CAPTION_FILES)} file "
                           "or a folder of .txt files (save a spreadsheet as .csv)")
    text = read_text(path, kind)
    if kind in TABLES:
        read_table(text, path, rows, image_column, caption_column, base)
        return

    try:
        found = json_rows(text, kind in LINES, rows.skipped, image_column, caption_column)
    except (NotJSON, RecursionError) as e:
        raise FuseDiTError(f"cannot read {path} as {kind[1:].upper()}: {e}") from None
    names = {}                              # of all columns, in order
    for _, fields in found:
        if isinstance(fields, dict):
            names |= dict.fromkeys(fields)
    columns = find_columns(names, image_column, caption_column)
    require_columns(columns, names, path)
    for where, fields in found:
        if not isinstance(fields, dict):
            fields = {}
        rows.add(where, fields, columns, base)
    rows.require_text(path)


def read_text(path, kind):
    """The text of a file, which may be compressed with gzip. Raises FuseDiTError."""
    kind = kind[1:].upper()
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as e:
        raise FuseDiTError(f"cannot read {path}: {e}") from None
    try:
        return decode(data)
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        encoding = "WINDOWS-1252"
        if data[e.start] == 0:
            encoding = "UTF-16LE"
        raise FuseDiTError(
            f"cannot read {path} as {kind} in UTF-8: byte 0x{data[e.start]:02x} in line {line}. "
            f"Save it as UTF-8; if it is text from Windows: iconv -f {encoding} -t UTF-8 "
            f"{path.name} > utf8-{path.name}") from None


def decode(data):
    """The text of bytes in UTF-8, or in UTF-16 with a byte order mark. UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    end = data.find(b"\0")
    if end >= 0:                            # UTF-16 without a mark, or no text at all
        raise UnicodeDecodeError("utf-8", data, end, end + 1, "a zero byte")
    return data.decode("utf-8-sig")


# ---------------------------------------------------------------------------- JSON
def json_rows(text, lines, skipped, image_column=None, caption_column=None):
    """The rows [(where, value)] of JSON or JSON Lines, whichever the text is.

    lines: the file's name says JSON Lines; then lines that are not JSON are added to `skipped`.
    Raises NotJSON.
    """
    try:
        content = json.loads(text, object_pairs_hook=merge_repeated)
    except ValueError as e:
        if not lines and not begins_with_object(text):
            raise NotJSON(e) from None
    else:
        return rows_of_json(content, image_column, caption_column)

    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=merge_repeated)
            rows.append((f"line {number}", value))
        except ValueError as e:
            reason = e.msg
            if "escape" in reason:
                reason += r", a backslash is spelt \\"
            skipped.append((f"not JSON ({reason})", f"line {number}"))
    return rows


def begins_with_object(text):
    """True if the first line that is not blank is an object in JSON."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def merge_repeated(pairs):
    """A dict of the pairs; the values of a key that occurs several times become one list."""
    merged = dict(pairs)
    if len(merged) == len(pairs):
        return merged
    merged = {}
    for key, value in pairs:
        merged.setdefault(key, []).append(value)
    return {key: values if len(values) > 1 else values[0] for key, values in merged.items()}


def rows_of_json(content, image_column=None, caption_column=None):
    """Rows [(where, value)] of a file's content.

    A list of rows; {"a.png": "a red fox"} or {"a.png": {"caption": "a fox"}}; COCO's {"images":
    [...], "annotations": [...]}; any object with one list of rows, as {"data": [...]}; or an object
    of columns, as pandas writes: {"image": {"0": "a.png"}, "caption": {"0": "a fox"}}.
    """
    if not isinstance(content, dict):
        if not isinstance(content, list):
            raise NotJSON("neither a list nor an object")
        return [(f"row {i}", value) for i, value in enumerate(content, 1)]
    lists = [name for name, value in content.items() if is_list_of_objects(value)]
    if "images" in lists and "annotations" in content:
        return coco_rows(content)
    if len(lists) == 1:
        return rows_of_json(content[lists[0]], image_column, caption_column)

    columns = find_columns(content, image_column, caption_column)
    if columns.image and (columns.captions or columns.synthetic):
        return rows_of_columns(content, columns.image[0])
    rows = []
    caption_field = caption_column[0] if caption_column else "caption"
    for name, value in content.items():
        if not isinstance(value, dict):
            value = {caption_field: value}
        rows.append((f"row {len(rows) + 1}", value | {image_column or "image": name}))
    return rows


def is_list_of_objects(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def rows_of_columns(content, image_column):
    """The rows of an object of columns, or the object itself if it is a single row."""
    value = content[image_column]
    if not isinstance(value, list | dict) or "path" in value:
        return [("row 1", content)]
    columns = {}
    for name, values in content.items():
        if isinstance(values, dict):
            values = list(values.values())
        if isinstance(values, list):
            columns[name] = values
    if len({len(values) for values in columns.values()}) != 1:
        raise NotJSON("its columns differ in length")
    rows = []
    for values in zip(*columns.values(), strict=True):
        rows.append((f"row {len(rows) + 1}", dict(zip(columns, values, strict=True))))
    return rows


def coco_rows(content):
    """A row for every image of a COCO file, with the list of all its captions."""
    captions = {}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict):
            texts = captions.setdefault(str(annotation.get("image_id")), [])
            texts += texts_of(annotation)
    if not any(captions.values()):
        raise NotJSON("its annotations have no captions (give COCO's captions_*.json)")
    rows = []
    for image in content["images"]:
        if not isinstance(image, dict):
            image = {}
        name = str(image.get("id"))
        rows.append((f"image {name}", image | {"caption": captions.pop(name, [])}))
    for image_id in captions:               # no image has this id
        rows.append((f"annotations of image {image_id}", {}))
    return rows


# ---------------------------------------------------------------------------- Parquet
def read_parquet(path, rows, image_column=None, caption_column=None, base=""):
    """Add the rows of a Parquet file with names of images to `rows`, a CaptionRows."""
    import duckdb  # an optional dependency
    try:
        with duckdb.connect() as db:
            table = db.read_parquet(str(path))
            types = dict(zip(table.columns, map(str, table.types), strict=True))
            columns = find_columns(types, image_column, caption_column)
            require_columns(columns, types, path)
            names = [*columns.image, *columns.captions, *columns.synthetic]
            values = {name: quoted(name) for name in names if not holds_bytes(types[name])}
            if not values.keys() & set(columns.image):
                image = columns.image[0]
                if "path" not in types[image] or has_bytes(db, path, image, types[image]):
                    raise FuseDiTError(f"{path} holds the images themselves: "
                                       "python prepare_data.py parquet FILES OUT packs them")
                values[image] = f"struct_extract({quoted(image)}, 'path')"
            found = db.execute(f"SELECT {', '.join(values.values())} FROM read_parquet(?)",
                               [str(path)]).fetchall()
    except duckdb.Error as e:
        raise FuseDiTError(f"cannot read {path}: {first_line(e)}") from None
    for number, row in enumerate(found, 1):
        rows.add(f"row {number}", dict(zip(values, row, strict=True)), columns, base)


def holds_bytes(kind):
    """True if a column of this DuckDB type holds files: bytes, or the hub's {bytes, path}."""
    return re.fullmatch(r"BLOB|STRUCT\((\w+ \w+, )*bytes BLOB(, .*)?\)", kind) is not None


def has_bytes(db, path, column, kind):
    """False if a file's metadata say that no row has bytes in a column of this DuckDB type."""
    name = column if kind == "BLOB" else f"{column}, bytes"
    empty = db.execute("SELECT bool_and(coalesce(stats_null_count = num_values, false)) "
                       "FROM parquet_metadata(?) WHERE path_in_schema = ?",
                       [str(path), name]).fetchone()[0]
    return not empty


def quoted(column):
    """The name of a column in SQL."""
    escaped = column.replace('"', '""')
    return f'"{escaped}"'


# ---------------------------------------------------------------------------- beside the images
def read_text_files(names, folder, rows, images=None):
    """Add a row for every image that has a caption file in `folder`.

    names: of the images, relative paths. images: the names of all images; None: there are no
    others. The caption of cats/1.jpg is in cats/1.jpg.txt, cats/1.txt or one of the other
    TEXT_SUFFIXES. Images whose file cannot be read are added to rows.skipped. Returns the names of
    these, and of the caption files that were used, as sets.
    """
    text_files = TextFiles(folder, images or names)
    used = set()
    unreadable = set()
    for image in names:
        try:
            files = text_files.find(image, rows)
            if not files:
                continue
            used.add(files[0])
            captions = captions_of_file(folder / files[0])
        except Several as reason:
            rows.skipped.append((SEVERAL, f"{image} ({', '.join(reason.names)})"))
            unreadable.add(image)
        except (UnicodeDecodeError, OSError) as e:
            reason = NOT_UTF8
            if isinstance(e, OSError):
                reason = f"caption cannot be read: {e.strerror}"
            rows.skipped.append((reason, files[0]))
            unreadable.add(image)
        else:
            rows.rows.append(CaptionRow(files[0], image, captions))
            if any(captions.values()):
                rows.used[PurePosixPath(files[0]).suffix.lower()] += 1
    for name in without_json(text_files.without_image()):
        rows.note(NO_IMAGE, name)
    return unreadable, used


class TextFiles:
    """The files in a folder that may hold the captions of images."""

    def __init__(self, folder, images):
        self.files = {}                     # path without the suffix -> names, best first
        for name, kind in list_files(folder):
            start, dot, suffix = name.rpartition(".")
            suffix = (dot + suffix).lower()
            if kind == FILE and suffix in TEXT_SUFFIXES:
                order = (TEXT_SUFFIXES.index(suffix), name)
                self.files.setdefault(composed(start), []).append(order)
        for start, files in self.files.items():
            self.files[start] = [name for _, name in sorted(files)]
        self.free = set(self.files)         # those that belong to no image
        for image in images:
            self.free.difference_update(starts(image))
        self.in_other_case = group(self.free, folded)

    def find(self, image, rows):
        """The names of an image's caption files, best first. Raises Several."""
        found = [start for start in starts(image) if start in self.files]
        if not found:
            for start in starts(image):
                found += self.in_other_case.get(folded(start), [])
            self.free.difference_update(found)
        files = [name for start in found for name in self.files[start]]
        if found and found[0] not in starts(image):
            if len(found) > 1:
                raise Several(files)
            rows.note(OTHER_CASE, files[0])
        own = image, image.rpartition(".")[0]              # not in another Unicode form
        files = [name for name in files if name.rpartition(".")[0] in own] or files
        others = without_json(files)[1:]
        if others:
            rows.note(OTHER_FILE, f"{files[0]}, used instead of {' and '.join(others)}")
        return files

    def without_image(self):
        return [name for start in sorted(self.free) for name in self.files[start]]


def without_json(names):
    return [name for name in names if not name.lower().endswith(".json")]


def starts(image):
    """The paths, without their suffix, of the files that may hold the caption of an image."""
    full = composed(image)
    return full, full.rpartition(".")[0]


def captions_of_file(path):
    """{kind: captions} of a file that belongs to one image: the lines of a text, or JSON."""
    text = decode(path.read_bytes())
    if path.suffix.lower() != ".json":
        return dict(original_caption=texts_of(text.split("\n")))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return dict(synthetic_caption=texts_of(content.get("synthetic_caption")),
                original_caption=texts_of(content))

"""Images stored in Parquet files with their captions, as data sets on the Hugging Face hub are."""
import contextlib
import sys
from collections import Counter
from functools import partial
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.backend import first_line
from fusedit_lib.data import packing
from fusedit_lib.data.caption_files import has_bytes, holds_bytes, quoted
from fusedit_lib.data.columns import (
    Columns,
    captions_of,
    find_columns,
    matching,
    normalised,
    require_columns,
)
from fusedit_lib.data.folder import one_or_several, print_notes
from fusedit_lib.data.image_names import PART
from fusedit_lib.data.images import Skip, image_rules
from fusedit_lib.data.items import Item, digest, make_sample, output_settings, require_exists

BLOCK_BYTES = 64_000_000                    # of rows that are held in memory at once, on average

# Names of columns with images, in the order in which they are tried.
IMAGE_FIELDS = "image", "img", "jpg", "jpeg", "png", "webp", "images", "image_bytes", "bytes"

IN_A_FOLDER = "for images in a folder: python prepare_data.py folder IMAGES FILE.parquet OUT"


class ParquetFile(NamedTuple):
    """A Parquet file with images."""
    path: object                            # Path
    name: str                               # for the report
    rows: int
    columns: Columns                        # image: the one column of images
    has_images: bool                        # False if this column is empty
    all_columns: list                       # their names


class RowRange:
    """Iterates over the items in those of the rows start <= row < stop that a ParquetFile has.

    The rows are read while iterating, in blocks that do not cross row groups; DuckDB then reads
    only that row group. Of a block that cannot be read, every row is an item without an image.
    """

    def __init__(self, file, start, stop, first_key):
        self.file = file
        self.start = start
        self.stop = stop
        self.first_key = first_key          # of the row `start`: its number in the whole data set

    def __iter__(self):
        import duckdb  # an optional dependency
        columns = self.file.columns
        names = [*columns.image, *columns.captions, *columns.synthetic]
        query = (f"SELECT {', '.join(map(quoted, names))} "
                 "FROM read_parquet(?, file_row_number=true) "
                 "WHERE file_row_number >= ? AND file_row_number < ? ORDER BY file_row_number")
        with duckdb.connect(config=dict(threads=1)) as db:
            for first, stop in self.blocks(db):
                try:
                    found = db.execute(query, [str(self.file.path), first, stop]).fetchall()
                except duckdb.Error:
                    found = [None] * (stop - first)
                for number, values in enumerate(found, first):
                    name = f"{self.file.name} row {number}"
                    key = self.first_key + number - self.start
                    if values is None:
                        yield Item(name, Skip("damaged Parquet"), captions={})
                    else:
                        fields = dict(zip(names, values, strict=True))
                        yield row_item(fields, columns, name, key)

    def blocks(self, db):
        """The range in parts (first, stop) that are read at once."""
        path = self.file.path
        groups = db.execute(
            "SELECT DISTINCT row_group_id, row_group_num_rows FROM parquet_metadata(?) "
            "ORDER BY row_group_id", [str(path)]).fetchall()
        size = max(1, BLOCK_BYTES * self.file.rows // path.stat().st_size)
        end = 0                             # of the row group
        for _, rows in groups:
            begin = end
            end += rows
            for first in range(max(begin, self.start), min(end, self.stop), size):
                yield first, min(first + size, end, self.stop)


def row_item(fields, columns, name, key):
    """The Item of a row {column: value}."""
    data = fields[columns.image[0]]
    image = Skip("no image")
    if isinstance(data, dict):              # the hub's {bytes, path}
        if data.get("path"):
            name += f" ({data['path']})"
            image = Skip("no image, only its path")
        data = data["bytes"]
    if data is not None:
        image = bytes(data)
    captions, _, _ = captions_of(fields, columns)
    captions = {kind: one_or_several(texts) for kind, texts in captions.items()}
    return Item(name, image, captions, f"{key:09d}")


# ---------------------------------------------------------------------------- files
def list_parquet(paths):
    """{name: Path} of the .parquet files among the paths and below their folders, in order."""
    files = {}
    listed = set()                          # their real paths
    repeated = []
    for path in paths:
        found = {path.name: path}
        if path.is_dir():
            found = {}
            for file in sorted(path.rglob("*.parquet")):
                name = file.relative_to(path).as_posix()
                if not any(part.startswith(".") for part in name.split("/")):
                    found[name] = file
        for name, file in found.items():
            if file.resolve() in listed:
                repeated.append(str(file))
                continue
            listed.add(file.resolve())
            if name in files:               # from two folders
                name = str(file)
            files[name] = file
    if not files:
        raise FuseDiTError(f"no .parquet file in {', '.join(map(str, paths))}")
    if repeated:
        print(f"files that are named twice are read once: {packing.first_few(repeated)}",
              file=sys.stderr)
    return files


def open_parquet(path, name, image_column, caption_column):
    """The ParquetFile at a path. Raises FuseDiTError."""
    import duckdb  # an optional dependency
    try:
        with duckdb.connect() as db:
            table = db.read_parquet(str(path))
            types = dict(zip(table.columns, map(str, table.types), strict=True))
            rows = db.execute("SELECT num_rows FROM parquet_file_metadata(?)",
                              [str(path)]).fetchone()[0]
            columns = find_columns(types, image_column, caption_column)
            require_columns(columns, types, path, image=False)
            image = find_image_column(types, path, image_column)
            has_images = has_bytes(db, path, image, types[image])
    except duckdb.Error as e:
        raise FuseDiTError(f"cannot read {path}: {first_line(e)}") from None
    columns = columns._replace(image=[image])
    return ParquetFile(path, name, rows, columns, has_images, list(types))


def find_image_column(types, path, image_column):
    """The name of the column of images. types: {column: its type}. Raises FuseDiTError."""
    candidates = [name for name in types if holds_bytes(types[name])]
    known = matching(candidates, IMAGE_FIELDS)
    if image_column is not None:
        known = matching(candidates, [normalised(image_column)])
    elif len(candidates) == 1:
        known = candidates
    if known:
        return known[0]
    names = ", ".join(f"{name} ({kind[:40]})" for name, kind in types.items())
    if candidates and image_column is None:
        raise FuseDiTError(f"{path} has several columns of images: give one with --image-column: "
                           f"{', '.join(candidates)}")
    remedy = ""
    if matching(types, ["url", "image_url"]):
        remedy = "; img2dataset downloads images from URLs and writes shards"
    elif matching(types, ["file_name", "filename", "path"]):
        remedy = f"; {IN_A_FOLDER}"
    elif any("BLOB" in kind and kind.endswith("]") for kind in types.values()):
        remedy = " (lists of images: a row must hold one image)"
    raise FuseDiTError(f"{path} has no such column with the bytes of images{remedy}. Its columns: "
                       f"{names}")


def row_ranges(files, size):
    """RowRanges of at most `size` rows each, for all rows of the ParquetFiles."""
    ranges = []
    key = 0
    for file in files:
        for start in range(0, file.rows, size):
            ranges.append(RowRange(file, start, start + size, key + start))
        key += file.rows
    return ranges


def warn_of_parts(files):
    """Print a line to stderr if files of train and test, for example, are packed together."""
    parts = set()
    for file in files:
        found = PART.match(file.path.name)
        if found:
            parts.add(found[0])
    if len(parts) > 1:
        print(f"files of several parts are packed together ({', '.join(sorted(parts))}); to "
              "choose, give files instead of their folder", file=sys.stderr)


def print_columns(files):
    """Print the columns that are packed, a line for all ParquetFiles with the same ones."""
    rows = Counter()
    count = Counter()
    for file in files:
        columns = file.columns
        text = f"images from column {columns.image[0]}"
        if columns.captions:
            joint = " and " if columns.all_captions else ", or where it is empty from "
            text += f", captions from {joint.join(columns.captions)}"
        if columns.synthetic:
            text += f", synthetic captions from {columns.synthetic[0]}"
        rows[text] += file.rows
        count[text] += 1
    for text in rows:
        print(f"{rows[text]} rows in {count[text]} files; {text}")


def captions_report(files):
    """The entry `captions` of report.json: the columns of all ParquetFiles.

    other_columns: {column: number of rows in which another one holds the caption}.
    """
    import duckdb  # an optional dependency
    found = dict(image={}, captions={}, synthetic={})
    all_columns = {}
    ignored = Counter()
    for file in files:
        columns = file.columns
        for kind in found:
            found[kind] |= dict.fromkeys(getattr(columns, kind))
        all_columns |= dict.fromkeys(file.all_columns)
        if len(columns.captions) > 1 or len(columns.synthetic) > 1:
            names = [*columns.captions, *columns.synthetic]
            query = f"SELECT {', '.join(map(quoted, names))} FROM read_parquet(?)"
            # Packing reports what cannot be read.
            with contextlib.suppress(duckdb.Error), duckdb.connect() as db:
                result = db.execute(query, [str(file.path)])
                while rows := result.fetchmany(10_000):
                    for values in rows:
                        fields = dict(zip(names, values, strict=True))
                        ignored.update(captions_of(fields, columns)[2])
    columns = {kind: list(names) for kind, names in found.items()}
    return dict(columns=columns, all_columns=list(all_columns), other_columns=dict(ignored))


def parquet(args):
    """Run `prepare_data.py parquet`."""
    require_exists(*args.data)
    files = []
    for name, path in list_parquet(args.data).items():
        files.append(open_parquet(path, name, args.image_column, args.caption_column))
    if not any(file.has_images for file in files):
        raise FuseDiTError(f"column {files[0].columns.image[0]} of {files[0].path} holds no images "
                           f"in any row; {IN_A_FOLDER}")
    warn_of_parts(files)
    print_columns(files)
    total = sum(file.rows for file in files)
    content = digest((file.name, file.path.stat().st_size, file.rows) for file in files)
    if packing.begin(args, **output_settings(args, rows=content)):
        report = captions_report(files)
        print_notes(report | dict(notes={}), {})
        make = partial(make_sample, image_rules(args))
        jobs = row_ranges(files, args.shard_size)
        packing.pack(args, "parquet", jobs, make, total=total, captions=report)

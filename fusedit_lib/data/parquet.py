"""Images stored in Parquet files with their captions, as data sets on the Hugging Face hub are."""
from functools import partial
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.backend import first_line
from fusedit_lib.data import packing
from fusedit_lib.data.caption_files import holds_bytes
from fusedit_lib.data.columns import Columns, find_columns, matching, require_columns, texts_of
from fusedit_lib.data.folder import one_or_several
from fusedit_lib.data.images import Skip, image_rules
from fusedit_lib.data.items import Item, digest, make_sample, output_settings, require_exists

FETCH = 16                                  # number of rows that are held in memory at once

# Names of columns with images, in the order in which they are tried.
IMAGE_FIELDS = "image", "img", "jpg", "jpeg", "png", "webp", "images", "image_bytes", "bytes"


class ParquetFile(NamedTuple):
    """A Parquet file with images."""
    path: object                            # Path
    name: str                               # for the report
    rows: int
    columns: Columns                        # image: the one column of images


class RowRange:
    """Iterates over the items in the rows start <= row < stop of a ParquetFile.

    The rows are read while iterating. DuckDB reads only the row groups that hold them, one at a
    time. If they cannot be read to the end, one extra item names the row.
    """

    def __init__(self, file, start, stop, first_key):
        self.file = file
        self.start = start
        self.stop = stop
        self.first_key = first_key          # of the row `start`: its number in the whole data set

    def __iter__(self):
        import duckdb  # an optional dependency
        columns = self.file.columns
        (image,) = columns.image
        names = [image, *columns.captions, *columns.synthetic]
        number = self.start
        try:
            with duckdb.connect(config=dict(threads=1)) as db:
                db.execute(
                    f"SELECT {', '.join(map(quoted, names))} "
                    "FROM read_parquet(?, file_row_number=true) "
                    "WHERE file_row_number >= ? AND file_row_number < ?",
                    [str(self.file.path), self.start, self.stop])
                while found := db.fetchmany(FETCH):
                    for values in found:
                        fields = dict(zip(names, values, strict=True))
                        key = self.first_key + number - self.start
                        yield row_item(fields, columns, f"{self.file.name} row {number}", key)
                        number += 1
        except duckdb.Error:
            yield Item(f"{self.file.name} from row {number}", Skip("damaged Parquet"), captions={})


def row_item(fields, columns, name, key):
    """The Item of a row {column: value}."""
    data = fields[columns.image[0]]
    if isinstance(data, dict):              # the hub's {bytes, path}
        if data.get("path"):
            name += f" ({data['path']})"
        data = data["bytes"]
    image = Skip("no image")
    if data is not None:
        image = bytes(data)
    captions = {}
    for kind, names in (("synthetic_caption", columns.synthetic),
                        ("original_caption", columns.captions)):
        texts = next(filter(None, (texts_of(fields[column]) for column in names)), [])
        if texts:
            captions[kind] = one_or_several(texts)
    return Item(name, image, captions, f"{key:09d}")


# ---------------------------------------------------------------------------- files
def list_parquet(paths):
    """{name: Path} of the .parquet files among the paths and below their folders, in order."""
    files = {}
    for path in paths:
        found = {path.name: path}
        if path.is_dir():
            found = {}
            for file in sorted(path.rglob("*.parquet")):
                name = file.relative_to(path).as_posix()
                if not any(part.startswith(".") for part in name.split("/")):
                    found[name] = file
        for name, file in found.items():
            if name in files:               # from two folders
                name = str(file)
            files[name] = file
    if not files:
        raise FuseDiTError(f"no .parquet file in {', '.join(map(str, paths))}")
    return files


def open_parquet(path, name, image_column, caption_column):
    """The ParquetFile at a path, and the names of all its columns. Raises FuseDiTError."""
    import duckdb  # an optional dependency
    try:
        with duckdb.connect() as db:
            table = db.read_parquet(str(path))
            types = dict(zip(table.columns, map(str, table.types), strict=True))
            rows = db.execute("SELECT num_rows FROM parquet_file_metadata(?)",
                              [str(path)]).fetchone()[0]
    except duckdb.Error as e:
        raise FuseDiTError(f"cannot read {path}: {first_line(e)}") from None
    columns = find_columns(types, image_column, caption_column)
    require_columns(columns, types, path, image=False)
    image = find_image_column(types, path, image_column)
    return ParquetFile(path, name, rows, columns._replace(image=[image])), list(types)


def find_image_column(types, path, image_column):
    """The name of the column of images. types: {column: its type}. Raises FuseDiTError."""
    candidates = [name for name in types if holds_bytes(types[name])]
    known = matching(candidates, IMAGE_FIELDS)
    if image_column is not None:
        known = [name for name in candidates if name == image_column]
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
        remedy = "; for images in a folder: python prepare_data.py folder IMAGES FILE.parquet OUT"
    raise FuseDiTError(f"{path} has no such column with the bytes of images{remedy}. Its columns: "
                       f"{names}")


def quoted(column):
    escaped = column.replace('"', '""')
    return f'"{escaped}"'


def row_ranges(files, size):
    """RowRanges of at most `size` rows each, for all rows of the ParquetFiles."""
    ranges = []
    key = 0
    for file in files:
        for start in range(0, file.rows, size):
            stop = min(start + size, file.rows)
            ranges.append(RowRange(file, start, stop, key + start))
        key += file.rows
    return ranges


def parquet(args):
    """Run `prepare_data.py parquet`."""
    require_exists(*args.data)
    files = []
    for name, path in list_parquet(args.data).items():
        file, names = open_parquet(path, name, args.image_column, args.caption_column)
        files.append(file)
    columns = files[0].columns
    report = dict(columns=columns._asdict(), all_columns=names)
    total = sum(file.rows for file in files)
    content = digest((file.name, file.path.stat().st_size, file.rows) for file in files)
    print(f"{total} rows in {len(files)} files; images from column {columns.image[0]}, captions "
          f"from {', '.join([*columns.synthetic, *columns.captions][:1])}")
    if packing.begin(args, **output_settings(args, rows=content)):
        make = partial(make_sample, image_rules(args))
        jobs = row_ranges(files, args.shard_size)
        packing.pack(args, "parquet", jobs, make, total=total, captions=report)

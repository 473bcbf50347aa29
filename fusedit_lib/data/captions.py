"""Captions that are stored separately from their images and looked up by key."""
import itertools
import shutil
import sys

from fusedit import FuseDiTError
from fusedit_lib.backend import first_line
from fusedit_lib.files import atomic_write

LOOKUP_SIZE = 250                           # number of captions that are looked up at once


class CaptionTable:
    """Captions by key, in a DuckDB file sorted by key, since millions would not fit in memory.

    If a key has several captions, the one that sorts first is used, so the order of the rows in
    the original files does not matter.
    """

    def __init__(self, path):
        self.path = path

    @classmethod
    def from_files(cls, source, key_column, caption_column, path):
        """Build the table at `path` from .jsonl, .jsonl.gz or .parquet files unless it exists.

        source: one file, or a folder that contains such files. Raises FuseDiTError if there is no
        such file, if a file cannot be read, or if a column is missing.
        """
        import duckdb  # an optional dependency
        if path.exists():
            return cls(path)
        files = find_caption_files(source)
        if not files:
            raise FuseDiTError(f"no .jsonl, .jsonl.gz or .parquet file in {source}")
        remove_leftovers(path)

        print(f"sorting the captions of {source}; this takes a while", file=sys.stderr)
        with atomic_write(path) as tmp:
            config = dict(memory_limit="700MB", temp_directory=f"{tmp}.d", threads=2,
                          preserve_insertion_order="false")
            with duckdb.connect(str(tmp), config=config) as db:
                try:
                    db.execute(
                        f'CREATE TABLE captions AS SELECT "{key_column}"::VARCHAR AS key, '
                        f'"{caption_column}"::VARCHAR AS caption '
                        f"FROM {read_expression(files, key_column, caption_column)} ORDER BY ALL")
                except duckdb.Error as e:
                    reason = first_line(e)
                    raise FuseDiTError(f"cannot read {source}: {reason}") from None
                for column, name in (("key", key_column), ("caption", caption_column)):
                    count = db.execute(f"SELECT count({column}) FROM captions").fetchone()[0]
                    if not count:
                        raise FuseDiTError(f"no row of {source} has a column {name}")
        return cls(path)

    def open(self):
        """A read-only connection to the table."""
        import duckdb  # an optional dependency
        config = dict(memory_limit="500MB", threads=1)
        return duckdb.connect(str(self.path), read_only=True, config=config)

    def counts(self):
        """The numbers of rows, of distinct keys, and of rows without a readable key."""
        with self.open() as db:
            rows, keys, unreadable = db.execute(
                "SELECT count(*), count(DISTINCT key), count(*) - count(key) FROM captions"
            ).fetchone()
        return dict(rows=rows, keys=keys, unreadable=unreadable)

    def lookup(self, keys):
        """{key: caption} for the keys that have a caption."""
        keys = list(keys)
        # The range lets DuckDB skip blocks of the sorted table that contain none of the keys.
        parameters = dict(low=min(keys), high=max(keys), keys=keys)
        with self.open() as db:
            rows = db.execute(
                "SELECT key, min(caption) FROM captions WHERE key BETWEEN $low AND $high AND "
                "key IN (SELECT unnest($keys)) GROUP BY key", parameters).fetchall()
        return dict(rows)


def find_caption_files(source):
    """[source] if it is a file, otherwise all caption files in and below this folder."""
    if source.is_file():
        return [source]
    files = []
    for pattern in ("*.jsonl", "*.jsonl.gz", "*.parquet"):
        files += source.rglob(pattern)
    return sorted(files)


def read_expression(files, key_column, caption_column):
    """SQL that reads the two columns of the files. A broken line of JSON yields NULLs."""
    quoted = []
    for path in files:
        name = str(path).replace("'", "''")
        quoted.append(f"'{name}'")
    names = ", ".join(quoted)
    if files[0].suffix == ".parquet":
        return f"read_parquet([{names}])"
    columns = f"{{'{key_column}': 'VARCHAR', '{caption_column}': 'VARCHAR'}}"
    return (f"read_json([{names}], format='newline_delimited', ignore_errors=true, "
            f"columns={columns})")


def remove_leftovers(path):
    """Delete the temporary files and folders of a run that was killed while writing `path`."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


class CaptionFolder:
    """Captions by key, in a folder of KEY.txt files."""

    def __init__(self, folder):
        self.folder = folder

    def lookup(self, keys):
        """{key: caption} for the keys that have a caption."""
        captions = {}
        for key in keys:
            path = self.folder / f"{key}.txt"
            try:
                captions[key] = path.read_text("utf-8", errors="replace")
            except FileNotFoundError:
                pass
        return captions


class WithCaptions:
    """Iterates over items and adds to each the synthetic caption of its key."""

    def __init__(self, items, captions):
        self.items = items
        self.captions = captions            # a CaptionTable or CaptionFolder

    def __iter__(self):
        items = iter(self.items)
        while True:
            batch = list(itertools.islice(items, LOOKUP_SIZE))
            if not batch:
                return
            keys = {item.key.encode(errors="replace").decode() for item in batch}
            synthetic = self.captions.lookup(keys)
            for item in batch:
                captions = item.captions | dict(synthetic_caption=synthetic.get(item.key))
                yield item._replace(captions=captions)

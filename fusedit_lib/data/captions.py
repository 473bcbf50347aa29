"""TODO."""
import itertools
import shutil
import sys

from fusedit import FuseDiTError
from fusedit_lib.files import atomic_write

# ---- captions of millions of pictures ------------------------------------------------------------

class Captions:
    """Captions by key on disk, sorted by DuckDB, since millions would not fit into memory.

    Of keys that come twice the caption that sorts first counts, so the order of a file's rows
    does not.
    """

    def __init__(self, path):
        self.path = path

    @classmethod
    def of_files(cls, files, key, caption, path):
        """Read .jsonl, .jsonl.gz or .parquet files, those named or all in a folder, unless done."""
        import duckdb
        if path.exists():
            return cls(path)
        found = [files] if files.is_file() else sorted(
            p for kind in ("*.jsonl", "*.jsonl.gz", "*.parquet") for p in files.rglob(kind))
        if not found:
            raise FuseDiTError(f"no .jsonl, .jsonl.gz or .parquet file in {files}")
        for old in path.parent.glob(f".{path.name}.*"):    # of a killed run
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        names = ", ".join("'" + str(p).replace("'", "''") + "'" for p in found)
        rows = f"read_parquet([{names}])" if found[0].suffix == ".parquet" else (
            f"read_json([{names}], format='newline_delimited', ignore_errors=true, columns="
            f"{{'{key}': 'VARCHAR', '{caption}': 'VARCHAR'}})")
        print(f"sorting the captions of {files}, for a while", file=sys.stderr)
        with atomic_write(path) as tmp:
            with duckdb.connect(str(tmp), config=dict(
                    memory_limit="700MB", temp_directory=f"{tmp}.d", threads=2,
                    preserve_insertion_order="false")) as db:
                try:
                    db.execute(f'CREATE TABLE captions AS SELECT "{key}"::VARCHAR AS key, '
                               f'"{caption}"::VARCHAR AS caption FROM {rows} ORDER BY ALL')
                except duckdb.Error as e:
                    raise FuseDiTError(f"cannot read {files}: {str(e).splitlines()[0]}") from None
                for column, name in (("key", key), ("caption", caption)):
                    if not db.execute(f"SELECT count({column}) FROM captions").fetchone()[0]:
                        raise FuseDiTError(f"no row of {files} has a column {name}")
        return cls(path)

    def counts(self):
        """How many rows there are, keys, and rows that could not be read or have no key."""
        with self.open() as db:
            return dict(zip(("rows", "keys", "unreadable"), db.execute(
                "SELECT count(*), count(DISTINCT key), count(*) - count(key) FROM captions"
            ).fetchone(), strict=True))

    def open(self):
        import duckdb
        return duckdb.connect(str(self.path), read_only=True, config=dict(
            memory_limit="500MB", threads=1))

    def of(self, keys):
        """{key: caption} of those that have one."""
        keys = list(keys)
        with self.open() as db:
            return dict(db.execute(
                "SELECT key, min(caption) FROM captions WHERE key BETWEEN $low AND $high AND "
                "key IN (SELECT unnest($keys)) GROUP BY key",
                dict(low=min(keys), high=max(keys), keys=keys)).fetchall())


class Texts:
    """Captions by key in KEY.txt of a folder."""

    def __init__(self, folder):
        self.folder = folder

    def of(self, keys):
        found = {}
        for key in keys:
            try:
                found[key] = (self.folder / f"{key}.txt").read_text("utf-8", errors="replace")
            except FileNotFoundError:
                pass
        return found


# ---- CC12M ---------------------------------------------------------------------------------------

class Captioned:
    """Items with the new captions of their keys, looked up for some at a time."""

    def __init__(self, items, captions):
        self.items, self.captions = items, captions

    def __iter__(self):
        items = iter(self.items)
        while part := list(itertools.islice(items, 250)):
            said = self.captions.of({i.key.encode(errors="replace").decode() for i in part})
            for i in part:
                yield i._replace(captions=i.captions | dict(synthetic_caption=said.get(i.key)))

"""prepare_data.py parquet: images and captions in Parquet files, as on the Hugging Face hub."""
import io

import duckdb
import pytest
from PIL import Image
from test_datasets import kill
from test_prepare_data import files, pack, read_shards

from fusedit import FuseDiTError
from fusedit_lib.data import parquet
from fusedit_lib.data.images import Skip


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (200, 100, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, columns, rows, row_group=None):
    """Write rows to a Parquet file. columns: their names and types, as SQL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as db:
        db.execute(f"CREATE TABLE t ({columns})")
        for row in rows:
            db.execute(f"INSERT INTO t VALUES ({', '.join('?' * len(row))})", row)
        size = f", ROW_GROUP_SIZE {row_group}" if row_group else ""
        db.execute(f"COPY t TO '{path}' (FORMAT parquet{size})")
    return path


def write_long_parquet(path, rows):
    """Write a file with row groups of 2048 rows, all with the same image."""
    with duckdb.connect() as db:
        db.execute(
            f"COPY (SELECT {{'bytes': ?::BLOB, 'path': i || '.png'}} AS image, 'number ' || i AS "
            f"text FROM range({rows}) AS t(i)) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 2048)",
            [png(0)])
    return path


def damage(path, row_group):
    """Overwrite the first column's pages in a row group."""
    with duckdb.connect() as db:
        (offset,) = db.execute(
            "SELECT min(coalesce(dictionary_page_offset, data_page_offset)) "
            "FROM parquet_metadata(?) WHERE row_group_id = ?", [str(path), row_group]).fetchone()
    data = bytearray(path.read_bytes())
    data[offset:offset + 200] = bytes(200)
    path.write_bytes(data)


HUB = "image STRUCT(bytes BLOB, path VARCHAR), text VARCHAR"


def hub_row(number):
    return dict(bytes=png(number), path=f"{number}.png"), f"number {number}"


def texts(samples, kind="original_caption"):
    """{key: (width of the image - 8, caption)}"""
    found = {}
    for key, sample in samples.items():
        width = Image.open(io.BytesIO(sample["image.png"])).width
        found[key] = (width - 8, sample[f"{kind}.txt"].decode())
    return found


def numbered(count):
    return {f"{i:09d}": (i, f"number {i}") for i in range(count)}


def test_a_data_set_of_the_hub(tmp_path, capsys):
    data = tmp_path / "data"
    write_parquet(data / "train-00000-of-00002.parquet", HUB, map(hub_row, range(7)))
    write_parquet(data / "train-00001-of-00002.parquet", HUB, map(hub_row, range(7, 10)))
    (data / ".cache").mkdir()
    (data / ".cache" / "x.parquet").write_bytes(b"unfinished")
    pack("parquet", data, tmp_path / "out", "--shard-size", 3)
    samples, report = read_shards(tmp_path / "out")
    assert texts(samples) == numbered(10)
    assert samples["000000008"]["image.png"] == png(8)
    assert [shard["samples"] for shard in report["shards"]] == [3, 3, 1, 3]
    assert report["captions"]["all_columns"] == ["image", "text"]
    out, err = capsys.readouterr()
    assert "images from column image, captions from text" in out
    assert "several parts" not in err

    pack("parquet", *sorted(data.glob("*.parquet")), tmp_path / "named", "--shard-size", 3)
    assert files(tmp_path / "named").keys() == files(tmp_path / "out").keys()
    assert read_shards(tmp_path / "named")[0] == samples


def test_parts_of_a_data_set_that_are_packed_together_are_named(tmp_path, capsys):
    write_parquet(tmp_path / "data" / "train-00000.parquet", HUB, [hub_row(0)])
    write_parquet(tmp_path / "data" / "test-00000.parquet", HUB, [hub_row(1)])
    pack("parquet", tmp_path / "data", tmp_path / "out")
    assert "several parts are packed together (test, train)" in capsys.readouterr().err


def test_odd_rows_are_counted(tmp_path):
    rows = [hub_row(0), (dict(bytes=None, path="gone.png"), "gone"), (None, "none"),
            (dict(bytes=png(3), path=None), None), (dict(bytes=b"<html>", path="x.png"), "html"),
            hub_row(5)]
    write_parquet(tmp_path / "d.parquet", HUB, rows)
    pack("parquet", tmp_path / "d.parquet", tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert texts(samples) == {"000000000": (0, "number 0"), "000000005": (5, "number 5")}
    assert report["skipped_keys"] == {
        "no image, only its path": ["d.parquet row 1 (gone.png)"], "no image": ["d.parquet row 2"],
        "no caption": ["d.parquet row 3"], "not an image": ["d.parquet row 4 (x.png)"]}


@pytest.mark.parametrize("columns, row, caption", [
    ("jpg BLOB, txt VARCHAR", [png(1), "A  dog"], "A dog"),
    ("picture STRUCT(bytes BLOB, path VARCHAR), \"Alt Text\" VARCHAR",
     [dict(bytes=png(1), path="p"), "A dog"], "A dog"),
    ("image BLOB, captions VARCHAR[]", [png(1), ["A dog", "A wet\ndog", "A dog"]],
     "A dog\nA wet dog"),
    ("image BLOB, sentences STRUCT(raw VARCHAR, id INT)[]",
     [png(1), [dict(raw="A dog", id=1), dict(raw="A wet dog", id=2)]], "A dog\nA wet dog"),
    ("label INT, width INT, text VARCHAR, image BLOB, mask BLOB", [1, 9, "A dog", png(1), b""],
     "A dog"),
])
def test_columns_and_several_captions(tmp_path, columns, row, caption):
    write_parquet(tmp_path / "d.parquet", columns, [row])
    pack("parquet", tmp_path / "d.parquet", tmp_path / "out")
    assert texts(read_shards(tmp_path / "out")[0]) == {"000000000": (1, caption)}


def test_columns_that_are_named_and_a_synthetic_caption(tmp_path):
    write_parquet(tmp_path / "d.parquet",
                  "before BLOB, after BLOB, edit VARCHAR, text VARCHAR, synthetic_caption VARCHAR",
                  [[b"x", png(4), "make it red", "A dog", "A red dog"]])
    with pytest.raises(FuseDiTError, match="several columns of images: .*: before, after"):
        pack("parquet", tmp_path / "d.parquet", tmp_path / "out")
    pack("parquet", tmp_path / "d.parquet", tmp_path / "out", "--image-column", "After",
         "--caption-column", "edit")
    samples, report = read_shards(tmp_path / "out")
    assert texts(samples) == {"000000000": (4, "make it red")}
    assert texts(samples, "synthetic_caption") == {"000000000": (4, "A red dog")}
    assert report["captions"]["columns"] == dict(image=["after"], captions=["edit"],
                                                 synthetic=["synthetic_caption"])


@pytest.mark.parametrize("columns, row, message", [
    ("image BLOB, label INT", [b"x", 1], "--caption-column: image, label"),
    ("url VARCHAR, caption VARCHAR", ["https://x/1.jpg", "A dog"], "img2dataset"),
    ("file_name VARCHAR, text VARCHAR", ["1.jpg", "A dog"], "prepare_data.py folder IMAGES"),
    ("images STRUCT(bytes BLOB, path VARCHAR)[], text VARCHAR",
     [[dict(bytes=png(1), path="1.png")], "A dog"], "lists of images: a row must hold one"),
    ("item STRUCT(image STRUCT(bytes BLOB)), text VARCHAR", [dict(image=dict(bytes=b"")), "A dog"],
     "no such column with the bytes of images"),
    ("pixels INT[], text VARCHAR", [[1, 2], "A dog"], r"Its columns: pixels \(INTEGER\[\]\), text"),
])
def test_parquet_without_images_is_an_error_with_the_remedy(tmp_path, columns, row, message):
    write_parquet(tmp_path / "d.parquet", columns, [row])
    with pytest.raises(FuseDiTError, match=message):
        pack("parquet", tmp_path / "d.parquet", tmp_path / "out")


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FuseDiTError, match="no such file or folder"):
        pack("parquet", tmp_path / "none.parquet", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FuseDiTError, match="no .parquet file in"):
        pack("parquet", tmp_path / "empty", tmp_path / "out")
    whole = write_long_parquet(tmp_path / "d.parquet", 4000)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(FuseDiTError, match="cannot read .*cut.parquet: "):
        pack("parquet", tmp_path / "cut.parquet", tmp_path / "out")

    damage(whole, 1)
    pack("parquet", whole, tmp_path / "out", "--shard-size", 2048)
    samples, report = read_shards(tmp_path / "out")
    assert len(samples) == 2048
    lost = [f"d.parquet row {i}" for i in range(2048, 4000)]
    assert report["skipped_keys"] == {"damaged Parquet": lost}


def test_rows_with_several_captions_are_counted(tmp_path, capsys):
    columns = "image BLOB, text VARCHAR, caption VARCHAR"
    write_parquet(tmp_path / "0.parquet", columns,
                  [[png(0), "one", None], [png(1), "two", "the caption"], [png(2), "three", " "]])
    write_parquet(tmp_path / "1.parquet", "img BLOB, prompt VARCHAR", [[png(3), "four"]])
    pack("parquet", tmp_path / "0.parquet", tmp_path / "1.parquet", tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    captions = [caption for _, caption in texts(samples).values()]
    assert captions == ["one", "the caption", "three", "four"]
    assert report["captions"] == dict(
        columns=dict(image=["image", "img"], captions=["caption", "text", "prompt"], synthetic=[]),
        all_columns=["image", "text", "caption", "img", "prompt"], other_columns=dict(text=1))
    out, err = capsys.readouterr()
    assert "column text is ignored in 1 rows" in err
    assert "3 rows in 1 files; images from column image, captions from caption, or where" in out
    assert "1 rows in 1 files; images from column img, captions from prompt\n" in out


def test_a_file_that_is_named_twice_is_read_once(tmp_path, capsys):
    path = write_parquet(tmp_path / "d" / "0.parquet", HUB, [hub_row(0), hub_row(1)])
    (tmp_path / "d" / "link.parquet").symlink_to(path)
    pack("parquet", path, tmp_path / "d", path, tmp_path / "out")
    assert texts(read_shards(tmp_path / "out")[0]) == numbered(2)
    assert (f"named twice are read once: {path}, {tmp_path}/d/link.parquet, {path}\n"
            in capsys.readouterr().err)


def test_paths_without_bytes_are_packed_by_folder(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", HUB, [(dict(bytes=None, path="1.png"), "A dog"),
                                                       (None, "none")])
    with pytest.raises(FuseDiTError, match="holds no images in any row; for images in a folder: "
                       "python prepare_data.py folder IMAGES FILE.parquet OUT"):
        pack("parquet", path, tmp_path / "out")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1))
    pack("folder", tmp_path / "images", path, tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert texts(samples) == {"000000000": (1, "A dog")}
    assert report["skipped_keys"] == {"no image name (image)": ["row 2"]}

    write_parquet(path, HUB, [hub_row(1), (dict(bytes=None, path="1.png"), "A dog")])
    with pytest.raises(FuseDiTError, match="holds the images themselves"):
        pack("folder", tmp_path / "images", path, tmp_path / "again")
    pack("parquet", path, tmp_path / "again")
    assert len(read_shards(tmp_path / "again")[0]) == 1


def test_two_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write_parquet(tmp_path / folder / "0.parquet", HUB, [hub_row(1), (None, "none")])
    pack("parquet", tmp_path / "a", tmp_path / "b", tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert len(samples) == 2
    assert report["skipped_keys"] == {"no image": ["0.parquet row 1",
                                                   f"{tmp_path}/b/0.parquet row 1"]}


def test_only_the_row_groups_of_a_range_are_read(tmp_path):
    path = write_long_parquet(tmp_path / "d.parquet", 5000)
    file = parquet.open_parquet(path, "d.parquet", None, None)
    ranges = parquet.row_ranges([file], 1100)
    names = [[item.name for item in part] for part in ranges]
    assert [len(part) for part in names] == [1100] * 4 + [600]
    assert sum(names, []) == [f"d.parquet row {i} ({i}.png)" for i in range(5000)]
    damage(path, 2)                         # the rows from 4096 on
    damaged = [[isinstance(item.image, Skip) for item in part] for part in ranges]
    assert sum(damaged, []) == [False] * 4096 + [True] * 904


def test_blocks_do_not_cross_row_groups(tmp_path, monkeypatch):
    path = write_long_parquet(tmp_path / "d.parquet", 5000)
    file = parquet.open_parquet(path, "d.parquet", None, None)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", path.stat().st_size * 1000 // 5000)
    with duckdb.connect() as db:
        blocks = list(parquet.RowRange(file, 1500, 4500, 0).blocks(db))
    assert blocks == [(1500, 2048), (2048, 3048), (3048, 4048), (4048, 4096), (4096, 4500)]
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 1)         # images larger than a block
    names = [item.name for item in parquet.RowRange(file, 4094, 4098, 0)]
    assert names == [f"d.parquet row {i} ({i}.png)" for i in range(4094, 4098)]


def test_workers_do_not_change_the_bytes(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", HUB, map(hub_row, range(120)))
    pack("parquet", path, tmp_path / "one", "--shard-size", 12)
    pack("parquet", path, tmp_path / "four", "--shard-size", 12, "--workers", 4)
    assert files(tmp_path / "one") == files(tmp_path / "four")


@pytest.mark.slow
def test_kills_do_not_change_the_bytes(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", HUB, map(hub_row, range(120)))
    pack("parquet", path, tmp_path / "one", "--shard-size", 12)
    words = ["parquet", path, tmp_path / "killed", "--shard-size", 12, "--workers", 2]
    kill(words, 0.4)
    assert files(tmp_path / "killed") == files(tmp_path / "one")

"""Captions as people have them: tables, JSON, Parquet and text files of many kinds."""
import gzip
import json
import sys
import unicodedata

import duckdb
import pytest
from PIL import Image
from test_prepare_data import pack, read_shards

from fusedit import FuseDiTError
from fusedit_lib.cli import explain


@pytest.fixture
def images(tmp_path):
    """A folder of three images, 1.jpg to 3.jpg."""
    folder = tmp_path / "imgs"
    for number in (1, 2, 3):
        write_image(folder / f"{number}.jpg", number)
    return folder


def write_image(path, number):
    """Write an image whose file differs from that of any other number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8 + number, 8), (200, 100, 0)).save(path)


def packed(images, *words, flags=()):
    """Pack the folder; returns {name of an image: its caption file, as text} and the report.

    A sample is traced to its image by the bytes of the file.
    """
    out = images.parent / "out"
    pack("folder", images, *words, out, "--overwrite", *flags)
    samples, report = read_shards(out)
    names = {path.read_bytes(): path.relative_to(images).as_posix() for path in images.rglob("*.*")}
    captions = {}
    for sample in samples.values():
        data = next(data for name, data in sample.items() if name.startswith("image."))
        name = names[data]
        assert name not in captions
        captions[name] = sample["original_caption.txt"].decode()
    return captions, report


def places(report, note):
    """The places of the report's note that begins with the given words."""
    (found,) = [value for key, value in report["captions"]["notes"].items() if key.startswith(note)]
    assert found["count"] == len(found["names"])
    return found["names"]


THREE = {"1.jpg": "A dog", "2.jpg": "A cat, asleep, on a mat", "3.jpg": "A fox"}


# ---- tables --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, unquoted", [
    ('image,caption\n1.jpg,A dog\n2.jpg,"A cat, asleep, on a mat"\n3.jpg,A fox\n', 0),
    ("image,caption\n1.jpg,A dog\n2.jpg,A cat, asleep, on a mat\n3.jpg,A fox", 1),
    ("image, caption\n1.jpg, A dog\n2.jpg, A cat, asleep, on a mat\n3.jpg, A fox\n", 1),
    ('image, caption\r\n1.jpg, A dog\r\n2.jpg, "A cat, asleep, on a mat"\r\n3.jpg,A fox\r\n', 0),
    ("image;caption\n1.jpg;A dog\n2.jpg;A cat, asleep, on a mat\n3.jpg;A fox\n", 0),
    ("image\tcaption\n1.jpg\tA dog\n2.jpg\tA cat, asleep, on a mat\n3.jpg\tA fox\n", 0),
    ("image_name| comment\n1.jpg| A dog\n2.jpg| A cat, asleep, on a mat\n3.jpg| A fox\n", 0),
    ("sep=;\nimage;caption\n1.jpg;A dog\n2.jpg;A cat, asleep, on a mat\n3.jpg;A fox\n", 0),
    ("\ufeffFile Name,Text\n1.jpg,A dog\n2.jpg,A cat, asleep, on a mat\n\n3.jpg,A fox\n", 1),
    ("IMAGE,Caption,,\n1.jpg,A dog,,\n2.jpg,A cat, asleep, on a mat,,\n3.jpg,A fox,,\n", 1),
    (",filename,caption\n0,1.jpg,A dog\n1,2.jpg,A cat, asleep, on a mat\n2,3.jpg,A fox\n", 1),
    ('caption,image\nA dog,1.jpg\n"A cat, asleep, on a mat",2.jpg\nA fox,3.jpg\n', 0),
    ("\n\nimage,caption\n1.jpg,A dog\n2.jpg,A cat, asleep, on a mat\n3.jpg,A fox\n", 1),
    ("1.jpg,A dog\n2.jpg,A cat, asleep, on a mat\n3.jpg,A fox\n", 1),
    ("1.jpg\tA dog\n2.jpg\tA cat, asleep, on a mat\n3.jpg\tA fox\n", 0),
    ("image\rcaption\r".replace("\r", ",", 1) + "1.jpg,A dog\r2.jpg,A cat, asleep, on a mat\r"
     "3.jpg,A fox\r", 1),
])
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_table_is_read_whatever_its_separator(images, tmp_path, text, unquoted, suffix):
    table = tmp_path / f"table{suffix}"
    table.write_bytes(text.encode())
    captions, report = packed(images, table)
    assert captions == THREE
    assert not report["skipped"]
    notes = [note for note in report["captions"]["notes"] if note.startswith("separators")]
    assert len(notes) == unquoted
    if unquoted:
        (place,) = places(report, "separators")
        line = int(place.removeprefix("line "))
        assert "asleep" in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[line - 1]


@pytest.mark.parametrize("row, caption", [
    ('2.jpg,"Hello", he said, smiling', '"Hello", he said, smiling'),
    ('2.jpg,"A cat, asleep", on a mat', '"A cat, asleep", on a mat'),
    ('"2.jpg",A cat, asleep', "A cat, asleep"),
    ('2.jpg,A 12" record, black', 'A 12" record, black'),
    ('2.jpg,"A 12" record, black', '"A 12" record, black'),
    ('2.jpg,"A 12" record', '"A 12" record'),
    ('"2.jpg","A 12" record"', 'A 12" record'),
    ('2.jpg,"a quote that is not closed', '"a quote that is not closed'),
    ('2.jpg,"A cat\nasleep"', "A cat asleep"),
    ('2.jpg,"A ""tabby"" cat"', 'A "tabby" cat'),
    ("2.jpg,A cat,", "A cat,"),
])
def test_quotes_that_do_not_enclose_a_field_keep_every_row(images, tmp_path, row, caption):
    for last in ("3.jpg,A fox", '3.jpg,"A fox"'):
        (tmp_path / "c.csv").write_text(f"image,caption\n1.jpg,A dog\n{row}\n{last}\n")
        captions, _ = packed(images, tmp_path / "c.csv")
        assert captions == {"1.jpg": "A dog", "2.jpg": caption, "3.jpg": "A fox"}


def test_a_quote_that_is_not_closed_does_not_swallow_the_next_rows(images, tmp_path):
    (tmp_path / "c.csv").write_text('image,caption\n1.jpg,"A dog\n2.jpg,A cat\n3.jpg,A fox"\n')
    captions, report = packed(images, tmp_path / "c.csv")
    assert captions == {"1.jpg": '"A dog', "2.jpg": "A cat", "3.jpg": 'A fox"'}
    assert places(report, "quotes") == ["line 2"]


def test_a_name_with_a_comma(images, tmp_path):
    write_image(images / "4, b.jpg", 4)
    (tmp_path / "c.csv").write_text('image,caption\n"4, b.jpg",A cat, asleep\n')
    assert packed(images, tmp_path / "c.csv")[0] == {"4, b.jpg": "A cat, asleep"}


@pytest.mark.parametrize("text, message", [
    ("image,caption,split\n1.jpg,A dog,train\n2.jpg,A cat, asleep,train\n",
     r"c.csv, line 3: 4 fields, but the header has 3 \(image, caption, split\): "
     r"'2.jpg,A cat, asleep,train'. Put quotes"),
    ("image,caption,synthetic_caption\n1.jpg,A dog, wet,A long text\n", "line 2: 4 fields"),
    ("1.jpg,640,480,A dog\n2.jpg,640,480,A cat\n", "no header, and 4 columns: '1.jpg,640,480,A"),
    ("photo,words\n1.jpg,A dog\n", r"names the images.* 2 columns with --image-column: photo"),
    ("image,words\n1.jpg,A dog\n", r"holds captions.*--caption-column: image, words"),
    ("image,caption,caption\n1.jpg,A,B\n", "two columns caption"),
    ("", "is empty"),
    ("image caption\n1.jpg A dog\n", "single column, 'image caption'; separate .* with a comma"),
    ("image,caption\nx/1.jpg,A dog\n", r"none of 1 rows of .* names an image .*'x/1.jpg'.*1.jpg"),
])
def test_an_ambiguous_table_is_an_error_that_says_what_to_do(images, tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(FuseDiTError, match=message):
        packed(images, tmp_path / "c.csv")


def test_a_conversation_is_not_a_caption(images, tmp_path):
    talk = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A dog"}]
    (tmp_path / "c.json").write_text(json.dumps([dict(image="1.jpg", conversations=talk)]))
    with pytest.raises(FuseDiTError, match="a conversation is not a caption: .*image, conversati"):
        packed(images, tmp_path / "c.json")
    duckdb.sql(f"COPY (SELECT * FROM '{tmp_path}/c.json') TO '{tmp_path}/c.parquet'")
    for name in ("c.json", "c.parquet"):
        with pytest.raises(FuseDiTError, match='conversations contains no text, but .."from": "hu'):
            packed(images, tmp_path / name, flags=["--caption-column", "conversations"])


def test_rows_with_fewer_fields_are_counted(images, tmp_path):
    """The caption of 1.jpg has a line break without quotes."""
    (tmp_path / "c.csv").write_text(
        "image,caption,tags,price\n1.jpg,A dog\non a mat,tame,5\n2.jpg\n3.jpg,A fox,wild\n")
    captions, report = packed(images, tmp_path / "c.csv")
    assert captions == {"3.jpg": "A fox"}
    assert report["skipped_keys"] == {
        "row with fewer fields than the header": ["line 2", "line 4"],
        "image not found": ["on a mat"], "no caption": ["1.jpg", "2.jpg"]}
    (tmp_path / "c.csv").write_text("caption,image,tags\nA dog,1.jpg\nA cat,2.jpg,tame\n")
    assert packed(images, tmp_path / "c.csv")[0] == {"1.jpg": "A dog", "2.jpg": "A cat"}


def test_columns_of_other_names_are_named_and_ignored_ones_reported(images, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("Pic,Alt,Text,words\n1.jpg,a1,t1,w1\n2.jpg,a2,,w2\n")
    captions, report = packed(images, tmp_path / "c.csv", flags=["--image-column", "pic"])
    assert captions == {"1.jpg": "t1", "2.jpg": "a2"}
    assert report["captions"]["columns"] == {"Text": 1, "Alt": 1}
    assert report["captions"]["other_columns"] == {"Alt": 1}
    assert "column Alt is ignored in 1 rows" in capsys.readouterr().err
    flags = ["--image-column", "Pic", "--caption-column", "words"]
    captions, report = packed(images, tmp_path / "c.csv", flags=flags)
    assert captions == {"1.jpg": "w1", "2.jpg": "w2"}
    assert report["settings"]["caption_column"] == ["words"]
    captions, report = packed(images, tmp_path / "c.csv", flags=[*flags, "--caption-column", "alt"])
    assert captions == {"1.jpg": "w1\na1", "2.jpg": "w2\na2"}
    assert report["captions"]["other_columns"] == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_files_from_windows_are_read(images, tmp_path, encoding):
    (tmp_path / "c.csv").write_bytes("image;caption\r\n1.jpg;né à Łódź\r\n".encode(encoding))
    assert packed(images, tmp_path / "c.csv")[0] == {"1.jpg": "né à Łódź"}
    for path in list(images.glob("*.jpg")):
        path.with_suffix(".txt").write_bytes("né à Łódź\r\n".encode(encoding))
    assert packed(images)[0]["3.jpg"] == "né à Łódź"


def test_another_encoding_is_an_error_with_the_remedy(images, tmp_path):
    (tmp_path / "c.csv").write_bytes("image,caption\n1.jpg,né\n".encode("cp1252"))
    with pytest.raises(FuseDiTError, match="byte 0xe9 in line 2. .*iconv -f WINDOWS-1252"):
        packed(images, tmp_path / "c.csv")
    (tmp_path / "c.csv").write_bytes("image,caption\n1.jpg,A dog\n".encode("utf-16-le"))
    with pytest.raises(FuseDiTError, match="byte 0x00 in line 1.*iconv -f UTF-16LE"):
        packed(images, tmp_path / "c.csv")


# ---- JSON ----------------------------------------------------------------------------------------

OBJECTS = [dict(image="1.jpg", caption="A dog"), dict(image="2.jpg", caption="A cat")]
PAIRS = {"1.jpg": "A dog", "2.jpg": "A cat"}
COCO_IMAGES = [dict(id=11, file_name="1.jpg"), dict(id=12, file_name="2.jpg")]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.JSON"])
@pytest.mark.parametrize("text", [
    json.dumps(OBJECTS),
    json.dumps(OBJECTS, indent=1),
    json_lines(OBJECTS),
    json.dumps(PAIRS),
    json.dumps(PAIRS, indent=1),
    json.dumps({name: dict(caption=caption) for name, caption in PAIRS.items()}),
    json.dumps(dict(version=1, data=OBJECTS)),
    json.dumps(dict(image=list(PAIRS), caption=list(PAIRS.values()))),
    json.dumps(dict(image={"0": "1.jpg", "1": "2.jpg"}, caption={"0": "A dog", "1": "A cat"})),
    json.dumps([dict(image=dict(bytes=None, path="1.jpg"), text=["A dog"]),
                dict(image="2.jpg", text="A cat")]),
    json.dumps([dict(images=[name], texts=[caption]) for name, caption in PAIRS.items()]),
    json.dumps([dict(id=1, caption="A dog"), dict(id="2", caption="A cat")]),
    json.dumps(dict(info={}, images=COCO_IMAGES, annotations=[
        dict(image_id="12", caption="A cat"), dict(image_id=11, caption="A dog")])),
    json.dumps(dict(dataset="coco", images=[
        dict(filename="1.jpg", sentences=[dict(raw="A dog", tokens=["a", "dog"])]),
        dict(filename="2.jpg", sentences=[dict(raw="A cat")])])),
])
def test_json_is_read_whatever_its_shape_and_suffix(images, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    captions, report = packed(images, tmp_path / name)
    assert captions == PAIRS
    assert report["skipped_keys"] == {"no caption": ["3.jpg"]}


def test_a_file_with_one_row_of_json(images, tmp_path):
    for name in ("one.json", "one.jsonl"):
        (tmp_path / name).write_text(json.dumps(OBJECTS[0]))
        assert packed(images, tmp_path / name)[0] == {"1.jpg": "A dog"}


def test_compressed_files(images, tmp_path):
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(OBJECTS).encode()))
    assert packed(images, tmp_path / "c.jsonl.gz")[0] == PAIRS
    whole = gzip.compress(b"image,caption\n1.jpg,A dog\n2.jpg,A cat\n")
    (tmp_path / "c.csv.gz").write_bytes(whole)
    assert packed(images, tmp_path / "c.csv.gz")[0] == PAIRS
    (tmp_path / "c.csv.gz").write_bytes(whole[:-9])
    with pytest.raises(FuseDiTError, match="cannot read .*c.csv.gz: "):
        packed(images, tmp_path / "c.csv.gz")


@pytest.mark.parametrize("content, message", [
    (dict(images=COCO_IMAGES, annotations=[dict(image_id=11, bbox=[0, 0, 1, 1])]),
     r"annotations have no captions \(give COCO's captions_"),
    ([dict(photo="1.jpg", words="A dog")], "--image-column: photo, words"),
    (["1.jpg", "2.jpg"], "--image-column: none"),
    (5, "neither a list nor an object"),
    (dict(image=["1.jpg"], caption=["A dog", "A cat"]), "columns differ in length"),
])
def test_json_without_captions_is_an_error(images, tmp_path, content, message):
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(FuseDiTError, match=message):
        packed(images, tmp_path / "c.json")


@pytest.mark.parametrize("row", [
    dict(image_id=1, captions=["A dog"]), dict(image={"path": "1.jpg"}, caption="A dog")])
def test_a_single_line_of_json_lines(images, tmp_path, row):
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    assert packed(images, tmp_path / "c.jsonl")[0] == {"1.jpg": "A dog"}


def test_odd_json(images, tmp_path):
    annotations = dict(image_id=[1, 2], caption="A ghost"), dict(image_id=11, caption="A dog")
    content = dict(images=[*COCO_IMAGES, 3, dict(id=[1, 2])], annotations=annotations)
    (tmp_path / "c.json").write_text(json.dumps(content))
    captions, report = packed(images, tmp_path / "c.json")
    assert captions == {"1.jpg": "A dog"}
    (images / "1.json").write_text("[" * 100000)
    (images / "2.txt").write_text("A cat")
    assert packed(images)[0] == {"2.jpg": "A cat"}


def test_annotations_without_their_image_are_counted(images, tmp_path):
    annotations = [dict(image_id=11, caption="A dog"), dict(image_id=99, caption="A ghost")]
    (tmp_path / "c.json").write_text(json.dumps(dict(images=COCO_IMAGES, annotations=annotations)))
    captions, report = packed(images, tmp_path / "c.json")
    assert captions == {"1.jpg": "A dog"}
    (reason,) = [reason for reason in report["skipped"] if reason.startswith("no image name")]
    assert report["skipped_keys"][reason] == ["annotations of image 99"]


# ---- Parquet -------------------------------------------------------------------------------------

def write_parquet(path, select):
    with duckdb.connect() as db:
        db.execute(f"COPY ({select}) TO '{path}' (FORMAT parquet)")


def test_parquet_with_names_and_captions(images, tmp_path):
    path = tmp_path / "c.parquet"
    write_parquet(path, "SELECT * FROM (VALUES ('1.jpg', ['A dog'], 1), ('2.jpg', ['A cat'], 2)) "
                        "AS t(file_name, captions, width)")
    captions, report = packed(images, path)
    assert captions == PAIRS
    assert report["captions"]["columns"] == {"captions": 2}
    write_parquet(path, "SELECT 1 AS a, 'x' AS b")
    with pytest.raises(FuseDiTError, match="--image-column: a, b"):
        packed(images, path)
    path.write_bytes(b"<html>")
    with pytest.raises(FuseDiTError, match="cannot read .*c.parquet: "):
        packed(images, path)


# ---- files beside the images ---------------------------------------------------------------------

@pytest.mark.parametrize("name", ["1.txt", "1.TXT", "1.caption", "1.jpg.txt", "1.jpg.caption"])
def test_caption_files_beside_the_images(images, name):
    (images / name).write_text("A dog\n")
    captions, report = packed(images)
    assert captions == {"1.jpg": "A dog"}
    assert report["other_files"] == {"caption file": dict(count=1, names=[name])}
    assert report["skipped_keys"] == {"no caption": ["2.jpg", "3.jpg"]}


def test_json_beside_the_images(images):
    (images / "1.json").write_text('{"caption": "A dog", "width": 9}')
    (images / "2.jpg.json").write_text('{"prompt": "A cat", "synthetic_caption": "Long"}')
    (images / "3.json").write_text('{"masks": []}')
    out = images.parent / "out"
    pack("folder", images, out)
    samples, _ = read_shards(out)
    texts = [{name: data for name, data in sample.items() if "caption" in name}
             for _, sample in sorted(samples.items())]
    assert texts == [{"original_caption.txt": b"A dog"},
                     {"original_caption.txt": b"A cat", "synthetic_caption.txt": b"Long"}]


def test_one_of_several_caption_files_is_used_and_the_others_are_reported(images, capsys):
    write_image(images / "1.png", 7)
    (images / "1.txt").write_text("both")
    (images / "1.png.txt").write_text("the PNG")
    (images / "2.caption").write_text("not this")
    (images / "2.txt").write_text("A cat")
    (images / "README.txt").write_text("Photos of animals.")
    captions, report = packed(images)
    assert captions == {"1.jpg": "both", "1.png": "the PNG", "2.jpg": "A cat"}
    assert places(report, "more than one") == [
        "1.png.txt, used instead of 1.txt", "2.txt, used instead of 2.caption"]
    assert places(report, "caption file without") == ["README.txt"]
    assert report["other_files"] == {
        "caption file": dict(count=3, names=["1.png.txt", "1.txt", "2.txt"]),
        ".caption": dict(count=1, names=["2.caption"]),
        ".txt": dict(count=1, names=["README.txt"])}
    err = capsys.readouterr().err
    assert "caption file without an image: 1, the first is README.txt" in err
    assert "files," not in err
    (images / "3.CAPTION").write_text("A fox")
    (images / "4.caption").write_text("A fox")
    captions, report = packed(images)
    assert captions["3.jpg"] == "A fox"
    assert report["captions"]["suffixes"] == {".txt": 3, ".caption": 1}
    assert "captions: 3 .txt files, 1 .caption files" in capsys.readouterr().err


def test_twins_in_two_unicode_forms_have_their_own_captions(images):
    for number, form in enumerate(("NFC", "NFD"), 4):
        path = images / f"{unicodedata.normalize(form, 'é')}.jpg"
        write_image(path, number)
        path.with_suffix(".txt").write_text(form)
    captions, report = packed(images)
    assert sorted(captions.values()) == ["NFC", "NFD"]
    assert captions["\xe9.jpg"] == "NFC" and not report["captions"]["notes"]


def test_caption_files_with_letters_in_another_case(images):
    write_image(images / "IMG_4.JPG", 4)
    write_image(images / "IMG_5.JPG", 5)
    (images / "img_4.txt").write_text("A dog")
    (images / "img_5.txt").write_text("A cat")
    (images / "Img_5.txt").write_text("A fox")
    captions, report = packed(images)
    assert captions == {"IMG_4.JPG": "A dog"}
    assert places(report, "caption files with letters in another case") == ["img_4.txt"]
    assert report["skipped_keys"].pop("several caption files match the name") == [
        "IMG_5.JPG (Img_5.txt, img_5.txt)"]
    assert "caption file without an image" not in report["captions"]["notes"]
    write_image(images / "img_4.jpg", 6)                   # the file is that of this image
    assert packed(images)[0] == {"img_4.jpg": "A dog"}


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", json_lines(dict(file_name=name, text=text) for name, text in PAIRS.items())),
    ("metadata.csv", "file_name,text\n1.jpg,A dog\n2.jpg,A cat\n"),
])
def test_an_imagefolder_of_the_hugging_face_hub(images, name, text):
    (images / name).write_text(text)
    captions, report = packed(images)
    assert captions == PAIRS
    assert report["other_files"] == {"caption file": dict(count=1, names=[name])}


def test_metadata_names_no_image_of_another_folder(tmp_path, capsys):
    images = tmp_path / "imgs"
    for name, number in {"1.jpg": 1, "train/2.jpg": 2, "val/3.jpg": 3, "a/4.jpg": 4}.items():
        write_image(images / name, number)
    for part, rows in {"train": {"2.jpg": "A cat", "3.jpg": "x", "1.jpg": "x"},
                       "val": {"3.jpg": "A fox", "2.jpg": "x", "imgs/train/2.jpg": "x"}}.items():
        lines = json_lines(dict(file_name=name, text=text) for name, text in rows.items())
        (images / part / "metadata.jsonl").write_text(lines)
    (images / "1.txt").write_text("A dog")                 # in folders without such a file
    (images / "a" / "4.txt").write_text("A bird")
    (images / "val" / "3.txt").write_text("not used")
    captions, report = packed(images)
    files = f"{images}/train/metadata.jsonl, {images}/val/metadata.jsonl"
    assert f"captions: from {files}\n" in capsys.readouterr().err
    assert captions == {"1.jpg": "A dog", "train/2.jpg": "A cat", "val/3.jpg": "A fox",
                        "a/4.jpg": "A bird"}
    assert report["skipped_keys"] == {
        "image not found": ["3.jpg", "1.jpg", "2.jpg", "imgs/train/2.jpg"]}
    assert report["other_files"][".txt"]["names"] == ["val/3.txt"]
    (images / "metadata.csv").write_text("file_name,text\n4.jpg,x\n1.jpg,A wolf\n")
    (images / "a" / "metadata.csv").write_text("file_name,text\n4.jpg,A bird\n")
    captions, report = packed(images)
    assert captions == {"1.jpg": "A wolf", "train/2.jpg": "A cat", "val/3.jpg": "A fox",
                        "a/4.jpg": "A bird"}


def test_metadata_in_each_part_names_the_images_beside_it(tmp_path):
    images = tmp_path / "data"
    for number, name in enumerate(["train/1.jpg", "val/1.jpg", "1.jpg", "val/2.jpg", "2.jpg"]):
        write_image(images / name, number)
    (images / "train" / "metadata.csv").write_text("file_name,text\n1.jpg,of train\n2.jpg,none\n")
    write_parquet(images / "val" / "metadata.parquet",
                  "SELECT * FROM (VALUES ('1.jpg', 'of val'), ('val/2.jpg', 'two')) "
                  "AS t(file_name, text)")
    captions, report = packed(images)
    assert captions == {"train/1.jpg": "of train", "val/1.jpg": "of val", "val/2.jpg": "two"}
    assert report["skipped_keys"] == {"image not found": ["2.jpg"],
                                      "no caption": ["1.jpg", "2.jpg"]}


# ---- several captions ----------------------------------------------------------------------------

SEVERAL = {
    "list.json": '{"1.jpg": ["A dog", "A\\n wet  dog"]}',
    "repeated.json": '{"1.jpg": "A dog", "1.jpg": "A wet dog"}',
    "c.jsonl": '{"image": "1.jpg", "captions": ["A dog", "", "A wet dog", "A dog"]}',
    "twice.jsonl": '{"image": "1.jpg", "text": "A dog", "text": "A wet dog"}\n{"image": "2.jpg"}',
    "rows.csv": "image,caption\n1.jpg,A dog\n1.jpg,A wet dog\n1.jpg,A dog\n",
    "list.csv": 'image,caption\n1.jpg,"[\'A dog\', \'A wet dog\']"\n',
    "json.csv": 'raw,filename\n"[""A dog"", ""A wet dog""]",1.jpg\n',
    "flickr.txt": "1.jpg#0\tA dog\n1.jpg#1\tA wet dog\n",
    "coco.json": json.dumps(dict(images=COCO_IMAGES, annotations=[
        dict(image_id=11, caption="A dog"), dict(image_id=11, caption="A wet dog")])),
    "karpathy.json": json.dumps(dict(images=[dict(filename="1.jpg", sentences=[
        dict(raw="A dog"), dict(raw="A wet dog")])])),
}


def test_lists_in_the_cells_of_a_table(images, tmp_path, recwarn):
    cells = {"1.jpg": r'["\ud83d\ude00"]', "2.jpg": r"['a \d']", "3.jpg": "[sic] a ['fox']"}
    rows = [f"{name}\t{cell}\n" for name, cell in cells.items()]
    (tmp_path / "c.tsv").write_text("image\tcaption\n" + "".join(rows))
    captions, _ = packed(images, tmp_path / "c.tsv")
    assert captions == {"1.jpg": "\U0001f600", "2.jpg": r"a \d", "3.jpg": "[sic] a ['fox']"}
    assert not recwarn


@pytest.mark.parametrize("name", SEVERAL)
def test_several_captions_are_the_lines_of_one_sample(images, tmp_path, name):
    (tmp_path / name).write_text(SEVERAL[name])
    captions, report = packed(images, tmp_path / name)
    assert captions == {"1.jpg": "A dog\nA wet dog"}
    assert report["several_captions"] == 1


def test_the_lines_of_a_text_file_are_several_captions(images, capsys):
    (images / "1.txt").write_text("A dog\r\n\r\n A  wet dog \r\n")
    (images / "2.txt").write_text("A cat\n")
    captions, report = packed(images)
    assert captions == {"1.jpg": "A dog\nA wet dog", "2.jpg": "A cat"}
    assert report["several_captions"] == 1
    assert ("1 images have several captions: 1.jpg; training draws one line at every visit "
            "(--caption-pick whole" in capsys.readouterr().out)


def test_a_missing_duckdb_is_one_line(images, tmp_path, monkeypatch):
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    for words in (["folder", images, tmp_path / "c.parquet"], ["parquet", tmp_path / "c.parquet"]):
        with pytest.raises(ModuleNotFoundError) as error:
            pack(*words, tmp_path / "out")
        assert explain(error.value, "") == "duckdb is not installed: pip install -e '.[data]'"

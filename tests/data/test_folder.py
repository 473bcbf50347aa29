"""prepare_data.py folder: which images are packed, with which captions, and what is reported."""
import csv
import io
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from test_prepare_data import command, pack, read_shards

from fusedit import FuseDiTError
from fusedit_lib.data import folder, items
from fusedit_lib.data.caption_files import NOT_UTF8

COLOURS = {"RGB": "orange", "L": 200, "P": 3}


def write_image(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 10), COLOURS[mode]).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Six good images in six formats, one of them in a subfolder."""
    folder = tmp_path / "photos"
    write_image(folder / "sub" / "d.gif", "P")
    for name in ("a.png", "b.jpg", "c.webp", "e.bmp", "f.JPEG"):
        write_image(folder / name)
    for path in list(folder.rglob("*.*")):
        path.with_suffix(".txt").write_text(f"an orange  {path.stem}\n")
    return folder


def original_caption(sample):
    return sample["original_caption.txt"].decode()


def captions(samples):
    return sorted(original_caption(sample) for sample in samples.values())


def test_folder_with_txt_beside_the_images(photos, tmp_path, capsys):
    pack("folder", photos, tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == [f"an orange {letter}" for letter in "abcdef"]
    assert not index["skipped"]

    by_letter = {original_caption(sample)[-1]: sample for sample in samples.values()}
    kinds = {}
    for letter, sample in by_letter.items():
        kinds[letter] = next(kind for kind in sample if "image" in kind)
    assert kinds == {"a": "image.png", "b": "image.jpg", "c": "image.webp", "d": "image.png",
                     "e": "image.png", "f": "image.jpg"}
    assert by_letter["b"]["image.jpg"] == (photos / "b.jpg").read_bytes()
    assert "6 images in 1 shards" in capsys.readouterr().out


def test_folder_skips_and_counts_broken_inputs(photos, tmp_path):
    (photos / "a.txt").unlink()
    (photos / "b.txt").write_text(" \n")
    (photos / "c.txt").write_bytes("né".encode("latin-1"))
    for number in range(7):                 # one file that is not an image and six truncated ones
        path = photos / f"bad{number}.png"
        path.write_bytes((photos / "a.png").read_bytes()[:50])
        path.with_suffix(".txt").write_text("broken")
    (photos / "bad0.png").write_text("this is not an image")

    out, err = command("folder", photos, tmp_path / "out", "--shard-size", 4, "--workers", 2)
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == ["an orange d", "an orange e", "an orange f"]
    assert index["skipped"] == {"damaged or cut short": 6, "no caption": 2, "not an image": 1,
                                NOT_UTF8: 1}
    assert "skipped 6: damaged or cut short: " in err and "and 1 more" in err
    assert "skipped 2: no caption: a.png, b.jpg" in err
    assert "not UTF-8 (text from Windows: iconv -f WINDOWS-1252 -t UTF-8): c.txt" in err
    assert "3 images" in out


ROWS = [("a.png", "one"), ("./b.jpg", "two"), ("c", "three"), ("sub/d.gif", "four")]


def write_captions(path, rows):
    """Write (image, caption) rows in one of the formats that `folder` reads."""
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    elif path.name == "map.json":
        path.write_text(json.dumps(dict(rows)))
    elif path.suffix == ".json":
        entries = [dict(file_name=image, text=[caption]) for image, caption in rows]
        path.write_text(json.dumps(entries))
    else:
        lines = [json.dumps(dict(image=image, caption=caption)) for image, caption in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["map.json", "list.json", "c.jsonl", "c.csv"])
def test_folder_with_a_file_of_captions(photos, tmp_path, name, capsys):
    rows = [*ROWS, ("nowhere.png", "five"), ("e.bmp", "")]
    pack("folder", photos, write_captions(tmp_path / name, rows), tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == sorted(caption for _, caption in ROWS)
    assert index["skipped"] == {"no caption": 2, "image not found": 1}
    err = capsys.readouterr().err
    assert "nowhere.png" in err and "e.bmp" in err and "f.JPEG" in err


def caption_texts(sample):
    return sorted((kind, text.decode()) for kind, text in sample.items() if "caption" in kind)


def test_both_captions_broken_lines_and_odd_rows(photos, tmp_path):
    lines = [
        json.dumps(dict(image="a.png", caption="short", synthetic_caption="long")),
        json.dumps(dict(image="b.jpg", synthetic_caption="only long")),
        "{broken",
        "",
        json.dumps(["not", "a", "row"]),
        json.dumps(dict(image="b.jpg", caption="second")),
        json.dumps(dict(caption="of nothing")),
        json.dumps(dict(image="c.webp", caption=5)),
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    pack("folder", photos, tmp_path / "c.jsonl", tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert sorted(caption_texts(sample) for sample in samples.values()) == [
        [("original_caption.txt", "second"), ("synthetic_caption.txt", "only long")],
        [("original_caption.txt", "short"), ("synthetic_caption.txt", "long")]]
    counts = {reason.split(" (")[0]: count for reason, count in index["skipped"].items()}
    assert counts == {"not JSON": 1, "no image name": 2, "no caption": 4}


def test_half_an_emoji_in_a_caption_is_skipped_and_counted(photos, tmp_path):
    rows = [dict(image="a.png", caption="\ud83d"), dict(image="b.jpg", caption="\U0001f600")]
    (tmp_path / "c.json").write_text(json.dumps(rows))     # written as escapes: valid JSON
    pack("folder", photos, tmp_path / "c.json", tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert captions(samples) == ["\U0001f600"]
    assert index["skipped"]["caption is not Unicode"] == 1


def test_the_seed_determines_the_shuffled_order(photos, tmp_path):
    for number in range(30):
        name = f"n{number:02}"
        write_image(photos / f"{name}.png").with_suffix(".txt").write_text(name)
    orders = []
    for k, seed in enumerate((0, 0, 1)):
        pack("folder", photos, tmp_path / f"out{k}", "--seed", seed)
        samples, _ = read_shards(tmp_path / f"out{k}")
        orders.append([original_caption(sample) for sample in samples.values()])
    first, same_seed, other_seed = orders
    assert first == same_seed != other_seed
    assert sorted(first) == sorted(other_seed)
    assert first != sorted(first)


def test_the_settings_of_a_run_keep_their_names(tmp_path, photos):
    """A run started by an earlier version is resumed only if it wrote the same settings."""
    pack("shapes", tmp_path / "shapes", "-n", 3)
    _, report = read_shards(tmp_path / "shapes")
    assert report["settings"] == dict(command="shapes", n=3, image_size=32, seed=0, shard_size=2000)
    pack("folder", photos, tmp_path / "folder", "--overwrite")
    settings = read_shards(tmp_path / "folder")[1]["settings"]
    assert settings.pop("items") == "59bc5946b234d6e188560b09335dfd51b668356b"
    assert settings == dict(command="folder", images=str(photos), captions=None, size=0, quality=95,
                            min_size=1, max_aspect=1000, seed=0, shard_size=2000)
    pack("folder", photos, tmp_path / "folder", "--overwrite", "--resize", "bilinear")
    assert read_shards(tmp_path / "folder")[1]["settings"]["resize"] == "bilinear"


@pytest.mark.parametrize("words, message", [
    (["{}/none", "{}/out"], "no such file or folder"),
    (["{}/photos", "{}/none.csv", "{}/out"], "none.csv"),
    (["{}/photos", "{}/broken.json", "{}/out"], "cannot read .*broken.json as JSON"),
    (["{}/photos", "{}/latin.csv", "{}/out"], "cannot read .*latin.csv as CSV in UTF-8"),
    (["{}/photos", "{}/c.yaml", "{}/out"], "must be a .csv, .tsv, .txt, .json"),
    (["{}/empty", "{}/out"], "no images in"),
    (["{}/photos", "{}/empty", "{}/out"], "all 6 inputs were skipped"),
])
def test_unusable_input_is_reported_in_one_message(photos, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"a.png": "one"')
    (tmp_path / "latin.csv").write_bytes("image,caption\na.png,né\n".encode("latin-1"))
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(FuseDiTError, match=message):
        pack("folder", *[word.format(tmp_path) for word in words])
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())




# ---- every file in the report --------------------------------------------------------------------

def test_every_file_in_the_folder_is_in_the_report(photos, tmp_path, capsys):
    (photos / "sub" / "clip.MP4").write_bytes(b"x")
    (photos / "LICENSE").write_text("x")
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / ".cache").mkdir()
    write_image(photos / ".cache" / "hidden.png")
    (photos / "masks").mkdir()
    for number in range(3):
        (photos / "masks" / f"{number}.json").write_text("{}")
    (photos / "sub" / "back").symlink_to(photos)
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "gone.txt").write_text("a broken link")
    (photos / "gone.mp4").symlink_to(tmp_path / "nowhere")
    (photos / "self.png").symlink_to(photos / "self.png")
    os.mkfifo(photos / "pipe.png")          # to open it would wait for ever
    pack("folder", photos, tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert len(samples) == 6
    assert report["skipped_keys"] == {"no caption": ["self.png"], "broken link": ["gone.png"]}
    others = {kind: found["names"] for kind, found in report["other_files"].items()}
    captions = others.pop("caption file")
    assert captions == ["a.txt", "b.txt", "c.txt", "e.txt", "f.txt", "gone.txt", "sub/d.txt"]
    assert others == {
        ".json": ["masks/0.json", "masks/1.json", "masks/2.json"], ".mp4": ["sub/clip.MP4"],
        "no suffix": ["LICENSE"], "hidden file": [".DS_Store"], "hidden folder": [".cache"],
        "link to a folder above it": ["sub/back"], "broken link": ["gone.mp4"],
        "neither file nor folder": ["pipe.png"]}
    counts = {kind: found["count"] for kind, found in report["other_files"].items()}
    assert counts["caption file"] == 7 and counts[".json"] == 3
    assert "other files in IMAGES, not packed: 3 .json, 1 .mp4" in capsys.readouterr().err


def test_many_files_of_a_kind_are_counted(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "NAMES_LISTED", 2)
    for number in range(3):
        (photos / f"{number}.json").write_text("{}")
    pack("folder", photos, tmp_path / "out")
    _, report = read_shards(tmp_path / "out")
    assert report["other_files"][".json"] == dict(count=3, names=["0.json", "1.json"])


def test_a_folder_that_cannot_be_read_is_reported(photos, tmp_path, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(items.os, "scandir", refuse)
    pack("folder", photos, tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert len(samples) == 5
    assert report["skipped_keys"] == {"folder cannot be read: Permission denied": ["sub"]}
    assert "skipped 1: folder cannot be read: Permission denied: sub" in capsys.readouterr().err
    with pytest.raises(FuseDiTError, match="folder cannot be read: Permission denied: .*sub"):
        list(items.list_images(photos, Counter()))


def test_an_image_that_a_caption_names_is_packed_whatever_its_suffix(photos, tmp_path):
    (photos / "1f3a").write_bytes((photos / "a.png").read_bytes())
    (photos / ".b.jpg").write_bytes((photos / "b.jpg").read_bytes())
    rows = [("1f3a", "one"), (".b.jpg", "two"), ("a.txt", "three")]
    pack("folder", photos, write_captions(tmp_path / "c.csv", rows), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert captions(samples) == ["one", "two"]
    assert report["skipped_keys"]["not an image"] == ["a.txt"]
    assert "no suffix" not in report["other_files"]
    assert "hidden file" not in report["other_files"]


# ---- names ---------------------------------------------------------------------------------------

def test_names_of_other_machines_and_systems(photos, tmp_path, capsys):
    write_image(photos / unicodedata.normalize("NFD", "né.png"))
    rows = {r"C:\data\photos\a.png": "one", r"C:\data\photos\sub\d.gif": "two", "né.png": "three"}
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pack("folder", photos, tmp_path / "c.json", tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert captions(samples) == ["one", "three", "two"]
    assert report["skipped"] == {"no caption": 4}
    note = f"C:/data/photos taken as {photos}"
    assert report["captions"]["notes"][note]["count"] == 2
    assert f"captions: {note}: 2, the first is C:\\data\\photos" in capsys.readouterr().err


def test_image_root_is_a_setting_of_the_run(photos, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"/mnt/x/a.png": "one", "/mnt/x/sub/d": "two"}))
    words = ["folder", photos, tmp_path / "c.json", tmp_path / "out"]
    message = "none of 2 rows .*'/mnt/x/a.png'.*add --image-root /mnt/x"
    with pytest.raises(FuseDiTError, match=message):
        pack(*words)
    pack(*words, "--image-root", "/mnt/x")
    samples, report = read_shards(tmp_path / "out")
    assert captions(samples) == ["one", "two"]
    assert report["settings"]["image_root"] == ["/mnt/x"]
    with pytest.raises(FuseDiTError, match="no name in CAPTIONS begins with --image-root /mnt/y"):
        pack(*words, "--image-root", "/mnt/x", "--image-root", "/mnt/y", "--overwrite")


def test_the_folder_that_names_are_relative_to_is_suggested(photos, tmp_path):
    write_image(photos / "sub" / "cats" / "1.jpg")
    (tmp_path / "c.json").write_text(json.dumps({"cats/1.jpg": "one"}))
    with pytest.raises(FuseDiTError, match=f"; give {photos}/sub as IMAGES"):
        pack("folder", photos, tmp_path / "c.json", tmp_path / "out")


def test_two_images_of_one_stem_are_ambiguous(photos, tmp_path):
    write_image(photos / "a.jpg")
    rows = [("a", "one"), ("b", "two"), ("a.jpg", "three")]
    pack("folder", photos, write_captions(tmp_path / "c.csv", rows), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert captions(samples) == ["three", "two"]
    assert report["skipped_keys"]["several images match the name"] == ["a (a.jpg, a.png)"]


def test_control_characters_of_names_are_printed_as_escapes(photos, tmp_path, capsys):
    lines = [r'{"image": "sub\box.jpg", "caption": "x"}', r'{"image": "sub\d.gif", "caption": "x"}',
             '{"image": "a.png", "caption": "one"}', '{"image": "a.png", "cap']
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (photos / "b\x1b[2J.txt").write_text("no image's")
    pack("folder", photos, tmp_path / "c.jsonl", tmp_path / "out")
    err = capsys.readouterr().err
    assert r"a control character (JSON spells a backslash \\): sub\x08ox.jpg" in err
    assert r"not JSON (Invalid \escape, a backslash is spelt \\): line 2" in err
    assert "not JSON (Unterminated string starting at): line 4" in err
    pack("folder", photos, tmp_path / "beside")
    err = capsys.readouterr().err
    assert r"caption file without an image: 1, the first is b\x1b[2J.txt" in err
    assert "\x1b" not in err


def test_a_folder_typed_in_the_other_unicode_form_is_found(photos, tmp_path):
    composed = "Archives été"
    decomposed = unicodedata.normalize("NFD", composed)
    photos.rename(tmp_path / decomposed)
    write_captions(tmp_path / "légendes.csv", ROWS)
    names = tmp_path / composed / "sub", tmp_path / unicodedata.normalize("NFD", "légendes.csv")
    (tmp_path / decomposed / "sub").mkdir(exist_ok=True)
    pack("folder", tmp_path / composed, names[1], tmp_path / "out")
    assert len(read_shards(tmp_path / "out")[0]) == 4
    pack("folder", names[0], tmp_path / "sub")
    assert len(read_shards(tmp_path / "sub")[0]) == 1
    with pytest.raises(FuseDiTError, match="no such file or folder: .*/Été/x"):
        pack("folder", tmp_path / "Été" / "x", tmp_path / "none")


def test_a_caption_file_in_the_folder_is_suggested(photos, tmp_path, capsys):
    for path in list(photos.rglob("*.txt")):
        path.unlink()
    write_captions(photos / "captions.csv", ROWS)
    with pytest.raises(FuseDiTError, match="all 6 inputs were skipped"):
        pack("folder", photos, tmp_path / "out")
    assert "if captions.csv holds the captions, give it as CAPTIONS" in capsys.readouterr().err
    pack("folder", photos, photos / "captions.csv", tmp_path / "out")
    assert len(read_shards(tmp_path / "out")[0]) == 4


def test_flags_may_stand_before_out(photos, tmp_path):
    captions_file = write_captions(tmp_path / "c.csv", ROWS)
    pack("folder", photos, captions_file, "--seed", 3, tmp_path / "out")
    assert read_shards(tmp_path / "out")[1]["settings"]["seed"] == 3
    pack("folder", photos, "--seed", 4, tmp_path / "beside")
    assert read_shards(tmp_path / "beside")[1]["settings"]["seed"] == 4
    for words in (["--sed", 3], ["--sed"], ["out", "more"]):
        with pytest.raises(SystemExit):
            pack("folder", photos, captions_file, tmp_path / "new", *words)
    assert not (tmp_path / "new").exists()


def test_images_in_parquet_are_sent_to_the_other_command(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train.parquet"
    path.write_bytes(b"PAR1")
    for images in (path, path.parent):
        with pytest.raises(FuseDiTError, match="prepare_data.py parquet"):
            pack("folder", images, tmp_path / "out")

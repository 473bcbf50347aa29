"""The filters of prepare_data.py: the lengths of captions, and images with the same pixels."""
import io
import json
from typing import NamedTuple

import numpy as np
import pytest
from layouts import (
    EVERY,
    cc12m,
    emoji_packages,
    jpeg,
    journeydb,
    photo_folder,
    sa1b,
    saved,
    scene,
    write_file,
    write_json_lines,
)
from PIL import Image
from test_datasets import (
    emoji_command,
    folder_command,
    journeydb_command,
    kill,
    sa1b_command,
    text_of,
)
from test_download import KILLED, status_of_child
from test_prepare_data import files, pack, read_shards

import prepare_data
from fusedit_lib.data import images, packing
from fusedit_lib.data.filters import PackedImage, find_duplicates, pixel_hash, write_images

DUPLICATE = "same pixels as another image"


# ---- captions ------------------------------------------------------------------------------------

def photo(folder, name, text="a photo", image=None, save=jpeg):
    """Write an image, by default one of its own, and its caption."""
    if image is None:
        image = scene(sum(name.encode()))
    write_file(folder / name, save(image))
    write_file((folder / name).with_suffix(".txt"), text)


@pytest.mark.parametrize("flags, reason, kept", [
    (["--min-words", 3], "no caption of at least 3 words", "cde"),
    (["--max-words", 4], "no caption of at most 4 words", "abcd"),
    (["--min-words", 2, "--max-words", 4], "no caption of 2 to 4 words", "bcd"),
    (["--min-words", 0, "--max-words", 0], None, "abcde")])
def test_images_without_a_caption_of_the_right_length_are_skipped(tmp_path, flags, reason, kept):
    for count, name in enumerate("abcde", 1):
        photo(tmp_path / "in", f"{name}.jpg", "  ".join(["word"] * count) + "\n")
    pack("folder", tmp_path / "in", tmp_path / "out", *flags)
    samples, report = read_shards(tmp_path / "out")
    lengths = sorted(len(text_of(sample, "original").split()) for sample in samples.values())
    assert lengths == [1 + "abcde".index(name) for name in kept]
    lost = sorted(f"{name}.jpg" for name in set("abcde") - set(kept))
    assert sorted(report["skipped_keys"].get(reason, ())) == lost
    assert report["inputs"] == 5 and report["notes"] == {}


def test_a_caption_of_another_length_is_left_out_and_the_image_kept(tmp_path, capsys):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        photo(tmp_path / "in", name)
    photo(tmp_path / "in", "d.jpg", image=scene(sum(b"a.jpg")))
    write_json_lines(tmp_path / "rows.jsonl", [
        dict(image="a.jpg", caption="short", synthetic_caption="one of four words"),
        dict(image="b.jpg", caption="one of four words", synthetic_caption="one of as many as six"),
        dict(image="c.jpg", caption="short", synthetic_caption="one of as many as six"),
        dict(image="d.jpg", caption="the pixels of another")])
    pack("folder", tmp_path / "in", tmp_path / "rows.jsonl", tmp_path / "out",
         "--min-words", 2, "--max-words", 5, "--skip-duplicates")
    samples, report = read_shards(tmp_path / "out")
    captions = [kind for key in sorted(samples) for kind in samples[key] if "caption" in kind]
    assert captions == ["synthetic_caption.txt", "original_caption.txt"]
    few = "caption of fewer than 2 words left out"
    many = "caption of more than 5 words left out"
    assert report["notes"] == {few: 1, many: 1}
    assert report["note_keys"] == {few: ["a.jpg"], many: ["b.jpg"]}
    assert report["skipped_keys"] == {"no caption of 2 to 5 words": ["c.jpg"],
                                      DUPLICATE: ["d.jpg = a.jpg"]}
    assert f"noted 1: {few}: a.jpg\n" in capsys.readouterr().err


def test_each_of_several_captions_is_kept_or_left_out(tmp_path):
    """An image that is a duplicate is not counted among those with several captions."""
    image = scene(7)
    lines = ["short", "only two", "one of as many as six", "three of them"]
    photo(tmp_path / "in", "a.jpg", "\n".join(lines), image)
    photo(tmp_path / "in", "b.jpg", "short\nonly two\n")
    photo(tmp_path / "in", "c.jpg", "short\nonly two\nthree of them\n", image)
    pack("folder", tmp_path / "in", tmp_path / "out", "--min-words", 2, "--max-words", 5,
         "--skip-duplicates")
    samples, report = read_shards(tmp_path / "out")
    assert sorted(text_of(sample, "original") for sample in samples.values()) == [
        "only two", "only two\nthree of them"]
    assert report["skipped_keys"] == {DUPLICATE: ["c.jpg = a.jpg"]}
    assert report["several_captions"] == 1
    keys = {kind: sorted(names) for kind, names in report["note_keys"].items()}
    assert keys == {"caption of fewer than 2 words left out": ["a.jpg", "b.jpg"],
                    "caption of more than 5 words left out": ["a.jpg"]}


def test_the_alt_text_of_cc12m_does_not_replace_a_caption_that_is_too_long(tmp_path):
    plain = cc12m(tmp_path, EVERY).plain
    captions = [(plain[1], "one of as many as six"), (plain[2], "one of four words")]
    write_json_lines(tmp_path / "rows.jsonl", [
        dict(key=f"{number:09d}", caption_llava=caption) for number, caption in captions])
    pack("cc12m", tmp_path / "cc12m-wds", tmp_path / "rows.jsonl", tmp_path / "out",
         "--max-words", 5)
    samples, report = read_shards(tmp_path / "out")
    assert list(samples) == [f"{plain[2]:09d}"]
    assert text_of(samples[f"{plain[2]:09d}"], "original") == f"alt text of {plain[2]}"
    assert report["skipped_keys"]["no caption of at most 5 words"] == [f"{plain[1]:09d}"]


@pytest.mark.parametrize("words", [
    "emoji out", "folder in out", "parquet in out", "cc12m in text out", "sa1b in text out",
    "journeydb text in out"])
def test_every_command_that_packs_images_has_the_filters(words):
    flags = ["--min-words", "3", "--max-words", "9", "--skip-duplicates", "--min-size", "5"]
    rules = images.image_rules(prepare_data.parse_args([*words.split(), *flags]))
    assert rules[-3:] == (3, 9, True) and rules.min_size == 5
    rules = images.image_rules(prepare_data.parse_args(words.split()))
    assert rules[-3:] == (0, 0, False)


def test_limits_that_exclude_every_caption_are_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        pack("folder", "in", "out", "--min-words", 5, "--max-words", 4)
    assert "argument --max-words: must not be below --min-words" in capsys.readouterr().err


# ---- pixels --------------------------------------------------------------------------------------

def test_images_are_the_same_if_they_look_the_same_in_training():
    """The format, the metadata, the orientation flag, alpha and grey make no difference."""
    image = scene(1)
    exif = Image.Exif()
    exif[0x0112] = 6                        # rotate by 90 degrees clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    compressed = jpeg(image)
    decoded = Image.open(io.BytesIO(compressed))
    clear = image.convert("RGBA")
    clear.paste((255, 255, 255, 0), (0, 0, 8, 8))
    white = image.copy()
    white.paste("white", (0, 0, 8, 8))
    grey = image.convert("L")
    for one, other in [
        (saved(image, "PNG"), saved(image, "BMP")),
        (saved(image, "PNG"), saved(image, "WEBP", lossless=True)),
        (saved(image, "PNG"), saved(turned, "PNG", exif=exif)),
        (compressed, saved(decoded, "TIFF")),
        (compressed, jpeg(image, comment=b"of another program")),
        (saved(clear, "PNG"), saved(white, "PNG")),
        (saved(grey, "PNG"), saved(grey.convert("RGB"), "PNG")),
    ]:
        assert pixel_hash(one) == pixel_hash(other) < 2**64


def test_one_bit_and_the_shape_make_an_image_another():
    image = scene(1)
    changed = np.asarray(image).copy()
    changed[40, 50, 2] ^= 1
    hashes = {pixel_hash(saved(one, "PNG")) for one in (
        image, Image.fromarray(changed), image.transpose(Image.Transpose.ROTATE_180),
        Image.new("RGB", (20, 10)), Image.new("RGB", (10, 20)))}
    assert len(hashes) == 5


def test_the_first_input_of_the_same_pixels_is_kept(tmp_path):
    """Inputs are numbered where they are shuffled; otherwise the shards are in order."""
    shards = {
        "s0": [("b", 7, 0), ("c", 8, 0), ("B", 7, 0)],
        "s1": [],
        "s2": [("d", 2**64 - 1, 0), ("C", 8, 0), ("BB", 7, 0)],
        "s3": [("D", 2**64 - 1, 0), ("e", 2**64 - 2, 0)],
    }
    for name, shard in shards.items():
        write_images([PackedImage(*fields) for fields in shard], tmp_path / name)
    duplicates = find_duplicates([tmp_path / name for name in shards])
    assert duplicates == [{2: "B = b"}, {}, {1: "C = c", 2: "BB = b"}, {0: "D = d"}]

    write_images([PackedImage("late", 7, 5), PackedImage("early", 7, 2)], tmp_path / "s0")
    write_images([PackedImage("first", 7, 1)], tmp_path / "s1")
    duplicates = find_duplicates([tmp_path / "s0", tmp_path / "s1"])
    assert duplicates == [{0: "late = first", 1: "early = first"}, {}]


# ---- duplicates ----------------------------------------------------------------------------------

def sa1b_folder(folder, copies):
    """A folder of images for `sa1b`: 12 of their own, and {name: (number, caption)} copies.

    A copy is a PNG, whose pixels are those of a JPEG.
    """
    for number in range(0, 120, 10):
        name = f"sa_{number:03d}"
        write_file(folder / "images" / f"{name}.jpg", jpeg(scene(number)))
        write_file(folder / "captions" / f"{name}.txt", f"scene {number}")
    for name, (number, caption) in copies.items():
        pixels = Image.open(io.BytesIO(jpeg(scene(number))))
        write_file(folder / "images" / f"{name}.png", saved(pixels, "PNG"))
        write_file(folder / "captions" / f"{name}.txt", caption)


COPIES = {"sa_015": (10, "a later one"), "sa_016": (10, "and another"), "sa_085": (0, "far away"),
          "sa_115": (110, "the last")}


def pack_sa1b(folder, out, *flags):
    pack("sa1b", folder / "images", folder / "captions", out, "--size", 0, *flags)


def test_the_shards_are_those_of_a_folder_without_the_duplicates(tmp_path, capsys):
    sa1b_folder(tmp_path / "with", COPIES)
    sa1b_folder(tmp_path / "without", {})
    pack_sa1b(tmp_path / "with", tmp_path / "out", "--skip-duplicates")
    pack_sa1b(tmp_path / "without", tmp_path / "expected")
    got = files(tmp_path / "out")
    expected = files(tmp_path / "expected")
    for name in ("sa1b-000000.tar", "index.json", "offsets.npy"):
        assert got[name] == expected[name]
    _, report = read_shards(tmp_path / "out")
    assert report["inputs"] == 16 and report["skipped"] == {DUPLICATE: 4}
    names = ["sa_015.png = sa_010.jpg", "sa_016.png = sa_010.jpg", "sa_085.png = sa_000.jpg",
             "sa_115.png = sa_110.jpg"]
    assert report["skipped_keys"][DUPLICATE] == names
    assert report["settings"]["skip_duplicates"] is True
    assert f"skipped 4: {DUPLICATE}: sa_015.png = sa_010.jpg, sa_016" in capsys.readouterr().err

    pack_sa1b(tmp_path / "with", tmp_path / "all")         # without the flag, nothing is skipped
    assert read_shards(tmp_path / "all")[1]["outputs"] == 16


def test_a_shard_of_duplicates_only_is_not_written(tmp_path):
    sa1b_folder(tmp_path, COPIES)
    pack_sa1b(tmp_path, tmp_path / "out", "--skip-duplicates", "--shard-size", 1)
    samples, report = read_shards(tmp_path / "out")
    assert len(samples) == len(report["shards"]) == 12
    assert [shard["name"] for shard in report["shards"]][:3] == [
        "sa1b-000000.tar", "sa1b-000001.tar", "sa1b-000004.tar"]


def test_an_image_that_is_skipped_itself_has_no_duplicates(tmp_path):
    sa1b_folder(tmp_path, COPIES)
    (tmp_path / "captions" / "sa_000.txt").unlink()
    (tmp_path / "captions" / "sa_010.txt").write_text("scene")
    pack_sa1b(tmp_path, tmp_path / "out", "--skip-duplicates", "--min-words", 2)
    _, report = read_shards(tmp_path / "out")
    assert report["skipped_keys"] == {
        DUPLICATE: ["sa_016.png = sa_015.png", "sa_115.png = sa_110.jpg"],
        "no caption": ["sa_000.jpg"], "no caption of at least 2 words": ["sa_010.jpg"]}


def test_the_seed_does_not_change_which_image_is_kept(tmp_path):
    for name in "abcdefgh":
        photo(tmp_path / "in", f"{name}.png", name, scene(len("ab" if name < "e" else "c")),
              lambda image: saved(image, "PNG"))
    for seed in range(3):
        pack("folder", tmp_path / "in", tmp_path / f"out{seed}", "--seed", seed, "--shard-size", 3,
             "--skip-duplicates", "--workers", 1 + seed)
        samples, report = read_shards(tmp_path / f"out{seed}")
        assert sorted(text_of(sample, "original") for sample in samples.values()) == ["a", "e"]
        assert sorted(report["skipped_keys"][DUPLICATE]) == [
            f"{name}.png = {'a' if name < 'e' else 'e'}.png" for name in "bcdfgh"]


# ---- restarts ------------------------------------------------------------------------------------

def test_a_run_of_an_earlier_version_is_resumed(tmp_path, monkeypatch):
    """Its records have no notes, and its settings none of the new flags."""
    sa1b_folder(tmp_path, {})
    words = ["sa1b", tmp_path / "images", tmp_path / "captions", "--shard-size", 5]
    pack(*words, tmp_path / "whole")

    def full_disk(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(packing, "finish", full_disk)
    with pytest.raises(OSError):
        pack(*words, tmp_path / "out")
    monkeypatch.undo()
    progress = tmp_path / "out" / ".progress"
    assert set(json.loads((progress / "settings.json").read_text())) == {
        "command", "images", "captions", "key_column", "caption_column", "size", "quality",
        "min_size", "max_aspect", "shard_size", "folders"}
    for path in progress.glob("sa1b-*.json"):
        record = json.loads(path.read_text())
        del record["notes"]
        path.write_text(json.dumps(record))
    pack(*words, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def small_command(folder):
    """Packs three shards, whose size shows nothing: 10240 bytes with and without duplicates.

    The first of two images in the second shard is a duplicate, and both in the third.
    """
    for name, number in (("a", 1), ("b", 2), ("c", 2), ("d", 3), ("e", 1), ("f", 3)):
        photo(folder, f"{name}.jpg", image=scene(number))
    return ["sa1b", folder, folder, "--size", 0, "--shard-size", 2, "--skip-duplicates",
            "--workers", 1]


def test_a_run_that_ends_while_duplicates_are_left_out_is_resumed(tmp_path, monkeypatch):
    """The disk is full when the second shard has its new tar but not yet its new record."""
    words = small_command(tmp_path / "photos")
    pack(*words, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    assert list(read_shards(tmp_path / "whole")[0]) == ["a", "b", "d"]
    assert {len(tar) for name, tar in expected.items() if name.endswith(".tar")} == {10240}

    write_record = packing.write_record

    def full_disk(shard, **entries):
        if "without_duplicates" in entries:
            raise OSError(28, "No space left on device")
        write_record(shard, **entries)
    monkeypatch.setattr(packing, "write_record", full_disk)
    with pytest.raises(OSError):
        pack(*words, tmp_path / "out")
    monkeypatch.undo()
    assert files(tmp_path / "out")["sa1b-000001.tar"] == expected["sa1b-000001.tar"]
    pack(*words, tmp_path / "out")
    assert files(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_kill_before_any_step_does_not_change_the_bytes(tmp_path):
    words = small_command(tmp_path / "photos")
    pack(*words, tmp_path / "whole")
    k = 0
    status = KILLED
    while status == KILLED:
        k += 1
        out = tmp_path / f"out{k}"
        status = status_of_child(k, out, [*words, out])
        pack(*words, out)
        assert files(out) == files(tmp_path / "whole"), k
    assert status == 0 and k > 80


class Messy(NamedTuple):
    """A command with a data set that is given duplicates, and how long one run may take."""
    build: object                           # build(folder) writes the data set
    command: object                         # command(folder) -> its words, without OUT
    images: str                             # pattern of the image files
    longest: float                          # maximum seconds until a kill


MESSY = {"sa1b": Messy(sa1b, sa1b_command, "images/*/*", 0.3),
         "journeydb": Messy(journeydb, journeydb_command, "imgs/*/*", 0.3),
         "folder": Messy(photo_folder, folder_command, "photos/*.jpg", 0.4),
         "emoji": Messy(emoji_packages, emoji_command, "packages/*e*/*.*p*", 0.12)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESSY)
def test_kills_do_not_change_which_duplicates_are_left_out(tmp_path, name):
    """With 1 and 4 workers; every third image file becomes a copy of the one before."""
    case = MESSY[name]
    case.build(tmp_path)
    paths = sorted(tmp_path.glob(case.images))
    for k in range(1, len(paths), 3):
        paths[k].write_bytes(paths[k - 1].read_bytes())
    words = [*case.command(tmp_path), "--skip-duplicates", "--min-words", 2]
    pack(*words, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    report = json.loads(next((tmp_path / "whole").rglob("report.json")).read_text())
    for workers in (1, 4):
        pack(*words, tmp_path / f"out{workers}", "--workers", workers)
        assert files(tmp_path / f"out{workers}") == expected
        kill([*words, tmp_path / f"killed{workers}", "--workers", workers], case.longest)
        assert files(tmp_path / f"killed{workers}") == expected
    assert report["skipped"][DUPLICATE] > 5

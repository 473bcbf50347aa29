"""Shards made by others: img2dataset's and cc12m-wds's names, dotted keys, several captions."""
import io
import json
import random
import tarfile
from collections import Counter

import pytest
import torch
from conftest import REFERENCE
from PIL import Image, ImageFont
from safetensors.torch import load_file
from test_prepare_data import command, pack
from tiny_shards import COLOURS, add_file, in_turn, png, tiny_batches, write_shard

from fusedit import FuseDiTError
from fusedit_lib.data.cc12m import TarItems
from fusedit_lib.data.check import wrap_to_width
from fusedit_lib.data.images import Skip
from fusedit_lib.data.layout import LayoutError, find_captions, find_image, pick_caption
from fusedit_lib.data.shards import (
    ShardReader,
    can_read_latents,
    expand_shards,
    read_index,
    read_sample,
    sample_offsets,
)
from fusedit_lib.train.config import RunConfig
from fusedit_lib.train.flags import parse_run

VAE = REFERENCE / "released_layout" / "pipeline" / "vae"


@pytest.fixture(autouse=True)
def empty_index_cache():
    read_index.cache_clear()


# ------------------------------------------------------------------------------ the rule

@pytest.mark.parametrize("names, key, image", [
    ("json jpg txt", "", "jpg"),
    ("png jpg txt", "", "jpg"),             # in the order of layout.IMAGES
    ("jpg image.webp txt", "", "image.webp"),
    ("image.caption.txt image.json image.png", "", "image.png"),
    ("image.caption.txt jpg", "", "jpg"),
    ("txt webp png", "", "png"),
    ("tif txt", "", "tif"),
    ("json 0001.png txt", "", "0001.png"),
    ("mask.png jpg", "", "jpg"),
    ("mask.png jpg", "mask.png", "mask.png"),
    ("mask.png jpg", ".JPG", "jpg"),
    ("a.jpg b.jpg txt", "", "several images (a.jpg, b.jpg)"),
    ("a.jpg b.jpg txt", "b.jpg", "b.jpg"),
    ("jpg txt", "png", "no image (it has jpg, txt)"),
    ("txt json", "", "no image (it has txt, json)"),
])
def test_the_image_of_a_sample(names, key, image):
    files = dict.fromkeys(names.split(), b"x")
    try:
        found = find_image(files, key)
    except LayoutError as e:
        found = str(e)
    assert found == image


@pytest.mark.parametrize("files, key, captions", [
    (dict(txt="a cat\n", json='{"caption": "a dog"}'), "", {"txt": "a cat"}),
    ({"txt": "a", "synthetic_caption.txt": "b"}, "", {"synthetic_caption.txt": "b"}),
    ({"original_caption.txt": "o", "synthetic_caption.txt": "s"}, "",
     {"synthetic_caption.txt": "s", "original_caption.txt": "o"}),
    ({"caption": "a", "text": "b"}, "", {"caption": "a"}),
    ({"prompt.txt": "a"}, "", {"prompt.txt": "a"}),
    ({"0001.txt": "a"}, "", {"0001.txt": "a"}),
    ({"0.txt": "a", "1.txt": "b"}, "", "several caption files (0.txt, 1.txt)"),
    (dict(json='{"url": "u", "text": " a\\n cat"}'), "", {"field text of json": "a cat"}),
    (dict(json='{"captions": ["a\\nb", " ", "c"]}'), "", {"field captions of json": "a b\nc"}),
    (dict(txt="a\nb", json='{"caption": "a\\nb"}'), "", {"txt": "a b"}),       # img2dataset's
    (dict(txt="a\nb", json='{"captions": ["a", "b"]}'), "", {"txt": "a\nb"}),
    (dict(txt="a\nb", json="{"), "", {"txt": "a\nb"}),
    (dict(json='{"caption": "c", "synthetic_caption": "s"}'), "",
     {"field synthetic_caption of json": "s"}),
    (dict(json="[" * 100_000), "", "KEY.json is not JSON (json)"),
    (dict(txt=" \n", json='{"caption": "a dog"}'), "", {"field caption of json": "a dog"}),
    (dict(txt="", json='{"caption": null}'), "", "blank caption (txt)"),
    (dict(txt="a", style="b"), "style", {"style": "b"}),
    (dict(txt="a", json='{"style": "b"}'), "style", {"field style of json": "b"}),
    (dict(txt="a", json='{"url": "u", "width": 1}'), "style",
     "no caption (it has txt, json; text fields of json: url)"),
    (dict(json="[1]"), "", "no caption (it has json)"),
    (dict(json="{"), "", "KEY.json is not JSON (json)"),
    (dict(txt=b"\xef\xbb\xbfa cat"), "", {"txt": "a cat"}),
    (dict(txt=b"\xff\xfe"), "", "caption is not UTF-8 (txt)"),
])
def test_the_captions_of_a_sample(files, key, captions):
    content = {}
    for name, text in files.items():
        content[name] = text if isinstance(text, bytes) else text.encode()
    try:
        found = find_captions(content, key)
    except LayoutError as e:
        found = str(e)
    assert found == captions
    assert isinstance(found, str) or list(found) == list(captions)


def test_one_of_several_captions_is_picked():
    text = "one\r\n\n two \nthree"
    rng = random.Random(0)
    drawn = Counter(pick_caption(text, "random", rng) for _ in range(3000))
    assert drawn.keys() == {"one", "two", "three"}
    assert min(drawn.values()) > 900
    assert pick_caption(text, "first", rng) == "one"
    assert pick_caption(text, "whole", rng) == text
    before = rng.getstate()
    assert pick_caption("one", "random", rng) == "one"
    assert rng.getstate() == before         # a single caption draws nothing


# ------------------------------------------------------------------------------ whole shards

COLOUR_NAMES = list(COLOURS)


def image(i, size=(24, 20)):
    """The bytes of a PNG that differs for every i."""
    colour = COLOURS[COLOUR_NAMES[i % 3]]
    drawn = Image.new("RGB", size, colour)
    drawn.putpixel((i % 20, i // 20), (9, 9, 9))
    return png(drawn)


def jpeg(i):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image(i))).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def img2dataset_sample(i, image_extension="jpg"):
    """A sample of img2dataset 1.47, which cc12m-wds has as well."""
    row = dict(caption=f"a red star {i}", url=f"http://x/{i}.jpg", key=f"{i:09d}",
               status="success", error_message=None, width=24, height=20, original_width=24,
               original_height=20, exif="{}", sha256="0" * 64)
    data = jpeg(i) if image_extension == "jpg" else image(i)
    return f"{i:09d}", {image_extension: data, "json": json.dumps(row), "txt": row["caption"]}


def repacked(sample):
    """The same sample under the names of this repository."""
    key, files = sample
    ours = {}
    for name, content in files.items():
        if name == "txt":
            ours["original_caption.txt"] = content
        elif name != "json":
            ours[f"image.{name}"] = content
    return key, ours


@pytest.fixture
def others(tmp_path):
    """The same samples in img2dataset's layout and repacked, not yet indexed: two folders."""
    folders = []
    for name in ("theirs", "ours"):
        folder = tmp_path / name
        folder.mkdir()
        folders.append(folder)
    for s in range(3):
        samples = [img2dataset_sample(10 * s + i, "jpg" if i % 3 else "png") for i in range(8)]
        write_shard(folders[0] / f"{s:05d}.tar", samples)
        write_shard(folders[1] / f"{s:05d}.tar", [repacked(sample) for sample in samples])
    return folders


def same_batches(a, b):
    assert a.keys() == b.keys() and not a["bad"] and not b["bad"]
    for name in a:
        if isinstance(a[name], torch.Tensor):
            assert a[name].equal(b[name]), name
        else:
            assert a[name] == b[name]


def test_shards_of_img2dataset_train_as_repacked(gemma_folder, others):
    """The same pixels, captions and noise, whatever the number of ranks."""
    out, err = command("index", others[0])
    assert "images: jpg (15), png (9); captions: txt (24)\n24 samples in 3 shards" in out
    assert err == ""
    pack("index", others[1])
    theirs, ours = [tiny_batches(gemma_folder, folder, micro_batch=8) for folder in others]
    for m in range(6):
        same_batches(theirs[m], ours[m])
    assert len(set(theirs[0]["captions"]) - {""}) > 3

    ranks = [tiny_batches(gemma_folder, others[0], micro_batch=2, rank=rank, world=4)[4]
             for rank in range(4)]
    for name in ("pixels", "ids", "noise"):
        assert in_turn([rank[name] for rank in ranks]).equal(ours[4][name])


@pytest.mark.parametrize("content", ["[1]", '{"shards": 5}', '{"shards": ["a"]}', "{"])
def test_the_index_json_of_another_program_is_replaced(others, content):
    path = others[0] / "index.json"
    path.write_text(content)
    pack("index", others[0])
    assert json.loads(path.read_text())["samples"] == 24


def test_captions_in_json(gemma_folder, tmp_path, others):
    """Also a field that --caption-key names."""
    samples = []
    for i in range(6):
        key, files = img2dataset_sample(i)
        del files["txt"]
        files["json"] = json.dumps(json.loads(files["json"]) | {"style": f"of {i}"})
        samples.append((key, files))
    folder = tmp_path / "json"
    folder.mkdir()
    write_shard(folder / "a.tar", samples)
    out, _ = command("index", folder)
    assert "images: jpg (6); captions: field caption of json (6)" in out
    keep = ["--caption-drop", "0"]
    batch = tiny_batches(gemma_folder, folder, *keep, micro_batch=6)[0]
    assert sorted(batch["captions"]) == [f"a red star {i}" for i in range(6)]

    assert "field style of json (6)" in command("index", folder, "--caption-key", "style")[0]
    assert "field style of json (6)" in command("check", folder, "--caption-key", "style")[0]
    batch = tiny_batches(gemma_folder, folder, *keep, "--caption-key", "style", micro_batch=6)[0]
    assert sorted(batch["captions"]) == [f"of {i}" for i in range(6)]


def test_unusable_shards_are_refused_with_the_flags_to_use(gemma_folder, tmp_path):
    """By index and check; and by training, if there is an index.json already."""
    samples = []
    for i in range(4):
        key, files = img2dataset_sample(i)
        samples.append((key, {"img": files["jpg"], "tags": "a red star",
                              "json": '{"heading": "a star", "width": 3}'}))
    path = tmp_path / "a.tar"
    write_shard(path, samples)
    message = ("none of 4 samples can be trained on. They have img (4), tags (4), json (4); text "
               "fields of KEY.json: heading (4). Problem: no image. --image-key names")
    assert message in command("index", tmp_path, code=1)[1]
    assert not (tmp_path / "index.json").exists()
    assert message in command("check", tmp_path, code=1)[0]
    assert not (tmp_path / "index.json").exists()

    entry = dict(name="a.tar", samples=4, bytes=path.stat().st_size)
    (tmp_path / "index.json").write_text(json.dumps(dict(shards=[entry])))
    asked = tiny_batches(gemma_folder, tmp_path, micro_batch=4)[0]
    assert "no image (it has img, tags, json; text fields of json: heading)" in asked["error"]
    assert "--image-key names" in asked["error"]
    asked = tiny_batches(gemma_folder, tmp_path, "--image-key", "img", micro_batch=4)[0]
    assert "no caption (it has img, tags, json; text" in asked["error"]
    assert "--caption-key names" in asked["error"]

    keys = ["--image-key", "img", "--caption-key", "heading"]
    out, _ = command("index", tmp_path, *keys)
    assert "images: img (4); captions: field heading of json (4)" in out
    batch = tiny_batches(gemma_folder, tmp_path, *keys, "--caption-drop", "0")[0]
    assert batch["captions"] == ("a star",) * 4
    assert "0 problems" in command("check", tmp_path, *keys)[0]


def test_keys_that_merge_are_named(tmp_path):
    """A key ends at the first dot; img.001.jpg and img.002.jpg are one sample."""
    good = [img2dataset_sample(i) for i in range(2)]
    merged = [(f"img.{i:03d}", img2dataset_sample(i)[1]) for i in range(3)]
    write_shard(tmp_path / "a.tar", merged)
    for name in ("index", "check"):
        out, err = command(name, tmp_path, code=1)
        assert "none of 1 samples can be trained on. They have *.jpg (3), *.json (3), *.txt (3)" \
            in out + err
        assert "several images. A key ends at the first dot" in out + err

    write_shard(tmp_path / "b.tar", [*good, *good[1:]])
    out, err = command("index", tmp_path)
    assert "1 x several images: img of a.tar. A key ends at the first dot" in err
    assert "1 x two files with the same name: 000000001.jpg of b.tar" in err
    assert "images: jpg (2); captions: txt (2)\n3 samples in 2 shards" in out
    out, _ = command("check", tmp_path, code=1)
    assert "1 x several images: img of a.tar" in out and "1 x two files" in out


def test_a_key_that_merges_with_its_versions_is_named(tmp_path):
    """Beside cat.jpg and cat.txt, a second image is another sample if it has a caption."""
    files = img2dataset_sample(0)[1]
    write_shard(tmp_path / "a.tar", [("cat", files), ("cat.v2", files), ("dog", files)])
    _, err = command("index", tmp_path)
    assert "1 x several images: cat of a.tar. A key ends at the first dot" in err
    assert "1 x several images: cat of a.tar" in command("check", tmp_path, code=1)[0]
    write_shard(tmp_path / "a.tar", [("cat", files | {"mask.png": files["jpg"]})])
    _, err = command("index", tmp_path)
    assert not err                          # no advice on --max-skipped either


def test_dotted_keys_that_do_not_merge_are_used(gemma_folder, tmp_path):
    write_shard(tmp_path / "a.tar", [(f"{i}.big", img2dataset_sample(i)[1]) for i in range(4)])
    out, err = command("index", tmp_path)
    assert "images: *.jpg (4); captions: *.txt (4)" in out and not err
    batch = tiny_batches(gemma_folder, tmp_path, "--caption-drop", "0")[0]
    assert sorted(batch["captions"]) == [f"a red star {i}" for i in range(4)]


def test_files_that_are_not_adjacent_are_named(tmp_path):
    """As in a tar that is sorted by extension."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for extension in ("jpg", "txt"):
            for i in range(3):
                key, files = img2dataset_sample(i)
                add_file(tar, f"{key}.{extension}", files[extension])
    for name in ("index", "check"):
        out, err = command(name, tmp_path, code=1)
        assert "files of a sample that are not next to each other. Unpack such a tar" in out + err
        assert "none of 6 samples" in out + err


def test_unusual_members_of_a_tar(gemma_folder, tmp_path):
    """Upper case, folders, ./, hidden files of macOS, long names and files that are no samples."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add_file(tar, "README", "a tar")
        add_file(tar, "./._0.jpg", "x")
        folder = tarfile.TarInfo("./b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key in ("0", "./b/0", "b/1.5/" + "n" * 120, "__MACOSX/._1"):
            add_file(tar, f"{key}.JPG", jpeg(0))
            add_file(tar, ".DS_Store", "x")
            add_file(tar, f"{key}.Txt", key[-1])
    out, err = command("index", tmp_path)
    assert "images: jpg (3); captions: txt (3)\n3 samples" in out and not err
    offsets = sample_offsets(tmp_path / "a.tar")
    with open(tmp_path / "a.tar", "rb") as tar:
        samples = [read_sample(tar, offsets, i) for i in range(3)]
    assert [key for key, _ in samples] == ["0", "b/0", "b/1.5/" + "n" * 120]
    assert all(list(files) == ["jpg", "txt"] for _, files in samples)
    assert "0 problems" in command("check", tmp_path)[0]     # 0 and b/0 are different keys
    batch = tiny_batches(gemma_folder, tmp_path, "--caption-drop", "0", micro_batch=3)[0]
    assert sorted(batch["captions"]) == ["0", "0", "n"] and not batch["bad"]


# ------------------------------------------------------------------------------ several captions

@pytest.fixture
def several(tmp_path):
    """A shard of four images with three captions each, two with one, and one with none."""
    samples = []
    for i in range(7):
        key, files = img2dataset_sample(i)
        captions = [f"a red star {i}", f"two {i}", f"three {i}"]
        if i in (4, 5):
            captions = captions[:1]
        files["txt"] = "\n".join(captions) + "\n"
        if i == 2:                          # a list in KEY.json
            files["json"] = json.dumps(dict(captions=captions))
            del files["txt"]
        if i == 6:
            files |= dict(txt="\n", json="{}")
        samples.append((key, files))
    folder = tmp_path / "several"
    folder.mkdir()
    write_shard(folder / "a.tar", samples)
    return folder


def test_one_of_several_captions_is_drawn_at_every_visit(gemma_folder, several):
    out, err = command("index", several)
    assert "txt (5), field captions of json (1); 4 samples with several captions" in out
    assert "1 x blank caption: 000000006 of a.tar. Training skips" in err
    needed = ("1 of 7 samples (14.3%) cannot be trained on. Training stops at a share of 0.01, "
              "unless it is given --max-skipped 0.18\n")
    assert needed in err
    out, _ = command("check", several, code=1)
    assert needed in out
    assert "txt: 11, length" in out and "4 samples with several captions" in out

    keep = ["--caption-drop", "0"]
    drawn = tiny_batches(gemma_folder, several, *keep, micro_batch=350)[0]["captions"]
    by_image = {}
    for caption in drawn:
        by_image.setdefault(caption[-1], Counter())[caption] += 1
    assert {i: len(captions) for i, captions in by_image.items()} == \
        {"0": 3, "1": 3, "2": 3, "3": 3, "4": 1, "5": 1}
    assert min(by_image["0"].values()) > 8

    parts = []
    for rank in range(2):
        one = tiny_batches(gemma_folder, several, *keep, micro_batch=35, accumulation=5, rank=rank,
                           world=2)
        parts.append([one[m]["captions"] for m in range(5)])
    again = []
    for micro_batches in zip(*parts, strict=True):
        for captions in zip(*micro_batches, strict=True):  # the ranks take positions in turn
            again += captions
    assert again == list(drawn)             # depends only on the position

    first = tiny_batches(gemma_folder, several, *keep, "--caption-pick", "first", micro_batch=70)[0]
    assert set(first["captions"]) == {f"a red star {i}" for i in range(6)}
    whole = tiny_batches(gemma_folder, several, *keep, "--caption-pick", "whole", micro_batch=70)[0]
    assert "a red star 0\ntwo 0\nthree 0" in whole["captions"]
    assert whole["noise"].equal(first["noise"]) and whole["pixels"].equal(first["pixels"])


def test_like_published_takes_the_whole_caption():
    argv = ["--preset", "fusedit", "--like-published"]
    assert parse_run(argv, "").caption_pick == "whole"
    assert parse_run([*argv, "--caption-pick", "first"], "").caption_pick == "first"
    assert parse_run(argv[:2], "").caption_pick == "random"


# ------------------------------------------------------------------------------ check and encode

def test_the_image_grid_is_that_of_the_repacked_shards(tmp_path, others):
    """With the same images and captions as in training."""
    grids = []
    for folder in others:
        grids.append(tmp_path / f"{folder.name}.png")
        out, _ = command("check", folder, "--grid", grids[-1])
        assert "24 samples in 3 shards" in out and "0 problems; 15 JPEG, 9 PNG" in out
    with Image.open(grids[0]) as a, Image.open(grids[1]) as b:
        assert a.tobytes() == b.tobytes()
        middle = a.convert("RGB").getpixel((8 + 96, 8 + 96))
        assert any(max(map(abs, (x - y for x, y in zip(middle, colour, strict=True)))) < 8
                   for colour in COLOURS.values())
        text = a.convert("L").crop((8, 8 + 192, 200, 8 + 192 + 15))
        assert text.getextrema()[0] < 100   # "a red star 3"
    out, _ = command("check", others[0])
    assert "images: jpg (15), png (9); captions: txt (24)" in out
    assert "txt: 24, length 4 to 4" in out


def test_encode_reads_shards_of_others(tmp_path, others, capsys):
    flags = ["--vae", VAE, "--image-size", 32, "--dtype", "float32", "--batch-size", 4]
    for folder in others:
        pack("index", folder)
        read_index.cache_clear()
        pack("encode", folder, *flags)
        read_index.cache_clear()
    for path in others[0].glob("*.latents.safetensors"):
        theirs = load_file(path)
        ours = load_file(others[1] / path.name)
        assert theirs["latents"].equal(ours["latents"])
        assert theirs["whole"].tolist() == ours["whole"].tolist() == [1] * 8

    class Config:
        vae = str(VAE)
        image_size = 32

    shards = expand_shards(str(others[0]))
    assert can_read_latents(shards, RunConfig(), Config(), 0)
    assert "jpg" in ShardReader(shards, 2, "", latents=True).read(0, 1)
    assert not can_read_latents(shards, RunConfig(image_key="png"), Config(), 0)
    assert "their image_key is unset, not png" in capsys.readouterr().err
    with pytest.raises(FuseDiTError, match="--image-key.*--overwrite replaces"):
        pack("encode", others[0], *flags, "--image-key", "png")
    pack("encode", others[0], *flags, "--image-key", "png", "--overwrite")
    assert "noted unreadable image, which training skips: 15 images" in capsys.readouterr().err
    read_index.cache_clear()
    shards = expand_shards(str(others[0]))
    assert can_read_latents(shards, RunConfig(image_key="png"), Config(), 0)
    whole = load_file(others[0] / "00000.latents.safetensors")["whole"].tolist()
    assert whole == [1, 0, 0, 1, 0, 0, 1, 0]


def test_cc12m_tars_may_hold_png_and_webp(tmp_path):
    samples = [("1", dict(png=image(1), txt="a")), ("2", dict(webp=b"x", txt="b")),
               ("3", dict(txt="c"))]
    write_shard(tmp_path / "a.tar", samples)
    images = [item.image for item in TarItems(tmp_path / "a.tar")]
    assert images[:2] == [image(1), b"x"]
    assert isinstance(images[2], Skip) and str(images[2]) == "no image"



def test_the_lines_of_a_caption_are_not_wider_than_the_image():
    font = ImageFont.load_default(12)
    text = "a caption of words " * 4 + "W" * 80
    lines = wrap_to_width(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert lines[0] == "a caption of words"[:len(lines[0])] and len(lines) == 4
    assert lines[-1].endswith("...")
    assert wrap_to_width("two words", font, 100) == ["two words"]
    assert wrap_to_width("", font, 100) == []


def test_check_prints_what_the_image_grid_shows(tmp_path, others):
    folder = others[0]
    out, _ = command("check", folder, "--grid", tmp_path / "grid.png")
    lines = [line for line in out.splitlines() if line.startswith("row ")]
    assert lines[0].startswith("row 1, column 1: ") and lines[6].startswith("row 2, column 1: ")
    key, _, rest = lines[0].removeprefix("row 1, column 1: ").partition(" of ")
    shard, _, caption = rest.partition(": ")
    with tarfile.open(folder / shard) as tar:
        assert tar.extractfile(f"{key}.txt").read().decode().startswith(caption[:20])

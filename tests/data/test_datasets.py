"""Packs a small version of every data set from its published layout, with all kinds of damage."""
import io
import json
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import warm
from conftest import ROOT
from layouts import (
    EVERY,
    LOST,
    cc12m,
    emoji_packages,
    journeydb,
    journeydb_name,
    photo_folder,
    sa1b,
    saved,
    scene,
    write_file,
    write_json_lines,
)
from PIL import Image
from test_prepare_data import files, pack, read_shards

from fusedit import FuseDiTError
from fusedit_lib.data import emoji_captions, images
from fusedit_lib.data.shards import ShardReader, expand_shards

duckdb = pytest.importorskip("duckdb")


# ---- commands of the data sets -------------------------------------------------------------------

def cc12m_command(folder):
    return ["cc12m", folder / "cc12m-wds", folder / "train.jsonl.gz"]


def sa1b_command(folder):
    return ["sa1b", folder / "images", folder / "captions", "--size", 32, "--shard-size", 9]


def journeydb_command(folder):
    return ["journeydb", folder / "train_anno_realease_repath.jsonl", folder / "imgs", "--size", 32,
            "--shard-size", 9]


def folder_command(folder):
    return ["folder", folder / "photos", "--shard-size", 9]


def emoji_command(folder):
    return ["emoji", "--packages", folder / "packages", "--shard-size", 3]


def shapes_command(folder):
    return ["shapes", "-n", 300, "--shard-size", 9]


# ---- expected shards -----------------------------------------------------------------------------

def expected_skips(data_set, **more):
    """The counts by reason that report.json must contain."""
    kinds = [one.kind for one in data_set.image_files]
    skips = {reason: kinds.count(kind) for kind, reason in LOST.items()}
    return skips | more


def image_of(sample):
    return next(data for kind, data in sample.items() if kind.startswith("image."))


def text_of(sample, kind):
    return sample[f"{kind}_caption.txt"].decode()


def assert_shows(data, image, near=12):
    """Assert that a file shows an image, up to compression: mean absolute difference of pixels."""
    got = images.read_square(data, 24).permute(1, 2, 0).numpy().astype(int)
    want = np.asarray(images.square(image, 24, "center", None)).astype(int)
    assert np.abs(got - want).mean() < near


def assert_loader_reads(out):
    """Assert that the data loader can read every sample of the shards."""
    index = json.loads((out / "index.json").read_text())
    reader = ShardReader(expand_shards(str(out)), 2, "")
    for k, shard in enumerate(index["shards"]):
        for i in range(shard["samples"]):
            sample = reader.read(k, i)
            assert images.read_square(image_of(sample), 16).shape == (3, 16, 16)


def packed_images(data_set, samples, key_of):
    """(ImageFile, sample) pairs of the packed images.

    Asserts that all are packed except the images to skip and the first plain one. key_of(number):
    returns the key of an image.
    """
    pairs = []
    for one in data_set.image_files:
        key = key_of(one.number)
        expected = one.image is not None and one.number != data_set.plain[0]
        assert (key in samples) == expected, one.kind
        if expected:
            pairs.append((one, samples[key]))
    return pairs


def test_cc12m(tmp_path):
    data_set = cc12m(tmp_path)
    pack(*cc12m_command(tmp_path), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert report["skipped"] == expected_skips(data_set, **{"no synthetic caption": 1})
    assert report["inputs"] == 100 and len(report["shards"]) == 2
    assert report["captions"] == dict(rows=108, keys=106, unreadable=1)
    for one, sample in packed_images(data_set, samples, "{:09d}".format):
        synthetic = f"A long caption of {one.number}."
        if one.number == data_set.plain[1]:
            synthetic = "A caption that sorts first."
        assert text_of(sample, "synthetic") == synthetic
        assert text_of(sample, "original") == f"alt text of {one.number}"
        assert_shows(image_of(sample), one.image)
        if one.kind in ("plain", "cmyk", "palette", "turned"):
            assert image_of(sample) == one.data            # not encoded again
    assert_loader_reads(tmp_path / "out")


def test_cc12m_with_parquet_and_a_truncated_tar(tmp_path):
    cc12m(tmp_path)
    duckdb.sql(f"COPY (SELECT * FROM read_json('{tmp_path}/train.jsonl.gz', ignore_errors=true)) "
               f"TO '{tmp_path}/part-0.parquet'")
    tar = tmp_path / "cc12m-wds" / "cc12m-train-0001.tar"
    whole = tar.read_bytes()
    for k, size in enumerate((0, 100, 600, 40_000, 40_512, 41_100, 60_001, len(whole) // 2)):
        tar.write_bytes(whole[:size])
        pack("cc12m", tmp_path / "cc12m-wds", tmp_path / "part-0.parquet", tmp_path / f"out{k}")
        _, report = read_shards(tmp_path / f"out{k}")
        (name,) = report["skipped_keys"]["damaged tar"]
        assert name.startswith("cc12m-train-0001.tar from byte")
        assert 50 < report["inputs"] < 90


def test_sa1b(tmp_path):
    data_set = sa1b(tmp_path)
    for name in ("sa_1.json", ".DS_Store"):                # masks, and what macOS leaves
        (tmp_path / "images" / name).touch()
    pack(*sa1b_command(tmp_path), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert report["skipped"] == expected_skips(data_set, **{"no caption": 1})
    assert report["inputs"] == 100 and len(report["shards"]) == 12
    assert report["other_files"] == {".json": 1, "hidden file": 1}
    for one, sample in packed_images(data_set, samples, "sa_{}".format):
        assert text_of(sample, "synthetic") == f"The image shows {one.number}."
        assert_shows(image_of(sample), one.image)
        stored = Image.open(io.BytesIO(image_of(sample)))
        assert stored.size == (43, 32)      # --size 32: the shorter side
        assert stored.format == "JPEG"
    assert_loader_reads(tmp_path / "out")


def test_sa1b_captions_as_rows(tmp_path):
    """The format of the hub's dataset viewer: columns __key__ and txt, in a folder of Parquets."""
    sa1b(tmp_path)
    pack(*sa1b_command(tmp_path), tmp_path / "texts")
    rows = [dict(__key__=path.stem, txt=path.read_text())
            for path in (tmp_path / "captions").iterdir()]
    write_json_lines(tmp_path / "c.jsonl", rows)
    (tmp_path / "rows").mkdir()
    duckdb.sql(f"COPY (SELECT * FROM '{tmp_path}/c.jsonl') TO '{tmp_path}/rows/0.parquet'")
    for captions in (tmp_path / "c.jsonl", tmp_path / "rows"):
        out = tmp_path / f"out-{captions.stem}"
        pack("sa1b", tmp_path / "images", captions, out, "--size", 32, "--shard-size", 9)
        assert read_shards(out)[0] == read_shards(tmp_path / "texts")[0]


def test_journeydb(tmp_path):
    data_set = journeydb(tmp_path)
    pack(*journeydb_command(tmp_path), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    not_json = "not JSON with img_path"
    assert report["skipped"] == expected_skips(
        data_set, **{"image not found": 1, not_json: 2})
    assert report["skipped_keys"][not_json] == ["line 101", "line 103"]
    assert report["inputs"] == 102

    def key_of(number):
        return journeydb_name(number).replace("/", "_")
    for one, sample in packed_images(data_set, samples, key_of):
        assert text_of(sample, "synthetic") == f"prompt {one.number} --ar 3:2"
        has_original = "original_caption.txt" in sample
        assert has_original == (one.number != data_set.plain[1])
        assert_shows(image_of(sample), one.image)
    assert_loader_reads(tmp_path / "out")


def test_unwanted_sizes_and_aspect_ratios_are_skipped(tmp_path):
    for name, size in (("good", (64, 48)), ("small", (64, 31)), ("long", (200, 40))):
        write_file(tmp_path / "in" / f"{name}.png", saved(Image.new("RGB", size), "PNG"))
        write_file(tmp_path / "in" / f"{name}.txt", name)
    pack("folder", tmp_path / "in", tmp_path / "out", "--min-size", 32, "--max-aspect", 4)
    _, report = read_shards(tmp_path / "out")
    assert report["skipped_keys"] == {"shorter side below 32 pixels": ["small.png"],
                                      "longer than 4 times its shorter side": ["long.png"]}


def test_odd_rows_and_duplicate_keys_are_skipped(tmp_path):
    (tmp_path / "imgs").mkdir()
    for name in (*(f"{letter}.jpg" for letter in "abcdefg"), "a.png"):
        scene(0).save(tmp_path / "imgs" / name)
    write_json_lines(tmp_path / "rows.jsonl", [
        dict(img_path="./a.jpg", prompt="one"),
        dict(img_path="./a.png", prompt="again"),
        dict(img_path="./b.jpg", prompt="two", Task2={}),
        dict(img_path="./b\0.jpg", prompt="nul"),
        dict(img_path="./\ud83d.jpg", prompt="half"),
        dict(img_path="./c.jpg", prompt="list", Task2=dict(Caption=["x"])),
        dict(img_path="./d.jpg", Task2=dict(Caption="GPT's")),
        dict(img_path="./e.jpg", prompt=None, Task2=dict(Caption="too")),
        dict(img_path="./f.jpg", prompt=" "),
        dict(img_path="./g.jpg", prompt=5, Task2=dict(Caption="a number")),
        dict(prompt="of nothing"),
        ["no row"],
    ])
    pack("journeydb", tmp_path / "rows.jsonl", tmp_path / "imgs", tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    without_prompt = {key: text_of(samples.pop(key), "original") for key in "deg"}
    assert without_prompt == {"d": "GPT's", "e": "too", "g": "a number"}
    prompts = {key: text_of(sample, "synthetic") for key, sample in samples.items()}
    assert prompts == {"a": "one", "b": "two", "c": "list"}
    assert report["skipped"] == {"same key as the one before": 1, "cannot be read: invalid name": 2,
                                 "not JSON with img_path": 2, "no caption": 1}


def test_long_images_and_hidden_folders(tmp_path):
    for name in ("good/a", ".hidden/b"):
        write_file(tmp_path / "in" / f"{name}.png", saved(scene(1), "PNG"))
        write_file(tmp_path / "in" / f"{name}.txt", "a scene")
    Image.new("L", (70_000, 71)).save(tmp_path / "in" / "long.png")
    (tmp_path / "in" / "long.txt").write_text("long")
    pack("folder", tmp_path / "in", tmp_path / "out", "--size", 70)
    _, report = read_shards(tmp_path / "out")
    assert report["skipped_keys"] == {"longer than a JPEG can be": ["long.png"]}
    assert report["outputs"] == 1


def test_a_missing_caption_column_and_an_interrupted_sort(tmp_path):
    cc12m(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(FuseDiTError, match="no row of .* has a column caption_lava"):
        pack(*cc12m_command(tmp_path), out, "--caption-column", "caption_lava")
    write_file(out / ".progress" / ".captions.duckdb.12.tmp.d" / "part", b"x")
    pack(*cc12m_command(tmp_path), out, "--overwrite")
    assert len(read_shards(out)[0]) == 91


def test_brightness_of_16_bits_and_transparency_are_kept():
    rules = images.ImageRules(size=0, quality=95, min_size=1, max_aspect=1000)
    shrink = rules._replace(size=30)

    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    suffix, data = images.pack_image(saved(Image.fromarray(ramp), "PNG"), rules)
    got = np.asarray(Image.open(io.BytesIO(data)))
    assert suffix == "png" and np.abs(got - ramp / 257).max() <= 1

    magenta = (255, 0, 255)
    keyed = saved(Image.new("RGB", (80, 60), magenta), "PNG", transparency=magenta)
    suffix, data = images.pack_image(keyed, shrink)
    assert suffix == "png" and (images.read_square(data, 16) == 255).all()

    clear = saved(Image.new("RGBA", (80, 60), (255, 0, 0, 0)), "PNG")
    suffix, data = images.pack_image(clear, shrink)
    alpha = Image.open(io.BytesIO(data)).getpixel((5, 5))[3]
    assert suffix == "png" and alpha == 0
    assert (images.read_square(data, 16) == 255).all()     # a transparent image becomes white


def test_packing_can_resize_as_the_published_code_does(tmp_path):
    """Resize(512) of the published process_sa1b.py: bilinear, the longer side rounded down.

    An image with transparency is stored without loss.
    """
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (35, 47, 4), np.uint8))
    write_file(tmp_path / "photos" / "a.png", saved(image, "PNG"))
    write_file(tmp_path / "photos" / "a.txt", b"noise")
    bilinear = image.resize((int(20 * 47 / 35), 20), Image.Resampling.BILINEAR)
    bicubic = image.resize((round(20 * 47 / 35), 20), Image.Resampling.BICUBIC)
    for resize, want in (("bilinear", bilinear), ("bicubic", bicubic)):
        pack("folder", tmp_path / "photos", tmp_path / resize, "--size", 20, "--resize", resize)
        (sample,) = read_shards(tmp_path / resize)[0].values()
        assert Image.open(io.BytesIO(image_of(sample))).tobytes() == want.tobytes()


def test_emoji_hold_out_style_concept_pairs(tmp_path):
    emoji_packages(tmp_path)
    pack("emoji", tmp_path / "out", "--packages", tmp_path / "packages")
    train, report = read_shards(tmp_path / "out" / "train")
    held_out, _ = read_shards(tmp_path / "out" / "held-out")
    assert len(train) + len(held_out) == 30 + 25 + 1
    assert len(held_out) == 1 and report["skipped"] == {}

    (key, sample), = held_out.items()
    style, concept = key.split("-", 1)
    other_style = {"google": "fluent", "fluent": "google"}[style]
    assert f"{other_style}-{concept}" in train and key not in train
    i = int(concept[2:]) - 600
    in_words = {"google": "flat", "fluent": "3d"}[style]
    assert text_of(sample, "original") == f"thing {i}, {in_words}"
    captions = text_of(sample, "synthetic").split("\n")
    assert len(set(captions)) == emoji_captions.CAPTIONS and captions[0] == f"thing {i}, {in_words}"
    assert any(f"tag{i}" in caption for caption in captions)
    with_tone = train["google-1f607-1f3fb"]
    assert text_of(with_tone, "original") == "thing 7: light skin tone, flat"


# ---- restarts and processes ----------------------------------------------------------------------

# Runs a command in a child process, kills it eight times at random moments, and then lets it
# finish. The child is forked from a process that has already imported everything. Writing is slowed
# down so that the kills occur during the work.
KILLER = """
import json, os, random, signal, sys, time
import duckdb, prepare_data
from fusedit_lib.data import latents, packing

write = packing.TarWriter.write
encode_shard = latents.encode_shard

def slow_write(*args):
    time.sleep(0.025)
    return write(*args)

def slow_encode_shard(*args):
    time.sleep(0.25)
    return encode_shard(*args)

packing.TarWriter.write = slow_write
latents.encode_shard = slow_encode_shard

words = json.loads(sys.argv[1])
rng = random.Random(sys.argv[2])
longest = float(sys.argv[3])

def start():
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        args = prepare_data.parse_args(words)
        os._exit(args.run(args) or 0)
    os.setpgid(child, child)                # by whichever process comes first
    return child

kills = 0
status = None
while status != 0:
    child = start()
    if kills < 8:
        time.sleep(0.02 + rng.random() * longest)
        os.killpg(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status != 0:
        assert kills < 8, status
        kills += 1
print("KILLS", kills)
"""


def kill(words, longest):
    """Run a command to completion after killing it eight times, within `longest` seconds each."""
    words = [str(word) for word in words]
    done = warm.run(["-c", KILLER, json.dumps(words), words[0], longest], cwd=ROOT)
    assert "KILLS 8" in done.stdout, done.stdout + done.stderr


class Case(NamedTuple):
    """A command that is killed repeatedly and whose output is compared."""
    build: object                           # build(folder) writes the command's input
    command: object                         # command(folder) -> its words, without OUT
    longest: float                          # maximum seconds until a kill: about one shard per
                                            # worker, so that shards remain for the eighth kill


CASES = {
    "cc12m": Case(partial(cc12m, n=10 * EVERY), cc12m_command, 1.35),
    "sa1b": Case(sa1b, sa1b_command, 0.3),
    "journeydb": Case(journeydb, journeydb_command, 0.3),
    "folder": Case(photo_folder, folder_command, 0.4),
    "emoji": Case(emoji_packages, emoji_command, 0.12),
    "shapes": Case(None, shapes_command, 0.4),
}


def slow_unless_emoji(name):
    if name == "emoji":
        return name
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", map(slow_unless_emoji, CASES))
def test_kills_and_the_number_of_processes_do_not_change_the_bytes(tmp_path, name):
    case = CASES[name]
    if case.build is not None:
        case.build(tmp_path)
    words = case.command(tmp_path)
    for workers in (1, 2, 4):
        pack(*words, tmp_path / f"out{workers}", "--workers", workers)
        assert files(tmp_path / f"out{workers}") == files(tmp_path / "out1")
    kill([*words, tmp_path / "killed", "--workers", 2], case.longest)
    assert files(tmp_path / "killed") == files(tmp_path / "out1")
    assert not list((tmp_path / "killed").rglob(".progress"))

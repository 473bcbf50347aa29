"""The paper's data sets in exactly their published layouts, small, with every kind of damage."""
import gzip
import io
import json
import random
from functools import partial

import numpy as np
import pytest
import warm
from conftest import ROOT
from PIL import Image
from test_prepare_data import files, pack, read_shards
from tiny_shards import write_shard

from fusedit import FuseDiTError
from fusedit_lib.data import emoji, images
from fusedit_lib.data.shards import ShardReader, expand_shards

duckdb = pytest.importorskip("duckdb")
KEPT = ["cmyk", "sixteen", "palette", "animated", "turned"]   # odd, but pictures
LOST = {"zero": "empty file", "broken": "not an image", "short": "damaged or cut short",
        "huge": "over 90 megapixels"}
KINDS = ["plain", *KEPT, *LOST]
EVERY = 50                                  # of each odd kind one in so many: 2 %


def saved(image, kind, **more):
    box = io.BytesIO()
    image.save(box, kind, **more)
    return box.getvalue()


def scene(seed):
    """A picture with another colour in each quarter, so that no turn looks the same."""
    colours = np.random.RandomState(seed).randint(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(24, 0).repeat(32, 1))              # 64 x 48


def odd(kind, seed):
    """A picture's file of a kind, and the picture that it should be taken for, or None."""
    image = scene(seed)
    if kind == "plain":
        return saved(image, "JPEG", quality=95), image
    if kind == "cmyk":
        return saved(image.convert("CMYK"), "JPEG", quality=95), image
    if kind == "sixteen":
        gray = np.asarray(image.convert("L"))
        return saved(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"), Image.fromarray(gray)
    if kind == "palette":
        return saved(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), image
    if kind == "animated":
        return saved(image, "GIF", save_all=True, append_images=[scene(seed + 1)]), image
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6                    # to be turned by 90 degrees to the right
        return saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95,
                     exif=exif), image
    if kind == "short":
        return saved(image, "JPEG", quality=95)[:-30], None
    if kind == "huge":
        return saved(Image.new("1", (12000, 8000)), "PNG"), None
    return b"" if kind == "zero" else b"<html>404</html>", None


def pictures(n, first=0):
    """[(number, kind, bytes, picture or None)], of which every kind but plain is 2 %."""
    kinds = [kind for kind in KINDS[1:] for _ in range(n // EVERY)]
    kinds += ["plain"] * (n - len(kinds))
    random.Random(first).shuffle(kinds)
    return [(first + i, kind, *odd(kind, first + i)) for i, kind in enumerate(kinds)]


def assert_shows(data, want, near=12):
    got = images.read_square(data, 24).permute(1, 2, 0).numpy().astype(int)
    want = np.asarray(images.square(want, 24, "center", None)).astype(int)
    assert np.abs(got - want).mean() < near


def image_of(sample):
    return next(v for k, v in sample.items() if k.startswith("image."))


def trains(out):
    """The loader reads every sample of the shards."""
    index = json.loads((out / "index.json").read_text())
    tars = ShardReader(expand_shards(str(out)), 2, "")
    for k, shard in enumerate(index["shards"]):
        for i in range(shard["samples"]):
            sample = tars.read(k, i)
            assert images.read_square(image_of(sample), 16).shape == (3, 16, 16)


# ---- the data sets, as they are published --------------------------------------------------------

def cc12m(folder, n=100):
    """pixparse/cc12m-wds: KEY.jpg, KEY.json, KEY.txt; train.jsonl.gz of CaptionEmporium."""
    (folder / "cc12m-wds").mkdir(parents=True)
    everything, rows = [], []
    for t in range(n // EVERY):
        some = pictures(EVERY, first=1000 * t)
        everything += some
        write_shard(folder / "cc12m-wds" / f"cc12m-train-{t:04d}.tar", [
            (f"{i:09d}", {"jpg": data, "json": json.dumps(dict(key=f"{i:09d}")),
                          "txt": f"alt text of {i}"}) for i, _, data, _ in some])
    for i, *_ in everything:
        rows.append(dict(key=f"{i:09d}", url="http://x/y.jpg", caption_llava_short=f"of {i}",
                         caption_llava=f"A long caption\nof {i}."))
    plain = [i for i, kind, *_ in everything if kind == "plain"]
    rows = [row for row in rows if row["key"] != f"{plain[0]:09d}"]          # one has none
    rows.append(dict(key=f"{plain[1]:09d}", caption_llava="A caption that sorts first."))
    rows += [dict(key=f"{i:09d}", caption_llava="of no image") for i in range(5000, 5007)]
    random.Random(0).shuffle(rows)
    lines = [json.dumps(row) for row in rows]
    lines.insert(10, '{"key": "0000')
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return everything, plain


def sa1b(folder, n=100):
    """What sa1b-download leaves: sa_000000/sa_1.jpg; captions as sa_1.txt."""
    everything = [(i, kind, data, image) for i, kind, data, image in pictures(n)]
    for i, _, data, _ in everything:
        path = folder / "images" / f"sa_{i // 40:06d}" / f"sa_{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (folder / "captions").mkdir(exist_ok=True)
        (folder / "captions" / f"sa_{i}.txt").write_text(f"The image shows {i}.\n")
    plain = [i for i, kind, *_ in everything if kind == "plain"]
    (folder / "captions" / f"sa_{plain[0]}.txt").unlink()
    return everything, plain


def journeydb(folder, n=100):
    """train_anno_realease_repath.jsonl, and imgs/000/NAME.jpg and so on."""
    everything, rows = pictures(n), []
    for i, _, data, _ in everything:
        path = folder / "imgs" / f"{i % 3:03d}" / f"{i:08x}-{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        rows.append(dict(img_path=f"./{path.relative_to(folder / 'imgs')}", Task1={}, Task3={},
                         prompt=f"prompt {i} --ar 3:2",
                         Task2=dict(Caption=f"GPT's caption of {i}.")))
    plain = [i for i, kind, *_ in everything if kind == "plain"]
    rows[plain[0]]["img_path"] = "./002/gone.jpg"
    del rows[plain[1]]["Task2"]
    lines = [json.dumps(row) for row in rows] + ['{"img_path":', "", '{"prompt": "no path"}']
    (folder / "train_anno_realease_repath.jsonl").write_text("\n".join(lines) + "\n")
    return everything, plain


def expected_skips(everything, **more):
    kinds = [kind for _, kind, *_ in everything]
    return {why: kinds.count(kind) for kind, why in LOST.items()} | more


def cc12m_words(folder):
    return ["cc12m", folder / "cc12m-wds", folder / "train.jsonl.gz"]


def sa1b_words(folder):
    return ["sa1b", folder / "images", folder / "captions", "--size", 32, "--shard-size", 9]


def journeydb_words(folder):
    return ["journeydb", folder / "train_anno_realease_repath.jsonl", folder / "imgs", "--size", 32,
            "--shard-size", 9]


# ---- what comes of them --------------------------------------------------------------------------

def test_cc12m(tmp_path):
    everything, plain = cc12m(tmp_path)
    pack(*cc12m_words(tmp_path), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert report["skipped"] == expected_skips(everything, **{"no synthetic caption": 1})
    assert report["inputs"] == 100 and len(report["shards"]) == 2
    assert report["captions"] == dict(rows=108, keys=106, unreadable=1)
    for i, kind, data, image in everything:
        key = f"{i:09d}"
        assert (key in samples) == (image is not None and i != plain[0]), kind
        if key in samples:
            sample = samples[key]
            assert sample["original_caption.txt"].decode() == f"alt text of {i}"
            assert sample["synthetic_caption.txt"].decode() == (
                f"A long caption of {i}." if i != plain[1] else "A caption that sorts first.")
            assert_shows(image_of(sample), image)
            if kind in ("plain", "cmyk", "palette", "turned"):
                assert image_of(sample) == data            # not encoded again
    trains(tmp_path / "out")


def test_cc12m_with_parquet_and_a_tar_that_is_cut(tmp_path):
    cc12m(tmp_path)
    duckdb.sql(f"COPY (SELECT * FROM read_json('{tmp_path}/train.jsonl.gz', ignore_errors=true)) "
               f"TO '{tmp_path}/part-0.parquet'")
    tar = tmp_path / "cc12m-wds" / "cc12m-train-0001.tar"
    whole = tar.read_bytes()
    for k, cut in enumerate((0, 100, 600, 40_000, 40_512, 41_100, 60_001, len(whole) // 2)):
        tar.write_bytes(whole[:cut])
        pack("cc12m", tmp_path / "cc12m-wds", tmp_path / "part-0.parquet", tmp_path / f"out{k}")
        _, report = read_shards(tmp_path / f"out{k}")
        (name,) = report["skipped_keys"]["damaged tar"]
        assert name.startswith("cc12m-train-0001.tar from byte")
        assert 50 < report["inputs"] < 90


def test_sa1b(tmp_path):
    everything, plain = sa1b(tmp_path)
    pack(*sa1b_words(tmp_path), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert report["skipped"] == expected_skips(everything, **{"no caption": 1})
    assert report["inputs"] == 100 and len(report["shards"]) == 12
    for i, kind, _, image in everything:
        assert (f"sa_{i}" in samples) == (image is not None and i != plain[0]), kind
        if f"sa_{i}" in samples:
            sample = samples[f"sa_{i}"]
            assert sample["synthetic_caption.txt"].decode() == f"The image shows {i}."
            assert_shows(image_of(sample), image)
            packed = Image.open(io.BytesIO(image_of(sample)))
            assert min(packed.size) == 32 and packed.size == (43, 32)
            assert packed.format == "JPEG"
    trains(tmp_path / "out")


def test_sa1b_captions_as_rows(tmp_path):
    """The form that the hub's viewer gives: __key__ and txt, in Parquet files of a folder."""
    sa1b(tmp_path)
    pack(*sa1b_words(tmp_path), tmp_path / "texts")
    rows = [dict(__key__=p.stem, txt=p.read_text()) for p in (tmp_path / "captions").iterdir()]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows").mkdir()
    duckdb.sql(f"COPY (SELECT * FROM '{tmp_path}/c.jsonl') TO '{tmp_path}/rows/0.parquet'")
    for captions in (tmp_path / "c.jsonl", tmp_path / "rows"):
        out = tmp_path / f"out-{captions.stem}"
        pack("sa1b", tmp_path / "images", captions, out, "--size", 32, "--shard-size", 9)
        assert read_shards(out)[0] == read_shards(tmp_path / "texts")[0]


def test_journeydb(tmp_path):
    everything, plain = journeydb(tmp_path)
    pack(*journeydb_words(tmp_path), tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert report["skipped"] == expected_skips(everything, **{
        "image is not there": 1, "not JSON with img_path and prompt": 2})
    assert report["skipped_keys"]["not JSON with img_path and prompt"] == ["line 101", "line 103"]
    assert report["inputs"] == 102
    for i, kind, _, image in everything:
        key = f"{i % 3:03d}_{i:08x}-{i}"
        assert (key in samples) == (image is not None and i != plain[0]), kind
        if key in samples:
            sample = samples[key]
            assert sample["synthetic_caption.txt"].decode() == f"prompt {i} --ar 3:2"
            assert ("original_caption.txt" in sample) == (i != plain[1])
            assert_shows(image_of(sample), image)
    trains(tmp_path / "out")


def test_sizes_and_shapes_that_are_not_wanted_are_skipped(tmp_path):
    for name, size in (("good", (64, 48)), ("small", (64, 31)), ("long", (200, 40))):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(path)
        path.with_suffix(".txt").write_text(name)
    pack("folder", tmp_path / "in", tmp_path / "out", "--min-size", 32, "--max-aspect", 4)
    _, report = read_shards(tmp_path / "out")
    assert report["skipped_keys"] == {"shorter side below 32 pixels": ["small.png"],
                                      "longer than 4 times its shorter side": ["long.png"]}


def test_odd_rows_and_keys_that_meet_are_skipped_not_fatal(tmp_path):
    (tmp_path / "imgs").mkdir()
    for name in ("a.jpg", "a.png", "b.jpg", "c.jpg"):
        scene(0).save(tmp_path / "imgs" / name)
    rows = [dict(img_path="./a.jpg", prompt="one"), dict(img_path="./a.png", prompt="again"),
            dict(img_path="./b.jpg", prompt="two", Task2={}),
            dict(img_path="./b\0.jpg", prompt="nul"), dict(img_path="./\ud83d.jpg", prompt="half"),
            dict(img_path="./c.jpg", prompt="list", Task2=dict(Caption=["x"])), ["no row"]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack("journeydb", tmp_path / "rows.jsonl", tmp_path / "imgs", tmp_path / "out")
    samples, report = read_shards(tmp_path / "out")
    assert {k: s["synthetic_caption.txt"] for k, s in samples.items()} == {
        "a": b"one", "b": b"two", "c": b"list"}
    assert report["skipped"] == {"same key as the one before": 1, "cannot be read: its name": 2,
                                 "not JSON with img_path and prompt": 1}


def test_long_pictures_and_hidden_folders(tmp_path):
    for name in ("good/a.png", ".hidden/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        scene(1).save(tmp_path / "in" / name)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("a scene")
    Image.new("L", (70_000, 71)).save(tmp_path / "in" / "long.png")
    (tmp_path / "in" / "long.txt").write_text("long")
    pack("folder", tmp_path / "in", tmp_path / "out", "--size", 70)
    _, report = read_shards(tmp_path / "out")
    assert report["skipped_keys"] == {"longer than a JPEG can be": ["long.png"]}
    assert report["outputs"] == 1


def test_captions_without_the_column_and_a_sort_that_was_killed(tmp_path):
    cc12m(tmp_path)
    with pytest.raises(FuseDiTError, match="no row of .* has a column caption_lava"):
        pack(*cc12m_words(tmp_path), tmp_path / "out", "--caption-column", "caption_lava")
    spilled = tmp_path / "out" / ".progress" / ".captions.duckdb.12.tmp.d"
    spilled.mkdir()
    (spilled / "part").write_bytes(b"x")
    pack(*cc12m_words(tmp_path), tmp_path / "out", "--overwrite")
    assert len(read_shards(tmp_path / "out")[0]) == 91


def test_sixteen_bits_keep_their_light_and_transparency_stays():
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    how = images.Rules(0, 95, 1, 1000)
    suffix, data = images.picture(saved(Image.fromarray(ramp), "PNG"), how)
    got = np.asarray(Image.open(io.BytesIO(data)))
    assert suffix == "png" and np.abs(got - ramp / 257).max() <= 1
    keyed = saved(Image.new("RGB", (80, 60), (255, 0, 255)), "PNG", transparency=(255, 0, 255))
    suffix, data = images.picture(keyed, how._replace(size=30))
    assert suffix == "png" and (images.read_square(data, 16) == 255).all()
    clear = Image.new("RGBA", (80, 60), (255, 0, 0, 0))
    suffix, data = images.picture(saved(clear, "PNG"), how._replace(size=30))
    assert suffix == "png" and Image.open(io.BytesIO(data)).getpixel((5, 5))[3] == 0
    assert (images.read_square(data, 16) == 255).all()     # a see-through picture shows white


# ---- restarts and processes ----------------------------------------------------------------------

# Kill the command, forked from a process that has imported all it needs, at random moments.
KILLER = """
import json, os, random, signal, sys, time
import duckdb, prepare_data
from fusedit_lib.data import latents, packing
write, encode = packing.TarWriter.write, latents.encode_shard                # slowed, to be hit
packing.TarWriter.write = lambda *a: (time.sleep(0.025), write(*a))[1]
latents.encode_shard = lambda *a: (time.sleep(0.25), encode(*a))[1]
words, seed, kills = json.loads(sys.argv[1]), sys.argv[2], 0
rng, longest = random.Random(seed), float(sys.argv[3])
while True:
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        args = prepare_data.arguments(words)
        os._exit(args.run(args) or 0)
    if kills < 8:
        time.sleep(0.02 + rng.random() * longest)
        os.killpg(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert kills < 8 or status == 0, status
    if not status:
        break
    kills += 1
print("KILLS", kills)
"""


def emoji_registry(folder):
    """The packages as download.py leaves them: 30 concepts, some in one style, one with tones."""
    words = []
    for i in range(30):
        code = f"1F{600 + i}"
        words.append(dict(label=f"thing {i}", hexcode=code, tags=[f"tag{i}", "thing"], skins=[
            dict(label=f"thing {i}: tone", hexcode=f"{code}-1F3FB", tone=tone)
            for tone in (1, 2, [1, 5])] if i == 7 else []))
        for style, suffix, name in (("google", "png", f"{code.lower()}-fe0f"),
                                    ("fluent", "webp", code.lower())):
            if i < 25 or style == "google":
                path = folder / "packages" / style / f"{name}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                scene(i).save(path)
    scene(7).save(folder / "packages" / "google" / "1f607-1f3fb.png")
    (folder / "packages" / "words").mkdir()
    (folder / "packages" / "words" / "data.json").write_text(json.dumps(words))


def test_emoji_hold_styles_of_concepts_out(tmp_path):
    emoji_registry(tmp_path)
    pack("emoji", tmp_path / "out", "--packages", tmp_path / "packages")
    train, report = read_shards(tmp_path / "out" / "train")
    held, _ = read_shards(tmp_path / "out" / "held-out")
    assert len(train) + len(held) == 30 + 25 + 1 and len(held) == 1 and report["skipped"] == {}
    (key,), (sample,) = held, held.values()
    style, concept = key.split("-", 1)
    other = {"google": "fluent", "fluent": "google"}[style]
    assert f"{other}-{concept}" in train and key not in train
    i = int(concept[2:]) - 600
    assert sample["original_caption.txt"].decode() == f"{emoji.STYLES[style]} thing {i}"
    assert sample["synthetic_caption.txt"].decode().endswith(f"thing {i}, tag{i}")
    assert train["google-1f607-1f3fb"]["original_caption.txt"] == b"a flat emoji of thing 7: tone"


WORDS = {"cc12m": (partial(cc12m, n=10 * EVERY), cc12m_words), "sa1b": (sa1b, sa1b_words),
         "journeydb": (journeydb, journeydb_words),
         "folder": (None, lambda folder: ["folder", folder / "photos", "--shard-size", 9]),
         "emoji": (emoji_registry, lambda folder: ["emoji", "--packages", folder / "packages",
                                          "--shard-size", 3]),
         "shapes": (None, lambda folder: ["shapes", "-n", 300, "--shard-size", 9])}

def built(name, tmp_path):
    build, words = WORDS[name]
    if build:
        build(tmp_path)
    for i, _, data, _ in pictures(150) if name == "folder" else ():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(data)
        (tmp_path / "photos" / f"{i}.txt").write_text(f"photo {i}")
    return [str(w) for w in words(tmp_path)]


def kill(words, longest):
    """Run a command to its end, killed eight times, each time within so many seconds."""
    out = warm.run(["-c", KILLER, json.dumps([str(w) for w in words]), words[0], longest],
                   cwd=ROOT)
    assert "KILLS 8" in out.stdout, out.stdout + out.stderr


@pytest.mark.parametrize("name", [
    "emoji", *(pytest.param(name, marks=pytest.mark.slow) for name in WORDS if name != "emoji")])
def test_killed_eight_times_and_any_processes_give_the_same_bytes(tmp_path, name):
    words = built(name, tmp_path)
    for n in (1, 2, 4):
        pack(*words, tmp_path / f"out{n}", "--workers", n)
        assert files(tmp_path / f"out{n}") == files(tmp_path / "out1")
    # at most about a shard a worker, so that some are left for the eighth
    kill([*words, tmp_path / "killed", "--workers", 2], dict(
        cc12m=1.35, emoji=0.12, sa1b=0.3, journeydb=0.3).get(name, 0.4))
    assert files(tmp_path / "killed") == files(tmp_path / "out1")
    assert not list((tmp_path / "killed").rglob(".progress"))

"""Batches from shards: reproducible at any step and rank, with damaged data and dead workers."""
import io
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, tiny_clip
from PIL import Image
from tiny_shards import (
    COLOURS,
    ORIGINAL_CAPTIONS,
    SHAPE,
    batch_keys,
    in_turn,
    index,
    numbered,
    png,
    sample_keys,
    sample_names,
    scene,
    tiny_batches,
    write_shard,
)

from fusedit import FuseDiTError
from fusedit_lib.data import batches as batches_module
from fusedit_lib.data import images
from fusedit_lib.data.batches import load_batches, to_device
from fusedit_lib.data.shards import read_index, sample_offsets
from fusedit_lib.pretrained import ClipTokenizer


@pytest.fixture
def shards(tmp_path):
    """3 shards of 8 numbered samples."""
    return numbered(tmp_path / "shards")


@pytest.fixture(autouse=True)
def empty_index_cache():
    read_index.cache_clear()


# ------------------------------------------------------------------------------ the order

def global_batches(gemma, shards, micro_batch, accumulation, world):
    """The keys of three training steps, in the order of their positions."""
    ranks = []
    for rank in range(world):
        batches = tiny_batches(gemma, shards, *ORIGINAL_CAPTIONS, micro_batch=micro_batch,
                               accumulation=accumulation, rank=rank, world=world)
        ranks.append(sample_keys(batches, 3 * accumulation))
    steps = []
    for step in range(3):
        keys = []
        for i in range(accumulation):
            of_ranks = [micro_batches[step * accumulation + i] for micro_batches in ranks]
            for together in zip(*of_ranks, strict=True):   # the ranks take positions in turn
                keys += together
        steps.append(keys)
    return steps


def test_the_order_depends_only_on_the_seed(gemma_folder, shards):
    whole = global_batches(gemma_folder, shards, 8, 1, 1)
    assert whole == global_batches(gemma_folder, shards, 2, 4, 1)
    assert whole == global_batches(gemma_folder, shards, 2, 2, 2)
    assert whole == global_batches(gemma_folder, shards, 1, 2, 4)
    assert sorted(sum(whole, [])) == sample_names(0, 24)
    other = tiny_batches(gemma_folder, shards, *ORIGINAL_CAPTIONS, "--seed", "1", micro_batch=8)
    other = sample_keys(other, 3)
    assert other != whole
    assert sorted(sum(other, [])) == sample_names(0, 24)


def test_instructions_go_before_the_captions_of_clip_too(gemma_folder, shards, tmp_path):
    """As in the published code (data.py:190-204); an empty caption stays empty."""
    clip = str(tiny_clip(tmp_path / "clip"))
    model = [f"clip={clip}", "text_modulation_embeds_dim=24", "timestep_conditioning=addition",
             "instruction=a star and "]
    batch = tiny_batches(gemma_folder, shards, "--caption-drop", "0.5", "--set", *model,
                         micro_batch=8)[0]
    assert "" in batch["captions"]
    prompts = [f"a star and {caption}" if caption else "" for caption in batch["captions"]]
    assert batch["clip"].equal(ClipTokenizer(clip)(prompts))
    assert not batch["clip"].equal(ClipTokenizer(clip)(batch["captions"]))


def test_noise_and_captions_depend_only_on_the_position(gemma_folder, shards):
    """A position's noise, noise level, crop and caption do not depend on how a batch is divided."""
    flags = ["--caption-drop", "0.5", "--original-caption-rate", "0.5"]
    whole = tiny_batches(gemma_folder, shards, *flags, micro_batch=8)[3]
    ranks = [tiny_batches(gemma_folder, shards, *flags, micro_batch=2, accumulation=2, rank=rank,
                          world=2) for rank in range(2)]
    for key in ("noise", "normal", "pixels", "ids"):
        together = torch.cat([in_turn([ranks[0][m][key], ranks[1][m][key]]) for m in (6, 7)])
        assert together.equal(whole[key]), key
    assert whole["noise"].shape == (8, 1, 3, 16, 16)
    assert len(set(whole["normal"].tolist())) == 8
    assert abs(whole["noise"].std() - 1) < 0.05


# Prints the time and memory that batch 800,000 takes.
LATE_STEP = """
import resource, sys, time
from fusedit_lib import pretrained
from fusedit_lib.data import batches
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

batches.decode = lambda *_: (batches.torch.zeros(3, 16, 16).byte(), "a")
begin = time.time()
run = parse_run(sys.argv[1:], "")
tokenizer = pretrained.load_tokenizer(run.base, 64)
batch = batches.Batches(run, model_config(run), tokenizer, 512)[800_000]
assert len(batch["captions"]) == 512 and not batch["bad"]
print(time.time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_any_step_is_reached_directly(gemma_folder, tmp_path, known):
    """2,600 shards of 10,000 samples, step 800,000 at batch 512; all shards are links to one tar.

    The same holds without offsets.npy, but with 8 streams: a batch scans the tar of each stream for
    its offsets, which takes 0.6 s.
    """
    tar = tmp_path / "one.tar"
    files = {"image.png": b"x", "synthetic_caption.txt": "a"}
    write_shard(tar, [(f"{i:05d}", files) for i in range(10_000)])
    data = tmp_path / "data"
    data.mkdir()
    entries = []
    for s in range(2600):
        os.link(tar, data / f"s-{s:06d}.tar")
        entries.append(dict(name=f"s-{s:06d}.tar", samples=10_000, bytes=tar.stat().st_size))
    (data / "index.json").write_text(json.dumps({"shards": entries}))
    if known:
        np.save(data / "offsets.npy", np.tile(sample_offsets(tar), 2600))

    streams = "64" if known else "8"
    argv = ["--data", data, "--base", gemma_folder, "--batch", "512", "--streams", streams]
    argv += ["--set", *SHAPE]
    done = warm.run(["-c", LATE_STEP, *argv], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    seconds, gigabytes = map(float, done.stdout.split())
    print(seconds, gigabytes)
    assert seconds < 10 and gigabytes < 1


# ------------------------------------------------------------------------------ batch contents

def test_a_batch_matches_the_shards(gemma_folder, shards):
    batch = tiny_batches(gemma_folder, shards, "--caption-drop", "0")[0]
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert batch["pixels"].dtype == torch.uint8
    assert not batch["bad"]
    assert batch["ids"].shape == batch["mask"].shape == (4, 8)         # always max_text_tokens wide
    for pixels, caption, mask in zip(batch["pixels"], batch["captions"], batch["mask"],
                                     strict=True):
        name = caption.split()[1]
        colour = torch.tensor(COLOURS[name], dtype=torch.uint8)
        assert caption == f"a {name} square"
        assert mask.sum() == 4
        assert (pixels == colour[:, None, None]).all()


def test_a_batch_on_its_device(gemma_folder, shards):
    batch = tiny_batches(gemma_folder, shards)[0]
    moved = to_device(batch, "cpu")
    assert moved.ids is batch["ids"]
    assert moved.mask is batch["mask"]
    assert moved.normal is batch["normal"]
    assert moved.eps.equal(batch["noise"][:, 0])
    assert moved.clip_ids is None and moved.vae_noise is None
    assert moved.x.dtype == torch.float32 and moved.x.is_contiguous()
    assert moved.x.min() == -1 and moved.x.max() == 1


def test_no_data_is_an_error(gemma_folder):
    with pytest.raises(FuseDiTError, match="--data is missing"):
        tiny_batches(gemma_folder, [], micro_batch=1)


def test_captions_are_chosen_and_dropped_by_rate(gemma_folder, shards):
    batches = tiny_batches(gemma_folder, shards, "--caption-drop", "0.25",
                           "--original-caption-rate", "0.5", micro_batch=300)
    captions = [caption for m in range(4) for caption in batches[m]["captions"]]
    dropped = captions.count("")
    original = sum(" of " in caption for caption in captions)
    assert abs(dropped / 1200 - 0.25) < 0.04
    assert abs(original / 1200 - 0.375) < 0.05


# ------------------------------------------------------------------------------ cropping

def test_cropping():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = (255, 0, 0)            # the middle square is red
    image = Image.fromarray(wide)
    rng = random.Random(0)
    middle = np.asarray(images.square(image, 16, "center", rng))
    assert middle.shape == (16, 16, 3)
    assert (middle[:, 1:-1] == (255, 0, 0)).all()
    upright = image.transpose(Image.Transpose.ROTATE_90)
    tall = np.asarray(images.square(upright, 16, "center", rng))
    assert (tall[1:-1] == (255, 0, 0)).all()

    red = set()
    for _ in range(20):
        crop = np.asarray(images.square(image, 16, "random", rng))
        red.add(float(crop[..., 0].mean()))
    assert len(red) > 5                     # crops at different positions

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    noise = Image.fromarray(pixels)
    assert images.square(noise, 16, "center", rng).tobytes() == noise.tobytes()
    grey = Image.new("L", (5, 9), 7)
    assert images.square(grey, 16, "random", rng).getpixel((3, 3)) == (7, 7, 7)


# width, height: landscape, portrait, odd, a crop at 1.5 pixels, enlarged, one side already right
PUBLISHED_SIZES = [(96, 64), (64, 96), (101, 67), (33, 47), (38, 32), (32, 38), (7, 11), (16, 29)]


def published_resize(image, size):
    """The published Resize(size, BILINEAR), with torchvision's arithmetic written out."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    wanted = (size, long) if width <= height else (long, size)
    return image.resize(wanted, Image.Resampling.BILINEAR)


def published_square(image, size):
    """The published Resize(size, BILINEAR) and CenterCrop(size) of a PIL image (data.py:24-25)."""
    image = published_resize(image, size)
    left = int(round((image.width - size) / 2.0))
    top = int(round((image.height - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


def noise_image(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("width, height", PUBLISHED_SIZES)
@pytest.mark.parametrize("size", [16, 21])
def test_bilinear_pixels_are_the_published_ones(width, height, size):
    image = noise_image(width, height)
    want = published_square(image, size)
    got = images.square(image, size, "center", None, "bilinear")
    assert got.size == want.size == (size, size)
    assert got.tobytes() == want.tobytes()

    # a JPEG is decoded at its full size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    want = np.asarray(published_square(Image.open(buffer).convert("RGB"), size))
    read = images.read_square(buffer.getvalue(), size, resize="bilinear")
    assert (read.permute(1, 2, 0).numpy() == want).all()


def test_bilinear_random_crops_are_those_of_the_resized_image():
    """At every whole pixel, as RandomCrop takes them."""
    image = noise_image(40, 32)
    resized = published_resize(image, 16)
    assert resized.size == (20, 16)
    places = {resized.crop((x, 0, x + 16, 16)).tobytes() for x in range(5)}
    rng = random.Random(0)
    crops = {images.square(image, 16, "random", rng, "bilinear").tobytes() for _ in range(60)}
    assert crops == places


def test_the_run_chooses_the_filter(gemma_folder, tmp_path):
    image = noise_image(41, 30)
    write_shard(tmp_path / "a.tar", [scene("n00", **{"image.png": png(image)})])
    index(tmp_path)
    for more, resize in (([], "bicubic"), (["--resize", "bilinear"], "bilinear")):
        batch = tiny_batches(gemma_folder, tmp_path, *more, micro_batch=1)[0]
        want = np.asarray(images.square(image, 16, "center", None, resize))
        assert (batch["pixels"][0].permute(1, 2, 0).numpy() == want).all(), resize


def test_transparent_images_are_put_on_white():
    rgba = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 8, 16))
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((12, 3))
    for image in (rgba, rgba.convert("LA"), palette):
        flat = images.square(image, 16, "center", random.Random(0))
        assert flat.mode == "RGB"
        assert flat.getpixel((12, 3)) == (255, 255, 255)
        assert flat.getpixel((3, 3)) != (255, 255, 255)


# ------------------------------------------------------------------------------ broken samples

def huge():
    """A small PNG whose header declares 100 megapixels."""
    data = bytearray(png(Image.new("1", (16, 16))))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def reencode(data, format):
    """Re-encode the bytes of a PNG as jpg, webp or png."""
    buffer = io.BytesIO()
    pillow_name = {"jpg": "jpeg"}.get(format, format)
    Image.open(io.BytesIO(data)).save(buffer, pillow_name)
    return bytearray(buffer.getvalue())


def unreadable(data):
    try:
        with warnings.catch_warnings(action="error"):
            Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:
        return True
    return False


def parse_problem(line):
    """(tar name, sample) from a line of batch["bad"] such as "sample 3 of FOLDER/a.tar: reason"."""
    sample, _, rest = line.partition(" of ")
    return Path(rest.split(":")[0]).name, int(sample.removeprefix("sample "))


def test_bad_samples_are_reported_and_replaced(gemma_folder, tmp_path):
    good = png(Image.new("RGB", (16, 16)))
    no_captions = {"synthetic_caption.txt": None, "original_caption.txt": None}
    write_shard(tmp_path / "a.tar", [
        scene("n00"),
        scene("n01", **{"image.png": good[:40]}),
        scene("n02"),
        scene("n03", **{"image.png": None}),
        scene("n04", **{"image.png": b""}),
        scene("n05", **no_captions),
        scene("n06", **{"original_caption.txt": b"\xff\xfe"}),
        scene("n07"),
        scene("n08", **{"image.png": huge()}),
    ])
    write_shard(tmp_path / "b.tar", [scene("n09"), scene("n10")])
    index(tmp_path)
    data = (tmp_path / "b.tar").read_bytes()
    cut = data.index(b"n10.image") + 512 + 40
    (tmp_path / "b.tar").write_bytes(data[:cut])

    batches = tiny_batches(gemma_folder, tmp_path, *ORIGINAL_CAPTIONS, micro_batch=11)
    expected = [("a.tar", i) for i in (1, 3, 4, 5, 6, 8)] + [("b.tar", 1)]
    for epoch in range(3):
        batch = batches[epoch]              # as large as an epoch
        assert len(batch["captions"]) == 11
        assert set(batch_keys(batch)) <= {"n00", "n02", "n07", "n09"}
        assert sorted(parse_problem(line) for line in batch["bad"]) == expected
        assert any("over 90 megapixels" in line for line in batch["bad"])


def damaged_scene(key, rng):
    """(sample, is it unusable) for a scene that is damaged in one of six ways or undamaged."""
    key, files = scene(key, size=(24, 20))
    format = rng.choice(["png", "jpg", "webp"])
    image = reencode(files.pop("image.png"), format)
    damage = rng.choice(["flip", "caption", "image", "zero", "huge", "cut", "none"])
    broken = damage not in ("flip", "none")
    if damage == "flip":
        image[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        broken = unreadable(image)
    elif damage == "caption":
        files = {}
    elif damage == "zero":
        image = b""
    elif damage == "huge":
        image = huge()
    elif damage == "cut":
        image = image[:len(image) // 2]
    if damage != "image":
        files[f"image.{format}"] = bytes(image)
    return (key, files), broken


@pytest.mark.parametrize("offsets, count", [
    (True, 12),
    pytest.param(True, 40, marks=pytest.mark.slow),
    pytest.param(False, 40, marks=pytest.mark.slow),
])
def test_all_kinds_of_damage_are_counted_exactly(gemma_folder, tmp_path, offsets, count):
    """Shards of 50 samples, most of them damaged in different ways; each is reported once."""
    rng = random.Random(0)
    names = [f"s-{s:02d}.tar" for s in range(count)]
    expected = set()
    for s, name in enumerate(names):
        samples = []
        for i in range(50):
            sample, broken = damaged_scene(f"n{50 * s + i:04d}", rng)
            samples.append(sample)
            if broken:
                expected.add((name, i))
        write_shard(tmp_path / name, samples)
    index(tmp_path, offsets)

    for s in (3, 11):                       # truncated
        data = (tmp_path / names[s]).read_bytes()
        cut = data.index(f"n{50 * s + 30:04d}.".encode())
        (tmp_path / names[s]).write_bytes(data[:cut])
        expected |= {(names[s], i) for i in range(30, 50)}
    (tmp_path / names[7]).write_bytes(b"")  # empty
    expected |= {(names[7], i) for i in range(50)}

    batches = tiny_batches(gemma_folder, tmp_path, *ORIGINAL_CAPTIONS, micro_batch=50)
    bad = [parse_problem(line) for m in range(count) for line in batches[m]["bad"]]
    assert len(bad) == len(set(bad))
    assert set(bad) == expected
    assert len(expected) > 25 * count


@pytest.mark.parametrize("sample, message", [
    (scene("a", **{"image.png": b"no image"}), "100 samples in a row"),
    (("a", {"txt": "a cat"}), "no image"),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_usable_samples_is_an_error(gemma_folder, tmp_path, sample, message, workers):
    write_shard(tmp_path / "a.tar", [sample])
    # `prepare_data.py index` refuses the second
    (tmp_path / "index.json").write_text('{"shards": [{"name": "a.tar", "samples": 1}]}')
    batches = tiny_batches(gemma_folder, tmp_path)
    with pytest.raises(FuseDiTError, match=message) as raised:
        next(load_batches(batches, range(9), workers))
    assert "\n" not in str(raised.value)    # no traceback of a worker


# ------------------------------------------------------------------------------ workers

def test_workers_yield_batches_in_order_and_stop(gemma_folder, shards):
    batches = tiny_batches(gemma_folder, shards, *ORIGINAL_CAPTIONS)
    stream = load_batches(batches, range(2, 9), 2)
    keys = [batch_keys(next(stream)) for _ in range(4)]
    assert keys == sample_keys(batches, 6)[2:]
    begin = time.time()
    stream.close()
    assert time.time() - begin < 5


@pytest.mark.parametrize("milliseconds", range(6))
def test_a_dead_worker_is_reported_with_its_cause(gemma_folder, shards, milliseconds):
    """The worker dies at different times; just after its start, it may be transferring a batch."""
    stream = load_batches(tiny_batches(gemma_folder, shards), range(1000), 1)
    next(stream)
    time.sleep(milliseconds / 1000)
    begin = time.time()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.1)                         # nothing is raised during a training step
    with pytest.raises(FuseDiTError, match="a data process died.*--workers"):
        for _ in stream:
            pass
    assert time.time() - begin < 30


def test_a_worker_may_die_while_holding_a_lock(gemma_folder, shards, monkeypatch):
    """The DataLoader's event has a lock; if its owner is dead, setting the event blocks forever."""
    events = []

    def make_event():
        events.append(multiprocessing.Event())
        return events[-1]

    monkeypatch.setattr(torch.multiprocessing, "Event", make_event)
    stream = load_batches(tiny_batches(gemma_folder, shards), range(1000), 2)
    next(stream)
    holder = multiprocessing.Process(target=events[0]._cond.acquire)
    holder.start()
    holder.join()
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(FuseDiTError, match="a data process died"):
        for _ in stream:
            pass
    assert not any(worker.is_alive() for worker in workers)


def test_a_hanging_worker_is_reported(gemma_folder, shards, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batches_module, "SAMPLE_TIMEOUT", 1)
        patch.setattr(batches_module, "decode", lambda *_: time.sleep(60))
        stream = load_batches(tiny_batches(gemma_folder, shards), range(1000), 1)
        with pytest.raises(FuseDiTError, match="a data process died.*a sample or a copy makes no"):
            next(stream)

    # An idle worker may wait for longer than the limit.
    monkeypatch.setattr(batches_module, "SAMPLE_TIMEOUT", 1)
    stream = load_batches(tiny_batches(gemma_folder, shards), range(20), 1)
    next(stream)
    time.sleep(2)
    assert len(list(stream)) == 19

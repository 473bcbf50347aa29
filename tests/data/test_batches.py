"""From shards to batches: each sample once an epoch, at once at any step, whatever is broken."""
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import threading
import time
import warnings
import zlib
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, tiny_gemma
from PIL import Image
from tiny_shards import COLOURS, SHAPE, index, numbered, png, scene, write_shard

from fusedit import FuseDiTError
from fusedit_lib import pretrained
from fusedit_lib.data import batches as batches_module
from fusedit_lib.data import images
from fusedit_lib.data.batches import Batches, load_batches, to_device
from fusedit_lib.data.order import Mixture, Order
from fusedit_lib.data.shards import Tars, expand_shards, read_index, sample_offsets
from fusedit_lib.train.config import model_config, parse_run

PLAIN = ["--caption-drop", "0", "--original-caption-rate", "1"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def shards(tmp_path):
    """3 shards of 8 numbered samples."""
    return numbered(tmp_path / "shards")


@pytest.fixture(autouse=True)
def fresh():
    read_index.cache_clear()


def batches(gemma, data, *argv, micro=4, times=1, rank=0, world=1):
    data = [data] if isinstance(data, str | Path) else data
    run = parse_run(["--base", str(gemma), "--batch", str(micro * times * world), "--set",
                              *SHAPE, *argv, *(["--data", *map(str, data)] if data else [])], "")
    return Batches(run, model_config(run), pretrained.load_tokenizer(gemma), micro,
                          times, rank, world)


def keys(source, n):
    """The numbers of the samples of micro-batches 0 .. n - 1; their captions carry them."""
    return [[c.split()[-1] for c in source[m]["captions"]] for m in range(n)]


# ------------------------------------------------------------------------------ which shards

def test_shard_patterns(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "c[1].tar"):
        write_shard(tmp_path / name, [scene("x")])
    index(tmp_path)

    def found(pattern):
        return [Path(s[0]).name for s in expand_shards(f"{tmp_path}/{pattern}")]
    assert found("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
    assert found(f"a*.tar::{tmp_path}/b*") == ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert found("c[1].tar") == ["c[1].tar"] and len(found("")) == 4
    for wrong in ("{0..2}.tar", "no*.tar"):
        with pytest.raises(FuseDiTError, match="no file matches"):
            found(wrong)


def test_what_is_wrong_with_an_index_is_said_with_its_remedy(gemma, tmp_path):
    write_shard(tmp_path / "a.tar", [scene("x")])
    with pytest.raises(FuseDiTError, match=r"cannot read .*index.json.*prepare_data.py index"):
        expand_shards(str(tmp_path))
    index(tmp_path)
    read_index.cache_clear()
    write_shard(tmp_path / "b.tar", [scene("y")])
    with pytest.raises(FuseDiTError, match=r"does not list b.tar.*prepare_data.py index"):
        expand_shards(str(tmp_path))
    for text in ("[1]", "{", '{"shards": [{"name": "a.tar"}]}'):
        read_index.cache_clear()
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(FuseDiTError, match="cannot read"):
            expand_shards(f"{tmp_path}/a.tar")
    read_index.cache_clear()
    (tmp_path / "index.json").write_text('{"shards": [{"name": "a.tar", "samples": 0}]}')
    with pytest.raises(FuseDiTError, match="counts no samples"):
        expand_shards(f"{tmp_path}/a.tar")
    with pytest.raises(FuseDiTError, match="--data is missing"):
        batches(gemma, [], micro=1)


# ------------------------------------------------------------------------------ in which order

@pytest.mark.parametrize("counts, pool", [([8, 8, 8], 8), ([5, 0, 9, 1, 7], 2), ([13], 4),
                                          ([2] * 9, 1)])
def test_an_epoch_is_every_sample_once_in_a_new_order(counts, pool):
    order, total = Order(counts, 7, pool), sum(counts)
    every = {(s, i) for s, n in enumerate(counts) for i in range(n)}
    epochs = [[order[e * total + p] for p in range(total)] for e in range(3)]
    for epoch in epochs:
        assert set(epoch) == every
    assert epochs[0] != epochs[1] != epochs[2]
    if pool < len(counts):                                  # the shards themselves, too
        assert [s for s, _ in epochs[0]] != [s for s, _ in epochs[1]]
    assert epochs[1] == [Order(counts, 7, pool)[total + p] for p in range(total)]
    assert epochs[0] != [Order(counts, 8, pool)[p] for p in range(total)]


def test_samples_mix_within_a_pool_of_shards():
    order = Order([100] * 8, 0, 2)
    for first in range(0, 800, 200):
        pool = [order[p] for p in range(first, first + 200)]
        assert len({s for s, _ in pool}) == 2               # no more than two shards are open
        assert 30 < sum(s == pool[0][0] for s, _ in pool[:100]) < 70
        assert [i for _, i in pool] != sorted(i for _, i in pool)


def test_data_sets_keep_their_shares_and_their_epochs():
    sets = [[("a", 30, 0, 0)] * 2, [("b", 7, 0, 0)]]
    mix = Mixture(sets, [3.0, 1.0], 5, 8)
    places = [mix[p] for p in range(4000)]
    assert Counter(s == 2 for s, _ in places) == {False: 3000, True: 1000}
    of_b = [i for s, i in places if s == 2]
    for e in range(142):
        assert sorted(of_b[7 * e:7 * e + 7]) == list(range(7))
    near = [sum(s == 2 for s, _ in places[p:p + 100]) for p in range(0, 4000, 100)]
    assert max(near) < 45                                   # spread out, not in a row


def test_the_order_depends_on_the_seed_alone(gemma, shards):
    def global_batches(micro, times, world, n=3, **more):
        parts = {r: iter(keys(batches(gemma, shards, *PLAIN, micro=micro, times=times, rank=r,
                                      world=world), n * times)) for r in range(world)}
        return [sum((next(parts[r]) for _ in range(times) for r in range(world)), [])
                for _ in range(n)]
    whole = global_batches(8, 1, 1)
    assert whole == global_batches(2, 4, 1) == global_batches(2, 2, 2) == global_batches(1, 2, 4)
    assert sorted(sum(whole, [])) == [f"n{i:02d}" for i in range(24)]
    other = keys(batches(gemma, shards, *PLAIN, "--seed", "1", micro=8), 3)
    assert other != whole and sorted(sum(other, [])) == sorted(sum(whole, []))


def test_noise_and_words_belong_to_the_sample(gemma, shards):
    """However a batch is cut up, a place has its own noise, level, crop and caption."""
    argv = ["--caption-drop", "0.5", "--original-caption-rate", "0.5"]
    whole = batches(gemma, shards, *argv, micro=8)[3]
    parts = [batches(gemma, shards, *argv, micro=2, times=2, rank=r, world=2)[6 + i]
             for i in range(2) for r in range(2)]
    for key in ("noise", "normal", "pixels", "ids"):
        assert torch.cat([p[key] for p in parts]).equal(whole[key]), key
    assert whole["noise"].shape == (8, 1, 3, 16, 16)
    assert len({*whole["normal"].tolist()}) == 8
    assert abs(whole["noise"].std() - 1) < 0.05


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_any_step_is_reached_at_once(gemma, tmp_path, known):
    """2,600 shards x 10,000 samples, step 800,000 at batch 512; one tar under many names.

    Also without offsets.npy, when the 16 tars that the batch is of are read for their offsets.
    """
    write_shard(tmp_path / "one.tar", [(f"{i:05d}", {"image.png": b"x", "synthetic_caption.txt":
                                                     "a"}) for i in range(10_000)])
    data = tmp_path / "data"
    data.mkdir()
    for s in range(2600):
        os.link(tmp_path / "one.tar", data / f"s-{s:06d}.tar")
    offsets, size = sample_offsets(tmp_path / "one.tar"), (tmp_path / "one.tar").stat()
    if known:
        np.save(data / "offsets.npy", np.tile(offsets, 2600))
    (data / "index.json").write_text(json.dumps({"shards": [
        dict(name=f"s-{s:06d}.tar", samples=10_000, bytes=size.st_size) for s in range(2600)]}))
    script = (
        "import sys, time, resource\n"
        "from fusedit_lib import pretrained\n"
        "from fusedit_lib.data import batches\n"
        "from fusedit_lib.data.batches import Batches\n"
        "from fusedit_lib.train.config import model_config, parse_run\n"
        "batches.decode = lambda f, run, size, rng: (batches.torch.zeros(3, 16, 16).byte(), 'a')\n"
        "begin = time.time()\n"
        "run = parse_run(sys.argv[1:], '')\n"
        "source = Batches(run, model_config(run),\n"
        "                        pretrained.load_tokenizer(run.base), 512)\n"
        "batch = source[800_000]\n"
        "assert len(batch['captions']) == 512 and not batch['bad']\n"
        "print(time.time() - begin,\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n")
    done = warm.run(["-c", script, "--data", data, "--base", gemma, "--batch", "512", "--set",
                     *SHAPE], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    seconds, gigabytes = map(float, done.stdout.split())
    print(seconds, gigabytes)
    assert seconds < 10 and gigabytes < 1


# ------------------------------------------------------------------------------ to which batch

def test_a_batch_is_what_the_shards_hold(gemma, shards):
    b = batches(gemma, shards, "--caption-drop", "0")[0]
    assert b["pixels"].shape == (4, 3, 16, 16) and b["pixels"].dtype == torch.uint8
    assert not b["bad"]
    assert b["ids"].shape == b["mask"].shape == (4, 8)      # always max_text_tokens wide
    for pixels, caption, mask in zip(b["pixels"], b["captions"], b["mask"], strict=True):
        colour = torch.tensor(COLOURS[caption.split()[1]], dtype=torch.uint8)
        assert caption == f"a {caption.split()[1]} square" and mask.sum() == 4
        assert (pixels == colour[:, None, None]).all()
    x, ids, mask, clip, normal, noise = to_device(b, "cpu")
    assert ids is b["ids"] and mask is b["mask"] and normal is b["normal"] and clip is None
    assert len(noise) == 1 and noise[0].equal(b["noise"][:, 0])
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1 and x.is_contiguous()


def test_offsets_make_no_difference_but_in_time(gemma, shards):
    known = keys(batches(gemma, shards, *PLAIN), 6)
    (shards / "offsets.npy").unlink()
    assert keys(batches(gemma, shards, *PLAIN), 6) == known
    assert keys(batches(gemma, f"{shards}/s-1.tar", *PLAIN, micro=8), 1)[0] != []


def test_a_part_of_a_folder_finds_its_offsets(gemma, shards):
    some = keys(batches(gemma, f"{shards}/s-{{1,2}}.tar", *PLAIN, micro=16), 1)[0]
    assert sorted(some) == [f"n{i:02d}" for i in range(8, 24)]


def test_long_names_and_folders_in_a_tar(tmp_path):
    long = "a" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key in (f"folder/{long}", "folder/short"):
            for ext in ("image.png", "synthetic_caption.txt"):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = 3
                tar.addfile(info, io.BytesIO(key[-3:].encode()))
    assert len(sample_offsets(tmp_path / "a.tar")) == 3
    tars = Tars([(str(tmp_path / "a.tar"), 2, None, None, 0)], 2, "")
    assert tars.read(0, 0) == {"image.png": b"aaa", "synthetic_caption.txt": b"aaa"}
    assert tars.read(0, 1) == {"image.png": b"ort", "synthetic_caption.txt": b"ort"}


def test_captions_are_chosen_and_dropped_by_rate(gemma, shards):
    source = batches(gemma, shards, "--caption-drop", "0.25", "--original-caption-rate", "0.5",
                     micro=300)
    kinds = Counter("empty" if not c else "original" if " of " in c else "synthetic"
                    for m in range(4) for c in source[m]["captions"])
    assert abs(kinds["empty"] / 1200 - 0.25) < 0.04
    assert abs(kinds["original"] / 1200 - 0.375) < 0.05


def test_cropping(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = (255, 0, 0)            # the middle square is red
    rng, image = random.Random(0), Image.fromarray(wide)
    middle = np.asarray(images.square(image, 16, "center", rng))
    assert middle.shape == (16, 16, 3) and (middle[:, 1:-1] == (255, 0, 0)).all()
    tall = np.asarray(images.square(image.transpose(Image.Transpose.ROTATE_90), 16, "center", rng))
    assert (tall[1:-1] == (255, 0, 0)).all()
    seen = {float(np.asarray(images.square(image, 16, "random", rng))[..., 0].mean())
            for _ in range(20)}
    assert len(seen) > 5                    # squares from everywhere
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    assert images.square(noise, 16, "center", rng).tobytes() == noise.tobytes()
    assert images.square(Image.new("L", (5, 9), 7), 16, "random", rng).getpixel((3, 3)) == (7,) * 3


def test_transparent_pictures_stand_on_white():
    rgba = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 8, 16))
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((12, 3))
    for image in (rgba, rgba.convert("LA"), palette):
        flat = images.square(image, 16, "center", random.Random(0))
        assert flat.mode == "RGB" and flat.getpixel((12, 3)) == (255, 255, 255)
        assert flat.getpixel((3, 3)) != (255, 255, 255)


# ------------------------------------------------------------------------------ what is broken

def huge():
    """A small PNG whose header says 100 megapixels."""
    data = bytearray(png(Image.new("1", (16, 16))))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def picture_in(data, format):
    """A PNG's bytes in another format."""
    box = io.BytesIO()
    Image.open(io.BytesIO(data)).save(box, {"jpg": "jpeg"}.get(format, format))
    return bytearray(box.getvalue())


def unreadable(data):
    try:
        with warnings.catch_warnings(action="error"):
            Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:
        return True


def test_bad_samples_are_named_and_others_stand_in(gemma, tmp_path):
    good = png(Image.new("RGB", (16, 16)))
    write_shard(tmp_path / "a.tar", [
        scene("n00"), scene("n01", **{"image.png": good[:40]}), scene("n02"),
        scene("n03", **{"image.png": None}), scene("n04", **{"image.png": b""}),
        scene("n05", **{"synthetic_caption.txt": None, "original_caption.txt": None}),
        scene("n06", **{"original_caption.txt": b"\xff\xfe"}), scene("n07"),
        scene("n08", **{"image.png": huge()})])
    write_shard(tmp_path / "b.tar", [scene("n09"), scene("n10")])
    index(tmp_path)
    cut = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(cut[:cut.index(b"n10.image") + 512 + 40])
    source = batches(gemma, tmp_path, *PLAIN, micro=11)
    for m in range(3):                                      # each is an epoch
        batch = source[m]
        assert len(batch["captions"]) == 11
        assert {c.split()[-1] for c in batch["captions"]} <= {"n00", "n02", "n07", "n09"}
        named = sorted((b.split(" of ")[0], Path(b.split(" of ")[1].split(":")[0]).name)
                       for b in batch["bad"])
        assert named == [("sample 1", "a.tar"), ("sample 1", "b.tar")] + [
            (f"sample {i}", "a.tar") for i in (3, 4, 5, 6, 8)]
        assert any("exceeds limit" in b for b in batch["bad"])


@pytest.mark.parametrize("offsets, shards", [
    (True, 12), *(pytest.param(known, 40, marks=pytest.mark.slow) for known in (True, False))])
def test_flipped_bytes_and_cut_tars_are_counted_exactly(gemma, tmp_path, offsets, shards):
    """Shards of 50 samples, most of them broken, in every way; none hangs or is missed."""
    rng, expected = random.Random(0), set()
    for s in range(shards):
        samples = []
        for i in range(50):
            key, files = scene(f"n{50 * s + i:04d}", size=(24, 20))
            picture, kind = picture_in(files.pop("image.png"), format := rng.choice(
                ["png", "jpg", "webp"])), rng.choice(["flip", "caption", "image", "zero", "huge",
                                                      "cut", "none"])
            if kind == "flip":
                picture[rng.randrange(len(picture))] ^= 1 << rng.randrange(8)
                if unreadable(picture):
                    kind = "unreadable"
            if kind == "caption":
                files = {}
            if kind != "image":
                files[f"image.{format}"] = {
                    "zero": b"", "huge": huge(), "cut": picture[:len(picture) // 2]}.get(
                        kind, bytes(picture))
            if kind not in ("flip", "none"):
                expected.add((s, i))
            samples.append((key, files))
        write_shard(tmp_path / f"s-{s:02d}.tar", samples)
    index(tmp_path, offsets)
    for s in (3, 11):                                       # cut, and one that is gone
        data = (tmp_path / f"s-{s:02d}.tar").read_bytes()
        at = data.index(f"n{50 * s + 30:04d}.".encode())
        (tmp_path / f"s-{s:02d}.tar").write_bytes(data[:at])
        expected |= {(s, i) for i in range(30, 50)}
    (tmp_path / "s-07.tar").write_bytes(b"")
    expected |= {(7, i) for i in range(50)}
    source = batches(gemma, tmp_path, *PLAIN, micro=50)
    bad = [b for m in range(shards) for b in source[m]["bad"]]
    found = [(int(Path(b.split(" of ")[1].split(": ")[0]).stem[2:]), int(b.split()[1]))
             for b in bad]
    assert len(found) == len(set(found)) and set(found) == expected
    assert len(expected) > 25 * shards


@pytest.mark.parametrize("samples, says", [
    ([scene("a", **{"image.png": b"no picture"})], "100 samples in a row"),
    ([("a", {"txt": "a cat"})], "no image")])
@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_holds_nothing_is_an_error(gemma, tmp_path, samples, says, workers):
    write_shard(tmp_path / "a.tar", samples)
    index(tmp_path)
    source = batches(gemma, tmp_path)
    with pytest.raises(FuseDiTError, match=says) as e:
        next(load_batches(source, range(9), workers))
    assert "\n" not in str(e.value)         # no worker's traceback in it


def test_workers_give_the_batches_in_order_and_end(gemma, shards):
    source = batches(gemma, shards, *PLAIN)
    made = load_batches(source, range(2, 9), 2)
    assert [[c.split()[-1] for c in next(made)["captions"]] for _ in range(4)] == keys(source,
                                                                                        6)[2:]
    begin = time.time()
    made.close()
    assert time.time() - begin < 5


@pytest.mark.parametrize("time_until", range(6))
def test_a_dead_worker_is_an_error_with_its_cause(gemma, shards, time_until):
    """At whatever moment: at once it may be in the middle of handing over a batch."""
    made = load_batches(batches(gemma, shards), range(1000), 1)
    next(made)
    time.sleep(time_until / 1000)
    begin = time.time()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.1)                         # during a training step nothing is raised
    with pytest.raises(FuseDiTError, match="a data process died.*--workers"):
        for _ in made:
            pass
    assert time.time() - begin < 30


def test_a_worker_may_die_with_a_lock_in_its_hands(gemma, shards, monkeypatch):
    """torch's event has one: whoever asks the event after that waits forever."""
    events = []
    monkeypatch.setattr(torch.multiprocessing, "Event", lambda: events.append(
        multiprocessing.Event()) or events[-1])
    made = load_batches(batches(gemma, shards), range(1000), 2)
    next(made)
    takes = multiprocessing.Process(target=events[0]._cond.acquire)
    takes.start()
    takes.join()
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(FuseDiTError, match="a data process died"):
        for _ in made:
            pass
    assert not any(worker.is_alive() for worker in workers)


def test_a_worker_that_hangs_is_an_error(gemma, shards, monkeypatch):
    monkeypatch.setattr(batches_module, "HANGS", 1)
    monkeypatch.setattr(batches_module, "decode", lambda *_: time.sleep(60))
    made = load_batches(batches(gemma, shards), range(1000), 1)
    with pytest.raises(FuseDiTError, match="a data process died.*did a batch take over"):
        next(made)
    monkeypatch.undo()                      # one that has nothing to do may wait for long
    monkeypatch.setattr(batches_module, "HANGS", 1)
    made = load_batches(batches(gemma, shards), range(20), 1)
    next(made)
    time.sleep(2)
    assert len(list(made)) == 19


# ------------------------------------------------------------------------------ remote shards

@pytest.fixture
def server(shards):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)
    asked = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=shards))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()


def test_remote_shards_are_copied_once_and_bounded(gemma, shards, server, tmp_path):
    url, asked = server
    argv = [*PLAIN, "--cache", str(tmp_path / "cache"), "--mix-shards", "1"]
    near = keys(batches(gemma, shards, *PLAIN, "--mix-shards", "1"), 6)
    assert keys(batches(gemma, f"{url}/s-{{0..2}}.tar", *argv), 6) == near
    assert keys(batches(gemma, f"{url}/", *argv), 6) == near        # the whole folder
    assert sorted(p for p in asked if p.endswith("tar")) == [f"/s-{i}.tar" for i in range(3)]
    for i in range(5):                      # copies of another run
        (tmp_path / "cache" / f"{i}.tar").touch()
        os.utime(tmp_path / "cache" / f"{i}.tar", (i, i))
    (shards / "s-0.tar").rename(shards / "t-0.tar")
    index(shards)
    read_index.cache_clear()
    assert len(keys(batches(gemma, f"{url}/", *argv), 6)) == 6
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 4


def test_what_a_server_does_not_give_is_named(gemma, shards, server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(FuseDiTError, match="cannot read .*none/index.json"):
        expand_shards(f"{url}/none/a.tar")
    (shards / "s-1.tar").write_bytes((shards / "s-1.tar").read_bytes()[:2048])
    source = batches(gemma, f"{url}/", *PLAIN, "--cache", str(tmp_path / "cache"), micro=24)
    bad = source[0]["bad"]
    assert len(bad) == 8 and all("2048 of" in b and "s-1.tar" in b for b in bad)
    assert not list((tmp_path / "cache").glob("*.tmp"))

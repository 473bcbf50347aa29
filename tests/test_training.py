"""Run settings, loader, EMA, checkpoints; and the real launcher, as processes on a CPU."""
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_gemma
from PIL import Image
from safetensors.torch import load_file

import loader
import training
import weights
from fusedit import FuseDiTError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SHAPE = ["image_size=16", "patch_size=4", "dit_hidden_size=32", "initial_layers=0",
         "dit_num_hidden_layers=null", "max_text_tokens=8",
         "sandwich_norm=true", "timestep_conditioning=null"]    # as the paper's final model


def png(image):
    box = io.BytesIO()
    image.save(box, "png")
    return box.getvalue()


def write_shard(path, samples):
    """samples: (key, {extension: bytes or str})"""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for ext, content in files.items():
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def scene(key, colour="red", size=(16, 16), **changes):
    files = {"image.png": png(Image.new("RGB", size, COLOURS[colour])),
             "synthetic_caption.txt": f"a {colour} square",
             "original_caption.txt": f"{colour} of {key}"}
    return key, {k: v for k, v in (files | changes).items() if v is not None}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def shards(tmp_path):
    """3 shards of 8 numbered samples."""
    for s in range(3):
        write_shard(tmp_path / f"s-{s}.tar", [
            scene(f"n{8 * s + i:02d}", list(COLOURS)[i % 3]) for i in range(8)])
    return tmp_path


def batches(gemma, data, *argv, rank=0, world=1, start=0, micro=4):
    run = training.parse_run(["--data", str(data), "--base", str(gemma), "--set", *SHAPE, *argv],
                             "")
    config = training.model_config(run)
    tokenizer = weights.load_tokenizer(gemma)
    return loader.Batches(run, config, tokenizer, micro, rank, world, start)


def keys(source, n):
    """The numbers of the next n samples; their original captions carry them."""
    captions = itertools.chain.from_iterable(b["captions"] for b in source)
    return [c.split()[-1] for c in itertools.islice(captions, n)]


PLAIN = ["--caption-drop", "0", "--original-caption-rate", "1", "--workers", "0"]

# ------------------------------------------------------------------------------ run settings


def test_every_setting_is_a_flag_with_its_comment_and_default():
    out = subprocess.run([sys.executable, ROOT / "train_gpu.py", "--help"], text=True,
                         capture_output=True, check=True).stdout
    for f in fields(training.RunConfig):
        assert f"--{f.name.replace('_', '-')} " in out or f"--{f.name}," in out, f.name
        assert f.metadata["about"] in out
        if type(f.default) in (int, float):
            assert f"{f.metadata['about']} ({f.default})" in out


@pytest.mark.parametrize("argv, says", [
    (["--steps", "0"], "at least 1"), (["--caption-drop", "1.5"], "from 0 to 1"),
    (["--crop", "left"], "invalid choice"), (["--lr", "fast"], "invalid float"),
    (["--lr", "nan"], "at least 0"), (["--fast"], "unrecognized")])
def test_bad_flags_are_usage_errors(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse_run(argv, "")
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [
    (["--preset", "fusedit/2d-ropes"], "2d-rope"), (["--set", "patch_size"], "field=value"),
    (["--set", "patchsize=2"], "patch_size"), (["--set", "patch_size=two"], "patch_size"),
    (["--set", "patch_size=4", "--image-size", "30"], "28 or 32")])
def test_bad_models_are_named(argv, says):
    with pytest.raises(FuseDiTError, match=re.escape(says)):
        training.model_config(training.parse_run(argv, ""))


def test_overrides_reach_the_model(tmp_path, monkeypatch):
    (tmp_path / "gemma").mkdir()
    monkeypatch.chdir(tmp_path)
    run = training.parse_run(["--set", "patch_size=2", "pos_embed=ape", "shift=3", "--set",
                              "qk_norm=false", "--image-size", "32", "--base", "gemma"], "")
    c = training.model_config(run)
    assert (c.patch_size, c.pos_embed, c.shift, c.qk_norm, c.image_size) == (2, "ape", 3, False, 32)
    assert c.base == str(tmp_path / "gemma")    # absolute: sample.py may run anywhere
    hub = training.model_config(training.parse_run(["--preset", "fusedit"], ""))
    assert hub.base == "google/gemma-2-2b"


def test_prompts_come_from_flags_and_files(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\na star\n")
    run = training.parse_run(["--prompts", "a square", str(tmp_path / "p.txt")], "")
    assert run.prompts == ["a square", "a red circle", "a star"]
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FuseDiTError, match="UTF-8"):
        training.parse_run(["--prompts", str(tmp_path / "p.txt")], "")


def test_batch_arithmetic():
    def split(batch, micro, world):
        run = training.RunConfig(batch=batch, micro_batch=micro)
        return training.split_batch(run, world)
    assert split(512, 0, 8) == (64, 1)
    assert split(512, 16, 8) == (16, 4)
    assert split(6, 2, 3) == (2, 1)
    with pytest.raises(FuseDiTError, match=r"--batch 504 or 528 would, or --micro-batch 2"):
        split(512, 3, 8)
    with pytest.raises(FuseDiTError, match=r"--batch 9 or 12 would$"):
        split(10, 0, 3)
    with pytest.raises(FuseDiTError, match=r"--batch 4 would$"):
        split(2, 0, 4)


def test_learning_rate():
    run = training.RunConfig(lr=1.0, warmup_steps=4, steps=12, lr_schedule="cosine")
    rates = [training.learning_rate(run, i) for i in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[8] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    run = training.RunConfig(lr=1.0, warmup_steps=2)
    assert [training.learning_rate(run, i) for i in (0, 1, 9, 10 ** 6)] == [0.5, 1, 1, 1]


def test_ema_formula():
    ema = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        ema.weight.fill_(1.0)
    expected = 1.0
    for n, value in enumerate([2.0, 5.0, -1.0, 4.0]):
        rate = min(0.2, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * value
        training.update_ema(ema, [("weight.weight", torch.tensor([[value]]))], n, 0.2)
        assert ema.weight.item() == pytest.approx(expected, rel=1e-6)
    assert rate == 0.2                      # the last updates were past the warm-up
    training.update_ema(None, iter([("weight.weight", None)]), 0, 0.9)  # another rank


def test_a_loss_that_is_no_number_names_its_step(tmp_path):
    run = training.RunConfig(out=str(tmp_path))
    training.check_losses(run, [1.0, 2.0], 10)
    with pytest.raises(FuseDiTError, match="loss of step 9 is nan.*checkpoint: none"):
        training.check_losses(run, [1.0, float("nan"), 2.0], 10)


# ------------------------------------------------------------------------------ loader

def test_shard_patterns(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "c[1].tar"):
        (tmp_path / name).touch()

    def found(*patterns):
        return [Path(s).name for s in loader.expand_shards([f"{tmp_path}/{p}" for p in patterns])]
    assert found("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
    assert found("a*.tar", "b*") == ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert found("c[1].tar") == ["c[1].tar"] and len(found("")) == 4
    assert loader.expand_shards([f"{tmp_path}/b-0.tar::http://x/{{1..2}}.tar"])[1:] == [
        "http://x/1.tar", "http://x/2.tar"]
    for wrong in (["{0..2}.tar"], ["no*.tar"]):
        with pytest.raises(FuseDiTError, match="no file matches"):
            found(*wrong)
    with pytest.raises(FuseDiTError, match="--data is missing"):
        loader.expand_shards([])


def test_a_batch_is_what_the_shards_hold(gemma, shards):
    b = next(iter(batches(gemma, shards, "--caption-drop", "0", "--workers", "0")))
    assert b["pixels"].shape == (4, 3, 16, 16) and b["pixels"].dtype == torch.uint8
    assert b["pixels"].is_contiguous() and b["skipped"] == 0
    assert b["ids"].shape == b["mask"].shape == (4, 8)      # always max_text_tokens wide
    for pixels, caption, mask in zip(b["pixels"], b["captions"], b["mask"], strict=True):
        colour = torch.tensor(COLOURS[caption.split()[1]], dtype=torch.uint8)
        assert caption == f"a {caption.split()[1]} square" and mask.sum() == 4
        assert (pixels == colour[:, None, None]).all()
    x, ids, mask = loader.to_device(b, "cpu")
    assert ids is b["ids"] and mask is b["mask"]
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1


def test_captions_are_chosen_and_dropped_by_rate(gemma, shards):
    source = batches(gemma, shards, "--caption-drop", "0.25", "--original-caption-rate", "0.5",
                     "--workers", "0", micro=300)
    kinds = Counter("empty" if not c else "original" if " of " in c else "synthetic"
                    for b in itertools.islice(source, 4) for c in b["captions"])
    assert abs(kinds["empty"] / 1200 - 0.25) < 0.04
    assert abs(kinds["original"] / 1200 - 0.375) < 0.05


def test_cropping(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = (255, 0, 0)            # the middle square is red
    rng, image = random.Random(0), Image.fromarray(wide)
    middle = np.asarray(loader.square(image, 16, "center", rng))
    assert middle.shape == (16, 16, 3) and (middle[:, 1:-1] == (255, 0, 0)).all()
    tall = np.asarray(loader.square(image.transpose(Image.Transpose.ROTATE_90), 16, "center", rng))
    assert (tall[1:-1] == (255, 0, 0)).all()
    seen = {float(np.asarray(loader.square(image, 16, "random", rng))[..., 0].mean())
            for _ in range(20)}
    assert len(seen) > 5                    # squares from everywhere
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    assert loader.square(noise, 16, "center", rng).tobytes() == noise.tobytes()
    assert loader.square(Image.new("L", (5, 9), 7), 16, "random", rng).getpixel((3, 3)) == (7,) * 3


def test_transparent_pictures_stand_on_white():
    rgba = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 8, 16))
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((12, 3))
    for image in (rgba, rgba.convert("LA"), palette):
        flat = loader.square(image, 16, "center", random.Random(0))
        assert flat.mode == "RGB" and flat.getpixel((12, 3)) == (255, 255, 255)
        assert flat.getpixel((3, 3)) != (255, 255, 255)


@pytest.mark.parametrize("streams", [1, 2, 3, 5])      # 3 shards: more, as many, fewer
def test_an_epoch_reads_every_sample_once(shards, streams):
    paths = loader.expand_shards([str(shards)])
    epochs = []
    for seed in (1, 2):
        seen = []
        for s in range(streams):
            units = -(-streams // 3) * 3
            share = sum(8 // (units // 3) for _ in range(s, units, streams))
            raw = loader.read_samples(paths, s, streams, seed, lambda e: pytest.fail(str(e)))
            seen += [sample["__key__"] for sample in itertools.islice(raw, share)]
        epochs.append(seen)
        assert sorted(seen) == [f"n{i:02d}" for i in range(24)]
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_ranks_times_workers_alone(gemma, shards, monkeypatch):
    def read(ranks, workers, **more):
        """Micro-batches 0, 1, ... of the run, each from the rank and worker whose turn it is."""
        streams = {}
        for rank, worker in itertools.product(range(ranks), range(workers)):
            info = SimpleNamespace(id=worker, num_workers=workers)
            monkeypatch.setattr(loader, "get_worker_info", lambda info=info: info)
            found = keys(batches(gemma, shards, *PLAIN, rank=rank, world=ranks, **more), 12)
            streams[rank, worker] = [found[i:i + 4] for i in range(0, 12, 4)]
        return [streams[m % ranks, m // ranks % workers][m // (ranks * workers)]
                for m in range(3 * ranks * workers)]
    four = read(1, 4)
    assert four == read(2, 2) == read(4, 1) != read(2, 1)
    assert len({tuple(batch) for batch in four}) == 12
    assert read(1, 4, start=7) != four      # a resumed run does not begin anew
    assert four[0] != keys(batches(gemma, shards, *PLAIN, "--seed", "1", world=4), 4)


def test_bad_samples_are_skipped_and_counted(gemma, tmp_path, capfd):
    good = png(Image.new("RGB", (16, 16)))
    write_shard(tmp_path / "a.tar", [
        scene("n00"), scene("n01", **{"image.png": good[:40]}), scene("n02"),
        scene("n03", **{"image.png": None}), scene("n04", **{"image.png": b""}),
        scene("n05", **{"synthetic_caption.txt": None, "original_caption.txt": None}),
        scene("n06", **{"original_caption.txt": b"\xff\xfe"}), scene("n07")])
    write_shard(tmp_path / "b.tar", [scene("n08"), scene("n09")])
    cut = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(cut[:cut.index(b"n09.image") + 512 + 40])
    source = iter(batches(gemma, tmp_path, *PLAIN, "--shuffle", "1", micro=40))
    found = [next(source) for _ in range(3)]
    names = {c.split()[-1] for b in found for c in b["captions"]}
    assert names == {"n00", "n02", "n07", "n08"}
    epochs = 120 / 4                        # each has 5 bad samples, a cut one, and the cut
    assert abs(sum(b["skipped"] for b in found) - 7 * epochs) < 15
    err = capfd.readouterr().err
    assert "n01" in err or "n03" in err


@pytest.mark.parametrize("samples, says", [
    ([], "no samples in"), ([scene("a", **{"image.png": b"no picture"})], "1000 samples in a row"),
    ([("a", {"txt": "a cat"})], "no image")])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_data_that_holds_nothing_is_an_error(gemma, tmp_path, samples, says, workers):
    write_shard(tmp_path / "a.tar", samples)
    source = batches(gemma, tmp_path, "--workers", workers)
    with pytest.raises(FuseDiTError, match=says) as e:
        next(loader.load_batches(source, int(workers), pin=False))
    assert "\n" not in str(e.value)         # no worker's traceback in it


def test_workers_give_the_streams_in_turn_and_end(gemma, shards):
    made = loader.load_batches(batches(gemma, shards, *PLAIN), 2, pin=False)
    four = [[c.split()[-1] for c in next(made)["captions"]] for _ in range(4)]
    pair = [keys(batches(gemma, shards, *PLAIN, rank=r, world=2), 8) for r in range(2)]
    assert four == [pair[0][:4], pair[1][:4], pair[0][4:], pair[1][4:]]
    begin = time.time()
    made.close()
    assert time.time() - begin < 5


# ------------------------------------------------------------------------------ run folder

@pytest.fixture
def folder(tmp_path, gemma):
    run = training.parse_run(["--out", str(tmp_path / "run"), "--base", str(gemma), "--set",
                              *SHAPE, "--keep", "2"], "")
    config = training.model_config(run)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(training.settings(run, config))
    return run, config


def test_checkpoints_are_whole_or_absent(folder, monkeypatch):
    run, config = folder
    out, tensors = Path(run.out), {"w": torch.ones(3)}
    assert training.open_run(run, config) is None
    for step in (1, 2, 3):
        training.save_checkpoint(run, config, step, tensors, tensors)
    assert sorted(p.name for p in out.glob("step-*")) == ["step-0000002", "step-0000003"]
    assert training.open_run(run, config) == out / "step-0000003"

    def fail(*_):
        raise OSError(28, "No space left on device")
    for broken in ("training.save_file", "training.os.replace"):
        with monkeypatch.context() as m:
            m.setattr(broken, fail)
            with pytest.raises(OSError):
                training.save_checkpoint(run, config, 4, tensors, tensors)
        assert training.open_run(run, config) == out / "step-0000003"
        assert not (out / "step-0000004").exists()
    training.save_checkpoint(run, config, 4, {"w": torch.zeros(3)}, tensors)
    assert not list(out.glob(".step*")) and not list(out.rglob("*.tmp"))
    saved = training.load_checkpoint(training.open_run(run, config))
    file, name = saved.ema["w"]
    assert saved.step == 4 and (file.get_tensor(name) == 0).all() and "w" in saved.state


def test_a_model_folder_is_no_run(folder):
    run, config = folder
    weights.save_model(run.out, config, {})
    with pytest.raises(FuseDiTError, match="holds a model, not a run"):
        training.open_run(run, config)


def test_the_folder_of_another_run_is_refused(folder):
    run, config = folder
    training.save_checkpoint(run, config, 5, {}, {})
    run.lr, run.steps, run.workers = 0.5, 7, 1          # the latter two may change
    other = training.replace(config, pos_embed="ape")
    with pytest.raises(FuseDiTError) as e:
        training.open_run(run, other)
    assert "run.lr was 0.0001, is 0.5" in str(e.value)
    assert "model.pos_embed was '2d-rope', is 'ape'" in str(e.value)
    assert "steps" not in str(e.value) and "workers" not in str(e.value)
    run.lr = 1e-4
    training.open_run(run, training.replace(config, guidance=2.0))      # of the samples alone
    (Path(run.out) / "latest").write_text("step-0000009\n")
    with pytest.raises(FuseDiTError, match="step-0000009, which is not there"):
        training.open_run(run, config)


# ------------------------------------------------------------------------------ the launcher

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shards of one sample, over and over: the order of data then makes no difference."""
    where = tmp_path_factory.mktemp("data")
    for s in range(2):
        write_shard(where / f"s-{s}.tar", [scene(f"n{i}", "blue") for i in range(8)])
    return where


def flags(gemma, data, out, *more):
    return ["--data", str(data), "--base", str(gemma), "--out", str(out), "--set", *SHAPE,
            "--batch", "8", "--lr", "3e-3", "--workers", "1", "--log-every", "1", "--prompts",
            "a blue square", "a star", "--sample-steps", "2", "--dtype", "float32",
            "--caption-drop", "0", *more]


def launch(argv, *launcher, check=True, **more):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, ROOT / "train_gpu.py", *argv], text=True,
                          capture_output=True, env=env, timeout=300, **more)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_saves_and_goes_on(gemma, data, tmp_path):
    out, more = tmp_path / "run", ("--save-every", "20", "--sample-every", "20", "--ema-every", "5")
    first = launch(flags(gemma, data, out, "--steps", "40", *more))
    assert "step 40/40" in first.stdout and not first.stderr
    rows = metrics(out)
    assert [r["step"] for r in rows] == list(range(1, 41))
    assert np.mean([r["loss"] for r in rows[-5:]]) < 0.8 * np.mean([r["loss"] for r in rows[:5]])
    assert (out / "latest").read_text() == "step-0000040\n"
    with Image.open(out / "samples" / "step-0000040.png") as grid:
        assert grid.size[0] > 32
    model = weights.load_model(out)         # the whole run folder, its EMA
    raw = load_file(out / "step-0000040" / "train_state" / "state.safetensors")
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.dit.state_dict()[name], raw[f"weight.{name}"])
    assert model.config.base == str(gemma)

    second = launch(flags(gemma, data, out, "--steps", "44", *more))
    assert "from step 40 to 44" in second.stdout
    rows = metrics(out)
    assert [r["step"] for r in rows] == list(range(1, 45))
    assert np.mean([r["loss"] for r in rows[40:]]) < 1.1 * np.mean([r["loss"] for r in rows[34:40]])

    other = launch(flags(gemma, data, out, "--steps", "50", "--seed", "1", *more), check=False)
    assert other.returncode == 1 and "run.seed was 42, is 1" in other.stderr
    assert other.stderr.count("\n") == 1


def test_what_goes_wrong_is_one_line(gemma, data, tmp_path):
    done = launch(flags(gemma, data, tmp_path / "a", "--lr", "1e30", "--steps", "9", "--log-every",
                        "4", "--max-grad-norm", "0"), check=False)
    assert done.returncode == 1 and re.search(r"loss of step [2-9] is (nan|inf)", done.stderr)
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("a/step-*"))
    done = launch(flags(gemma, tmp_path / "none-*.tar", tmp_path / "b"), check=False)
    assert done.returncode == 1 and "no file matches" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "b").exists()
    if not torch.cuda.is_available():
        done = launch(flags(gemma, data, tmp_path / "c", "--device", "cuda"), check=False)
        assert done.returncode == 1 and "--device cuda" in done.stderr
        assert done.stderr.count("\n") == 1


def test_two_processes_do_what_one_does(gemma, shards, tmp_path):
    """Same global batch; micro-batches of 2 have their data and noise whoever computes them."""
    more = ("--steps", "6", "--micro-batch", "2", "--caption-drop", "0.3", "--ema-every", "2")
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"

    def swapped(name):
        return flags(gemma, shards, tmp_path / name, *more, "--steps", "7")
    launch(flags(gemma, shards, tmp_path / "one", *more, "--workers", "2"))
    launch(flags(gemma, shards, tmp_path / "two", *more, "--workers", "1"), *torchrun)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = (weights.load_model(tmp_path / name).dit.state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    # and each goes on as the other: one rank from two ranks' checkpoint, two from one's
    launch([*swapped("two"), "--workers", "2"])
    launch([*swapped("one"), "--workers", "1"], *torchrun)
    one, two = (metrics(tmp_path / name)[-1] for name in ("one", "two"))
    assert one["step"] == two["step"] == 7
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


SEVERAL = """
import json, sys, torch.distributed as dist, train_gpu
init = dist.init_process_group
dist.init_process_group = lambda *a, **k: dist.is_initialized() or init(*a, **k)
dist.destroy_process_group = lambda: None
for argv in json.loads(sys.argv[1]):
    sys.argv = ["train_gpu.py", *argv]
    assert train_gpu.main() == 0
"""


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_resumed_run_equals_one_never_stopped(gemma, data, tmp_path, dtype):
    """Every ZeRO stage, to the bit; and a checkpoint of one stage goes on in another."""
    def job(name, steps, zero, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", str(zero),
                     "--ema-every", "1", "--workers", "0", "--dtype", dtype, "--sample-every",
                     "100", *more)
    jobs = [job("mixed", 2, 1), job("mixed", 3, 3), job("mixed", 4, 2),
            job("remat", 4, 1, "--remat")]
    for z in range(4):
        jobs += [job(f"a{z}", 4, z), job(f"b{z}", 2, z), job(f"b{z}", 4, z)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SEVERAL, json.dumps(jobs)], env=env, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    def state(name):
        where = tmp_path / name / "step-0000004"
        return load_file(where / "model.safetensors") | load_file(
            where / "train_state" / "state.safetensors")
    for z in range(4):
        a, b = state(f"a{z}"), state(f"b{z}")
        assert all(torch.equal(a[k], b[k]) for k in a), z
    first = state("a1")
    for name in ("a2", "a3", "mixed", "remat") + ("a0",) * (dtype == "float32"):
        other, near = state(name), 1e-6 if dtype == "float32" else 1e-3
        assert first.keys() == other.keys()
        assert all(torch.allclose(first[k], other[k], atol=near) for k in first), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(gemma, data, tmp_path, number):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = flags(gemma, data, tmp_path, "--steps", "100000", "--log-every", "5")
    process = subprocess.Popen([sys.executable, ROOT / "train_gpu.py", *argv], text=True, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.killpg(process.pid, number)  # as a terminal or a launcher does, workers included
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    last = (tmp_path / "latest").read_text().strip()
    assert metrics(tmp_path)[-1]["step"] == int(last[5:]) and (tmp_path / last).is_dir()

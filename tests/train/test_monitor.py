"""The counts of skipped steps and samples, and the model FLOPs utilisation (MFU)."""
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import assert_equal, flags, launch, launch_all, metrics, state
from PIL import Image
from tiny_shards import index, numbered, sample_names, scene, write_shard

from fusedit_lib import pretrained
from fusedit_lib.data.batches import Batches
from fusedit_lib.train import costs, hardware, monitor, validation, xla
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

# Makes the noise levels, and therefore the loss, of the steps BAD NaN.
POISON = """
real_sigma = fusedit.logit_normal_sigma
step = -1
def poisoned(normal, shift):
    global step
    step += 1
    sigma = real_sigma(normal, shift)
    if step in BAD:
        sigma = sigma * float("nan")
    return sigma
fusedit.logit_normal_sigma = poisoned
"""


def poison(*steps):
    """Code that makes the loss of these steps, counted from 0, NaN."""
    return POISON.replace("BAD", str(steps))


# A finite loss with a gradient norm that is not finite.
HUGE = """
real_loss = fusedit.flow_loss
step = -1
def huge(*args):
    global step
    step += 1
    loss = real_loss(*args)
    if step == 2:
        loss = loss * 1e37
    return loss
fusedit.flow_loss = huge
"""

BF16_STAGES = ("0", "1", "2", "3", "1-offload", "2-offload", "3-offload")
ALL_MODES = [*((zero, "float32") for zero in "023"), *((zero, "bf16") for zero in BF16_STAGES)]


@pytest.mark.parametrize("modes", [
    [("1", "float32")], pytest.param(ALL_MODES, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(gemma, data, tmp_path, modes):
    """The skipped step leaves no trace: the run equals one that was stopped there and resumed."""
    def job(name, steps, zero, dtype):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--zero", zero, "--dtype", dtype, "--save-every", "3")
    jobs = []
    for mode in modes:
        name = "-".join(mode)
        jobs += [(job(f"a{name}", 6, *mode), poison(2)), (job(f"b{name}", 3, *mode), poison(2)),
                 job(f"b{name}", 6, *mode)]
    launch_all(jobs)
    for mode in modes:
        name = "-".join(mode)
        table = metrics(tmp_path / f"a{name}")
        assert [row["skipped_steps"] for row in table] == [0, 0, 1, 1, 1, 1], name
        assert table[2]["loss"] is None and table[2]["grad_norm"] is None
        assert all(np.isfinite(row["loss"]) for i, row in enumerate(table) if i != 2)
        assert adam_step(tmp_path / f"a{name}", 3) == 2    # the skipped step does not count
        assert adam_step(tmp_path / f"a{name}", 6) == 5
        assert_equal(state(tmp_path / f"a{name}", 6), state(tmp_path / f"b{name}", 6))


def adam_step(out, step):
    """The number of Adam steps in a checkpoint."""
    path = out / f"step-{step:07d}" / "train_state" / "state.json"
    return json.loads(path.read_text())["adam_step"]


def test_gradients_that_are_not_finite_are_skipped_and_ten_in_a_row_end_the_run(gemma, data,
                                                                                tmp_path):
    def job(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     *more)
    jobs = [(job("dead", 40, "--save-every", "4", "--log-every", "2"), poison(*range(5, 99))),
            (job("lives", 14), poison(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11)),
            (job("huge", 4, "--zero", "0", "--save-every", "3"), HUGE)]
    dead, _, _ = launch_all(jobs, check=False)
    assert [row["skipped_steps"] for row in metrics(tmp_path / "huge")] == [0, 0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in state(tmp_path / "huge", 4).values())
    assert dead.returncode == 1
    assert re.search(r"error: the loss or gradient was not finite for 1[01] steps in a row, up to "
                     r"step 1[67]: .*last good checkpoint is step-00000(12|16)", dead.stderr)
    assert all(tensor.isfinite().all() for tensor in state(tmp_path / "dead", 12).values())
    assert metrics(tmp_path / "lives")[-1]["skipped_steps"] == 11


def damage_samples(tar, first, last):
    """Overwrite the images of these samples in a shard."""
    content = bytearray(tar.read_bytes())
    for i in range(first, last + 1):
        header = content.index(f"n{i}.image".encode())
        content[header + 512:header + 520] = b"no image"
    tar.write_bytes(content)


def damage_exif_blocks(folder, count):
    """Write s-0.tar anew: `count` of its 50 images have a damaged EXIF block."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09")
    samples = []
    for i, name in enumerate(sample_names(0, 50)):
        changes = {}
        if i < count:
            changes = {"image.png": None, "image.jpg": buffer.getvalue()}
        samples.append(scene(name, **changes))
    write_shard(folder / "s-0.tar", samples)
    index(folder)


def test_too_many_bad_samples_stop_the_run_and_are_named(gemma, tmp_path):
    """Images that are readable but flawed are counted, and their kind of flaw is printed once."""
    data = numbered(tmp_path / "data", 4, 50)
    damage_exif_blocks(tmp_path / "data", 10)
    damage_samples(tmp_path / "data" / "s-2.tar", 100, 114)
    stops, lives = launch_all([
        flags(gemma, data, tmp_path / "stops", "--steps", "200"),
        flags(gemma, data, tmp_path / "lives", "--steps", "50", "--max-skipped", "0.1")],
        check=False)
    assert stops.returncode == 1
    assert re.search(r"error: 1[1-9] of \d+ samples could not be read, more than --max-skipped "
                     "0.01", stops.stderr)

    assert lives.returncode == 0
    table = metrics(tmp_path / "lives")     # 400 samples: two epochs
    named = []
    for row in table:
        named += row.get("bad", [])
    assert table[-1]["skipped"] == len(named) == 30
    assert len(set(named)) == 15
    assert all("s-2.tar" in name for name in named)
    assert "skipped sample" in lives.stderr
    assert "skipped samples 30" in lives.stdout

    note = "damaged EXIF block, ignored"
    noted = sum(row.get("notes", {}).get(note, 0) for row in table)
    assert 20 <= noted <= 50                # they may also replace one of the 30 bad samples
    assert lives.stderr.count(note) == 1
    assert "Warning" not in lives.stderr


# Pretends that the peak FLOP/s of this machine are known.
PEAK = """
from fusedit_lib.train import hardware
hardware.peak_flops = lambda device, world: 1e6
"""


def test_the_mfu_counts_useful_flops(gemma, data, tmp_path):
    """Padding of the text does not count."""
    argv = flags(gemma, data, tmp_path / "run", "--steps", "3", "--sample-every", "9",
                 "--log-every", "3")
    done = launch(argv, PEAK)
    run = parse_run(argv, "")
    config = model_config(run)
    useful = costs.useful_flops(config, latents=False, train_llm=False)
    source = Batches(run, config, pretrained.load_tokenizer(config.base, 64), 8)
    tokens = 0
    for m in (1, 2):                        # micro-batches of the second log line
        tokens += int(source[m]["mask"].sum())
    tokens /= 2 * 8                         # per image

    row = metrics(tmp_path / "run")[-1]
    assert 0 < tokens < config.max_text_tokens
    assert row["step"] == 3
    flops = useful.per_image + useful.per_token * tokens
    assert row["mfu"] == pytest.approx(row["images_per_s"] * flops / 1e6, rel=0.01)
    assert re.search(r"step 3/3  loss \S+  lr 3.0e-03  grad norm \S+  \S+ images/s  memory \S+ GB  "
                     r"MFU \S+%  remaining 0:00:00\n", done.stdout)


def test_a_rank_without_a_prompt_of_its_own_decodes_nothing(monkeypatch):
    """The last 5 of 8 ranks draw one of 3 images again, as ZeRO 3 needs all ranks."""
    decoded = []

    def decode(latents, vae):
        decoded.append(latents.flatten().tolist())
        return ["an image"]

    features = SimpleNamespace(map=lambda change: None)
    encoded = SimpleNamespace(of_images=lambda: (features, features))
    monkeypatch.setattr(validation, "padded_text_length", lambda *_: 4)
    monkeypatch.setattr(validation, "encode_prompts", lambda *_, **__: encoded)
    monkeypatch.setattr(validation, "latent_size", lambda *_: 1)
    monkeypatch.setattr(validation, "decode_latents", decode)
    monkeypatch.setattr(validation, "draw_latents",
                        lambda model, text, uncond, seeds, *_, **__: torch.tensor(seeds))
    run = SimpleNamespace(prompts=["a", "b", "c"], seed=7, sample_steps=1)
    devices = monitor.SeparateDevices(torch.device("cpu"), 8)
    model = SimpleNamespace(config=None)
    assert validation.sample_images(run, model, None, range(4, 8, 8), devices) == []
    assert decoded == []
    assert validation.sample_images(run, model, None, range(0, 6, 2), devices) == 2 * ["an image"]
    assert decoded == [[7], [9]]


# ------------------------------------------------------------------------------ TPUs

def install(monkeypatch, name, **content):
    """A module of the TPU's environment, in place of the real one."""
    module = SimpleNamespace(**content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def tpu(monkeypatch):
    """The modules that know the kind and the memory of a host's four v5e chips."""
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    known = install(monkeypatch, "torch_xla._internal.tpu", get_tpu_type=lambda: "v5litepod")
    internal = install(monkeypatch, "torch_xla._internal", tpu=known)
    install(monkeypatch, "torch_xla", _internal=internal)
    chips = [SimpleNamespace(memory_usage=used) for used in (5, 7, 6, 5)]
    device = install(monkeypatch, "tpu_info.device", get_local_chips=lambda: ("V5E", 4))
    metrics = install(monkeypatch, "tpu_info.metrics", get_chip_usage=lambda kind: chips)
    install(monkeypatch, "tpu_info", device=device, metrics=metrics)
    return SimpleNamespace(known=known, metrics=metrics)


def fail(*args):
    raise OSError("no answer")


def test_the_kind_and_memory_of_tpu_chips(tpu, monkeypatch, capfd):
    """Where they cannot be read, and on a CPU's virtual devices, they are not known."""
    assert (xla.tpu_kind(), xla.tpu_memory()) == ("v5litepod", 7)
    tpu.known.get_tpu_type = fail
    tpu.metrics.get_chip_usage = fail
    assert (xla.tpu_kind(), xla.tpu_memory()) == (None, None)
    assert capfd.readouterr().err == ("WARNING: the memory of the chips cannot be read (no "
                                      "answer); memory_gb is the host's\n")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert (xla.tpu_kind(), xla.tpu_memory()) == (None, None)
    assert capfd.readouterr().err == ""


def test_memory_that_cannot_be_read_is_not_asked_for_again():
    """The server of these figures may keep a log line waiting."""
    answers = [5, 7, 6, None]
    devices = SimpleNamespace(memory_in_use=lambda: answers.pop(0))
    log = SimpleNamespace(devices=devices, knows_memory=True, chip_memory=0)
    for most in (5, 7, 7, 7, 7):
        monitor.Monitor.read_chip_memory(log)
        assert log.chip_memory == most
    assert answers == []


@pytest.mark.parametrize("kind, flops", [("v4", 275e12), ("v5litepod", 197e12), ("v5p", 459e12),
                                         ("v6e", 918e12), ("v3", None), (None, None)])
def test_the_peak_of_tpu_chips(kind, flops):
    expected = None
    if flops:
        expected = 128 * flops
    assert hardware.tpu_peak_flops(kind, 128) == expected

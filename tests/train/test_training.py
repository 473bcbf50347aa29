"""Run settings, EMA, checkpoints, the watcher; and the real launcher, as processes on a CPU."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, tiny_gemma
from launching import (
    ENV,
    assert_equal,
    command,
    flags,
    launch,
    launch_all,
    losses,
    metrics,
    ranks,
    state,
)
from PIL import Image
from safetensors.torch import load_file
from tiny_shards import SHAPE, numbered

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import pretrained
from fusedit_lib.data.batches import Batches
from fusedit_lib.train import checkpoints, plot, validation, zero
from fusedit_lib.train.config import RunConfig, data_workers, model_config, parse_run, split_batch
from fusedit_lib.train.schedule import ema_decay, learning_rate


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 shards of 8 numbered samples."""
    return numbered(tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------ run settings


@pytest.mark.parametrize("engine", ["gpu", "tpu"])
def test_every_setting_is_a_flag_with_its_comment_and_default(engine):
    """train_tpu.py, too, without torch_xla."""
    out = launch(["--help"], engine=engine).stdout
    for f in fields(RunConfig):
        if f.metadata["only"] not in ("", engine):
            assert f"--{f.name.replace('_', '-')}" not in out
            continue
        assert re.search(rf"^  --{f.name.replace('_', '-')}[ ,]", out, re.M), f.name
        assert f.metadata["about"] in out
        if type(f.default) in (int, float):
            assert f"{f.metadata['about']} ({f.default})" in out


@pytest.mark.parametrize("argv, says", [
    (["--steps", "0"], "at least 1"), (["--caption-drop", "1.5"], "from 0 to 1"),
    (["--crop", "left"], "invalid choice"), (["--lr", "fast"], "invalid float"),
    (["--lr", "nan"], "at least 0"), (["--fast"], "unrecognized"), (["--zero", "4"], "3-offload"),
    (["--data-weights", "1", "x"], "positive"), (["--data-weights", "0"], "positive")])
def test_bad_flags_are_usage_errors(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(argv, "")
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [
    (["--preset", "fusedit/2d-ropes"], "2d-rope"), (["--set", "patch_size"], "field=value"),
    (["--set", "patchsize=2"], "patch_size"), (["--set", "patch_size=two"], "patch_size"),
    (["--set", "patch_size=4", "--image-size", "30"], "28 or 32")])
def test_bad_models_are_named(argv, says):
    with pytest.raises(FuseDiTError, match=re.escape(says)):
        model_config(parse_run(argv, ""))


def test_overrides_reach_the_model(tmp_path, monkeypatch):
    (tmp_path / "gemma").mkdir()
    monkeypatch.chdir(tmp_path)
    run = parse_run(["--set", "patch_size=2", "pos_embed=ape", "shift=3", "--set",
                              "qk_norm=false", "--image-size", "32", "--base", "gemma"], "")
    c = model_config(run)
    assert (c.patch_size, c.pos_embed, c.shift, c.qk_norm, c.image_size) == (2, "ape", 3, False, 32)
    assert c.base == str(tmp_path / "gemma")    # absolute: sample.py may run anywhere
    hub = model_config(parse_run(["--preset", "fusedit"], ""))
    assert hub.base == "google/gemma-2-2b"


def test_prompts_come_from_flags_and_files(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\na star\n")
    run = parse_run(["--prompts", "a square", str(tmp_path / "p.txt")], "")
    assert run.prompts == ["a square", "a red circle", "a star"]
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FuseDiTError, match="UTF-8"):
        parse_run(["--prompts", str(tmp_path / "p.txt")], "")


def test_batch_arithmetic():
    def split(batch, micro, world):
        run = RunConfig(batch=batch, micro_batch=micro)
        return split_batch(run, world)
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
    run = RunConfig(lr=1.0, warmup_steps=4, steps=12, lr_schedule="cosine")
    rates = [learning_rate(run, i) for i in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[8] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    run = RunConfig(lr=1.0, warmup_steps=2)
    assert [learning_rate(run, i) for i in (0, 1, 9, 10 ** 6)] == [0.5, 1, 1, 1]


def test_decay_of_the_average():
    run = RunConfig(ema_decay=0.2, ema_every=5)
    assert [ema_decay(run, step) for step in (1, 4, 6, 9, 11)] == [1.0] * 5
    assert [ema_decay(run, step) for step in (5, 10, 15)] == [1 / 10, 2 / 11, 0.2]


def test_shares_are_even_and_the_same_for_all():
    sizes = {f"layer.{i}": n for i, n in enumerate([100, 90, 60, 40, 40, 30, 20, 10, 5, 5])}

    def owners(names, world):
        model = torch.nn.Module()
        for name in names:
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(torch.full((sizes[name],), float(sizes[name])))
            model.add_module(name.replace(".", "_"), layer)
        ranks = [zero.shard_ema(model, None, rank, world) for rank in range(world)]
        assert all(owner == ranks[0][0] for owner, _ in ranks)
        for rank, (owner, ema) in enumerate(ranks):
            assert ema.keys() == {name for name, r in owner.items() if r == rank}
            assert all((p == len(p)).all() for p in ema.values())
        return ranks[0][0]
    for world in (1, 2, 3, 4):
        owner = owners(sizes, world)
        load = [sum(sizes[n.replace("_", ".").removesuffix(".weight")] for n, r in owner.items()
                    if r == rank) for rank in range(world)]
        assert len(owner) == len(sizes)
        assert max(load) <= sum(load) / world + max(sizes.values())
        assert owner == owners(dict(reversed(sizes.items())), world)


# ------------------------------------------------------------------------------ run folder

@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A process group of this process alone: what a launcher starts with."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path, gemma):
    run = parse_run(["--out", str(tmp_path / "run"), "--base", str(gemma), "--set",
                              *SHAPE, "--keep", "2"], "")
    config = model_config(run)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(checkpoints.settings(run, config))
    return run, config


def share(value=1.0):
    return {"dit.w": torch.full((3,), value)}, {
        f"{key}.dit.w": torch.full((3,), value) for key in ("weight", "exp_avg", "exp_avg_sq")}


def saver(run, config, first=0, data="some"):
    saved = checkpoints.Saved(first, "some", first, 0, 0, 0, {}, {}) if first else None
    return checkpoints.Saver(run, config, saved, data)


def save(run, config, *steps, value=1.0):
    """Save at these steps; returns the exit code of the last."""
    to = saver(run, config, max(steps_of(run), default=0))
    for step in steps:
        to.save(step, lambda: share(value),
                dict(adam_step=step, seen=0, skipped=0, skipped_steps=0))
    code = to.close(steps[-1], 0)
    to.lock.release()
    return code


def steps_of(run):
    return [int(p.name[5:]) for p in checkpoints.checkpoints(run.out)]


def test_checkpoints_are_whole_or_absent(folder, monkeypatch, capsys):
    run, config = folder
    out = Path(run.out)
    assert checkpoints.open_run(run, config) is None
    assert save(run, config, 1, 2, 3) == 0
    assert steps_of(run) == [2, 3]
    assert checkpoints.open_run(run, config) == out / "step-0000003"

    def fail(*_):
        raise OSError(28, "No space left on device")
    for broken in ("save_file", "shutil.disk_usage"):
        with monkeypatch.context() as m:
            m.setattr(f"fusedit_lib.train.checkpoints.{broken}", fail)
            assert save(run, config, 4) == 1            # the last step is not saved: no success
        err = capsys.readouterr().err
        assert "WARNING: step 4 is NOT saved" in err and "No space" in err
        assert "step-0000003" in err                    # the one to fall back on
        assert steps_of(run) == [2, 3] and not list(out.glob(".step*"))
    with monkeypatch.context() as m:                    # room is asked for before any is taken
        m.setattr(checkpoints.shutil, "disk_usage", lambda _: type("U", (), dict(free=40)))
        assert save(run, config, 4) == 1
    assert "it takes 4.8e-08 GB and 4e-08 GB are free" in capsys.readouterr().err
    assert save(run, config, 4, value=0.0) == 0
    assert not list(out.glob(".step*")) and not list(out.rglob("*.tmp"))
    saved = checkpoints.load_checkpoint(checkpoints.open_run(run, config))
    for file, name in (saved.ema["dit.w"], saved.state["exp_avg.dit.w"]):
        assert (file.get_tensor(name) == 0).all()
    assert saved.step == saved.adam_step == 4
    (out / ".step-0000005.tmp" / "train_state").mkdir(parents=True)     # a killed run's
    saver(run, config, 4).lock.release()
    assert not list(out.glob(".step*"))


# Another process saves step 3 and dies at the place that the second argument names.
DIES = """
import os, sys, torch
import test_training as t
from fusedit_lib.train import checkpoints
from fusedit_lib.train.config import model_config, parse_run
run = parse_run(sys.argv[3:], "")
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0,
                                     world_size=1)
die, real = lambda *a, **k: os._exit(9), os.replace
if sys.argv[2] == "half a file":
    checkpoints.save_file = lambda tensors, path, _: (path.write_bytes(b"{"), die())
elif sys.argv[2] == "after the rename":
    checkpoints.os.replace = lambda a, b: (real(a, b), b.name == "step-0000003" and die())
elif sys.argv[2] == "before the rename":
    checkpoints.os.replace = lambda a, b: die() if b.name == "step-0000003" else real(a, b)
elif sys.argv[2] == "pruning":
    checkpoints.shutil.rmtree = lambda path, **k: die() if path.name == "step-0000001" else None
else:
    setattr(checkpoints.Saver, sys.argv[2], die)
t.save(run, model_config(run), 3, value=3.0)
"""


@pytest.mark.parametrize("where, left", [
    ("write", 2), ("half a file", 2), ("publish", 2), ("before the rename", 2),
    ("after the rename", 3), ("pruning", 3)])
def test_a_kill_at_any_point_of_saving_leaves_a_whole_checkpoint(folder, gemma, where, left):
    run, config = folder
    save(run, config, 1, 2)
    done = warm.run(["-c", DIES, f"{run.out}-store", where, "--out", run.out, "--base", gemma,
                     "--keep", "2", "--set", *SHAPE], ENV)
    assert done.returncode == 9, done.stderr[-2000:]
    found = checkpoints.open_run(run, config)
    assert found.name == f"step-000000{left}"
    latest = (Path(run.out) / "latest").read_text().strip()
    assert checkpoints.damage(Path(run.out) / latest) is None
    file, name = checkpoints.load_checkpoint(found).ema["dit.w"]
    assert (file.get_tensor(name) == (1.0 if left == 2 else 3.0)).all()
    assert save(run, config, 4) == 0 and not list(Path(run.out).glob(".step*"))
    assert steps_of(run)[-1] == 4


def test_two_runs_do_not_share_a_folder(folder):
    run, config = folder
    first = saver(run, config)
    with pytest.raises(FuseDiTError, match="another run is writing"):
        saver(run, config)
    first.lock.release()
    saver(run, config).lock.release()


def test_some_checkpoints_are_kept_for_good(folder):
    run, config = folder
    run.keep, run.keep_every = 1, 4
    save(run, config, *range(1, 11))
    assert steps_of(run) == [4, 8, 10]


@pytest.mark.parametrize("file, how", [
    ("model.safetensors", "cut"), ("train_state/state.safetensors", "cut"),
    ("train_state/state.json", "cut"), ("config.json", "gone")])
def test_a_damaged_checkpoint_is_passed_over_by_name(folder, capsys, file, how):
    run, config = folder
    save(run, config, 1, 2)
    path = Path(run.out) / "step-0000002" / file
    path.unlink() if how == "gone" else os.truncate(path, path.stat().st_size - 3)
    assert checkpoints.open_run(run, config).name == "step-0000001"
    err = capsys.readouterr().err
    assert "passed over" in err and "step-0000002" in err and Path(file).name in err
    saver(run, config, 1).lock.release()    # going on sets it aside, and says where `latest` is
    assert steps_of(run) == [1] and list(Path(run.out).glob("aside-*-step-0000002"))
    assert (Path(run.out) / "latest").read_text() == "step-0000001\n"
    save(run, config, 3)
    run.resume = "1"
    (Path(run.out) / "step-0000001" / "train_state" / "state.json").unlink()
    with pytest.raises(FuseDiTError, match="--resume 1 is damaged .* has step-0000003"):
        checkpoints.open_run(run, config)
    run.resume = "auto"
    (Path(run.out) / "step-0000003" / "train_state" / "state.json").unlink()
    with pytest.raises(FuseDiTError, match="no checkpoint is whole"):
        checkpoints.open_run(run, config)


def test_which_checkpoint_to_resume(folder):
    run, config = folder
    run.keep = 9
    save(run, config, 1, 2, 13)
    assert checkpoints.open_run(run, config).name == "step-0000013"
    for wanted in ("2", "step-2", "step-0000002"):
        run.resume = wanted
        assert checkpoints.open_run(run, config).name == "step-0000002"
    saver(run, config, 2).lock.release()    # what came later is kept, under another name
    assert steps_of(run) == [1, 2] and list(Path(run.out).glob("aside-*-step-0000013"))
    run.resume = "5"
    with pytest.raises(FuseDiTError, match="--resume 5 is neither .* has step-0000001"):
        checkpoints.open_run(run, config)
    run.resume = "none"
    with pytest.raises(FuseDiTError, match="--resume auto goes on"):
        checkpoints.open_run(run, config)


def test_other_data_is_warned_of(folder, capsys):
    run, config = folder
    save(run, config, 1)
    saver(run, config, 1).lock.release()
    assert not capsys.readouterr().err
    saver(run, config, 1, data="more").lock.release()
    assert "--data is not what it was at step 1" in capsys.readouterr().err


def test_a_model_folder_is_no_run(folder):
    run, config = folder
    pretrained.save_model(run.out, config, {})
    with pytest.raises(FuseDiTError, match="holds a model, not a run"):
        checkpoints.open_run(run, config)


def test_the_folder_of_another_run_is_refused(folder):
    run, config = folder
    save(run, config, 5)
    run.lr, run.steps, run.workers = 0.5, 7, 1          # the latter two may change
    other = replace(config, pos_embed="ape")
    with pytest.raises(FuseDiTError) as e:
        checkpoints.open_run(run, other)
    assert "run.lr was 0.0001, is 0.5" in str(e.value)
    assert "model.pos_embed was '2d-rope', is 'ape'" in str(e.value)
    assert "steps" not in str(e.value) and "workers" not in str(e.value)
    run.lr = 1e-4
    checkpoints.open_run(run, replace(config, guidance=2.0))   # of the samples alone


# ------------------------------------------------------------------------------ the launcher

def test_a_run_learns_saves_and_goes_on(gemma, data, tmp_path):
    out = tmp_path / "run"
    more = ("--save-every", "20", "--sample-every", "20", "--ema-every", "5", "--workers", "1",
            "--val-data", str(data), "--val-every", "20", "--val-samples", "20", "--tensorboard")
    first = launch(flags(gemma, data, out, "--steps", "40", *more))
    assert "step 40/40" in first.stdout and not first.stderr
    rows = [r for r in metrics(out) if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 41))
    assert np.mean(losses(out)[-5:]) < 0.8 * np.mean(losses(out)[:5])
    assert all(r["grad_norm"] > 0 and r["memory_gb"] > 0 for r in rows)
    held = [r for r in metrics(out) if "val_loss" in r]
    assert [r["step"] for r in held] == [20, 40] and held[1]["val_loss"] < held[0]["val_loss"]
    levels = [held[1][f"val_{sigma:.4f}"] for sigma in validation.LEVELS]
    assert held[1]["val_loss"] == pytest.approx(np.mean(levels)) and len(set(levels)) == 8
    assert (out / "latest").read_text() == "step-0000040\n"
    with Image.open(out / "samples" / "step-0000040.png") as grid:
        assert grid.size[0] > 32 and grid.info["prompts"].splitlines()[1] == "a star"
    modes = {p.stat().st_mode & 0o777 for p in (out / "step-0000040").rglob("*.*")
             if p.is_file()}
    assert len(modes) == 1                  # tensors too are read by whom the umask lets
    model = pretrained.load_model(out)         # the whole run folder, its EMA
    raw = pretrained.load_model(out, ema=False)
    name = "layers.0.mlp.up_proj.weight"
    stored = load_file(out / "step-0000040" / "train_state" / "state.safetensors")
    assert torch.equal(raw.dit.state_dict()[name], stored[f"weight.dit.{name}"])
    assert not torch.equal(model.dit.state_dict()[name], raw.dit.state_dict()[name])
    assert model.config.base == str(gemma)

    with open(out / "metrics.jsonl", "a") as f:             # of steps that no checkpoint has
        f.write('{"step": 41, "loss": 9.0}\n{"step": 42, "lo')
    second = launch(flags(gemma, data, out, "--steps", "44", *more))
    assert "from step 40 to 44" in second.stdout
    assert (out / "metrics-aside.jsonl").read_text() == '{"step": 41, "loss": 9.0}\n'
    assert [r["step"] for r in metrics(out) if "loss" in r] == list(range(1, 45))
    other = launch(flags(gemma, data, out, "--steps", "50", "--seed", "1", *more), check=False)
    assert other.returncode == 1 and "run.seed was 42, is 1" in other.stderr
    assert other.stderr.count("\n") == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 45))
    assert [e.step for e in board.Scalars("val_loss")][:2] == [20, 40]
    picture = plot.plot(out)
    with Image.open(picture) as image:
        assert image.size[0] > 500 and len(image.convert("RGB").getcolors(10**6)) > 50


def test_what_goes_wrong_is_one_line(gemma, data, tmp_path):
    (tmp_path / "bad.json").write_text("{oops")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    for argv, says in [
            (["--data", str(tmp_path / "none-*.tar")], "no file matches"),
            (["--deepspeed-config", str(tmp_path / "no.json")], "No such file"),
            (["--deepspeed-config", str(tmp_path / "bad.json")], "not JSON"),
            (["--out", str(tmp_path / "bad.json")], "is a file"),
            (["--device", "cuda"], "--device cuda") if not torch.cuda.is_available() else
            (["--deepspeed-config", str(tmp_path / "no.json")], "No such file"),
            (["--deepspeed-config", str(tmp_path / "ds.json")],
             "zero_optimization.stage is 2, but the flags say 1"),
            (["--plan", "8xH999"], "known: B200")]:
        done = launch([*flags(gemma, data, tmp_path / "b"), *argv], check=False)
        assert done.returncode == 1 and says in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("b/step-*"))


def plain_torch(argv):
    """(losses, averaged weights) of the same run without DeepSpeed, written out in plain torch."""
    run = parse_run(argv, "")
    torch.manual_seed(run.seed)
    model = pretrained.build_model(model_config(run))
    source, losses = Batches(run, model.config, model.tokenizer, run.batch), []
    adam = torch.optim.AdamW(model.dit.parameters(), weight_decay=run.weight_decay)
    average = {name: p.detach().clone() for name, p in model.dit.named_parameters()}
    for step in range(run.steps):
        batch = source[step]
        x, eps = batch["pixels"] / 127.5 - 1, batch["noise"][:, 0]
        sigma = fusedit.random_sigma(batch["normal"], model.config.shift)
        s = sigma[:, None, None, None]
        v = model.dit((1 - s) * x + s * eps, sigma, model.read(batch["ids"], batch["mask"]))
        loss = torch.nn.functional.mse_loss(v, eps - x)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.dit.parameters(), run.max_grad_norm)
        adam.param_groups[0]["lr"] = run.lr * (min(step + 1, 5) / 5 if step < 5 else
                                               (1 + math.cos(math.pi * (step - 5) / 25)) / 2)
        adam.step()
        losses.append(loss.item())
        n, due = divmod(step + 1, 3)
        if not due:
            for name, p in model.dit.named_parameters():
                average[name].lerp_(p.detach(), 1 - min(0.99, n / (9 + n)))
    return losses, average


ALIKE = ("--steps", "30", "--caption-drop", "0.3", "--sample-every", "15", "--ema-every", "3",
         "--warmup-steps", "5", "--lr-schedule", "cosine")


@pytest.fixture(scope="module")
def plain(gemma, data):
    return plain_torch(flags(gemma, data, "", *ALIKE))


def trains_alike(tmp_path, gemma, data, plain, alone, pairs):
    """30 steps of one process and of two, each (name, further flags), against plain torch."""
    def jobs(some):
        return [flags(gemma, data, tmp_path / name, *ALIKE, *more) for name, *more in some]
    launch_all(jobs(alone))
    launch_all(jobs(pairs), n=2)
    known, average = plain
    assert len(known) == 30 and known[-1] < known[0]
    for name, *_ in alone + pairs:
        assert losses(tmp_path / name) == pytest.approx(known, rel=1e-5), name
    grids = {(tmp_path / name / "samples" / "step-0000015.png").read_bytes()
             for name, *_ in [alone[0], *pairs]}
    assert len(grids) == 1                  # two ranks draw what one does
    for name, *_ in pairs:                  # each rank wrote its half of average and state
        where = tmp_path / name / "step-0000030"
        sizes = [p.stat().st_size for p in sorted(where.glob("model-*-of-00002.safetensors"))]
        assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)
        assert_equal(pretrained.load_model(tmp_path / name).dit.state_dict(), average, atol=1e-5)


def test_deepspeed_trains_as_plain_torch_does(gemma, data, tmp_path, plain):
    trains_alike(tmp_path, gemma, data, plain,
                 [("one", "--zero", "0"), ("remat", "--remat", "--micro-batch", "2")],
                 [("two", "--zero", "2"), ("three", "--zero", "3", "--micro-batch", "1")])


@pytest.mark.slow
def test_every_stage_and_split_trains_alike(gemma, data, tmp_path, plain):
    """ZeRO 0 to 3 on two processes, accumulating 1 and 4; Adam on the CPU."""
    alone = [("plain4", "--zero", "0", "--micro-batch", "2"),
             *((f"offload{z}", "--zero", f"{z}-offload") for z in "123")]
    trains_alike(tmp_path, gemma, data, plain, alone, [
        (f"z{z}x{4 // m}", "--zero", str(z), "--micro-batch", str(m))
        for z in range(4) for m in (4, 1)])


COUNTS = """
import atexit
def told():
    found = torch._dynamo.utils.counters
    print("breaks", sum(found["graph_break"].values()), "graphs", found["stats"]["unique_graphs"])
atexit.register(told)
"""


@pytest.mark.slow
def test_compiled_blocks_train_alike(gemma, data, tmp_path):
    """In one piece, also where ZeRO 3 fetches a block's weights; a deeper one needs no more."""
    tiny_gemma(tmp_path / "deep", num_hidden_layers=4)

    def job(name, *more, base=gemma):
        return flags(base, data, tmp_path / name, "--steps", "6", "--sample-every", "9", *more)
    _, one, three, deep = launch_all([
        job("plain"), (job("one", "--zero", "1", "--compile"), COUNTS),
        (job("three", "--zero", "3", "--compile", "--remat"), COUNTS),
        (job("four", "--zero", "1", "--compile", base=tmp_path / "deep"), COUNTS)])
    launch(job("budget", "--zero", "2", "--compile", "--memory-budget", "0.5"))
    for name in ("one", "three", "budget"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    counts = [tuple(map(int, re.search(r"breaks (\d+) graphs (\d+)", done.stdout).groups()))
              for done in (one, three, deep)]
    assert [breaks for breaks, _ in counts] == [0, 0, 0] and min(counts)[1] > 0, counts
    assert counts[0] == counts[2], counts


@pytest.mark.slow
def test_float8_trains_nearly_alike_and_goes_on(gemma, data, tmp_path):
    """Emulated; at ZeRO 2 and 3, and from a checkpoint to the bit."""
    pytest.importorskip("torchao")

    def job(name, steps, zero, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", zero,
                     "--sample-every", "9", *more)
    launch_all([job("plain", 4, "2"), job("two", 4, "2", "--float8"),
                job("three", 4, "3", "--float8"), job("on", 2, "2", "--float8"),
                job("on", 4, "2", "--float8")])
    plain, two, three = (losses(tmp_path / name) for name in ("plain", "two", "three"))
    assert two == pytest.approx(plain, rel=0.01) and two[-1] != plain[-1]   # the first predicts 0
    assert three == pytest.approx(two, rel=1e-3)
    assert_equal(state(tmp_path / "on", 4), state(tmp_path / "two", 4))


@pytest.mark.parametrize("stages, dtype", [
    ("13", "float32"), pytest.param(["0", "2", "2-offload"], "float32", marks=pytest.mark.slow),
    pytest.param(["0", "1", "2", "3", "2-offload"], "bf16", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_never_stopped(gemma, data, tmp_path, stages, dtype):
    """Every ZeRO stage, to the bit; and a checkpoint of one stage goes on in another."""
    def job(name, steps, zero, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", str(zero),
                     "--ema-every", "1", "--dtype", dtype, "--sample-every", "100", *more)
    jobs = [job("mixed", 2, 1), job("mixed", 3, 3), job("mixed", 4, 2)]
    for z in stages:
        jobs += [job(f"a{z}", 4, z, "--save-every", "2", "--sample-every", "2"),
                 job(f"b{z}", 2, z), job(f"b{z}", 4, z)]
    launch_all(jobs)
    for z in stages:                        # a sampled and saved in passing, b stopped
        assert_equal(state(tmp_path / f"a{z}", 4), state(tmp_path / f"b{z}", 4))
    for name in [f"a{z}" for z in stages]:
        near = 1e-5 if dtype == "float32" else 1e-2        # stages round in other places
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "mixed"), rel=near)
        if dtype == "float32":
            assert_equal(state(tmp_path / "mixed", 4), state(tmp_path / name, 4), atol=1e-5)


@pytest.mark.slow
def test_resumed_ranks_equal_ranks_never_stopped(gemma, data, tmp_path):
    """Two ranks, to the bit; and three, into which few tensors divide, with ZeRO 3."""
    def job(name, steps, zero, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", zero,
                     "--ema-every", "1", "--sample-every", "100", *more)
    three = ("--batch", "9")
    launch_all([j for z in "0123" for j in (
        job(f"a{z}", 4, z, "--save-every", "2"), job(f"b{z}", 2, z), job(f"b{z}", 4, z))], n=2)
    launch_all([job("c", 4, "3", *three), job("d", 2, "3", *three), job("d", 4, "3", *three)], n=3)
    for a, b in (("a0", "b0"), ("a1", "b1"), ("a2", "b2"), ("a3", "b3"), ("c", "d")):
        assert_equal(state(tmp_path / a, 4), state(tmp_path / b, 4))


@pytest.mark.parametrize("stages, more_ranks", [
    ("1", 2), pytest.param("0123", 2, marks=pytest.mark.slow),
    pytest.param("13", 4, marks=pytest.mark.slow)])
def test_ranks_may_come_and_go(gemma, data, tmp_path, stages, more_ranks):
    """More ranks, or fewer, in mid-run, accumulating: the losses of an undisturbed run."""
    def job(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--sample-every", "100", *more)

    def jobs(name, steps):
        return [job(f"{name}-{z}", steps, "--zero", z, "--micro-batch", "2") for z in stages]
    launch_all([job("whole", 12), *jobs("grows", 6)])
    launch_all([*jobs("shrinks", 6), *jobs("grows", 12)], n=more_ranks)
    launch_all(jobs("shrinks", 12))
    whole = losses(tmp_path / "whole")
    for name in (f"{n}-{z}" for n in ("grows", "shrinks") for z in stages):
        assert losses(tmp_path / name) == pytest.approx(whole, rel=1e-5), name
        assert_equal(*({k.split("/")[-1]: v for k, v in state(tmp_path / n, 12).items()}
                       for n in (name, "whole")), atol=1e-5)


POISON = """
real, count = fusedit.random_sigma, -1
def poisoned(normal, shift):
    global count
    count += 1
    return real(normal, shift) * (float("nan") if count in BAD else 1)
fusedit.random_sigma = poisoned
"""


def poison(*steps):
    """Code that makes the loss of these steps, counted from 0, not a number."""
    return POISON.replace("BAD", str(steps))


# A finite loss whose gradient's norm is not.
HUGE = """
loss_of, calls = fusedit.flow_loss, -1
def huge(*args):
    global calls
    calls += 1
    return loss_of(*args) * (1e37 if calls == 2 else 1)
fusedit.flow_loss = huge
"""


@pytest.mark.parametrize("modes", [
    [("1", "float32")],
    pytest.param([*((z, "float32") for z in "023"), *((z, "bf16") for z in (
        "0", "1", "2", "3", "1-offload", "2-offload", "3-offload"))], marks=pytest.mark.slow)],
    ids=["quick", "all"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(gemma, data, tmp_path, modes):
    """And leaves no trace: after it the run is one that was stopped there, and went on."""
    def job(name, steps, zero, dtype):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--zero", zero, "--dtype", dtype, "--save-every", "3")
    jobs = []
    for mode in modes:
        name = "-".join(mode)
        jobs += [(job(f"a{name}", 6, *mode), poison(2)), (job(f"b{name}", 3, *mode), poison(2)),
                 job(f"b{name}", 6, *mode)]
    launch_all(jobs)
    for name in map("-".join, modes):
        rows = metrics(tmp_path / f"a{name}")
        assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 1, 1, 1], name
        assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None
        assert all(np.isfinite(r["loss"]) for i, r in enumerate(rows) if i != 2)
        two, three = (json.loads((tmp_path / f"a{name}" / f"step-000000{s}" / "train_state" /
                                  "state.json").read_text())["adam_step"] for s in (3, 6))
        assert (two, three) == (2, 5)       # Adam has not seen it
        assert_equal(state(tmp_path / f"a{name}", 6), state(tmp_path / f"b{name}", 6))


def test_a_gradient_that_is_not_finite_is_skipped_and_ten_in_a_row_are_too_many(gemma, data,
                                                                                tmp_path):
    def job(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     *more)
    jobs = [(job("dead", 40, "--save-every", "4", "--log-every", "2"), poison(*range(5, 99))),
            (job("lives", 14), poison(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11)),
            (job("huge", 4, "--zero", "0", "--save-every", "3"), HUGE)]
    dead = launch_all(jobs, check=False)[0]
    assert [r["skipped_steps"] for r in metrics(tmp_path / "huge")] == [0, 0, 1, 1]
    assert all(v.isfinite().all() for v in state(tmp_path / "huge", 4).values())
    assert dead.returncode == 1
    assert re.search(r"error: the loss or gradient of 1[01] steps in a row, up to step 1[67], is "
                     r"not finite.*last good checkpoint is step-00000(12|16)", dead.stderr)
    assert all(v.isfinite().all() for v in state(tmp_path / "dead", 12).values())
    assert metrics(tmp_path / "lives")[-1]["skipped_steps"] == 11


def test_too_many_bad_samples_stop_the_run_and_are_named(gemma, tmp_path):
    data = numbered(tmp_path / "data", 4, 50)
    tar = tmp_path / "data" / "s-2.tar"
    content = bytearray(tar.read_bytes())
    for i in range(100, 115):
        at = content.index(f"n{i}.image".encode())
        content[at + 512:at + 520] = b"no image"
    tar.write_bytes(content)
    stops, goes = launch_all([
        flags(gemma, data, tmp_path / "stops", "--steps", "200"),
        flags(gemma, data, tmp_path / "goes", "--steps", "50", "--max-skipped", "0.1")],
        check=False)
    assert (stops.returncode, goes.returncode) == (1, 0)
    assert re.search(r"error: 1[1-9] of \d+ samples could not be read, more than --max-skipped "
                     "0.01", stops.stderr)
    rows = metrics(tmp_path / "goes")       # 400 samples: two epochs
    named = [name for r in rows for name in r.get("bad", [])]
    assert rows[-1]["skipped"] == len(named) == 30 and len(set(named)) == 15
    assert all("s-2.tar" in name for name in named)
    assert "skipped sample" in goes.stderr


def test_gemma_can_be_trained_too(gemma, data, tmp_path):
    out, more = tmp_path / "run", ("--train-llm", "--ema-every", "1")
    jobs = [flags(gemma, data, out, "--steps", "4", *more),
            flags(gemma, data, tmp_path / "three", "--steps", "4", *more, "--zero", "3"),
            flags(gemma, data, out, "--steps", "6", *more),
            flags(gemma, data, tmp_path / "never", "--steps", "6", *more)]
    launch_all(jobs)
    assert losses(tmp_path / "three") == pytest.approx(losses(out)[:4], rel=1e-5)
    assert_equal(state(out, 6), state(tmp_path / "never", 6))
    model = pretrained.load_model(out)
    base = pretrained.build_model(model.config)
    moved = {k for k, v in model.llm.state_dict().items()
             if not torch.equal(v, base.llm.state_dict()[k])}
    assert {"embed_tokens.weight", "layers.0.mlp.up_proj.weight",
            "layers.1.self_attn.k_proj.weight"} <= moved
    pretrained.export(model, tmp_path / "whole")
    again = pretrained.load_model(tmp_path / "whole")
    assert all(torch.equal(v, again.llm.state_dict()[k]) for k, v in
               model.llm.state_dict().items())


# ------------------------------------------------------------------------------ kills

# Tell on stdout when a file is being written, slowly, and which samples each step had. With AFTER
# in the environment the process kills its group: in the AFTER-th step from now, a moment later, or
# (WRITING) when a checkpoint's file is half written after that step.
WATCHED = """
import random, signal, threading
save_file, load_batches = checkpoints.save_file, launcher.load_batches
left, writing = int(os.environ.get("AFTER", 10**9)), "WRITING" in os.environ
def kill():
    os.killpg(0, signal.SIGKILL)
def slow(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.write(1, f"WRITING {path}\\n".encode())     # whole lines, also of two threads at once
    if writing and left <= 0:
        os.truncate(path, path.stat().st_size // 2)
        kill()
    time.sleep(0.1)
def told(which, batches):
    global left
    for m, batch in zip(which, batches):
        keys = " ".join((c.split() or [""])[-1] for c in batch["captions"])
        os.write(1, f"KEYS {m} {keys}\\n".encode())
        left -= 1
        if left == 0 and not writing:
            threading.Timer(random.random() * 0.02, kill).start()
        yield batch
checkpoints.save_file = slow
launcher.load_batches = lambda batches, which, *more, **pin: told(
    which, load_batches(batches, which, *more, **pin))
"""


@pytest.mark.parametrize("kills, steps", [(3, 30), pytest.param(12, 90, marks=pytest.mark.slow)])
def test_killed_again_and_again_equals_never_killed(gemma, data, tmp_path, kills, steps):
    """SIGKILL at random moments, every third in the middle of writing a checkpoint."""
    def run(name, **more):
        argv = flags(gemma, data, tmp_path / name, "--steps", str(steps), "--save-every", "4",
                     "--ema-every", "1", "--caption-drop", "0", "--original-caption-rate", "1",
                     "--zero", "2")
        return launch(argv, WATCHED, env=ENV | more, check=False)
    assert run("whole").returncode == 0
    rng, seen, ends = random.Random(0), {}, []
    for i in range(kills + 1):
        more = {"AFTER": str(rng.randrange(4, 9))} if i < kills else {}
        if i % 3 == 2:
            more["WRITING"] = "1"
        done = run("killed", **more)
        ends.append(done.returncode)
        for line in done.stdout.splitlines():
            if line.startswith("KEYS"):
                _, m, *keys = line.split()
                seen[int(m)] = keys
    assert ends == [-signal.SIGKILL] * kills + [0]
    assert_equal(state(tmp_path / "killed", steps), state(tmp_path / "whole", steps))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert sorted(seen) == list(range(steps))
    for epoch in range(0, steps, 3):        # 24 samples, three steps of 8
        assert sorted(sum((seen[epoch + i] for i in range(3)), [])) == [
            f"n{i:02d}" for i in range(24)]


def read_until(process, begin):
    """Read a process's stdout to the line that begins so."""
    for line in process.stdout:
        if line.startswith(begin):
            return
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number, while_saving", [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_ends_the_step_and_saves(gemma, data, tmp_path, number, while_saving):
    process = warm.start(command(flags(
        gemma, data, tmp_path / "run", "--steps", "100000", "--log-every", "5", "--workers", "1",
        "--save-every", "7"), WATCHED), ENV)
    read_until(process, "WRITING" if while_saving else "step 5/")
    os.killpg(process.pid, number)          # as a terminal or a launcher does, workers included
    out, err = process.communicate()
    last = (tmp_path / "run" / "latest").read_text().strip()
    assert process.returncode == 0 and "Traceback" not in err
    assert f"stopped by {number.name}; step {int(last[5:])} is saved. To go on:" in out
    assert "--steps 100000" in out and checkpoints.damage(tmp_path / "run" / last) is None
    assert metrics(tmp_path / "run")[-1]["step"] == int(last[5:])


def test_a_full_disk_leaves_the_run_going(gemma, data, tmp_path):
    """Files may not grow beyond a size from step 5 on, as if the disk were full."""
    code = ("import resource, signal\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "poll = checkpoints.Saver.poll\n"
            "def full(self, *a):\n"
            "    if self.last == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, 1_000_000))\n"
            "    return poll(self, *a)\n"
            "checkpoints.Saver.poll = full\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n")
    sizes = {"run": "40_000", "log": "os.path.getsize(self.out / 'metrics.jsonl') + 20"}
    ends = launch_all([
        (flags(gemma, data, tmp_path / name, "--steps", "10", "--save-every", "4",
               "--sample-every", "99"), code.replace("MOST", size))
        for name, size in sizes.items()], check=False)
    assert len(losses(tmp_path / "run")) == 10
    assert 4 <= len(losses(tmp_path / "log")) < 7           # whole lines, none in part
    assert "WARNING: not written: " in ends[1].stderr
    for name, done in zip(sizes, ends, strict=True):
        assert done.returncode == 1
        for step in (8, 10):
            assert f"WARNING: step {step} is NOT saved" in done.stderr
        assert "The last checkpoint is step-0000004" in done.stderr
        assert [p.name for p in checkpoints.checkpoints(tmp_path / name)] == ["step-0000004"]
        assert checkpoints.damage(tmp_path / name / "step-0000004") is None
        assert not list((tmp_path / name).glob(".step*"))


def test_checkpoints_by_the_clock(gemma, data, tmp_path):
    """A clock on which each look at it is 3 s later than the last, and 20 steps take 60 s."""
    clock = ("import itertools, types\n"
             "seconds = itertools.count(0, 3)\n"
             "checkpoints.time = types.SimpleNamespace(\n"
             "    monotonic=lambda: next(seconds), time=time.time)\n")
    more = "--steps", "20", "--keep", "99", "--sample-every", "99"
    launch_all([
        (flags(gemma, data, tmp_path / "often", *more, "--save-minutes", "0.2"), clock),
        (flags(gemma, data, tmp_path / "never", *more), clock)])
    steps = [int(p.name[5:]) for p in checkpoints.checkpoints(tmp_path / "often")]
    assert steps[-1] == 20 and 3 <= len(steps) <= 5         # every 12 s
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "never")] == ["step-0000020"]


def test_a_signal_to_one_rank_stops_all(gemma, data, tmp_path):
    processes = ranks(command(flags(gemma, data, tmp_path / "run", "--steps", "1000000")), 2,
                      live=True)
    read_until(processes[0], "step 5/")
    os.kill(processes[1].pid, signal.SIGTERM)
    ends = [p.communicate() for p in processes]
    last = (tmp_path / "run" / "latest").read_text().strip()
    assert [p.returncode for p in processes] == [0, 0], ends
    assert f"stopped by SIGTERM; step {int(last[5:])} is saved" in ends[0][0]
    assert checkpoints.damage(tmp_path / "run" / last) is None


def running(argv):
    """Processes with the run's folder in their command line."""
    out = argv[argv.index("--out") + 1]
    return list(map(int, subprocess.run(["pgrep", "-f", out], text=True,
                                        capture_output=True).stdout.split()))


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2"],
    "deepspeed": [shutil.which("deepspeed", path=Path(sys.executable).parent), "--num_gpus", "2",
                  "--master_port", "29611"]}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dead_rank_ends_the_others(gemma, data, tmp_path, launcher):
    argv = flags(gemma, data, tmp_path / "run", "--steps", "1000000")
    process = subprocess.Popen([*LAUNCHERS[launcher], ROOT / "train_gpu.py", *argv], text=True,
                               env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    next(line for line in process.stdout if "step 5/" in line)
    ranks = [pid for pid in running(argv) if b"LOCAL_RANK=1" in
             Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(ranks[-1], signal.SIGKILL)
    process.communicate(timeout=500)        # and not the half hour of a collective
    assert process.returncode != 0 and not running(argv)


# On one GPU the process group is NCCL's alone. In its place: collectives of ours, as opposed to
# DeepSpeed's, that take a tensor of the CPU raise as they would there.
ONE_GPU = """
class OneGpu:
    def __getattr__(self, name):
        return getattr(dist, name)
    def refuse(self, *args, **kwargs):
        raise RuntimeError("No backend type associated with device type cpu")
    all_reduce = all_gather = broadcast = all_gather_object = broadcast_object_list = refuse
for module in (checkpoints, distributed, monitor, validation):
    module.dist = OneGpu()
"""


def test_one_gpu_needs_no_collective_of_the_cpu(gemma, data, tmp_path):
    """Checkpoints, log, grids and validation, and a run that goes on."""
    def argv(steps):
        return flags(gemma, data, tmp_path / "run", "--steps", str(steps), "--save-every", "1",
                     "--sample-every", "2", "--val-data", str(data), "--val-every", "2",
                     "--val-samples", "8")
    launch(argv(2), ONE_GPU)
    launch(argv(4), ONE_GPU)
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-0000004"
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.parametrize("world, backend", [("1", "nccl"), ("2", "cpu:gloo,cuda:nccl")])
def test_a_process_group_knows_its_gpu(monkeypatch, tmp_path, world, backend):
    """As it is started on a GPU, which is pretended here."""
    import train_gpu
    said = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.update(set=device))
    monkeypatch.setattr(train_gpu.backend, "pick_device", torch.device)
    monkeypatch.setattr(train_gpu.dist, "init_process_group", lambda backend, **more: said.update(
        backend=backend, **more))
    monkeypatch.setattr(train_gpu.backend, "native_bf16", lambda device: True)
    for key, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE=world,
                           DS_ACCELERATOR="cuda").items():
        monkeypatch.setenv(key, value)
    run = parse_run(["--dtype", "bf16", "--out", str(tmp_path)], "")
    _, device = train_gpu.start(run)
    assert device == torch.device("cuda:1")
    assert said["device_id"] == said["set"] == device and said["backend"] == backend


def test_data_processes_are_by_the_cores(monkeypatch):
    auto, none = (parse_run(argv, "") for argv in ([], ["--workers", "0"]))
    for name, cores, ranks_here, want in (("LOCAL_WORLD_SIZE", 16, 1, 15),
                                          ("LOCAL_SIZE", 128, 8, 15), ("LOCAL_SIZE", 224, 8, 16),
                                          ("LOCAL_WORLD_SIZE", 2, 1, 1),
                                          ("LOCAL_WORLD_SIZE", 4, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        monkeypatch.setattr(os, "cpu_count", lambda n=cores: n)
        monkeypatch.setenv(name, str(ranks_here))
        assert data_workers(auto) == want and data_workers(none) == 0
        monkeypatch.delenv(name)


def test_the_share_of_the_peak_counts_what_is_useful(gemma, data, tmp_path):
    """Words without padding, on a machine whose peak is said to be known."""
    argv = flags(gemma, data, tmp_path / "run", "--steps", "3", "--sample-every", "9",
                 "--log-every", "3")
    launch(argv, "from fusedit_lib.train import plan\nplan.peak = lambda device, world: 1e6\n")
    run = parse_run(argv, "")
    config = model_config(run)
    from fusedit_lib.train import plan
    image, token = plan.useful_flops(config, False, False)
    source = Batches(run, config, pretrained.load_tokenizer(config.base), 8)
    words = sum(int(source[m]["mask"].sum()) for m in (1, 2)) / 16      # the log's second line
    row = metrics(tmp_path / "run")[-1]
    assert 0 < words < config.max_text_tokens and row["step"] == 3
    assert row["utilisation"] == pytest.approx(
        row["images_per_s"] * (image + token * words) / 1e6, rel=0.01)


def test_averages_on_the_cpu_are_the_same(gemma, data, tmp_path):
    for name, more in (("on", []), ("off", ["--ema-offload"])):
        for steps in ("2", "4"):
            launch(flags(gemma, data, tmp_path / name, "--steps", steps, "--ema-every", "1",
                         "--sample-every", "9", *more))
    assert_equal(state(tmp_path / "on", 4), state(tmp_path / "off", 4))


def test_a_budget_needs_the_compiler(gemma, data, tmp_path):
    done = launch(flags(gemma, data, tmp_path / "run", "--memory-budget", "0.5"), check=False)
    assert done.returncode == 1
    assert "--memory-budget is the compiler's: add --compile" in done.stderr


def test_a_run_from_before_a_flag_goes_on(gemma, data, tmp_path):
    """A setting that an older run's config.json does not name had its default then."""
    argv = flags(gemma, data, tmp_path / "run", "--steps", "2", "--sample-every", "9")
    launch(argv)
    path = tmp_path / "run" / "config.json"
    said = json.loads(path.read_text())
    del said["run"]["float8"]
    path.write_text(json.dumps(said))
    done = launch([*argv, "--float8"], check=False)
    assert done.returncode == 1 and "float8 was False, is True" in done.stderr
    launch(argv)

"""Run settings: flags, --help, usage errors, model configuration and batch arithmetic."""
import json
import os
import re
import shutil
from dataclasses import fields, replace

import pytest
import torch
from conftest import tiny_vae
from launching import flags, launch

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import folders
from fusedit_lib.train import checkpoints, resuming
from fusedit_lib.train.build import build_models
from fusedit_lib.train.config import (
    RunConfig,
    data_workers,
    lasting_name,
    model_config,
    split_batch,
)
from fusedit_lib.train.flags import parse_run


def squeeze(text):
    """Text without white space, because --help wraps lines."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("engine", ["gpu", "tpu"])
def test_every_setting_has_a_flag_with_help_and_default(engine):
    """Also for train_tpu.py, without torch_xla."""
    out = launch(["--help"], engine=engine).stdout
    for setting in fields(RunConfig):
        name = "--" + setting.name.replace("_", "-")
        about = setting.metadata["about"]
        if not about or setting.metadata["only"] not in ("", engine):
            assert name not in out
            continue
        assert re.search(rf"^  {name}[ ,]", out, re.M), name
        assert squeeze(about) in squeeze(out)
        if type(setting.default) in (int, float):
            assert squeeze(f"{about} (default: {setting.default})") in squeeze(out)


@pytest.mark.parametrize("engine", ["gpu", "tpu"])
def test_help_has_groups(engine):
    """Every flag is listed under the title of its group."""
    out = launch(["--help"], engine=engine).stdout
    titles = [f.metadata["group"] for f in fields(RunConfig) if f.metadata["group"]]
    assert titles[0] == "model" and len(titles) == 8
    assert re.findall(r"^(\w.*):$", out, re.M)[-8:] == titles
    options = out[out.index("\noptions:"):out.index("\nmodel:")]
    assert re.findall(r"--[\w-]+", options) == ["--help"]


@pytest.mark.parametrize("argv, message", [
    (["--steps", "0"], "at least 1"),
    (["--caption-drop", "1.5"], "from 0 to 1"),
    (["--crop", "left"], "invalid choice"),
    (["--seed", "-2"], "from -1 to 18446744073709551615"),
    (["--seed", str(2**64)], "from -1 to 18446744073709551615"),
    (["--lr", "fast"], "invalid float"),
    (["--lr", "nan"], "at least 0"),
    (["--fast"], "unrecognized"),
    (["--zero", "4"], "3-offload"),
    (["--data-weights", "1", "x"], "positive"),
    (["--data-weights", "0"], "positive")])
def test_bad_flags_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(argv, "")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["init", "base", "out", "plan", "cache", "resume-with", "set"])
def test_an_empty_shell_variable_is_no_default(name, capsys):
    with pytest.raises(SystemExit):
        parse_run(["--steps", "2", f"--{name}", ""], "")
    assert f"--{name} is empty: give a value, or leave it out" in capsys.readouterr().err
    assert parse_run(["--prompts", ""], "").prompts == [""]


@pytest.mark.parametrize("argv, message", [
    (["--preset", "fusedit/2d-ropes"], "2d-rope"),
    (["--set", "patch_size"], "field=value"),
    (["--set", "patchsize=2"], "patch_size"),
    (["--set", "patch_size=two"], "patch_size"),
    (["--set", "patch_size=4", "--image-size", "30"], "28 or 32"),
    (["--set", "patch_size=4", "--image-size", "3"], "nearest: 4")])
def test_bad_model_settings_are_named(argv, message):
    with pytest.raises(FuseDiTError, match=re.escape(message)):
        model_config(parse_run(argv, ""))


def test_overrides_reach_the_model(tmp_path, monkeypatch):
    (tmp_path / "gemma").mkdir()
    monkeypatch.chdir(tmp_path)
    run = parse_run(["--set", "patch_size=2", "pos_embed=ape", "shift=3", "--set",
                     "qk_norm=false", "--image-size", "32", "--base", "gemma"], "")
    config = model_config(run)
    assert config.patch_size == 2
    assert config.pos_embed == "ape"
    assert config.shift == 3
    assert config.qk_norm is False
    assert config.image_size == 32
    assert config.base == str(tmp_path / "gemma")          # absolute: usable from anywhere
    hub = model_config(parse_run(["--preset", "fusedit"], ""))
    assert hub.base == "google/gemma-2-2b"


def test_the_patch_size_in_pixels_is_from_the_vae(tmp_path):
    for stages, patch in ((3, 8), (5, 32)):
        vae = tiny_vae(tmp_path / f"{stages}", stages)
        argv = ["--set", f"vae={vae}", "in_channels=4", "patch_size=2", "--image-size"]
        assert model_config(parse_run([*argv, str(3 * patch)], "")).image_size == 3 * patch
        with pytest.raises(FuseDiTError, match=f"patch size of {patch} pixels"):
            model_config(parse_run([*argv, str(3 * patch + patch // 2)], ""))


def test_a_vae_that_was_unknown_is_checked_once_it_is_loaded(tmp_path, gemma_folder):
    """model_config takes a hub id that has not been downloaded to have a factor of 8."""
    argv = ["--base", str(gemma_folder), "--dtype", "float32", "--image-size", "32", "--set",
            f"vae={tiny_vae(tmp_path / 'vae', 5)}", "in_channels=4", "patch_size=2"]
    run = parse_run(argv, "")
    config = model_config(run)
    build_models(run, config, torch.device("cpu"), None)
    with pytest.raises(FuseDiTError, match="48 is not a multiple of 32 pixels"):
        build_models(run, replace(config, image_size=48), torch.device("cpu"), None)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of the repository in tmp_path, with a folder demo/gemma; elsewhere/ is current."""
    (tmp_path / "clone" / "demo" / "gemma").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(fusedit, "__file__", str(tmp_path / "clone" / "fusedit.py"))
    return tmp_path / "clone"


def test_a_moved_repository_finds_its_own_models(clone, monkeypatch):
    assert lasting_name("demo/gemma") == "demo/gemma"
    assert lasting_name(str(clone / "demo" / "gemma")) == "demo/gemma"
    assert model_config(parse_run([], "")).base == "demo/gemma"
    moved = clone.rename(clone.with_name("moved"))
    monkeypatch.setattr(fusedit, "__file__", str(moved / "fusedit.py"))
    assert folders.resolve("demo/gemma") == moved / "demo" / "gemma"
    monkeypatch.chdir(moved / "demo")
    assert lasting_name("gemma") == "demo/gemma"
    assert lasting_name("google/gemma-2b") == "google/gemma-2b"        # a hub id


def test_of_two_folders_of_the_same_name_the_meant_one_is_found(clone, tmp_path):
    """resolve prefers the working directory's, so the repository's is then named by its path."""
    other = tmp_path / "elsewhere" / "demo" / "gemma"
    other.mkdir(parents=True)
    for meant in (other, clone / "demo" / "gemma"):
        assert lasting_name(str(meant)) == str(meant)
        assert folders.resolve(lasting_name(str(meant))) == meant
    assert lasting_name("demo/gemma") == str(other)


def test_prompts_come_from_flags_and_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n\na star\n")
    run = parse_run(["--prompts", "a square", str(path)], "")
    assert run.prompts == ["a square", "a red circle", "a star"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FuseDiTError, match="UTF-8"):
        parse_run(["--prompts", str(path)], "")


def test_a_mesh_may_start_with_a_minus():
    assert parse_run(["--mesh", "-1,2", "--steps", "3"], "", "tpu").mesh == "-1,2"


def split(batch, micro_batch, devices):
    return split_batch(RunConfig(batch=batch, micro_batch=micro_batch), devices)


def test_batch_arithmetic():
    assert split(512, 0, 8) == (64, 1)
    assert split(512, 16, 8) == (16, 4)
    assert split(6, 2, 3) == (2, 1)
    with pytest.raises(FuseDiTError, match=r"use --batch 504 or 528, or --micro-batch 2"):
        split(512, 3, 8)
    with pytest.raises(FuseDiTError, match=r"use --batch 9 or 12$"):
        split(10, 0, 3)
    with pytest.raises(FuseDiTError, match=r"use --batch 4$"):
        split(2, 0, 4)


@pytest.mark.parametrize("variable, cores, ranks_here, workers", [
    ("LOCAL_WORLD_SIZE", 16, 1, 15),
    ("LOCAL_SIZE", 128, 8, 15),
    ("LOCAL_SIZE", 224, 8, 16),
    ("LOCAL_WORLD_SIZE", 2, 1, 1),
    ("LOCAL_WORLD_SIZE", 4, 8, 1)])
def test_data_processes_depend_on_the_cores(monkeypatch, variable, cores, ranks_here, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv(variable, str(ranks_here))
    assert data_workers(parse_run([], "")) == workers
    assert data_workers(parse_run(["--workers", "0"], "")) == 0


def test_a_memory_budget_needs_the_compiler(gemma, data, tmp_path):
    done = launch(flags(gemma, data, tmp_path / "run", "--memory-budget", "0.5"), check=False)
    assert done.returncode == 1
    assert "--memory-budget has no effect without --compile: add --compile" in done.stderr


def test_a_run_from_before_caption_pick_reads_captions_whole(tmp_path):
    """As it did before; a new run, and one that names the flag, do not."""
    argv = ["--out", str(tmp_path)]
    assert parse_run(argv, "").caption_pick == "random"
    (tmp_path / "config.json").write_text('{"run": {"preset": "demo"}}')
    assert parse_run(argv, "").caption_pick == "whole"
    assert parse_run([*argv, "--caption-pick", "first"], "").caption_pick == "first"
    (tmp_path / "config.json").write_text('{"run": {"preset": "demo", "caption_pick": "random"}}')
    assert parse_run(argv, "").caption_pick == "random"


def test_a_resumed_run_keeps_its_streams(gemma, data, tmp_path):
    """One from before --streams has one; a folder without a checkpoint is a new run."""
    out = tmp_path / "run"
    argv = flags(gemma, data, out)
    config = model_config(parse_run(argv, ""))
    for stored, kept in ((None, 1), (16, 16)):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        settings = json.loads(checkpoints.run_settings_json(parse_run(argv, ""), config))
        del settings["run"]["streams"]
        if stored:
            settings["run"]["streams"] = stored
        (out / "config.json").write_text(json.dumps(settings))
        assert parse_run(argv, "").streams == 64
        (out / "step-0000001").mkdir()
        run = parse_run(argv, "")
        assert run.streams == kept
        assert resuming.changed_settings(settings, run, config) == []
        other = parse_run([*argv, "--streams", "64"], "")
        assert other.streams == 64
        (changed,) = resuming.changed_settings(settings, other, config)
        assert str(changed) == f"run.streams was {kept}, is now 64"

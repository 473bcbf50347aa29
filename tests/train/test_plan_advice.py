"""Tests what --plan refuses, and the flags that it names if a run does not fit."""
import re
from dataclasses import replace

import pytest
from launching import flags

from fusedit import FuseDiTError
from fusedit_lib.train import costs, hardware, memory, plan
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run


def show(argv, capsys):
    """The lines that --plan prints for these flags."""
    run = parse_run(argv, "")
    assert plan.show(run, model_config(run)) == 0
    return capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------------------ refused

@pytest.mark.parametrize("more, message", [
    (["--lora", "8"], "--lora needs a model to adapt"),
    (["--memory-budget", "0.5"], "--memory-budget has no effect without --compile"),
    (["--deepspeed-config", "no.json"], "--deepspeed-config no.json: No such file")])
def test_a_plan_of_settings_that_training_refuses(gemma_folder, tmp_path, capsys, more, message):
    """Shards that do not exist are no error, because the plan does not need them."""
    argv = flags(gemma_folder, tmp_path / "no-shards", "y", "--plan", "1xH100", "--batch", "4")
    assert show(argv, capsys)
    with pytest.raises(FuseDiTError, match=message):
        show([*argv, *more], capsys)


@pytest.mark.parametrize("words, offered", [
    ("--init demo", True), ("", False), ("--init demo --init-raw", False),
    ("--init demo --float8", False), ("--init demo --train-llm", False),
    ("--init demo --lora 8", False)])
def test_lora_is_advised_where_training_accepts_it(words, offered):
    run = parse_run(words.split(), "")
    assert any("lora" in change for change in sum(plan.levels(run, 1), [])) == offered


def test_lora_is_not_advised_without_peft(monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    run = parse_run(["--init", "demo"], "")
    assert not any("lora" in change for change in sum(plan.levels(run, 1), []))


# ------------------------------------------------------------------------------ what fits

@pytest.fixture
def small_run(gemma_folder, monkeypatch):
    """A run of 4 images on a GPU whose memory `plan_on` sets."""
    monkeypatch.setattr(memory, "BUCKET", 1000)        # otherwise as large as the model's gradients
    return parse_run(flags(gemma_folder, "x", "y", "--plan", "1x4080", "--batch", "4", "--dtype",
                           "bf16", "--sample-every", "0"), "")


def need(run, micro_batch, **changes):
    """The bytes that a run with some changes needs."""
    run = replace(run, **changes)
    config = model_config(run)
    devices = hardware.parse(run.plan)
    working = plan.working_memory(run, config, devices, micro_batch, False)
    found = plan.gpu_need(run, devices, costs.training_model(run, config), working)
    return found.remat if run.remat else found.kept


def plan_on(size, run, capsys, monkeypatch):
    """(verdict on the run, flags that are advised or "") on a GPU with this much memory."""
    monkeypatch.setitem(hardware.GPUS, "4080", hardware.Hardware(1e12, size))
    plan.show(run, model_config(run))
    out = capsys.readouterr().out
    (verdict,) = re.findall(r"   (\S.*?)   <- --zero", out)
    advice = re.findall(r"it fits with (.*)|(none of the flags.* fit)", out)
    return verdict.split("  ")[-1].strip(), "".join(sum(advice, ()))


def test_a_reserve_stays_free(small_run, monkeypatch):
    gpu = hardware.Hardware(1e12, 100)
    assert plan.verdict(gpu, 94, 90) == "fits"
    assert plan.verdict(gpu, 95, 94) == "with --remat"
    assert plan.verdict(gpu, 99, 95) == "too much"

    config = model_config(small_run)
    devices = hardware.parse(small_run.plan)
    model = costs.training_model(small_run, config)
    working = plan.working_memory(small_run, config, devices, 4, False)
    size = need(small_run, 4)
    for part, fits in ((1.05, False), (1.07, True)):
        monkeypatch.setitem(hardware.GPUS, "4080", hardware.Hardware(1e12, part * size))
        assert plan.fits(small_run, devices, model, working) == fits


def test_no_flag_is_advised_that_the_run_already_implies(small_run):
    for change in sum(plan.levels(replace(small_run, zero="2-offload"), 1), []):
        assert change.get("zero", "3-offload") == "3-offload"
        assert not change.get("ema_offload")


@pytest.mark.parametrize("micro_batch, changes, advice", [
    pytest.param(4, dict(compile=True), "--compile", marks=pytest.mark.slow),
    # on one GPU, --zero 2 costs nothing: rather that than smaller micro-batches
    (4, dict(compile=True, zero="2"), "--compile --zero 2"),
    pytest.param(1, dict(compile=True, zero="2"), "--micro-batch 1 --compile --zero 2",
                 marks=pytest.mark.slow),
    pytest.param(2, dict(compile=True, zero="2-offload"),
                 "--micro-batch 2 --compile --zero 2-offload", marks=pytest.mark.slow)])
def test_the_first_flags_that_suffice_are_advised(small_run, capsys, monkeypatch, micro_batch,
                                                  changes, advice):
    size = 1.07 * need(small_run, micro_batch, **changes)
    verdict, found = plan_on(size, small_run, capsys, monkeypatch)
    assert found == advice
    follow = replace(small_run, micro_batch=micro_batch, **changes)
    assert plan_on(size, follow, capsys, monkeypatch) == ("fits", "")


def test_image_grids_are_left_out_if_only_they_do_not_fit(small_run, capsys, monkeypatch):
    """Costly flags are not tried before that."""
    with_grids = replace(small_run, sample_every=1, remat=True, zero="3-offload", micro_batch=4,
                         set=(*small_run.set, "image_size=64"), prompts=("a star",) * 8)
    size = 1.07 * need(with_grids, 4, sample_every=0)
    assert need(with_grids, 4) > 1.2 * size
    verdict, advice = plan_on(size, with_grids, capsys, monkeypatch)
    assert (verdict, advice) == ("too much", "--sample-every 0")
    without = replace(with_grids, sample_every=0)
    assert plan_on(size, without, capsys, monkeypatch) == ("with --remat", "")


def test_nothing_fits(small_run, capsys, monkeypatch):
    verdict, advice = plan_on(1e5, small_run, capsys, monkeypatch)
    assert (verdict, advice) == ("too much", "none of the flags that save memory makes it fit")


def test_all_divisors_are_tried():
    assert plan.divisors(15) == [15, 5, 3, 1]

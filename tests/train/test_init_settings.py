"""Settings of runs that start from a trained model: names, refusals, and what is remembered."""
import shutil
from pathlib import Path

import pytest
from conftest import tiny_clip, tiny_vae
from launching import assert_equal, launch, losses, metrics, state
from starting import start_flags

from fusedit import FuseDiTError
from fusedit_lib import folders, pretrained
from fusedit_lib.files import read_json
from fusedit_lib.train import checkpoints, resuming
from fusedit_lib.train.config import check_run, lasting_name, model_config, run_of
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.metrics_log import MetricsLog


@pytest.mark.parametrize("argv, message", [
    (["--init", "demo", "--preset", "demo"], "leave out --preset"),
    (["--init", "demo", "--like-published"], "--like-published with --init needs --preset"),
    (["--init-raw"], "add --init")])
def test_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(argv, "")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_like_published_takes_the_run_settings_of_the_preset(capsys):
    run = parse_run(["--init", "demo", "--like-published", "--preset", "fusedit/2d-rope"], "")
    assert run.caption_pick == "whole"
    assert run.preset == "fusedit/2d-rope"
    demo = pretrained.stored_config(folders.repository() / "demo")
    assert model_config(run).dit_hidden_size == demo.dit_hidden_size != 2048


def test_a_model_that_still_exists_has_not_moved(tmp_path, monkeypatch):
    """Checkpoints of two runs have the same names, and "demo" is found from any folder."""
    monkeypatch.chdir(tmp_path)
    assert not resuming.is_moved("init", "demo", str(tmp_path / "demo"))
    assert resuming.is_moved("init", "/gone/step-0000500", str(tmp_path / "step-0000500"))


def test_the_default_run_folder(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    for init, name in (("run", "run"), ("run/step-0000002", "run"), ("released", "released"),
                       (".", models.name), (str(models / "run"), "run"), ("demo", "demo")):
        assert parse_run(["--init", init], "").out == f"runs/{name}-finetuned"
    monkeypatch.chdir(models / "run" / "step-0000002")
    assert parse_run(["--init", "."], "").out == "runs/run-finetuned"


def test_a_model_is_remembered_by_a_lasting_name(models, tmp_path, monkeypatch):
    """Any folder by its absolute path, and a run by its last checkpoint; demo by its own name."""
    monkeypatch.chdir(models.parent)
    for init, want in ((f"{models.name}/run", models / "run" / "step-0000004"),
                       (f"{models.name}/released", models / "released"), ("demo", "demo"),
                       (folders.repository() / "demo", "demo")):
        run = parse_run(["--init", str(init)], "")
        assert run.init == str(want)
        monkeypatch.chdir(tmp_path)
        assert model_config(run).base == lasting_name(model_config(run).base)
        monkeypatch.chdir(models.parent)


def test_the_folder_that_a_run_starts_from_is_not_written_to(models, tmp_path, monkeypatch):
    """Neither a run nor a model, however it is named."""
    monkeypatch.chdir(models)
    for init, out in (("run", "run"), ("run/step-0000002", "run"), (models / "run", "run"),
                      ("released", "../" + models.name + "/released"),
                      ("run/step-0000002", "run/step-0000002")):
        with pytest.raises(FuseDiTError, match="--out .* is what --init starts from: choose"):
            check_run(parse_run(["--init", str(init), "--out", out], ""))
    check_run(parse_run(["--init", "run", "--out", "run/finetuned"], ""))


def test_a_model_whose_name_is_a_number(models, tmp_path, monkeypatch):
    """It is no checkpoint of the published code, and its parent folder no run."""
    shutil.copytree(models / "released", tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert parse_run(["--init", "2024"], "").out == "runs/2024-finetuned"
    check_run(parse_run(["--init", "2024", "--out", "."], ""))
    (tmp_path / "50").mkdir()
    (tmp_path / "50" / "ema.pt").touch()
    with pytest.raises(FuseDiTError, match="--out . is what --init starts from"):
        check_run(parse_run(["--init", "50", "--out", "."], ""))
    assert run_of("gone/50") == Path("gone")               # a resumed run may have started from it


# ------------------------------------------------------------------------------ resuming

def test_a_resumed_run_does_not_need_the_model(models, data, tmp_path):
    """It equals a run that was never stopped, after the model's run has been deleted."""
    source = shutil.copytree(models / "run", tmp_path / "source")
    more = ["--init-raw", "--save-every", "1", "--ema-every", "1", "--image-size", "32"]

    def job(name, steps):
        return start_flags(source, data, tmp_path / name, *more, "--steps", str(steps))

    launch(job("whole", 3))
    launch(job("halves", 1))
    shutil.rmtree(source)
    launch(job("halves", 2))                # the same command
    without = job("halves", 3)[2:]          # --init may also be left out
    without.remove("--init-raw")
    launch(without)

    rows = metrics(tmp_path / "halves")
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 1, 2, 3]
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert_equal(state(tmp_path / "halves", 3), state(tmp_path / "whole", 3))


def begun(out, *words):
    """Writes config.json and an empty checkpoint of a new run. Returns its RunConfig."""
    run = parse_run([*map(str, words), "--out", str(out)], "")
    train_state = out / "step-0000001" / "train_state"
    train_state.mkdir(parents=True)
    (train_state / "state.json").write_text('{"files": {}}')
    (out / "config.json").write_text(checkpoints.run_settings_json(run, model_config(run)))
    return run


def test_a_resumed_run_keeps_its_model(models, tmp_path, monkeypatch):
    """Its run may have later checkpoints by now. --init may be left out, and --init-raw too."""
    source = shutil.copytree(models / "run", tmp_path / "source")
    (source / "latest").write_text("step-0000002\n")
    out = tmp_path / "out"
    first = begun(out, "--init", source, "--init-raw")
    assert first.init == str(source / "step-0000002")
    (source / "latest").write_text("step-0000004\n")
    monkeypatch.chdir(tmp_path)
    ways = (["--init", str(source), "--init-raw"], ["--init", "source", "--init-raw"],
            ["--init", "source/step-0000002", "--init-raw"], [])
    for exists in (True, False):
        if not exists:
            shutil.rmtree(source)
        for words in ways:
            run = parse_run([*words, "--out", str(out)], "")
            assert (run.init, run.init_raw, run.preset) == (first.init, True, ""), words
            assert resuming.changed_settings(read_json(out / "config.json"), run,
                                             model_config(run)) == []


@pytest.mark.parametrize("words, message", [
    (["--init", "run/step-0000004"],
     "run.init was '.*/run/step-0000002', is now '.*/run/step-0000004'"),
    (["--init", "run/step-0000002", "--init-raw"], "run.init_raw was False, is now True"),
    (["--init", "released"], "run.init was .*/run/step-0000002', is now .*/released'"),
    (["--set", "shift=2"], "model.shift was 4.0, is now 2.0")])
def test_a_run_of_another_model_is_not_resumed(models, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    begun(out, "--init", "run/step-0000002")
    run = parse_run([*words, "--out", str(out)], "")
    with pytest.raises(FuseDiTError, match=message):
        resuming.open_run(run, model_config(run))


def test_a_run_without_a_model_is_not_resumed_with_one(models, tmp_path, capsys):
    begun(tmp_path / "new", "--preset", "demo")
    run = parse_run(["--init", str(models / "run"), "--out", str(tmp_path / "new")], "")
    with pytest.raises(FuseDiTError, match="run.init was '', is now .*choose another --out"):
        resuming.open_run(run, model_config(run))
    begun(tmp_path / "tuned", "--init", models / "run")
    with pytest.raises(SystemExit):
        parse_run(["--preset", "demo", "--out", str(tmp_path / "tuned")], "")
    assert "leave out --preset" in capsys.readouterr().err


def test_a_second_run_does_not_land_in_the_first(tmp_path, monkeypatch):
    """Its default folder is the same, but other data would continue the first run."""
    monkeypatch.chdir(tmp_path)
    out = "runs/demo-finetuned"
    words = ["--init", "demo", "--data", "one", "two"]
    begun(tmp_path / out, *words)
    assert parse_run(words, "").out == out
    other = [*words[:2], "--data", "three"]
    with pytest.raises(FuseDiTError, match=f"^{out} holds a run on one two: to continue it, give "
                                           f"--out {out}; to start another, give another --out$"):
        parse_run(other, "")
    assert parse_run([*other, "--out", out], "").data == ["three"]
    assert parse_run([*other, "--plan", "8xH100"], "").out == out
    shutil.rmtree(tmp_path / out / "step-0000001")         # nothing of it could be continued
    assert parse_run(other, "").out == out


def test_like_published_is_remembered(tmp_path, capsys):
    words = ["--preset", "fusedit/2d-rope", "--init", "demo"]
    begun(tmp_path, *words, "--like-published")
    run = parse_run([*words, "--out", str(tmp_path)], "")
    assert resuming.changed_settings(read_json(tmp_path / "config.json"), run,
                                     model_config(run)) == []


def test_a_gemma_inside_the_model_is_named_if_it_is_gone(models, tmp_path):
    source = shutil.copytree(models / "released", tmp_path / "source")
    out = tmp_path / "out"
    begun(out, "--init", source)
    moved = source.rename(tmp_path / "moved")
    run = parse_run(["--out", str(out)], "")
    with pytest.raises(FuseDiTError, match="out needs .*/source/transformer, its Gemma, which does "
                                           "not exist. If it has been moved, use --base FOLDER"):
        model_config(run)
    run = parse_run(["--out", str(out), "--base", str(moved / "transformer")], "")
    assert resuming.changed_settings(read_json(out / "config.json"), run, model_config(run)) == []


@pytest.mark.parametrize("name, part", [("vae", "VAE"), ("clip", "CLIP")])
def test_a_vae_or_clip_is_named_if_it_is_gone(tmp_path, name, part):
    """And can be given in its new place."""
    old = tmp_path / "source" / name
    new = tmp_path / "moved" / name
    if name == "vae":
        tiny_vae(old)
        words = [f"vae={old}", "in_channels=4", "patch_size=1"]
    else:
        tiny_clip(old)
        words = [f"clip={old}", "text_modulation_embeds_dim=24"]
        words += ["timestep_conditioning=adaln-zero"]
    out = tmp_path / "out"
    begun(out, "--init", "demo", "--set", *words)
    old.parent.rename(new.parent)
    for more in ([], ["--set", *words]):
        with pytest.raises(FuseDiTError, match=f"out needs {old}, its {part}, which does not "
                                               f"exist. If it .*moved, use --set {name}=FOLDER"):
            model_config(parse_run(["--out", str(out), *more], ""))
        run = parse_run(["--out", str(out), *more, "--set", f"{name}={new}"], "")
        config = model_config(run)
        assert getattr(config, name) == str(new)
        assert resuming.changed_settings(read_json(out / "config.json"), run, config) == []


def test_a_run_that_starts_again_keeps_one_row_of_step_0(models, tmp_path):
    """It has stopped before its first checkpoint, and validates again."""
    run = parse_run(["--init", "demo", "--out", str(tmp_path)], "")
    for _ in range(2):
        log = MetricsLog(run, model_config(run), 0)
        log.write(dict(step=0, val_loss=1.5))
        log.write(dict(step=1, loss=1.5))
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1]
    MetricsLog(run, model_config(run), 1)   # resumed from step 1
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1]

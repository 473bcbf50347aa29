"""--like-published: the run settings of the published configs.

tests/reference/published_configs.json is a copy of the values of the 21 YAML files.
"""
import json

import pytest
from conftest import REFERENCE
from launching import flags, launch

import fusedit
from fusedit import FuseDiTError
from fusedit_lib.train.config import RunConfig
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.published_runs import HOSTS, published_settings

CONFIGS = json.loads((REFERENCE / "published_configs.json").read_text())
RUNS = {name: CONFIGS["all"] | own for name, own in CONFIGS["runs"].items()}

# published key -> the setting of RunConfig that has its value
SAME = {
    "trainer.max_steps": "steps",
    "trainer.seed": "seed",
    "trainer.gradient_clipping": "max_grad_norm",
    "trainer.checkpointing_steps": "save_every",
    "trainer.consolidation_steps": "keep_every",
    "trainer.logging_steps": "log_every",
    "ema.decay": "ema_decay",
    "ema.update_steps": "ema_every",
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "lr_scheduler.name": "lr_schedule",
    "lr_scheduler.num_warmup_steps": "warmup_steps",
    "data.original_caption_rate": "original_caption_rate",
    "data.random_dropping_rate": "caption_drop",
}


@pytest.mark.parametrize("name", RUNS)
def test_the_settings_are_those_of_the_published_config(name):
    config = RUNS[name]
    want = {setting: config[key] for key, setting in SAME.items()}
    assert config["data.center_crop"] is True
    assert config.get("trainer.train_llm", False) is False
    batch = config["data.batch_size"] * HOSTS * config["trainer.gradient_accumulation_steps"]
    want |= dict(batch=batch, crop="center", train_llm=False)
    # not in the configs, but in the code
    want |= dict(resize="bilinear", caption_pick="whole", ema_warmup=False)
    assert published_settings(name) == want


def test_every_preset_of_the_paper_has_published_settings():
    assert set(RUNS) == set(fusedit.PRESETS) - {"demo", "emoji", "fusedit"}
    assert published_settings("fusedit") == published_settings("fusedit/large-scale")
    with pytest.raises(FuseDiTError, match="paper's runs .demo has none.: .*fusedit/large-scale"):
        parse_run(["--like-published"], "")
    with pytest.raises(FuseDiTError, match="unknown preset"):
        parse_run(["--preset", "fusedit/2d-ropes", "--like-published"], "")


@pytest.mark.parametrize("engine", ["gpu", "tpu"])
def test_settings_are_set_where_they_are_not_given(capsys, engine):
    given = ["--preset", "fusedit", "--like-published", "--steps", "9", "--ema-warmup"]
    run = parse_run(given, "", engine)
    assert run.steps == 9 and run.ema_warmup is True
    assert run.resize == "bilinear" and run.keep_every == 50_000
    assert capsys.readouterr().err == (
        "--like-published sets --resize bilinear --caption-pick whole --save-every 5000 "
        "--keep-every 50000 --log-every 100\n")
    plain = parse_run(["--preset", "fusedit"], "", engine)
    assert plain.steps == RunConfig().steps and plain.resize == "bicubic"
    assert capsys.readouterr().err == ""
    assert parse_run(["--preset", "fusedit", "--like-published"], "", engine).steps == 1_000_000


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse_run(["--preset", "fusedit", "--like-published"], "")
    assert capsys.readouterr().err == ""


def test_a_run_resumes_with_and_without_the_flag(gemma, data, tmp_path):
    """Its config.json has the values, and remembers the flag."""
    argv = flags(gemma, data, tmp_path / "run", "--preset", "fusedit/2d-rope", "--set",
                 "vae=null", "in_channels=3", "--sample-every", "0")
    launch([*argv, "--steps", "1", "--like-published"])
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert stored["like_published"] is True
    assert stored["ema_warmup"] is False and stored["resize"] == "bilinear"

    without = launch([*argv, "--steps", "2"])
    assert "from step 1 to 2" in without.stdout
    changed = "--resize bilinear --caption-pick whole --no-ema-warmup"
    assert f"--like-published sets {changed}" in without.stderr

    path = tmp_path / "run" / "config.json"                # as before --caption-pick
    config = json.loads(path.read_text())
    del config["run"]["caption_pick"]
    path.write_text(json.dumps(config))
    assert "from step 2 to 3" in launch([*argv, "--steps", "3", "--like-published"]).stdout
    refused = launch([*argv, "--steps", "4", "--no-like-published"], check=False)
    assert "resize was 'bilinear', is now 'bicubic'" in refused.stderr

"""What --plan refuses, and the flags that it names if a run does not fit."""
import pytest
from launching import flags

from fusedit import FuseDiTError
from fusedit_lib.train import plan
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run


def show(argv, capsys):
    """The lines that --plan prints for these flags."""
    run = parse_run(argv, "")
    assert plan.show(run, model_config(run)) == 0
    return capsys.readouterr().out.splitlines()


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
    assert any("lora" in change for change in plan.levels(run)) == offered

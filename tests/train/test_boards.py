"""--tensorboard and --wandb: refused at once if they cannot be used; later they never end a run.

The module wandb is simulated: the real one needs a login and the network.
"""
import json

import pytest
from launching import ENV, flags, launch, losses

# wandb.py, in a folder of PYTHONPATH. Each function does what the environment variable says.
WANDB = """
import json, os, sys

class Job:
    def log(self, row, step):
        if os.environ["LOG"] == str(step):
            raise RuntimeError("connection reset\\nby peer")
        print("logged", step)

def login(verify):
    assert verify
    assert float(os.environ["WANDB_FINISH_TIMEOUT"]) > 0   # seconds, to end without a network
    print("login", os.environ.get("RANK"), file=sys.stderr)
    if os.environ["LOGIN"]:
        raise RuntimeError(os.environ["LOGIN"])
    return True

def init(**settings):
    if os.environ["INIT"]:
        raise RuntimeError(os.environ["INIT"])
    json.dumps(settings["config"])
    return Job()
"""


@pytest.fixture
def run_with(gemma, data, tmp_path):
    """Returns a function that trains with the fake wandb, and what its functions do."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(WANDB)

    def run(*words, n=1, check=True, login="", init="", log=""):
        env = ENV | {"PYTHONPATH": f"{tmp_path}/fake:{ENV['PYTHONPATH']}",
                     "LOGIN": login, "INIT": init, "LOG": log}
        argv = flags(gemma, data, tmp_path / "run", "--sample-every", "0", "--wandb", "p", *words)
        return launch(argv, n=n, env=env, check=check)
    return run


def warnings(done):
    return [line for line in done.stderr.splitlines() if not line.startswith("login")]


@pytest.mark.parametrize("n", [1, 2])
def test_a_failed_login_is_refused_before_the_model_is_loaded(run_with, tmp_path, n):
    done = run_with("--steps", "1", n=n, check=False, login="No API key configured.\nmore",
                    init="reached init")
    assert done.returncode == 1
    line = "error: --wandb: cannot log in: No API key configured. Run `wandb login`, check the"
    assert len(warnings(done)) == n         # every rank stops
    assert all(line in warning for warning in warnings(done)), done.stderr
    assert done.stderr.count("login 0\n") == 1
    assert "login 1" not in done.stderr     # only rank 0 logs in
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("failure, steps", [
    (dict(init="no\nnetwork"), []), (dict(log="2"), ["1"])])
def test_a_board_that_fails_later_does_not_end_the_run(run_with, tmp_path, failure, steps):
    done = run_with("--steps", "3", **failure)
    assert len(losses(tmp_path / "run")) == 3
    assert [line.split()[1] for line in done.stdout.splitlines() if "logged" in line] == steps
    reason = "no" if "init" in failure else "connection reset"
    begin = f"WARNING: Weights & Biases has failed ({reason}). The run continues without it; "
    assert len(warnings(done)) == 1 and warnings(done)[0].startswith(begin), done.stderr


def test_a_resumed_run_goes_on_without_its_boards(run_with, tmp_path):
    run_with("--steps", "1", "--tensorboard")
    for path in (tmp_path / "run" / "tensorboard").iterdir():
        path.unlink()
    (tmp_path / "run" / "tensorboard").rmdir()
    (tmp_path / "run" / "tensorboard").touch()
    done = run_with("--steps", "2", "--tensorboard", login="no network")
    assert len(losses(tmp_path / "run")) == 2
    first, second = warnings(done)
    assert first.startswith("WARNING: --tensorboard: File exists: ")
    assert second.startswith("WARNING: --wandb: cannot log in: no network. ")
    assert second.endswith("The run is resumed without it")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert (settings["tensorboard"], settings["wandb"]) == (False, "")


@pytest.mark.parametrize("flag, package", [("--tensorboard", "tensorboard"),
                                           ("--wandb=p", "wandb")])
def test_a_missing_package_is_named(gemma, data, tmp_path, flag, package):
    argv = flags(gemma, data, tmp_path / "run", "--steps", "1", flag)
    done = launch(argv, f"sys.modules['{package}'] = None", check=False)
    assert done.returncode == 1
    name = flag.removesuffix("=p")
    assert done.stderr.endswith(f"error: {name}: {package} is not installed: pip install -e "
                                "'.[watch]'\n")
    assert done.stderr.count("\n") == 1

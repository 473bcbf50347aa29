"""--tensorboard and --wandb: refused at once if they cannot be used; later they never end a run.

The module wandb is simulated: the real one needs a login and the network.
"""
import json
import sys

import pytest
import warm
from launching import ENV, flags, launch, losses

from fusedit_lib.train.config import RunConfig
from fusedit_lib.train.metrics_log import board_problems

# wandb.py, in a folder of PYTHONPATH. Each function does what the environment variable says.
WANDB = """
import json, os, sys

class Job:
    def log(self, row, step):
        if os.environ["LOG"] == str(step):
            raise RuntimeError("connection reset\\nby peer")
        print("logged", step)

    def finish(self, exit_code):
        print("finished", exit_code)

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

    def run(*words, before="", n=1, check=True, login="", init="", log=""):
        env = ENV | {"PYTHONPATH": f"{tmp_path}/fake:{ENV['PYTHONPATH']}",
                     "LOGIN": login, "INIT": init, "LOG": log}
        argv = flags(gemma, data, tmp_path / "run", "--sample-every", "0", "--wandb", "p", *words)
        return launch(argv, before, n=n, env=env, check=check)
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


# Rank 0 fails in its second step, with exit handlers that never end.
FAILS = """
import atexit

class Monitor(monitor.Monitor):
    def log_step(self, grad_norm):
        super().log_step(grad_norm)
        if self.step == 2 and self.rank == 0:
            atexit.register(time.sleep, 10000)
            raise RuntimeError("a GPU is broken")

launcher.Monitor = Monitor
"""


def test_the_boards_are_closed_when_one_of_several_ranks_fails(run_with):
    """An exit code tells Weights & Biases that the run has failed."""
    done = run_with("--steps", "3", before=FAILS, n=2, check=False)
    assert done.returncode == 1 and "a GPU is broken" in done.stderr
    assert [line for line in done.stdout.splitlines() if "ed " in line] == ["logged 1",
                                                                            "finished 1"]


def test_a_board_that_does_not_close_is_given_up():
    code = ("import time; from fusedit_lib import cli; cli.SECONDS_TO_CLOSE = 0.1\n"
            "cli.closers.append(lambda code: time.sleep(10000)); cli.exit_at_once(3)")
    assert warm.run(["-c", code]).returncode == 3


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


class OldTensorBoard:
    """A finder of modules that fails as torch.utils.tensorboard does if TensorBoard is too old."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.utils.tensorboard":
            raise ImportError("TensorBoard logging requires TensorBoard version 1.15 or above")


def test_a_tensorboard_that_is_too_old_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(sys, "meta_path", [OldTensorBoard(), *sys.meta_path])
    run = RunConfig(out=str(tmp_path / "run"), tensorboard=True)
    assert board_problems(run) == {
        "tensorboard": "--tensorboard: TensorBoard logging requires TensorBoard version 1.15 or "
                       "above"}

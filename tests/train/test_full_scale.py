"""The README's full-scale commands, word for word but for small models, on two processes of a CPU.

What follows a command here comes after its own flags, and so replaces them.
"""
import importlib.util
import re
import shlex
from typing import NamedTuple

import pytest
import warm
from conftest import REFERENCE, ROOT
from launching import ENV, launch, losses

from fusedit_lib.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Command(NamedTuple):
    """A command line of the README that trains a preset of full size."""
    ranks: str                              # "one", or "many" with a launcher before it
    flags: str                              # without the paths, which are not here


def readme_lines():
    """The lines of the README's bash blocks, with continued lines joined."""
    readme = (ROOT / "README.md").read_text()
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", readme, re.S):
        lines += block.replace("\\\n", " ").splitlines()
    return lines


def commands(program):
    """All Commands of a program, sorted."""
    found = set()
    for line in readme_lines():
        match = re.search(rf"{program}\.py (--preset fusedit[^'>#]*)", line)
        if match is None or "--plan" in line:
            continue
        words = re.sub(r"--(data|out|cache) \S+", "", match[1])
        ranks = "many"
        if line.startswith("python"):
            ranks = "one"
        found.add(Command(ranks, " ".join(words.split())))
    return sorted(found)


GPU = commands("train_gpu")
TPU = commands("train_tpu")


def test_the_readme_has_such_commands():
    assert {command.ranks for command in GPU} == {"one", "many"}
    assert all("--compile" in command.flags for command in GPU)
    assert TPU


@pytest.fixture(scope="module")
def small(gemma, data):
    """Flags that put a small Gemma, VAE and data set in place of the large ones."""
    return ["--base", str(gemma), "--data", str(data), "--set",
            f"vae={REFERENCE}/released_layout/pipeline/vae", "in_channels=16", "image_size=32",
            "patch_size=2", "initial_layers=0", "--batch", "8", "--micro-batch", "2",
            "--workers", "1", "--save-every", "1", "--sample-every", "2", "--sample-steps", "2",
            "--prompts", "a blue square", "a star", "--log-every", "1"]


def check_run(argv, out, n, engine, env):
    """Train 2 steps, resume for 2 more, and generate an image with the run."""
    argv = [*argv, "--out", str(out)]
    launch([*argv, "--steps", "2"], n=n, engine=engine, env=env)
    launch([*argv, "--steps", "4"], n=n, engine=engine, env=env)
    assert len(losses(out)) == 4
    assert len(list((out / "samples").glob("*.png"))) == 2
    assert checkpoints.damage(out / "step-0000004") is None
    done = warm.run([ROOT / "sample.py", "--model", out, "--prompt", "a blue square", "--steps",
                     "2", "--out", out / "generated", "--compile", "--device", "cpu"], ENV)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "generated").glob("*.png"))) == 1


@pytest.mark.parametrize("command", GPU, ids=str)
def test_it_trains_resumes_and_generates(small, tmp_path, command):
    argv = [*shlex.split(command.flags), *small, "--device", "cpu"]
    n = {"one": 1, "many": 2}[command.ranks]
    check_run(argv, tmp_path / "run", n, "gpu", ENV)


@pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                    reason="needs PyTorch/XLA: pip install -e '.[tpu,test]'")
@pytest.mark.parametrize("command", TPU, ids=str)
def test_it_trains_on_a_mesh(small, tmp_path, command):
    env = ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2",
                 "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    check_run([*shlex.split(command.flags), *small], tmp_path / "run", 1, "tpu", env)

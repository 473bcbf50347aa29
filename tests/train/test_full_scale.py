"""The documentation's full-scale commands, word for word, with small models on a CPU.

Flags that are appended to a command replace its own.
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
    """A command line in the documentation that trains a preset of full size, with a --batch."""
    ranks: str                              # "one", or "many" with a launcher before it
    flags: str                              # without paths, and without --resume-with


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(document):
    """The lines of a document's bash blocks, with continued lines joined."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
        lines += block.replace("\\\n", " ").splitlines()
    return lines


def commands(program, documents):
    """All Commands of a program in these documents, sorted."""
    lines = []
    for document in documents:
        lines += command_lines(document)
    found = set()
    for line in lines:
        match = re.search(rf"{program}\.py (--preset fusedit[^'>#]*)", line)
        if match is None or "--batch" not in line or "--plan" in line:
            continue                        # docs/data.md has lines that only show --data
        words = re.sub(r"--(data|out|cache|resume-with) \S+", "", match[1])
        ranks = "many"
        if line.startswith("python"):
            ranks = "one"
        found.add(Command(ranks, " ".join(words.split())))
    return sorted(found)


GPU = commands("train_gpu", DOCUMENTS)
TPU = commands("train_tpu", DOCUMENTS)


def test_the_documentation_has_such_commands():
    training = commands("train_gpu", [ROOT / "docs/training.md"])
    assert {command.ranks for command in training} == {"one", "many"}
    assert commands("train_tpu", [ROOT / "docs/tpu.md"])
    assert all("--compile" in command.flags for command in GPU)


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

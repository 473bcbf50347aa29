"""The README's full-scale commands, word for word but for small models, on two processes of a CPU.

What follows a command here comes after its own flags, and so replaces them.
"""
import importlib.util
import re
import shlex

import pytest
import warm
from conftest import REFERENCE, ROOT, tiny_gemma
from launching import ENV, launch, losses
from tiny_shards import numbered

from fusedit_lib.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def commands(program):
    """What the README gives a program to train presets of full size: {(launcher, flags)}.

    Its paths are not here: where data lie and a run goes is left out.
    """
    found = set()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(rf"{program}\.py (--preset fusedit.*)", line)
            if match and "--plan" not in line:
                words = match[1].partition("'")[0].partition(">")[0].partition("#")[0]
                words = re.sub(r"--(data|out|cache) \S+", "", words)
                kind = "one" if line.startswith("python") else "many"
                found.add((kind, " ".join(words.split())))
    return sorted(found)


GPU, TPU = commands("train_gpu"), commands("train_tpu")


def test_the_readme_has_such_commands():
    assert {kind for kind, _ in GPU} == {"one", "many"} and TPU
    assert all("--compile" in words for _, words in GPU)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags that put a small Gemma, VAE and data set in place of the large ones."""
    folder = tmp_path_factory.mktemp("small")
    tiny_gemma(folder, num_hidden_layers=2)
    return ["--base", str(folder), "--data", numbered(folder / "data"), "--set",
            f"vae={REFERENCE}/released_layout/pipeline/vae", "in_channels=16", "image_size=32",
            "patch_size=2", "initial_layers=0", "--batch", "8", "--micro-batch", "2",
            "--workers", "1", "--save-every", "1", "--sample-every", "2", "--sample-steps", "2",
            "--prompts", "a blue square", "a star", "--log-every", "1"]


def trains_resumes_and_draws(words, out, steps, n, engine, env):
    argv = [*words, "--out", str(out)]
    launch([*argv, "--steps", "2"], n=n, engine=engine, env=env)
    launch([*argv, "--steps", str(steps)], n=n, engine=engine, env=env)
    assert len(losses(out)) == steps and len(list((out / "samples").glob("*.png"))) == 2
    assert checkpoints.damage(out / f"step-{steps:07d}") is None
    done = warm.run([ROOT / "sample.py", "--model", out, "--prompt", "a blue square", "--steps",
                     "2", "--out", out / "drawn", "--compile", "--device", "cpu"], ENV)
    assert done.returncode == 0 and len(list((out / "drawn").glob("*.png"))) == 1, done.stderr


@pytest.mark.parametrize("kind, line", GPU)
def test_it_trains_saves_goes_on_and_draws(small, tmp_path, kind, line):
    words = [*shlex.split(line), *small, "--device", "cpu"]
    trains_resumes_and_draws(words, tmp_path / "run", 4, 1 if kind == "one" else 2, "gpu", ENV)


@pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                    reason="needs PyTorch/XLA: pip install -e '.[tpu,test]'")
@pytest.mark.parametrize("kind, line", TPU)
def test_it_trains_on_a_mesh(small, tmp_path, kind, line):
    env = ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2",
                 "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    trains_resumes_and_draws([*shlex.split(line), *small], tmp_path / "run", 4, 1, "tpu", env)

"""One cold start of each program, each in a new Python process.

In all other tests the programs are forked from a process that has imported everything
(tests/warm.py).
"""
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, tiny_gemma
from launching import flags, free_port, losses
from PIL import Image
from tiny_shards import numbered


class ColdStarts(NamedTuple):
    folder: Path                            # the working directory of all programs
    done: dict                              # {name: CompletedProcess}


def trainings(folder):
    """{name: command line} of one run: started by the deepspeed launcher, resumed without it."""
    tiny_gemma(folder / "gemma", num_hidden_layers=2)
    argv = flags(folder / "gemma", numbered(folder / "data"), folder / "run", "--device", "cpu")
    deepspeed = shutil.which("deepspeed", path=Path(sys.executable).parent)
    program = ROOT / "train_gpu.py"
    return dict(
        deepspeed=[deepspeed, "--num_gpus", "2", "--master_port", free_port(), program, *argv,
                   "--steps", "2"],
        python=[sys.executable, program, *argv, "--steps", "4"])


def other_programs(folder):
    """{name: command line} of the programs that need no training."""
    argv = dict(
        sample=["sample.py", "--prompt", "a large red circle above a small blue square", "--out",
                folder / "samples", "--device", "cpu"],
        prepare_data=["prepare_data.py", "shapes", folder / "shards", "-n", "10"],
        evaluate=["evaluate.py", "shapes", "-n", "6", "--steps", "2", "--out", folder / "shapes",
                  "--device", "cpu"],
        train_tpu=["train_tpu.py", "--preset", "demo", "--plan", "v4-8", "--batch", "32"])
    return {name: [sys.executable, ROOT / program, *words]
            for name, (program, *words) in argv.items()}


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """ColdStarts of all programs. One training run follows the other, in parallel with the rest."""
    folder = tmp_path_factory.mktemp("cold")

    def run(commands):
        done = {}
        for name, words in commands.items():
            done[name] = subprocess.run([str(word) for word in words], capture_output=True,
                                        text=True, cwd=folder)
        return done
    with ThreadPoolExecutor(2) as pool:
        trained, others = pool.map(run, [trainings(folder), other_programs(folder)])
    return ColdStarts(folder, trained | others)


@pytest.mark.parametrize("name", ["deepspeed", "python", "sample", "prepare_data", "evaluate",
                                  "train_tpu"])
def test_it_exits_cleanly(cold, name):
    done = cold.done[name]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_the_launchers_resume_each_others_run(cold):
    assert len(losses(cold.folder / "run")) == 4
    assert "from step 0 to 2; batch 8 = 2 x cpu" in cold.done["deepspeed"].stdout
    assert "from step 2 to 4; batch 8 = 1 x cpu" in cold.done["python"].stdout


def test_sample_writes_an_image(cold):
    path = Path(cold.done["sample"].stdout.strip())
    assert path.parent == cold.folder / "samples"
    with Image.open(path) as image:
        assert image.text["seed"] == "0"
        assert len(image.convert("RGB").getcolors(10**6)) > 3


def test_prepare_data_writes_shards(cold):
    index = json.loads((cold.folder / "shards" / "index.json").read_text())
    assert index["samples"] == 10


def test_evaluate_writes_scores(cold):
    (path,) = (cold.folder / "shapes").rglob("shapes.json")
    settings = json.loads(path.read_text())["settings"]
    assert settings["dtype"] in ("float32", "bfloat16")


def test_train_tpu_prints_a_plan(cold):
    assert "4 v4" in cold.done["train_tpu"].stdout

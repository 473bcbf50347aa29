"""One cold start of each program, each by a Python of its own.

Everywhere else the programs are forked from a process that has imported everything (tests/warm.py).
"""
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, tiny_gemma
from launching import flags, free_port, losses
from PIL import Image
from tiny_shards import numbered

DEEPSPEED = [shutil.which("deepspeed", path=Path(sys.executable).parent), "--num_gpus", "2",
             "--master_port"]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """(folder, {name: CompletedProcess}): the trainings in a row, the others beside them."""
    tmp = tmp_path_factory.mktemp("cold")
    tiny_gemma(tmp / "gemma", num_hidden_layers=2)
    train = flags(tmp / "gemma", numbered(tmp / "data"), tmp / "run", "--device", "cpu")
    trainings = dict(
        deepspeed=[*DEEPSPEED, free_port(), ROOT / "train_gpu.py", *train, "--steps", "2"],
        python=[sys.executable, ROOT / "train_gpu.py", *train, "--steps", "4"])
    others = dict(
        sample=["sample.py", "--prompt", "a large red circle above a small blue square", "--out",
                tmp / "samples", "--device", "cpu"],
        prepare_data=["prepare_data.py", "shapes", tmp / "shards", "-n", "10"],
        evaluate=["evaluate.py", "shapes", "-n", "6", "--steps", "2", "--out", tmp / "shapes",
                  "--device", "cpu"],
        train_tpu=["train_tpu.py", "--preset", "demo", "--plan", "v4-8", "--batch", "32"])
    others = {name: [sys.executable, ROOT / words[0], *words[1:]] for name, words in others.items()}

    def run(programs):
        return {name: subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp)
                for name, words in programs.items()}
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, (trainings, others))
    return tmp, one | other


@pytest.mark.parametrize("name", ["deepspeed", "python", "sample", "prepare_data", "evaluate",
                                  "train_tpu"])
def test_it_ends_well(ends, name):
    done = ends[1][name]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_the_launchers_go_on_with_each_others_run(ends):
    folder, done = ends
    assert len(losses(folder / "run")) == 4
    assert "from step 0 to 2; a step is 2 x cpu" in done["deepspeed"].stdout
    assert "from step 2 to 4; a step is 1 x cpu" in done["python"].stdout


def test_they_leave_what_they_say(ends):
    folder, done = ends
    picture = Path(done["sample"].stdout.strip())
    assert Image.open(picture).text["seed"] == "0" and picture.parent == folder / "samples"
    assert len(Image.open(picture).convert("RGB").getcolors(10**6)) > 3
    assert json.loads((folder / "shards" / "index.json").read_text())["samples"] == 10
    (scores,) = (folder / "shapes").rglob("shapes.json")
    assert json.loads(scores.read_text())["settings"]["dtype"] in ("float32", "bfloat16")
    assert "4 v4" in done["train_tpu"].stdout

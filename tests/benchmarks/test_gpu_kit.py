"""The kit that measures a GPU, at tiny sizes on a CPU: it ends; a part's fault stays its own."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

MEASURE = ["bash", ROOT / "benchmarks" / "gpu" / "measure.sh"]
PARTS = ("ceilings attn step train sample demo draw score smoke large tests variants exact float8"
         ).split()
FILES = {"log.txt", "results.jsonl", "profile.txt", "train.json", "sample.json", "demo.jsonl",
         "large.jsonl", "grid.png"}
pytestmark = pytest.mark.slow


def environment(folder, **settings):
    return os.environ | dict(SMALL="1", PY=sys.executable, OUT=str(folder / "out"),
                             W=str(folder / "work"), **settings)


def measure(folder, **settings):
    return subprocess.run(MEASURE, env=environment(folder, **settings), capture_output=True,
                          text=True)


def results(folder):
    return [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]


def codes(folder):
    return {r["name"]: r["code"] for r in results(folder) if r["kind"] == "part"}


@pytest.mark.timeout(1500)
def test_all_parts_run(tmp_path):
    done = measure(tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert codes(tmp_path) == dict.fromkeys(PARTS, 0)
    rows, table = results(tmp_path), done.stdout.split(" SUMMARY ")[1]
    without = {"tests", "train", "sample"}  # rows: the last two have files instead
    if not importlib.util.find_spec("torchao"):
        without.add("float8")
    for part in PARTS:
        assert f"{part} ok" in table
        assert part in without or any(r.get("part") == part for r in rows), part
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == FILES
    assert max(path.stat().st_size for path in files) < 2**24
    for said in ("TFLOP/s", "the default: rows, added", "a step of 2 pictures", "train.py, two ph",
                 "sample.py, 1, two phases", "demo: 6 steps", "score of demo", "smoke: ",
                 "zero 1, latents", "budget70:2", "demo, forward and backward", "tiny, joint mask"):
        assert said in table, said
    assert "cannot be told" not in table and "FAILED" not in table


@pytest.mark.parametrize("way", ["fail", "hang", "kill"])
def test_a_part_that_fails_loses_nothing_of_the_others(tmp_path, way):
    done = measure(tmp_path, STEPS="ceilings attn", PLANT=f"ceilings:{way}")
    found = codes(tmp_path)
    assert done.returncode == 1 and found["attn"] == 0
    assert found["ceilings"] == dict(fail=1, hang=124, kill=-9)[way]
    kinds = {r["kind"] for r in results(tmp_path)}
    assert "attention" in kinds and "product" not in kinds
    table = done.stdout.split(" SUMMARY ")[1]
    assert "the default: rows, added" in table and "FAILED: ceilings" in table
    assert "planted" in (tmp_path / "out/log.txt").read_text()


def test_what_came_before_a_fault_is_kept(tmp_path):
    done = measure(tmp_path, STEPS="ceilings attn", PLANT="attn")
    assert done.returncode == 1 and codes(tmp_path) == dict(ceilings=0, attn=1)
    assert "square" in done.stdout.split(" SUMMARY ")[1]


def test_a_signal_ends_the_part_and_tells_what_there_is(tmp_path):
    with subprocess.Popen(MEASURE, env=environment(tmp_path, STEPS="ceilings smoke"),
                          stdout=subprocess.PIPE, text=True) as process:
        while "smoke: at most" not in (line := process.stdout.readline()):
            assert line
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 1 and "smoke stopped" in rest
    assert codes(tmp_path) == dict(ceilings=0, smoke=130)


def test_what_can_be_wrong_is_said_at_once(tmp_path):
    assert measure(tmp_path, STEPS="ceiling").stderr.startswith("no part ceiling; there are")
    helped = subprocess.run([*MEASURE, "--help"], env=environment(tmp_path), capture_output=True,
                            text=True)
    assert helped.returncode == 0 and all(part in helped.stdout for part in PARTS)

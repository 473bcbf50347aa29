"""The GPU measurement kit, at tiny sizes on a CPU: a part that fails does not affect the others."""
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
PARTS = ("ceilings", "attn", "step", "train", "sample", "demo", "draw", "score", "smoke", "large",
         "tests", "variants", "exact", "float8")
FILES = {"log.txt", "results.jsonl", "profile.txt", "train.json", "sample.json", "demo.jsonl",
         "large.jsonl", "grid.png"}
IN_THE_TABLE = ("TFLOP/s", "the default: rows, added", "a step of 2 images", "train.py, two ph",
                "sample.py, 1, two phases", "demo: 6 steps", "score of demo", "smoke: ",
                "zero 1, latents", "budget70:2", "demo, forward and backward", "tiny, joint mask")
pytestmark = pytest.mark.slow


def environment(folder, **settings):
    fixed = dict(SMALL="1", PY=sys.executable, OUT=str(folder / "out"), W=str(folder / "work"))
    return os.environ | fixed | settings


def measure(folder, *argv, **settings):
    return subprocess.run([*MEASURE, *argv], env=environment(folder, **settings),
                          capture_output=True, text=True)


def results(folder):
    text = (folder / "out/results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def exit_codes(folder):
    """{name of a part: its exit code} from results.jsonl."""
    return {row["name"]: row["code"] for row in results(folder) if row["kind"] == "part"}


def table(stdout):
    return stdout.split(" SUMMARY ")[1]


@pytest.mark.timeout(1500)
def test_all_parts_run(tmp_path):
    done = measure(tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert exit_codes(tmp_path) == dict.fromkeys(PARTS, 0)

    without_rows = {"tests", "train", "sample"}            # the last two write files instead
    if not importlib.util.find_spec("torchao"):
        without_rows.add("float8")
    parts_with_rows = {row.get("part") for row in results(tmp_path)}
    shown = table(done.stdout)
    for part in PARTS:
        assert f"{part} ok" in shown
        assert part in without_rows or part in parts_with_rows, part

    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == FILES
    assert max(path.stat().st_size for path in files) < 2**24
    for text in IN_THE_TABLE:
        assert text in shown, text
    assert "cannot be shown" not in shown
    assert "FAILED" not in shown


@pytest.mark.parametrize("way, code", [("fail", 1), ("hang", 124), ("kill", -9)])
def test_a_failing_part_does_not_affect_the_others(tmp_path, way, code):
    done = measure(tmp_path, STEPS="ceilings attn", PLANT=f"ceilings:{way}")
    assert done.returncode == 1
    assert exit_codes(tmp_path) == dict(ceilings=code, attn=0)
    kinds = {row["kind"] for row in results(tmp_path)}
    assert "attention" in kinds
    assert "product" not in kinds
    shown = table(done.stdout)
    assert "the default: rows, added" in shown
    assert "FAILED: ceilings" in shown
    assert "planted" in (tmp_path / "out/log.txt").read_text()


def test_results_before_a_fault_are_kept(tmp_path):
    done = measure(tmp_path, STEPS="ceilings attn", PLANT="attn")
    assert done.returncode == 1
    assert exit_codes(tmp_path) == dict(ceilings=0, attn=1)
    assert "square" in table(done.stdout)


def test_a_signal_ends_the_part_and_prints_the_table(tmp_path):
    with subprocess.Popen(MEASURE, env=environment(tmp_path, STEPS="ceilings smoke"),
                          stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "smoke: at most" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 1
    assert "smoke stopped" in rest
    assert exit_codes(tmp_path) == dict(ceilings=0, smoke=130)


def test_wrong_settings_are_reported_at_once(tmp_path):
    assert measure(tmp_path, STEPS="ceiling").stderr.startswith("unknown part ceiling; choose from")
    helped = measure(tmp_path, "--help")
    assert helped.returncode == 0
    assert all(part in helped.stdout for part in PARTS)

"""--dtype auto on all kinds of machines, and threads that do not waste CPU time by spinning."""
import json
import os

import pytest
import torch
import warm
from conftest import ROOT
from launching import flags, launch, losses, metrics

from fusedit_lib import backend
from fusedit_lib.train import checkpoints, resuming
from fusedit_lib.train.config import RunConfig

CPU = torch.device("cpu")
# Pretends that this machine has, or does not have, bf16 in hardware.
NATIVE = """
from fusedit_lib import backend
backend.native_bf16 = lambda device: {}
"""


@pytest.mark.parametrize("capability, has, want", [
    ("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False),
    ("DEFAULT", True, False)])
def test_a_cpu_has_bf16_if_torch_may_use_avx512_bf16(monkeypatch, capability, has, want):
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    auto = {True: "bf16", False: "float32"}[want]
    assert backend.native_bf16(CPU) == want
    assert backend.dtype_name("auto", CPU) == auto
    assert backend.dtype_name("bf16", CPU) == "bf16"
    assert backend.dtype_name("float32", CPU) == "float32"
    assert bool(backend.emulation_note("bf16", CPU)) == (not want)
    assert not backend.emulation_note("float32", CPU)


@pytest.mark.parametrize("has, pjrt_device", [(True, "TPU"), (False, "CPU")])
def test_other_devices(monkeypatch, has, pjrt_device):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert backend.native_bf16(torch.device("cuda")) == has
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("PJRT_DEVICE", pjrt_device)
    assert backend.native_bf16(torch.device("xla")) == has


def test_a_cpu_limited_to_avx2_gets_float32():
    """ATEN_CPU_CAPABILITY lets the tests on a new CPU stand in for an older one."""
    code = ("import torch\n"
            "from fusedit_lib import backend\n"
            "print(backend.dtype_name('auto', torch.device('cpu')))")
    done = warm.run(["-c", code], os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, cold=True)
    assert done.stdout == "float32\n", done.stderr


# ------------------------------------------------------------------------------ training

def test_a_run_resumes_in_its_own_dtype(gemma_folder, data, tmp_path):
    out = tmp_path / "run"

    def run(steps, dtype, native):
        argv = flags(gemma_folder, data, out, "--steps", str(steps), "--dtype", dtype)
        return launch(argv, NATIVE.format(native), check=False)
    first = run(2, "auto", native=True)
    assert "images in bf16" in first.stdout
    assert not first.stderr
    assert json.loads((out / "config.json").read_text())["run"]["dtype"] == "bf16"

    other = run(4, "auto", native=False)    # on a machine without bf16
    assert "images in bf16" in other.stdout
    assert len(losses(out)) == 4
    assert other.stderr == (f"note: {out} was started in bf16 and continues in bf16; bf16 is "
                            "emulated on this cpu: float32 would be faster\n")

    refused = run(6, "float32", native=False)
    assert refused.returncode == 1
    assert "run.dtype was 'bf16', is now 'float32'" in refused.stderr
    assert metrics(out)[-1]["step"] == 4


@pytest.mark.parametrize("native, auto", [(True, "bf16"), (False, "float32")])
def test_the_dtype_of_a_new_run(tmp_path, monkeypatch, native, auto):
    monkeypatch.setattr(backend, "native_bf16", lambda device: native)

    def settled(dtype):
        run = RunConfig(out=str(tmp_path), dtype=dtype)
        return resuming.settle_dtype(run, CPU).dtype
    assert settled("auto") == auto
    assert settled("bf16") == "bf16"


# ------------------------------------------------------------------------------ sampling

EMULATED = NATIVE.format(False) + """
import {0}
from fusedit_lib import cli
cli.run({0}.main, '')
"""


def test_sample_says_that_bf16_is_emulated(tmp_path):
    done = warm.run(["-c", EMULATED.format("sample"), "--prompt", "a star", "--steps", "1",
                     "--dtype", "bf16", "--out", tmp_path], cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == (
        "drawing in bf16 on cpu (bf16 is emulated on this cpu: float32 would be faster)\n")


def test_evaluate_says_that_bf16_is_emulated(tmp_path):
    out = tmp_path / "shapes"

    def evaluate(*more):
        return warm.run(["-c", EMULATED.format("evaluate"), "shapes", "-n", "2", "--steps", "1",
                         "--out", out, *more], cwd=ROOT)
    first = evaluate("--dtype", "bfloat16")
    assert first.returncode == 0
    assert "drawing in bf16 on cpu (" in first.stderr

    # auto: the dtype of the existing images
    (out / "guidance-3-steps-1" / "images" / "00001.png").unlink()
    again = evaluate()
    assert again.returncode == 0
    assert "drawing in bf16 on cpu (" in again.stderr
    other = evaluate("--dtype", "float32")
    assert other.returncode == 1
    assert "dtype 'bfloat16', now 'float32'" in other.stderr


# ------------------------------------------------------------------------------ threads

# Prints a variable when a program starts to import torch, and exits.
WATCH_TORCH = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == 'torch':
            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)
            os._exit(0)
sys.modules.pop('torch', None)
sys.meta_path.insert(0, Watch())
import {0}
"""


@pytest.mark.parametrize("given, want", [
    ({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
@pytest.mark.parametrize("program", ["sample", "train_gpu", "train_tpu", "prepare_data",
                                     "evaluate"])
def test_spinning_is_limited_before_torch_is_imported(program, given, want):
    env = dict(os.environ)
    env.pop("GOMP_SPINCOUNT", None)
    env.pop("OMP_WAIT_POLICY", None)
    env |= given | {"PYTHONPATH": str(ROOT)}
    done = warm.run(["-c", WATCH_TORCH.format(program)], env, cold=True)
    assert done.stdout == f"{want}\n", done.stdout + done.stderr

"""--dtype auto, on machines of every kind; and threads that do not burn what others need."""
import json
import os

import pytest
import torch
import warm
from conftest import ROOT
from launching import flags, launch, losses, metrics
from tiny_shards import numbered

from fusedit_lib import backend
from fusedit_lib.train import checkpoints
from fusedit_lib.train.config import RunConfig

CPU = torch.device("cpu")
# This machine with, or without, bf16 of its own.
NATIVE = "from fusedit_lib import backend\nbackend.native_bf16 = lambda device: {}\n"


@pytest.mark.parametrize("capability, has, want", [
    ("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False),
    ("DEFAULT", True, False)])
def test_a_cpu_has_bf16_if_it_may_use_avx512_with_it(monkeypatch, capability, has, want):
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert backend.native_bf16(CPU) == want
    assert backend.dtype_name("auto", CPU) == ("bf16" if want else "float32")
    assert backend.dtype_name("bf16", CPU) == "bf16"
    assert backend.dtype_name("float32", CPU) == "float32"
    assert bool(backend.emulation_note("bf16", CPU)) == (not want)
    assert not backend.emulation_note("float32", CPU)


@pytest.mark.parametrize("has", [True, False])
def test_other_devices(monkeypatch, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert backend.native_bf16(torch.device("cuda")) == has
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("PJRT_DEVICE", "TPU" if has else "CPU")
    assert backend.native_bf16(torch.device("xla")) == has


def test_variables_that_make_a_cpu_older_make_it_float32():
    """As a newer one runs the tests in the place of an older one."""
    code = ("import torch\n"
            "from fusedit_lib import backend\n"
            "print(backend.dtype_name('auto', torch.device('cpu')))")
    done = warm.run(["-c", code], os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, cold=True)
    assert done.stdout == "float32\n", done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("data"))


def test_a_run_goes_on_in_its_own_dtype(gemma_folder, data, tmp_path):
    def run(steps, dtype, native):
        argv = flags(gemma_folder, data, tmp_path / "run", "--steps", str(steps), "--dtype", dtype)
        return launch(argv, NATIVE.format(native), check=False)
    first = run(2, "auto", True)
    assert "pictures in bf16" in first.stdout and not first.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["dtype"] == "bf16"
    other = run(4, "auto", False)           # a machine without it
    assert "pictures in bf16" in other.stdout and len(losses(tmp_path / "run")) == 4
    assert other.stderr == (f"note: {tmp_path}/run was begun in bf16 and goes on in it; bf16 is "
                            "emulated on this cpu: float32 would be faster\n")
    refused = run(6, "float32", False)
    assert refused.returncode == 1 and "run.dtype was 'bf16', is 'float32'" in refused.stderr
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_what_a_new_run_takes(tmp_path):
    def settled(dtype):
        return checkpoints.settle_dtype(RunConfig(out=str(tmp_path), dtype=dtype), CPU)
    assert settled("auto").dtype == ("bf16" if backend.native_bf16(CPU) else "float32")
    assert settled("bf16").dtype == "bf16"


def test_emulated_bf16_is_said_by_what_draws(tmp_path):
    code = NATIVE.format(False) + "import {0}\nfrom fusedit_lib import cli\ncli.run({0}.main, '')"
    sample = warm.run(["-c", code.format("sample"), "--prompt", "a star", "--steps", "1",
                       "--dtype", "bf16", "--out", tmp_path], cwd=ROOT)
    assert sample.returncode == 0 and sample.stderr == (
        "drawing in bf16 on cpu (bf16 is emulated on this cpu: float32 would be faster)\n")
    words = ["shapes", "-n", "2", "--steps", "1", "--out", tmp_path / "shapes"]
    first = warm.run(["-c", code.format("evaluate"), *words, "--dtype", "bfloat16"], cwd=ROOT)
    assert first.returncode == 0 and "drawing in bf16 on cpu (" in first.stderr
    (tmp_path / "shapes" / "guidance-3-steps-1" / "images" / "00001.png").unlink()
    again = warm.run(["-c", code.format("evaluate"), *words], cwd=ROOT)        # auto: as begun
    assert again.returncode == 0 and "drawing in bf16 on cpu (" in again.stderr
    other = warm.run(["-c", code.format("evaluate"), *words, "--dtype", "float32"], cwd=ROOT)
    assert other.returncode == 1 and "dtype bfloat16, now float32" in other.stderr


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
@pytest.mark.parametrize("program", ["sample", "train_gpu", "train_tpu", "prepare_data",
                                     "evaluate"])
def test_threads_wait_as_they_should_before_torch_is_there(program, given):
    code = ("import os, sys\n"
            "class Watch:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'torch':\n"
            "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
            "            os._exit(0)\n"
            "sys.modules.pop('torch', None)\n"
            "sys.meta_path.insert(0, Watch())\n"
            f"import {program}\n")
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = warm.run(["-c", code], env | given | {"PYTHONPATH": str(ROOT)}, cold=True)
    want = given.get("GOMP_SPINCOUNT", "None" if given else "3000")
    assert done.stdout == f"{want}\n", done.stdout + done.stderr

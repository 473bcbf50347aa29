"""Compares training and sampling on a GPU with the CPU. Run with pytest -m gpu on a GPU machine.

All other tests run on the CPU and see no GPU (conftest.py). Each run here is a separate process, in
the environment in which pytest was started.
"""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GPUS, ROOT
from launching import assert_equal, flags, free_port, losses, metrics, state
from PIL import Image


def count_gpus():
    """The number of GPUs that were visible to pytest."""
    if GPUS == "" or not shutil.which("nvidia-smi"):
        return 0
    if GPUS != "all":
        return len(GPUS.split(","))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU") for line in listed.splitlines())


def environment():
    """An environment in which processes see the GPUs that were visible to pytest."""
    paths = [str(ROOT), f"{ROOT}/tests"]
    if os.environ.get("PYTHONPATH"):        # packages that benchmarks/gpu has installed
        paths.append(os.environ["PYTHONPATH"])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": GPUS}
    if GPUS == "all":
        del env["CUDA_VISIBLE_DEVICES"]
    return env


DEVICE = "cuda"
FOUND = count_gpus()
ENV = environment()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not FOUND, reason="there is no GPU")]
if os.environ.get("GPU_EXPECTED") and not FOUND:           # set by benchmarks/gpu: do not skip
    raise RuntimeError("GPU_EXPECTED is set, and there is no GPU")


def program(name, *words, **env):
    """Run one of the programs. If it fails, the test fails and shows the end of its output."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, words)], env=ENV | env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def train(gemma, data, out, *more, device=DEVICE):
    argv = flags(gemma, data, out, "--steps", "6", "--sample-every", "9", "--device", device, *more)
    return program("train_gpu.py", *argv)


@pytest.fixture(scope="module")
def first_step(gemma, data, tmp_path_factory):
    """A run's first step on the CPU, because random initial weights on a GPU would differ."""
    out = tmp_path_factory.mktemp("first-step") / "run"
    train(gemma, data, out, "--steps", "1", device="cpu")
    return out


@pytest.fixture(scope="module")
def on_cpu(gemma, data, first_step, tmp_path_factory):
    """The whole run on the CPU, in float32."""
    out = tmp_path_factory.mktemp("cpu") / "run"
    shutil.copytree(first_step, out)
    train(gemma, data, out, device="cpu")
    return out


@pytest.mark.parametrize("more, near", [
    ("--zero 0", 2e-3),
    ("--zero 1 --ema-offload", 2e-3),
    ("--zero 2", 2e-3),
    ("--zero 3 --remat", 2e-3),
    ("--zero 2-offload", 2e-3),
    ("--dtype bf16", 2e-2),
    ("--dtype bf16 --zero 3", 2e-2),
    ("--dtype bf16 --compile --memory-budget 0.5", 2e-2)])
def test_training_matches_the_cpu(gemma, data, tmp_path, first_step, on_cpu, more, near):
    """On the GPU, float32 is TF32. The run saves at the end, and logs GPU memory."""
    out = tmp_path / "run"
    shutil.copytree(first_step, out)
    if "bf16" in more:                      # a run keeps its dtype, so change what it stored
        path = out / "config.json"
        path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bf16"'))
    done = train(gemma, data, out, *more.split())
    assert losses(out) == pytest.approx(losses(on_cpu), rel=near)
    assert (out / "latest").read_text().strip() == "step-0000006"
    assert 0 < metrics(out)[-1]["memory_gb"] < 1
    assert "attention kernel: " in done.stdout


def test_a_run_of_a_cpu_resumes_on_a_gpu(gemma, data, tmp_path, on_cpu):
    """It also resumes on the CPU again: a checkpoint does not depend on the device."""
    shutil.copytree(on_cpu, tmp_path / "run")
    train(gemma, data, tmp_path / "run", "--steps", "8")
    train(gemma, data, tmp_path / "run", "--steps", "9", device="cpu")
    shutil.copytree(on_cpu, tmp_path / "cpu")
    train(gemma, data, tmp_path / "cpu", "--steps", "9", device="cpu")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=5e-3)
    assert_equal(state(tmp_path / "run", 9), state(tmp_path / "cpu", 9), atol=2e-2)


def generated(device, out):
    """An image of the bundled demo in float32, as integers."""
    program("sample.py", "--prompt", "a large red circle", "--seed", 3, "--dtype", "float32",
            "--device", device, "--out", out)
    (path,) = out.glob("*.png")
    return np.asarray(Image.open(path), int)


def test_sampling_matches_the_cpu(tmp_path):
    gpu = generated(DEVICE, tmp_path / "gpu")
    cpu = generated("cpu", tmp_path / "cpu")
    assert np.ptp(gpu) > 100
    assert abs(gpu - cpu).mean() < 1


# Prints the largest relative error of attention and its gradients in bf16, compared with float64.
ATTENTION = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import fusedit
device = sys.argv[2]
IMAGE_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 1024, 8, 4, 256
errors = []

def random(heads, tokens):
    return torch.randn(2, heads, tokens, HEAD_DIM, device=device, dtype=torch.bfloat16,
                       requires_grad=True)

for words in (8, 120, 200):
    torch.manual_seed(words)
    text_tokens = -(-words // 128) * 128
    tokens = text_tokens + IMAGE_TOKENS
    q = random(HEADS, IMAGE_TOKENS)
    k = random(KV_HEADS, tokens)
    v = random(KV_HEADS, tokens)
    mask = torch.zeros(2, 1, 1, tokens, device=device, dtype=torch.bfloat16)
    mask[..., words:text_tokens] = -torch.inf
    grad = torch.randn_like(q)
    out = fusedit.attention(q, k, v, mask)
    got = [out, *torch.autograd.grad(out, (q, k, v), grad)]

    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    all_k = k.repeat_interleave(HEADS // KV_HEADS, 1)
    all_v = v.repeat_interleave(HEADS // KV_HEADS, 1)
    out = (q @ all_k.mT / HEAD_DIM ** 0.5 + mask.double()).softmax(-1) @ all_v
    want = [out, *torch.autograd.grad(out, (q, k, v), grad.double())]
    for a, b in zip(got, want, strict=True):
        errors.append(float((a - b).norm() / b.norm()))
print(max(errors))
"""


def test_attention_is_exact_at_full_size():
    """Output and gradients, at the lengths used in training. bfloat16 alone is 0.4 % off."""
    done = subprocess.run([sys.executable, "-c", ATTENTION, ROOT, DEVICE], env=ENV, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < 0.02


GRAPHED = """
import sys
import torch
root, device = sys.argv[1], torch.device(sys.argv[2])
torch.set_float32_matmul_precision("high")
sys.path.insert(0, root + "/benchmarks")
from ablation_points import POINTS
from ablation_readers import BUNDLED
from ablation_training import (GraphedStep, Settings, TrainingStep, make_scenes, new_model,
                               run_batches, run_config)

def losses(point, dtype, graphed):
    model = new_model(POINTS[point], BUNDLED, dtype, 0, device)
    run = run_config(Settings(160, 16, 64, 6, dtype, 1), 160, 1e-3, 0)
    step = TrainingStep(model, run, device)
    if graphed:
        step = GraphedStep(step)
    found = []
    for i, batch in enumerate(run_batches(make_scenes(64, model, device), 160, 16, 0)):
        step.set_learning_rate(1e-3 / (1 + i))
        found.append(step(batch))
    assert not graphed or step.graph is not None
    return torch.stack(found)

for argument in sys.argv[3:]:
    point, dtype = argument.split(",")
    usual = losses(point, dtype, graphed=False)
    error = (losses(point, dtype, graphed=True) - usual).abs().max()
    print(point, float(usual.std()), float(error))
"""


def test_the_cuda_graph_of_the_ablations_is_their_training_step():
    points = ["baseline,float32", "baseline,bf16", "deep-cross,bf16", "shallow-cross,bf16",
              "joint,bf16"]
    done = subprocess.run([sys.executable, "-c", GRAPHED, ROOT, DEVICE, *points], env=ENV,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.count(" ") == 2]
    assert len(lines) == len(points)
    for point, spread, error in lines:
        assert float(error) < 0.02 * float(spread), point


@pytest.mark.skipif(FOUND < 2, reason="there is only one GPU")
@pytest.mark.parametrize("zero", "123")
def test_two_gpus_match_the_cpu(gemma, data, tmp_path, first_step, on_cpu, zero):
    shutil.copytree(first_step, tmp_path / "run")
    argv = flags(gemma, data, tmp_path / "run", "--steps", "6", "--zero", zero,
                 "--sample-every", "3")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", free_port()]
    subprocess.run([*torchrun, ROOT / "train_gpu.py", *argv], env=ENV, check=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(on_cpu), rel=2e-3)


def test_torch_in_this_process_sees_no_gpu():
    """Neither do the processes that other tests start."""
    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

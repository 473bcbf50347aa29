"""Optimised code computes the same up to rounding, and the benchmarks' baseline is correct.

Importing the package changes nothing in the process, and pip installs all of it.
"""
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import warm
from conftest import REFERENCE, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import common

import fusedit
from fusedit_lib import backend
from fusedit_lib.data.batches import cut_text_length, to_device
from fusedit_lib.pretrained import build_model
from fusedit_lib.train import costs
from fusedit_lib.vae import load_vae

CPU = torch.device("cpu")


@pytest.fixture
def kernels():
    """Restores PyTorch's choice of attention kernels after a test that changes it."""
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(before)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.fixture
def cudnn():
    """Restores PyTorch's use of cuDNN's attention after a test that changes it."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


# ---- the benchmarks' baseline --------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_case():
    """The benchmarks' small case, with two layers."""
    case = common.case("small")
    case.gemma = common.gemma_config(common.SMALL | dict(num_hidden_layers=2))
    return case


@pytest.fixture(scope="module")
def small_model(small_case):
    return small_case.build(CPU, torch.float32)


@pytest.fixture(scope="module")
def batch(small_case):
    return next(small_case.batches(1, 3, CPU))


SIGMA = torch.full([3], 0.7)


def velocity(model, batch):
    return model.dit(batch["eps"], SIGMA, common.encode_text(model, batch))


@torch.no_grad()
def test_the_baseline_is_the_same_function(small_model, batch):
    want = common.joint_velocity(small_model, batch["eps"], SIGMA, batch["ids"], batch["mask"])
    got = velocity(small_model, batch)
    assert want.std() > 0.1
    assert common.relative_distance(got, want) < 1e-5


def matrix_parameters(module):
    """The parameters that are multiplied with every token."""
    total = 0
    for name, p in module.named_parameters():
        if p.dim() > 1 and "embed_tokens" not in name:
            total += p.numel()
    return total


def test_useful_flops_follow_from_the_shapes(small_case, small_model):
    """Two FLOPs for each weight and token, and for each multiplication in attention."""
    dit = small_model.dit
    image = 256                                         # tokens
    text = small_case.mean_length
    width = 2 * 256                                     # number of heads times their size
    parts = [dit.patch_embed, dit.layers, dit.proj_out]
    assert sum(map(matrix_parameters, parts)) == matrix_parameters(dit)

    products = 2 * 2 * width * image * (image + text)
    forward = 2 * (image * matrix_parameters(dit) + products)
    step = common.useful_flops(small_case, "train")
    assert step["dit"] == 3 * forward
    assert step["vae"] == 0
    assert common.useful_flops(small_case, 25)["dit"] == 50 * forward

    # Of Gemma's last layer only keys and values are computed; the other layers run completely.
    products = 2 * 2 * width * text * text
    at_most = 2 * (text * matrix_parameters(small_model.llm) + products)
    assert 0 < step["gemma"] <= at_most


def count(module):
    return sum(p.numel() for p in module.parameters())


def activation_bytes(config, batch_size, dtype):
    model = costs.abstract_model(config)
    return costs.activations(model, config, batch_size, dtype)[0]


def test_the_documented_benchmark_fits_a_gpu_of_80_gb():
    """Weights, gradients and Adam's of the DiT, and the activations of its heaviest part."""
    document = (ROOT / "docs/performance.md").read_text()
    command = re.search(r"benchmarks/train.py --preset (\S+) --batch (\d+)", document)
    config = fusedit.preset(command[1])
    batch_size = int(command[2])
    model = costs.abstract_model(config)
    dit = count(model.dit)
    gemma = count(model.llm)

    # In training, with keys and values repeated for each head, as the joint formulation has them.
    repeated = 2 * 26 * batch_size * 1280 * 8 * 256 * 2
    activations = activation_bytes(config, batch_size, torch.bfloat16)
    training = 2 * (dit + gemma) + (4 + 2 + 12) * dit + activations + repeated
    assert training < 75e9

    # In exactness(), where there is a float32 copy with gradients beside it. The joint formulation
    # has activations of Gemma as well.
    activations = activation_bytes(config, 1, torch.float32)
    assert (2 + 4) * (dit + gemma) + 4 * dit + 2 * activations < 75e9


def test_triton_kernels_are_not_counted_as_products():
    """A Triton kernel's name lists what was fused, such as the bias of attention or a convolution.
    """
    for name in ("triton_poi_fused__scaled_dot_product_fused_attention_overrideable_3",
                 "triton_red_fused_convolution_native_group_norm_1"):
        assert common.kind_of(name) == common.REST
    attention = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"
    assert common.kind_of(attention) == "attention's products"
    linear = "nvjet_tst_128x256_64x4_1x2_h_bz_TNT"
    assert common.kind_of(linear) == "linear layers' products"


# ---- optimised code ------------------------------------------------------------------------------

def velocity_and_gradient(model, batch):
    """The velocity, and the gradient of its square with respect to a weight of the first layer."""
    model.dit.zero_grad()
    v = velocity(model, batch)
    v.float().square().mean().backward()
    weight = model.dit.get_parameter("layers.0.mlp.down_proj.weight")
    return v.detach(), weight.grad


@pytest.mark.slow
def test_compiled_bf16_is_as_close_to_float32_as_bf16_can_be(small_case, small_model, batch,
                                                             kernels):
    """The errors are compared with those of uncompiled bf16 with PyTorch's default kernels."""
    want = velocity_and_gradient(small_model, batch)

    def errors(model):
        got = velocity_and_gradient(model, batch)
        return [common.relative_distance(a, b) for a, b in zip(got, want, strict=True)]

    model = small_case.build(CPU, torch.bfloat16)
    common.pytorch_defaults()
    plain = errors(model)
    backend.configure(CPU, torch.bfloat16)
    assert not torch.backends.cuda.flash_sdp_enabled()
    backend.compile_model(model, None)
    fast = errors(model)
    for fast_error, plain_error in zip(fast, plain, strict=True):
        assert 1e-4 < plain_error < 0.05, plain
        assert fast_error < 1.2 * plain_error, (fast, plain)


def test_compiling_for_a_gpu_needs_a_c_compiler(monkeypatch, tmp_path):
    """Triton calls $CC or, without it, gcc or clang."""
    gpu = torch.device("cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fusedit.FuseDiTError, match="no C compiler found.*apt install"):
        backend.check_compiler(gpu)
    (tmp_path / "gcc").touch(mode=0o755)
    backend.check_compiler(gpu)
    monkeypatch.setenv("CC", "/nowhere/gcc")
    with pytest.raises(fusedit.FuseDiTError, match="no C compiler found"):
        backend.check_compiler(gpu)


def test_only_errors_of_the_compiler_are_one_line():
    from torch._inductor.exc import CppCompileError, InductorError
    failed = InductorError(CppCompileError(["g++"], "a\nx.cpp:1: error: no Python.h\nb"), None)
    problem = backend.compiler_problem(failed)
    assert problem.startswith("--compile has failed (x.cpp:1: error: no Python.h): install")
    triton = InductorError(RuntimeError("Failed to find C compiler. Please specify"), None)
    assert "Failed to find C compiler" in backend.compiler_problem(triton)
    assert backend.compiler_problem(InductorError(RuntimeError("a bug"), None)) == ""
    triton = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"])
    assert "--compile has failed" in backend.compiler_problem(triton)
    assert backend.compiler_problem(subprocess.CalledProcessError(1, ["gsutil", "cp"])) == ""
    assert backend.compiler_problem(ValueError("a bug")) == ""


def test_float32_keeps_the_kernel_that_needs_little_memory(kernels):
    backend.configure(CPU, torch.float32)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_float8_changes_little_and_no_weight(small_case, small_model, batch):
    pytest.importorskip("torchao")
    model = small_case.build(CPU, torch.float32)
    backend.use_float8(model.dit)
    kinds = {type(module).__name__ for module in model.dit.layers.modules()}
    assert "Float8Linear" in kinds
    assert type(model.dit.proj_out) is torch.nn.Linear

    exact = dict(small_model.named_parameters())
    assert list(exact) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert p.equal(exact[name]), name
    with torch.no_grad():
        distance = common.relative_distance(velocity(model, batch), velocity(small_model, batch))
    assert 0.005 < distance < 0.15, distance


class Watched(torch.Tensor):
    """A tensor that records its shape when it is moved."""
    moved = []

    def to(self, *args, **kwargs):
        self.moved.append(tuple(self.shape))
        return self.as_subclass(torch.Tensor).to(*args, **kwargs)


@pytest.mark.parametrize("full, longest, cpu, gpu", [
    (256, 40, 64, 128),
    (256, 64, 64, 128),
    (256, 65, 128, 128),
    (256, 129, 192, 256),
    (256, 250, 256, 256),
    (32, 3, 8, 32),
    (32, 17, 24, 32),
    (259, 100, 144, 128),
    (259, 259, 259, 259),
    (5, 2, 5, 5),
])
def test_text_is_cut_in_quarters(full, longest, cpu, gpu, monkeypatch):
    """Text is cut to multiples of 128 instead on a GPU, because of cuDNN."""
    monkeypatch.setattr(Watched, "moved", [])
    mask = torch.arange(full) < torch.tensor([[1], [longest]])
    assert cut_text_length(mask, CPU) == cpu
    assert cut_text_length(mask, torch.device("cuda")) == gpu

    ids = torch.arange(full).expand(2, -1).clone()
    whole = dict(pixels=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
                 ids=ids.as_subclass(Watched), mask=mask.as_subclass(Watched),
                 normal=torch.zeros(2), noise=torch.zeros(2, 1, 3, 8, 8))
    cut = to_device(whole, CPU, cut_text=True)
    assert cut.ids.shape == cut.mask.shape == (2, cpu)
    assert cut.mask.sum(1).tolist() == [1, longest]
    # Text is moved in one piece and cut on the device.
    assert Watched.moved == [(2, full), (2, full)]


def test_a_trimmed_model_with_a_vae_compiles(gemma_folder):
    """Gemma's final norm has been dropped by then. On a CPU the VAE is not compiled."""
    vae = load_vae(REFERENCE / "released_layout" / "pipeline", CPU, torch.float32)
    config = fusedit.preset("fusedit", base=str(gemma_folder), vae=None, in_channels=3,
                            image_size=16, patch_size=2)
    model = build_model(config, CPU, torch.float32)
    assert model.llm.norm is None
    backend.compile_model(model, vae, budget=0.5)
    assert torch._functorch.config.activation_memory_budget == 0.5
    backend.compile_model(model, vae)
    assert torch._functorch.config.activation_memory_budget == 1
    assert vae.encoder._compiled_call_impl is None
    assert backend.check_attention(model, None, torch.device("cpu"), torch.float32) == ""


# ---- cuDNN's attention ---------------------------------------------------------------------------

def attention_inputs():
    q = torch.randn(2, 4, 6, 16, requires_grad=True)
    k = torch.randn(2, 2, 9, 16, requires_grad=True)
    v = torch.randn(2, 2, 9, 16, requires_grad=True)
    return q, k, v, torch.zeros(2, 1, 1, 9)


def attention_that_raises(q, k, v, mask):
    """Fails like cuDNN on a GPU where it has no plan for these shapes."""
    if torch.backends.cuda.cudnn_sdp_enabled():
        raise RuntimeError("No execution plans support the graph.\nat line 1")
    return fusedit.attention(q, k, v, mask)


def attention_that_is_not_finite(q, k, v, mask):
    """Fails like cuDNN on a GPU where it computes a wrong gradient."""
    out = fusedit.attention(q, k, v, mask)
    if torch.backends.cuda.cudnn_sdp_enabled():
        out = out / 0
    return out


@pytest.mark.parametrize("attention, problem", [
    (attention_that_raises, "No execution plans support the graph."),
    (attention_that_is_not_finite, "its gradient is not finite"),
])
def test_cudnns_attention_is_switched_off_where_it_fails(monkeypatch, cudnn, attention, problem):
    monkeypatch.setattr(backend, "attention", attention)
    note = backend.avoid_broken_cudnn(*attention_inputs())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert note == f"; cuDNN's is switched off ({problem})"


def test_cudnns_attention_stays_on_where_it_works(cudnn):
    with torch.no_grad():                   # as in sampling
        assert backend.avoid_broken_cudnn(*attention_inputs()) == ""
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_that_fails_without_cudnn_too_is_an_error(monkeypatch, cudnn):
    def attention(q, k, v, mask):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(backend, "attention", attention)
    with pytest.raises(fusedit.FuseDiTError, match="and without cuDNN's kernel: no kernel"):
        backend.avoid_broken_cudnn(*attention_inputs())


# ---- the benchmarks run --------------------------------------------------------------------------

# The full-size preset, including its VAE, but with a Gemma (and so a DiT) small enough for a test.
TINY = """
import runpy, sys
sys.path[:0] = sys.argv[2:4]
import common
from fusedit_lib.train import costs
costs.GEMMAS["google/gemma-2-2b"] = common.SMALL | dict(num_hidden_layers=2)
sys.argv = sys.argv[1:2] + sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LARGE = ["--preset", "fusedit/large-scale", "--image-size", "64", "--batch", "2"]


def run_benchmark(name, flags, folder):
    """The JSON that benchmarks/NAME.py writes."""
    out = folder / "out.json"
    benchmarks = ROOT / "benchmarks"
    done = warm.run(["-c", TINY, benchmarks / name, benchmarks, ROOT, *flags, "--out", out])
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed.keys() == result.keys()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    ("train.py", ["--batch", "2", "--no-exactness"]),
    ("train.py", LARGE),
    ("sample.py", ["--batch", "1", "--steps", "2"]),
    ("sample.py", ["--steps", "2", *LARGE]),
])
def test_a_benchmark_of_the_model_runs(name, flags, tmp_path):
    result = run_benchmark(name, ["--rounds", "1", "--no-compile", *flags], tmp_path)
    for formulation in ("two phases", "joint mask"):
        assert result[formulation]["utilisation"] > 0
        assert result[formulation]["peak_bytes"] > 1e8

    shares = result["shares"]
    assert {"Gemma", "attention's products", "linear layers' products"} <= shares.keys()
    has_vae = "--preset" in flags
    assert ("VAE" in shares) == has_vae
    assert (result["useful_flops"]["vae"] > 0) == has_vae


@pytest.mark.slow
def test_the_benchmark_of_attention_runs(tmp_path):
    flags = ["--batch", "1", "--rounds", "1", "--image", "64"]
    kernels = run_benchmark("attention.py", flags, tmp_path)["kernels"]
    assert {"math: rows, added mask", "flash: rows, added mask"} <= kernels.keys()
    for name, figures in kernels.items():
        if "no mask" not in name:
            assert figures["distance"] < 0.01, name


# ---- importing and installing --------------------------------------------------------------------

# Imports the modules named in argv, one by one, and prints what each import changed, as JSON:
# {module: names of settings that differ and of torch functions that were called}.
IMPORT_ALL = """
import contextlib, importlib, json, os, random, signal, sys, threading, warnings
import numpy, torch
import torch._dynamo, torch._functorch.config, torch._inductor.config
from torch.overrides import TorchFunctionMode
for package in ("transformers", "deepspeed", "webdataset", "PIL.Image", "filelock", "tqdm"):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(package)                # what it changes is not ours


class CalledFunctions(TorchFunctionMode):
    names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


def settings():
    umask = os.umask(0)
    os.umask(umask)
    cuda = torch.backends.cuda
    return {
        "umask": umask,
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "sys.path": list(sys.path),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "excepthook": sys.excepthook,
        "warnings": list(warnings.filters),
        "threads": threading.active_count(),
        "random": random.getstate(),
        "numpy.random": repr(numpy.random.get_state()),
        "torch.random": torch.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cuDNN attention": cuda.cudnn_sdp_enabled(),
        "reductions": cuda.fp16_bf16_reduction_math_sdp_allowed(),
        "TF32": (cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "dynamo": torch._dynamo.config.recompile_limit,
        "functorch": torch._functorch.config.activation_memory_budget,
        "autograd cache": torch._functorch.config.enable_autograd_cache,
        "inductor": torch._inductor.config.cpp.use_decompose_tanh,
    }


os.umask(0o027)
changes = {}
for name in sys.argv[1:]:
    before = settings()
    CalledFunctions.names.clear()
    try:
        with CalledFunctions():
            importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name.split(".")[0] not in ("torch_xla", "deepspeed"):      # optional
            raise
        continue
    called = list(CalledFunctions.names)
    after = settings()
    changes[name] = [key for key in after if after[key] != before[key]] + called
print(json.dumps(changes))
"""


def modules():
    """The names of fusedit and of every module and package of fusedit_lib."""
    names = []
    for path in [ROOT / "fusedit.py", *sorted((ROOT / "fusedit_lib").rglob("*.py"))]:
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        names.append(name.removesuffix(".__init__"))
    return names


def test_importing_changes_nothing():
    """Neither the umask nor the environment, a torch setting, ...; and nothing is computed."""
    names = modules()
    assert names[:2] == ["fusedit", "fusedit_lib"]
    # This process has imported our modules already; changes that they made must not be inherited.
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = warm.run(["-c", IMPORT_ALL, *names], env)
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stdout.splitlines()[-1])
    assert set(names) - changes.keys() <= {"fusedit_lib.train.xla", "fusedit_lib.train.zero"}
    assert {name: changed for name, changed in changes.items() if changed} == {}


def test_an_error_without_a_message_has_its_name():
    assert backend.first_line(EOFError()) == "EOFError"
    assert backend.first_line(RuntimeError("a\nb")) == "a"


def tracked_files():
    """The files that git tracks, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = listed.stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


def copy_tracked_files(target):
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def files_below(folder):
    """The relative paths of all files in a folder, without those that Python compiled."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def setuptools_version():
    """The major version of setuptools, or 0 if it is not installed."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return 0
    return int(version.split(".")[0])


USE_INSTALLED = """
import pkgutil
import fusedit, fusedit_lib.pretrained
print(fusedit.__file__)
for module in pkgutil.walk_packages(fusedit_lib.__path__, "fusedit_lib."):
    if module.ispkg:
        print(module.name)
"""


@pytest.mark.slow
@pytest.mark.skipif(setuptools_version() < 77, reason="needs setuptools>=77, as pyproject.toml")
def test_pip_installs_the_method_and_its_library(tmp_path):
    source = tmp_path / "source"
    target = tmp_path / "target"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy_tracked_files(source)

    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    command = ["pip", "install", "--no-deps", "--no-build-isolation", "--target", target, "."]
    pip = subprocess.run([sys.executable, "-m", *command], cwd=source, capture_output=True,
                         text=True, env=env | {"PIP_NO_INDEX": "1"})
    assert pip.returncode == 0, pip.stderr

    # fusedit.py, fusedit_lib and their metadata, and nothing else at the top level
    tops = {name.split("/")[0] for name in files_below(target)}
    version = importlib.metadata.version("fusedit")
    assert tops == {"fusedit.py", "fusedit_lib", f"fusedit-{version}.dist-info"}
    assert files_below(target / "fusedit_lib") == files_below(source / "fusedit_lib")

    # they work from another folder
    done = subprocess.run([sys.executable, "-c", USE_INSTALLED], cwd=elsewhere, capture_output=True,
                          text=True, env=env | {"PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr
    path, *packages = done.stdout.split()
    assert path == str(target / "fusedit.py")
    inits = (source / "fusedit_lib").glob("*/__init__.py")
    assert packages == sorted(f"fusedit_lib.{init.parent.name}" for init in inits)
    assert len(packages) >= 4

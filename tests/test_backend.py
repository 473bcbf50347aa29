"""What is fast computes the same, up to rounding; and the benchmarks' baseline is what it says."""
import json
import re
import sys

import pytest
import torch
import warm
from conftest import REFERENCE, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import common

import fusedit
from fusedit_lib import backend
from fusedit_lib.data.batches import padded_text_length, to_device
from fusedit_lib.pretrained import build_model
from fusedit_lib.train import costs
from fusedit_lib.vae import load_vae

CPU = torch.device("cpu")


@pytest.fixture
def kernels():
    """What a test changes of PyTorch's choice of kernels is put back."""
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(before)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.fixture(scope="module")
def small():
    """The benchmarks' small case, with two layers; its float32 model; a batch."""
    case = common.case("small")
    gemma = common.gemma_config(common.SMALL | dict(num_hidden_layers=2))
    case = common.Case(case.config, gemma, case.pad, case.lengths)
    return case, case.build(CPU, torch.float32), next(case.batches(1, 3, CPU))


def velocity(model, batch):
    with torch.no_grad():
        return model.dit(batch["eps"], torch.full([3], 0.7), common.encode_text(model, batch))


def test_the_baseline_is_the_same_function(small):
    case, model, batch = small
    with torch.no_grad():
        want = common.joint_velocity(model, batch["eps"], torch.full([3], 0.7), batch["ids"], batch["mask"])
    assert want.std() > 0.1 and common.relative_distance(velocity(model, batch), want) < 1e-5


def test_useful_flops_are_what_the_shapes_say(small):
    """Two for each weight and token, and for each product of a query with a key and a value."""
    case, model, _ = small
    dit, gemma = model.dit, model.llm
    image, words, width = 256, case.mean, 2 * 256          # tokens; heads times their size

    def linear(module):
        return sum(w.numel() for name, w in module.named_parameters()
                   if w.dim() > 1 and "embed_tokens" not in name)
    assert linear(dit.patch_embed) + linear(dit.layers) + linear(dit.proj_out) == linear(dit)
    want = 2 * (image * linear(dit) + 2 * 2 * width * image * (image + words))
    step = common.useful_flops(case, "train")
    assert step["dit"] == 3 * want and step["vae"] == 0
    # Gemma's last layer hands over its keys and values, and the first layers all they have.
    assert 0 < step["gemma"] <= 2 * (words * linear(gemma) + 2 * 2 * width * words * words)
    assert common.useful_flops(case, 25)["dit"] == 50 * want


def test_the_readmes_benchmark_fits_a_gpu_of_80_gb():
    """Weights, gradients and Adam's of the DiT, and the activations of its heaviest part."""
    line = re.search(r"benchmarks/train.py --preset (\S+) --batch (\d+)",
                     (ROOT / "README.md").read_text())
    config, batch = fusedit.preset(line[1]), int(line[2])
    model = costs.abstract_model(config)
    dit, gemma = (sum(p.numel() for p in m.parameters()) for m in (model.dit, model.llm))
    low, high = (costs.activations(costs.abstract_model(config), config, n, dtype)[0]
                 for n, dtype in ((batch, torch.bfloat16), (1, torch.float32)))
    keys = 2 * 26 * batch * 1280 * 8 * 256 * 2             # repeated for each head: joint's own
    # In training; and in exactness(), where there is a float32 copy with gradients beside it.
    assert 2 * (dit + gemma) + (4 + 2 + 12) * dit + low + keys < 75e9
    assert (2 + 4) * (dit + gemma) + 4 * dit + 2 * high < 75e9     # joint: of Gemma as well


@pytest.mark.slow
def test_compiled_bf16_is_as_near_to_float32_as_bf16_can_be(small, kernels):
    """Velocity and gradients, against the error of uncompiled bf16 by PyTorch's own kernels."""
    case, exact, batch = small
    name = "layers.0.mlp.down_proj.weight"

    def of(model):
        model.dit.zero_grad()
        v = model.dit(batch["eps"], torch.full([3], 0.7), common.encode_text(model, batch))
        v.float().square().mean().backward()
        return v.detach(), model.dit.get_parameter(name).grad
    want = of(exact)
    model = case.build(CPU, torch.bfloat16)
    common.pytorch_defaults()
    plain = [common.relative_distance(a, b) for a, b in zip(of(model), want, strict=True)]
    backend.configure(CPU, torch.bfloat16)
    assert not torch.backends.cuda.flash_sdp_enabled()
    backend.compile_model(model, None)
    fast = [common.relative_distance(a, b) for a, b in zip(of(model), want, strict=True)]
    for a, b in zip(fast, plain, strict=True):
        assert 1e-4 < b < 0.05 and a < 1.2 * b, (fast, plain)


def test_float32_keeps_the_kernel_that_needs_little_memory(kernels):
    backend.configure(CPU, torch.float32)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_float8_changes_little_and_no_weight(small):
    pytest.importorskip("torchao")
    case, exact, batch = small
    model = case.build(CPU, torch.float32)
    backend.use_float8(model.dit)
    kinds = {type(m).__name__ for m in model.dit.layers.modules()}
    assert "Float8Linear" in kinds and type(model.dit.proj_out) is torch.nn.Linear
    for (a, p), (b, q) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert a == b and p.equal(q)
    far = common.relative_distance(velocity(model, batch), velocity(exact, batch))
    assert 0.005 < far < 0.15, far


@pytest.mark.parametrize("full, longest, cpu, gpu", [
    (256, 40, 64, 128), (256, 64, 64, 128), (256, 65, 128, 128), (256, 129, 192, 256),
    (256, 250, 256, 256), (32, 3, 8, 32), (32, 17, 24, 32), (259, 100, 144, 128),
    (259, 259, 259, 259), (5, 2, 5, 5)])
def test_text_is_cut_in_quarters(full, longest, cpu, gpu):
    """And on a GPU in multiples of 128, for cuDNN's sake."""
    mask = torch.arange(full) < torch.tensor([[1], [longest]])
    assert [padded_text_length(mask, torch.device(d)) for d in ("cpu", "cuda")] == [cpu, gpu]
    whole = dict(pixels=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), mask=mask,
                 ids=torch.arange(full).expand(2, -1).clone(), normal=torch.zeros(2),
                 noise=torch.zeros(2, 1, 3, 8, 8))
    moved, real = [], torch.Tensor.to
    for key in ("ids", "mask"):             # goes over in one piece, and is cut there
        class Seen(torch.Tensor):
            def to(self, *args, **kwargs):
                moved.append(self.shape)
                return real(self.as_subclass(torch.Tensor), *args, **kwargs)
        whole[key] = whole[key].as_subclass(Seen)
    _, ids, cut, *_ = to_device(whole, CPU, cut_text=True)
    assert ids.shape == cut.shape == (2, cpu) and cut.sum(1).tolist() == [1, longest]
    assert moved == [(2, full), (2, full)]


def test_a_trimmed_model_with_a_vae_compiles(gemma_folder):
    """Gemma's last norm is gone by then; on a CPU the VAE stays as it is."""
    vae = load_vae(str(REFERENCE / "released_layout/pipeline/vae"), CPU, torch.float32)
    config = fusedit.preset("fusedit", base=str(gemma_folder), vae=None, in_channels=3,
                            image_size=16, patch_size=2)
    model = build_model(config, CPU, torch.float32)
    assert model.llm.norm is None
    backend.compile_model(model, vae, budget=0.5)
    assert torch._functorch.config.activation_memory_budget == 0.5
    backend.compile_model(model, vae)
    assert torch._functorch.config.activation_memory_budget == 1
    assert vae.encoder._compiled_call_impl is None
    assert backend.check_attention(model, torch.float32) == ""


def attention_inputs():
    q, k, v = (torch.randn(2, n, s, 16, requires_grad=True) for n, s in ((4, 6), (2, 9), (2, 9)))
    return q, k, v, torch.zeros(2, 1, 1, 9)


@pytest.fixture
def cudnn():
    """PyTorch's choice of cuDNN's attention is put back."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("fault", ["raises", "not finite"])
def test_cudnns_attention_is_switched_off_where_it_fails(monkeypatch, cudnn, fault):
    """attend as it would be on a GPU whose cuDNN has no plan for it, or a wrong gradient."""
    def attend(q, k, v, mask):
        out = fusedit.attention(q, k, v, mask)
        if torch.backends.cuda.cudnn_sdp_enabled():
            if fault == "raises":
                raise RuntimeError("No execution plans support the graph.\nat line 1")
            out = out / 0
        return out
    monkeypatch.setattr(backend, "attention", attend)
    said = backend.avoid_broken_cudnn(*attention_inputs())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert said == "; cuDNN's is switched off (" + (
        "No execution plans support the graph.)" if fault == "raises" else
        "its gradient is not finite)")


def test_attention_that_fails_altogether_is_said(monkeypatch, cudnn):
    with torch.no_grad():                   # as in sampling
        assert backend.avoid_broken_cudnn(*attention_inputs()) == ""
    assert torch.backends.cuda.cudnn_sdp_enabled()         # nothing failed: all as it was

    def attend(q, k, v, mask):
        raise RuntimeError("no kernel")
    monkeypatch.setattr(backend, "attention", attend)
    with pytest.raises(fusedit.FuseDiTError, match="and without: no kernel"):
        backend.avoid_broken_cudnn(*attention_inputs())


def test_a_compilers_kernel_is_no_product():
    """Its name lists what was fused, attention's bias and a convolution's, say."""
    for name in ("triton_poi_fused__scaled_dot_product_fused_attention_overrideable_3",
                 "triton_red_fused_convolution_native_group_norm_1"):
        assert common.kind_of(name) == common.REST
    assert common.kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == (
        "attention's products")
    assert common.kind_of("nvjet_tst_128x256_64x4_1x2_h_bz_TNT") == "linear layers' products"


def test_guidance_only_in_a_span_of_noise_levels():
    """Outside it a step is one call for the prompt alone."""
    text, empty = (fusedit.TextFeatures((), (), torch.full((1, 1, 1), v), torch.ones(1, 1).bool())
                   for v in (2.0, 1.0))
    seen = []

    def dit(x_t, sigma, t):
        seen.append((round(float(sigma[0]), 4), len(x_t)))
        return t.hidden[..., None].expand_as(x_t)
    x, levels = torch.zeros(1, 1, 2, 2), fusedit.sampling_sigmas(5, 3.0).tolist()
    low, high = levels[3] + 1e-3, levels[1] + 1e-3         # the second and the third of 5 steps
    got = fusedit.sample(dit, x, text, empty, 5, 6.0, 3.0, (low, high))
    assert seen == [(round(s, 4), 1 + (low <= s <= high)) for s in levels[:-1]]
    assert [n for _, n in seen] == [1, 2, 2, 1, 1]
    want = sum((b - a) * (7.0 if low <= a <= high else 2.0)
               for a, b in zip(levels, levels[1:], strict=False))
    assert torch.allclose(got, torch.full_like(x, want), atol=1e-5)


# The full-size preset, VAE and all, but with a Gemma (and so a DiT) that fits a test.
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


@pytest.mark.slow
@pytest.mark.parametrize("argv", [
    ["train.py", "--batch", "2", "--rounds", "1", "--no-compile", "--no-exactness"],
    ["train.py", "--rounds", "1", "--no-compile", *LARGE],
    ["sample.py", "--batch", "1", "--rounds", "1", "--no-compile", "--steps", "2"],
    ["sample.py", "--rounds", "1", "--no-compile", "--steps", "2", *LARGE],
    ["attention.py", "--batch", "1", "--rounds", "1", "--image", "64"]])
def test_a_benchmark_runs(argv, tmp_path):
    out, at = tmp_path / "out.json", ROOT / "benchmarks"
    done = warm.run(["-c", TINY, at / argv[0], at, ROOT, *argv[1:], "--out", out])
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]).keys() == found.keys()
    if argv[0] == "attention.py":
        assert {"math: rows, added mask", "flash: rows, added mask"} <= found["kernels"].keys()
        assert all(row["distance"] < 0.01 for name, row in found["kernels"].items()
                   if "no mask" not in name)
        return
    for name in ("two phases", "joint mask"):
        assert found[name]["utilisation"] > 0 and found[name]["peak_bytes"] > 1e8
    parts = found["shares"]
    assert {"Gemma", "attention's products", "linear layers' products"} <= parts.keys()
    assert ("VAE" in parts) == ("--preset" in argv) == (found["useful_flops"]["vae"] > 0)

"""--plan: what it says of FLOPs and memory against formulas, and against what is allocated."""
import json

import pytest
import torch
from conftest import REFERENCE, tiny_gemma
from launching import flags, launch
from tiny_shards import numbered

from fusedit import FuseDiTError, preset
from fusedit_lib.train import plan
from fusedit_lib.train.config import model_config, parse_run

# In the last micro-batch of step 2, where gradients and moments are there: the storages that some
# tensor holds, autograd's among them, when the forward pass ends and when the backward pass comes
# to a block, with ZeRO's buffers.
MEASURE = """
import gc
from torch._subclasses.fake_tensor import is_fake
real, calls = fusedit.flow_loss, 0
flash = torch.backends.cuda.enable_flash_sdp
torch.backends.cuda.enable_flash_sdp = lambda on: flash(True)      # as on a GPU
def live():
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    found = [t for t in found if not is_fake(t)]           # the compiler keeps some
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in found}.values())
def measured(engine, x, text, sigma, eps):
    global calls
    calls += 1
    if calls != 4:
        return real(engine, x, text, sigma, eps)
    batch = sum(t.untyped_storage().nbytes() for t in (x, eps)) + x.numel()     # and the bytes
    seen = [live() - batch]
    def backward(*_):
        seen.append(live() - batch)
        with open(OUT + str(dist.get_rank()), "w") as f:
            json.dump(seen, f)
    for layer in engine.module.dit.layers:
        layer.register_full_backward_pre_hook(backward)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss = real(engine, x, text, sigma, eps)
    seen.append(live() - batch)
    return loss
fusedit.flow_loss = measured
"""


@pytest.mark.parametrize("stage, shape", [
    (1, "image_size=16 dit_hidden_size=2048"), (0, "image_size=64 dit_hidden_size=256"),
    *(pytest.param(stage, "image_size=16 dit_hidden_size=2048", marks=pytest.mark.slow)
      for stage in (0, 2, 3)),
    pytest.param(3, "image_size=64 dit_hidden_size=256", marks=pytest.mark.slow)])
def test_the_memory_is_what_is_allocated(tmp_path, stage, shape):
    """Mostly weights and what belongs to them; and mostly activations."""
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=3)
    data, argv = numbered(tmp_path / "data"), [
        "--set", *shape.split(), "--zero", str(stage), "--batch", "16", "--micro-batch", "4",
        "--steps", "2", "--dtype", "bf16", "--sample-every", "9"]
    argv = flags(tmp_path / "gemma", data, tmp_path / "run", *argv)
    launch(argv, f"OUT = {str(tmp_path / 'rank')!r}\n" + MEASURE, n=2)
    config = model_config(parse_run(argv, ""))
    held = plan.states(plan.abstract(config), False, stage, 2, torch.bfloat16)
    act, _ = plan.activations(plan.abstract(config), config, 4, torch.bfloat16)
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}").read_text())
        assert sum(held) + act == pytest.approx(max(seen), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--compile"], ["--compile", "--memory-budget", "0.5"],
                                  ["--ema-offload"]])
def test_the_memory_with_other_flags_is_what_is_allocated(tmp_path, more):
    """Compiled blocks as they are and on a budget; averages that do not count on the GPU."""
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=3)
    data = numbered(tmp_path / "data")
    shape = ["--set", "image_size=64", "dit_hidden_size=256"]
    steps = ["--batch", "8", "--micro-batch", "4", "--steps", "2", "--sample-every", "9"]
    argv = flags(tmp_path / "gemma", data, tmp_path / "run", *shape, *steps, "--dtype", "bf16",
                 "--zero", "1", *more)
    launch(argv, f"OUT = {str(tmp_path / 'rank')!r}\n" + MEASURE)
    run = parse_run(argv, "")
    config = model_config(run)
    budget = run.memory_budget if run.compile else None
    held = plan.states(plan.abstract(config), False, 1, 1, torch.bfloat16)
    act, _ = plan.activations(plan.abstract(config), config, 4, torch.bfloat16, budget=budget)
    seen = json.loads((tmp_path / "rank0").read_text())
    assert sum(held) + act == pytest.approx(max(seen), rel=0.1), (held, act, seen)


def test_flops_are_those_of_the_matrices():
    """Twice the weights for every token, and twice two products of attention, at full size."""
    config = preset("fusedit/large-scale")
    model = plan.abstract(config)
    llm, dit, vae = plan.flops(model, config)
    N, T, H, h = 1024, 256, 8, 256
    matrices = sum(p.numel() for n, p in model.dit.named_parameters() if p.dim() > 1)
    attention = 26 * 4 * N * (T + N) * H * h
    assert dit == pytest.approx(2 * matrices * N + attention, rel=0.01)
    assert llm == pytest.approx(2 * T * sum(
        p.numel() for n, p in model.llm.layers.named_parameters() if p.dim() > 1)
        + 25 * 4 * T * T * H * h, rel=0.01)
    assert 1e12 < vae < 1.3e12
    assert plan.step_flops([llm, dit, vae]) == llm + 3 * dit + vae
    assert plan.step_flops([llm, dit, vae], True) == 3 * llm + 3 * dit + vae


def test_useful_flops_know_of_words_and_latents():
    """A caption of 80 words costs less than one of 256, and latents need no encoder."""
    config = preset("fusedit/large-scale")
    image, token = plan.useful_flops(config, latents=False, train_llm=False)
    llm, dit, vae = plan.flops(plan.abstract(config), config, 80)
    assert image + 80 * token == pytest.approx(plan.step_flops([llm, dit, vae]), rel=0.005)
    assert image - plan.useful_flops(config, True, False)[0] == vae
    assert plan.useful_flops(config, False, True)[1] > token       # Gemma's backward pass
    full = plan.step_flops(plan.flops(plan.abstract(config), config))
    assert 1.04 < full / (image + 80 * token) < 1.12


def test_activations_grow_with_the_batch_and_shrink_with_remat(gemma_folder):
    config = model_config(parse_run(flags(gemma_folder, "x", "y"), ""))
    (one, _), (four, less) = (plan.activations(plan.abstract(config), config, n, torch.bfloat16)
                              for n in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05) and less < 0.8 * four


def test_the_plan_of_every_paper_run_needs_no_download():
    for name, run in json.loads((REFERENCE / "paper_runs.json").read_text()).items():
        model = plan.abstract(preset(name))
        assert sum(p.numel() for p in model.dit.parameters()) == run["dit_parameters"], name


def test_what_is_printed(capsys, gemma_folder):
    argv = ["--preset", "fusedit/large-scale", "--plan", "64xH100@0.5", "--steps", "800000"]
    run = parse_run(argv, "")
    assert plan.show(run, model_config(run)) == 0
    out = capsys.readouterr().out
    assert "batch 512 = 64 H100 x 1 x 8" in out and "DiT 2,024,828,480" in out
    config = model_config(run)
    each = plan.step_flops(plan.flops(plan.abstract(config), config))
    days = 800_000 * 512 * each / (64 * 989e12 * 0.5) / 86400
    assert f"800,000 steps in {days:.1f} days" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1] in "0123" and "." in line]
    assert [r[0] for r in rows[:4]] == list("0123")
    for row in rows[:4]:
        numbers = [float(x) for x in row[1:12]]
        assert sum(numbers[:8]) == pytest.approx(numbers[8], abs=0.05)
    assert "with --remat" in out and "blocks not compiled" in out
    _, _, vae = plan.flops(plan.abstract(config), config)
    assert f"({(each - vae) / 1e12:.3g} of latents made beforehand)" in out


def test_the_plan_knows_what_saves_memory(capsys):
    """For the README's one GPU: 2.77 GB of activations an image compiled, where 5.34 were."""
    def row(*more):
        run = parse_run(["--preset", "fusedit/large-scale", "--plan", "1xH100", "--batch",
                                  "512", "--micro-batch", "8", "--zero", "2", *more], "")
        plan.show(run, model_config(run))
        line = next(x for x in capsys.readouterr().out.splitlines() if "<- --zero 2" in x)
        return [float(x) for x in line.split()[1:12]]
    plain, compiled, less, no_ema = (row(*more) for more in (
        [], ["--compile"], ["--compile", "--memory-budget", "0.7"], ["--ema-offload"]))
    assert plain[7] / 8 == pytest.approx(5.34, abs=0.01)
    assert compiled[7] / 8 == pytest.approx(2.77, abs=0.15)         # the compiler may change
    assert less[7] < 0.65 * compiled[7]
    assert plain[3] - no_ema[3] == pytest.approx(8.10) and plain[8] - no_ema[8] == pytest.approx(
        8.10, abs=0.02)
    assert [compiled[i] for i in range(7)] == [plain[i] for i in range(7)]


@pytest.mark.parametrize("name, chips, mesh", [
    ("v4-256", 128, "-1,2"), *(pytest.param(*point, marks=pytest.mark.slow) for point in (
        ("v4-256", 128, "-1,1"), ("v5e-256", 256, "-1,1"), ("v5e-256", 256, "-1,2")))])
def test_a_tpus_plan_adds_up(capsys, name, chips, mesh):
    argv = ["--preset", "fusedit/large-scale", "--plan", name, "--mesh", mesh]
    run = parse_run(argv, "", "tpu")
    assert plan.show(run, model_config(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = dict(zip(("fsdp", "tensor"), (chips // int(mesh[3:]), int(mesh[3:])), strict=True))
    assert f"batch 512 = {chips} " in lines[0]
    rows = [line.split() for line in lines if line.endswith("weight")]
    model, shown = plan.abstract(model_config(run)), 0.0
    for row in rows:                        # as "26 9216 x 2304 tensor, fsdp 552.1 4.31 name"
        n, whole, part = int(row[0]), float(row[-3]), float(row[-2])
        dims = [int(d) for d in row[1:-3] if d.isdigit()]
        assert n * torch.Size(dims).numel() == pytest.approx(whole * 1e6, abs=0.06e6)
        assert whole / part == pytest.approx(chips, rel=0.02)
        shown += whole
    total = sum(p.numel() for p in model.parameters())
    assert shown * 1e6 == pytest.approx(total, rel=0.002)
    heads, values = lines[-4].split(), [float(x) for x in lines[-3].split()[:12]]
    table = dict(zip(heads, values, strict=False))
    base = values[:heads.index("activations")]
    assert sum(base) + table["activations"] == pytest.approx(values[-3], abs=0.05)
    assert sum(base) + values[-2] == pytest.approx(values[-1], abs=0.05)
    assert values[-2] < table["activations"] / 4 and lines[-3].endswith("fits")
    trained = sum(plan.chip(k, p.shape, sizes) for k, p in model.dit.named_parameters("dit"))
    assert trained < 1.1 * 2_024_828_480 / chips
    assert table["Adam"] == pytest.approx(8 * trained / 1e9, abs=0.006)
    block = sum(p.numel() for p in model.dit.layers[0].parameters())
    assert table["gathered"] == pytest.approx(4 * block / sizes["tensor"] / 1e9, abs=0.006)
    assert table["weights"] == pytest.approx(4 * trained / 1e9, abs=0.006)


@pytest.mark.parametrize("text", ["8", "8xH999", "0xH100", "8xH100@2", "xH100", "8xH100@0.0",
                                  "v9-8", "v4-1", "v5e-0", "8xv4"])
def test_plans_that_make_no_sense(text):
    with pytest.raises(FuseDiTError, match="known: B200.* v4, v5e"):
        plan.parse(text)
    assert plan.parse("v4-256") == (128, "v4", 0.4)
    assert plan.parse("V5E-16@.5") == (16, "v5e", 0.5)
    assert plan.parse("8 x a100") == (8, "A100", 0.4)
    assert plan.parse("2xH100 PCIe@0.5") == (2, "H100 PCIe", 0.5)

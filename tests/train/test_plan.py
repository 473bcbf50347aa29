"""Compares the FLOPs and memory of --plan with formulas and with actual allocations."""
import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import REFERENCE, tiny_gemma, tiny_vae
from launching import flags, launch
from safetensors.torch import load_file
from tiny_shards import numbered

from fusedit import FuseDiTConfig, FuseDiTError, preset
from fusedit_lib import backend, pretrained, sampling
from fusedit_lib.data.shards import read_index
from fusedit_lib.train import compiled, costs, hardware, memory, plan
from fusedit_lib.vae import VAE, load_vae
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

# ------------------------------------------------------------------------------ measured memory

# Measures the bytes of all storages that tensors hold, including those of autograd and ZeRO's
# buffers, in the last micro-batch of step 2, when gradients and moments exist. It does so at the
# beginning and the end of the forward pass, and when the backward pass reaches a block. The bytes
# that would be in CPU memory if there were a GPU, because of "-offload" or --ema-offload, are those
# of the tensors that DeepSpeed keeps on its optimizer's own device and of the EMA.
MEASURE = """
import gc
from torch._subclasses.fake_tensor import is_fake
real_loss = fusedit.flow_loss
calls = 0
enable_flash = torch.backends.cuda.enable_flash_sdp
torch.backends.cuda.enable_flash_sdp = lambda on: enable_flash(True)   # as on a GPU

def live_bytes():
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    tensors = [t for t in tensors if not is_fake(t)]       # the compiler keeps some fake tensors
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

def offloaded_bytes(engine):
    optimizer = engine.deepspeed.optimizer
    tensors = []
    if EMA_ON_CPU:
        tensors += engine.ema.tensors.values()
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        for names in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat",
                      "param_buffer_of_bit16_for_cpu_offload_groups"):
            tensors += getattr(optimizer, names, [])
        tensors += [t.grad for t in tensors if t.grad is not None]
        for state in engine.adam.state.values():
            tensors += state.values()
        tensors += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
        for name in ("temp_grad_buffer_for_cpu_offload", "grad_partitions_flat_buffer"):
            if hasattr(optimizer, name):
                tensors.append(getattr(optimizer, name))
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

def measured(engine, x, text, sigma, eps):
    global calls
    calls += 1
    if calls != 4:
        return real_loss(engine, x, text, sigma, eps)
    batch = sum(t.untyped_storage().nbytes() for t in (x, eps))
    batch += x.numel()                      # images as bytes
    seen = [live_bytes() - batch]

    def backward(*_):
        seen.append(live_bytes() - batch)
        with open(OUT + str(dist.get_rank()), "w") as file:
            json.dump(dict(all=max(seen), cpu=offloaded_bytes(engine)), file)
    for layer in engine.module.dit.layers:
        layer.register_full_backward_pre_hook(backward)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss = real_loss(engine, x, text, sigma, eps)
    seen.append(live_bytes() - batch)
    return loss
fusedit.flow_loss = measured
"""


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three-layers")
    tiny_gemma(folder, num_hidden_layers=3)
    return folder


def measure(argv, folder, ranks):
    """[{"all": peak memory, "cpu": bytes of it in CPU memory}] of the ranks of a run."""
    run = parse_run(argv, "")
    ema_on_cpu = run.ema_offload or run.zero.endswith("offload")
    launch(argv, f"OUT = {str(folder / 'rank')!r}\nEMA_ON_CPU = {ema_on_cpu}\n" + MEASURE, n=ranks)
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(ranks)]


def check_plan(argv, folder, ranks):
    """Compare the memory of a run with its plan: on the GPU and, with offloading, on the CPU."""
    run = parse_run(argv, "")
    dtype = plan.compute_dtype(run)
    model = costs.training_model(run, model_config(run))
    devices = hardware.Devices(ranks, "H100", 1)
    held = memory.zero_memory(model, run.zero, ranks, dtype, run.ema_offload)
    working = plan.working_memory(run, model_config(run), devices, run.micro_batch, False)
    for found in measure(argv, folder, ranks):
        on_gpu = found["all"] - found["cpu"]
        assert held.gpu + working.kept == pytest.approx(on_gpu, rel=0.1), (held, working, found)
        assert held.cpu == pytest.approx(found["cpu"], rel=0.1), (held, found)


LARGE_WEIGHTS = "image_size=16 dit_hidden_size=2048"
LARGE_ACTIVATIONS = "image_size=64 dit_hidden_size=256"


def small_run(gemma, data, out, shape, *more, ranks=2):
    """The flags of a bf16 run of two steps with two micro-batches of 4 images on each rank."""
    return flags(gemma, data, out, "--set", *shape.split(), "--batch", str(8 * ranks),
                 "--micro-batch", "4", "--steps", "2", "--dtype", "bf16", "--sample-every", "0",
                 *more)


@pytest.mark.parametrize("zero, shape", [
    ("1", LARGE_WEIGHTS),
    ("0", LARGE_ACTIVATIONS),
    ("2-offload", LARGE_WEIGHTS),
    pytest.param("0", LARGE_WEIGHTS, marks=pytest.mark.slow),
    pytest.param("2", LARGE_WEIGHTS, marks=pytest.mark.slow),
    pytest.param("3", LARGE_WEIGHTS, marks=pytest.mark.slow),
    pytest.param("3", LARGE_ACTIVATIONS, marks=pytest.mark.slow),
    pytest.param("1-offload", LARGE_WEIGHTS, marks=pytest.mark.slow),
    pytest.param("3-offload", LARGE_WEIGHTS, marks=pytest.mark.slow)])
def test_planned_memory_matches_allocations(three_layers, data, tmp_path, zero, shape):
    check_plan(small_run(three_layers, data, tmp_path / "run", shape, "--zero", zero), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    ["--compile"], ["--compile", "--memory-budget", "0.5"], ["--ema-offload"],
    ["--set", "fusion=shallow", "text_states=joint"],
    ["--zero", "3"], ["--zero", "2-offload", "--dtype", "float32"], ["--zero", "3-offload"]])
def test_planned_memory_on_one_gpu_matches_allocations(three_layers, data, tmp_path, more):
    """Compiled blocks, without and with a memory budget, and an EMA in CPU memory."""
    shape = LARGE_WEIGHTS if "--zero" in more else LARGE_ACTIVATIONS
    argv = small_run(three_layers, data, tmp_path / "run", shape, *more, ranks=1)
    check_plan(argv, tmp_path, 1)


@pytest.mark.parametrize("shape, more", [
    (LARGE_ACTIVATIONS, ["--zero", "1"]),
    pytest.param(LARGE_ACTIVATIONS, ["--zero", "1", "--compile"], marks=pytest.mark.slow),
    pytest.param(LARGE_WEIGHTS, ["--zero", "1"], marks=pytest.mark.slow),
    pytest.param(LARGE_WEIGHTS, ["--zero", "3"], marks=pytest.mark.slow),
    pytest.param(LARGE_WEIGHTS, ["--zero", "2-offload"], marks=pytest.mark.slow)])
def test_planned_memory_of_lora_matches_allocations(three_layers, data, tmp_path, shape, more):
    """The frozen weights of a trained model in bf16, and adapters."""
    start = tmp_path / "start"
    launch(small_run(three_layers, data, start, shape, "--steps", "1", ranks=1))
    argv = ["--data", str(data), "--init", str(start), "--lora", "8", "--workers", "0",
            "--batch", "8", "--micro-batch", "4", "--steps", "2", "--dtype", "bf16",
            "--sample-every", "0", "--out", str(tmp_path / "run"), *more]
    check_plan(argv, tmp_path, 1)


def allocated(function):
    """The most bytes that PyTorch's allocator has given out at any time while a function runs."""
    backend.configure(torch.device("cpu"), torch.float32)          # as the programs do
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        function()
    now = 0
    peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_planned_memory_of_drawing_matches_allocations(three_layers):
    shape = LARGE_ACTIVATIONS.split()
    config = model_config(parse_run(flags(three_layers, "x", "y", "--set", *shape), ""))
    model = pretrained.build_model(config)
    prompts = ["a red circle above the small blue square and star"] * 2     # the longest text
    found = allocated(lambda: sampling.generate(model, prompts, steps=2))
    planned = memory.drawing_memory(config, 2, torch.float32)
    assert planned.working == pytest.approx(found, rel=0.1)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert planned.all == pytest.approx(weights + found, rel=0.1)
    assert planned.largest == planned.dit.sum < planned.all


@pytest.mark.parametrize("method, shape", [
    (VAE.moments, (2, 3, 64, 64)), (VAE.decode, (1, 4, 32, 32))])
def test_planned_memory_of_the_vae_matches_allocations(tmp_path, method, shape):
    config = FuseDiTConfig(vae=str(tiny_vae(tmp_path / "vae", block_out_channels=[32, 32, 32])))
    vae = load_vae(config.vae).to(memory_format=torch.channels_last)
    x = torch.zeros(shape).to(memory_format=torch.channels_last)
    method(vae, x)                          # the first call allocates more
    planned = memory.vae_memory(config, method, torch.empty(shape, device="meta"), torch.float32)
    assert planned.weights == sum(p.numel() * 4 for p in vae.parameters())
    assert planned.working == pytest.approx(allocated(lambda: method(vae, x.clone())), rel=0.1)


def test_activations_grow_with_the_batch_and_shrink_with_remat(gemma_folder):
    config = model_config(parse_run(flags(gemma_folder, "x", "y"), ""))
    model = costs.abstract_model(config)
    one = costs.activations(model, config, 1, torch.bfloat16)
    four = costs.activations(model, config, 4, torch.bfloat16)
    assert four.kept == pytest.approx(4 * one.kept, rel=0.05)
    assert four.remat < 0.8 * four.kept


@pytest.mark.parametrize("budget", [None, 1], ids=["plain", "compiled"])
def test_the_texts_of_all_blocks_are_planned(gemma_folder, budget):
    """In bf16, with text_states depth, where each block has a text of its own.

    For each of 3 more texts, RMSNorm keeps two forms of it in float32, and its Linear what it reads
    and returns in bf16.
    """
    kept = {}
    for text_states in ("static", "depth"):
        argv = flags(gemma_folder, "x", "y", "--set", "fusion=shallow",
                     f"text_states={text_states}", "max_text_tokens=64", "dit_hidden_size=48")
        config = model_config(parse_run(argv, ""))
        model = costs.abstract_model(config)
        kept[text_states] = costs.activations(model, config, 4, torch.bfloat16, budget=budget)
    tokens = 4 * 64
    texts = 3 * tokens * (2 * 4 * 32 + 2 * 32 + 2 * 48)
    for field in ("kept", "remat"):
        more = getattr(kept["depth"], field) - getattr(kept["static"], field)
        assert more == pytest.approx(texts, rel=0.05)


def test_a_scanned_layer_saves_results_of_matrix_products():
    """All that lies between them is recomputed; with --remat, only the layer's input is kept.

    At full size. In the program that benchmarks/tpu_compile.py traces, the loop over layers keeps
    these arrays and each layer's rotation angles, 139 MB in all.
    """
    config = preset("fusedit/large-scale")
    model = costs.abstract_model(config)
    _, blocks = costs.record_forward(model, config, 2, torch.bfloat16, False, [model.dit.layers])
    tokens = 2 * 1024
    keys = 2 * (256 + 1024)
    q = 2048                                # 8 heads
    k = 1024                                # 4 heads
    values = tokens * (2 * 9216 + 3 * 2304 + 2 * q + k) + keys * 2 * k
    kept = compiled.tpu_layer(*blocks.inputs[0], remat=False)
    assert kept.saved == pytest.approx(2 * values, rel=0.01)
    remat = compiled.tpu_layer(*blocks.inputs[0], remat=True)
    assert remat.saved == 2 * tokens * 2304
    assert kept.backward < remat.backward < kept.backward + kept.saved


# ------------------------------------------------------------------------------ FLOPs

def matrix_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def test_flops_match_a_formula():
    """At full size: 2 FLOPs per weight and token, and the two matrix products of attention."""
    config = preset("fusedit/large-scale")
    model = costs.abstract_model(config)
    forward = costs.flops(model, config)
    N = 1024                                # image tokens
    T = 256                                 # text tokens
    H = 8                                   # heads
    h = 256                                 # head dim
    dit = 2 * matrix_parameters(model.dit) * N + 26 * 4 * N * (T + N) * H * h
    gemma = 2 * matrix_parameters(model.llm.layers) * T + 25 * 4 * T * T * H * h
    assert forward.dit == pytest.approx(dit, rel=0.01)
    assert forward.gemma == pytest.approx(gemma, rel=0.01)
    assert 1e12 < forward.vae < 1.3e12
    assert costs.step_flops(forward) == forward.gemma + 3 * forward.dit + forward.vae
    assert costs.step_flops(forward, True) == 3 * forward.gemma + 3 * forward.dit + forward.vae


def test_useful_flops_depend_on_captions_and_latents():
    """A caption of 80 tokens costs less than one of 256, and latents need no encoder."""
    config = preset("fusedit/large-scale")
    model = costs.abstract_model(config)
    useful = costs.useful_flops(config, latents=False, train_llm=False)
    forward = costs.flops(model, config, 80)
    of_80 = useful.per_image + 80 * useful.per_token
    assert of_80 == pytest.approx(costs.step_flops(forward), rel=0.005)

    from_latents = costs.useful_flops(config, latents=True, train_llm=False)
    assert useful.per_image - from_latents.per_image == forward.vae
    with_gemma = costs.useful_flops(config, latents=False, train_llm=True)
    assert with_gemma.per_token > useful.per_token         # Gemma's backward pass
    full = costs.step_flops(costs.flops(model, config))
    assert 1.04 < full / of_80 < 1.12


# ------------------------------------------------------------------------------ printed plan

def test_the_plan_of_every_paper_run_needs_no_download():
    for name, run in json.loads((REFERENCE / "paper_runs.json").read_text()).items():
        model = costs.abstract_model(preset(name))
        assert memory.count_parameters(model.dit) == run["dit_parameters"], name


def show(argv, capsys, engine="gpu"):
    """The lines that --plan prints for these flags."""
    run = parse_run(argv, "", engine)
    assert plan.show(run, model_config(run)) == 0
    return capsys.readouterr().out.splitlines()


def test_the_plan_knows_a_vae_that_is_on_disk(tmp_path, gemma_folder, monkeypatch, capsys):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def text(vae, channels):
        more = ["--plan", "8xH100", "--steps", "8", "--set", f"vae={vae}",
                f"in_channels={channels}", "image_size=64", "patch_size=2"]
        return "\n".join(show(flags(gemma_folder, "x", "y", *more), capsys))

    vae = tiny_vae(tmp_path / "vae")
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    parameters = sum(t.numel() for t in weights.values())
    local = text(vae, 4)
    assert f"VAE {parameters:,} parameters" in local
    assert f"{(64 // 4 // 2) ** 2:,} image tokens, " in local
    assert "assumed" not in local

    hub = text("someone/pipeline", 16)
    assert "someone/pipeline has not been downloaded" in hub
    assert "assumed to have the shape of Stable Diffusion 3's, with 8 x 8 pixels" in hub
    assert f"{(64 // 8 // 2) ** 2:,} image tokens, " in hub
    # the presets' VAE is that of Stable Diffusion 3
    assert "assumed" not in text(FuseDiTConfig.vae, 16)


def test_the_printed_plan(capsys):
    argv = ["--preset", "fusedit/large-scale", "--plan", "64xH100@0.5", "--steps", "800000"]
    lines = show(argv, capsys)
    out = "\n".join(lines)
    assert "batch 512 = 64 H100 x 1 x 8" in out
    assert "DiT 2,024,828,480" in out
    assert "with --remat" in out
    assert "blocks not compiled" in out

    # time
    config = preset("fusedit/large-scale")
    forward = costs.flops(costs.abstract_model(config), config)
    per_image = costs.step_flops(forward)
    days = 800_000 * 512 * per_image / (64 * 989e12 * 0.5) / 86400
    assert f"800,000 steps in {days:.1f} days" in out
    assert f"({(per_image - forward.vae) / 1e12:.3g} with precomputed latents)" in out

    # a row for each ZeRO stage
    table = [line.split() for line in lines if line.strip()[:1] in list("0123") and "." in line]
    assert [row[0] for row in table[:4]] == list("0123")
    for row in table[:4]:
        numbers = [float(word) for word in row[1:12]]
        assert sum(numbers[:8]) == pytest.approx(numbers[8], abs=0.05)


def test_latents_of_the_data_are_used(tmp_path, gemma_folder, capsys):
    """Nothing is encoded, so neither the encoder's FLOPs nor its memory are counted."""
    vae = tiny_vae(tmp_path / "vae")
    argv = ["--plan", "8xH100", "--steps", "8", "--batch", "512", "--sample-every", "0", "--set",
            f"vae={vae}", "in_channels=4", "image_size=64", "patch_size=2"]
    data = numbered(tmp_path / "data")
    images = "\n".join(show(flags(gemma_folder, data, "y", *argv), capsys))
    index = json.loads((data / "index.json").read_text())
    for shard in index["shards"]:
        shard["latents"] = dict(image_size=64)
    (data / "index.json").write_text(json.dumps(index))
    read_index.cache_clear()
    latents = "\n".join(show(flags(gemma_folder, data, "y", *argv), capsys))
    both, without = re.search(r"an image: (\S+) TFLOP \((\S+) with precomp", images).groups()
    assert f"an image: {without} TFLOP ({both} without the latents of --data)" in latents

    run = parse_run(flags(gemma_folder, data, "y", *argv), "")
    config = model_config(run)
    devices = hardware.parse(run.plan)
    encodes = plan.working_memory(run, config, devices, 64, False)
    reads = plan.working_memory(run, config, devices, 64, True)
    assert encodes.vae > 0 == reads.vae
    assert encodes.remat > reads.remat      # the encoder needs more than a step with --remat
    draws = plan.working_memory(replace(run, sample_every=1), config, devices, 64, True)
    assert draws.grid > encodes.vae         # to which the VAE is moved

    # the same on TPUs, where the VAE's weights are not counted here and its images are fewer
    sizes = dict(fsdp=8, tensor=1)
    encodes, reads = [plan.tpu_working_memory(run, config, devices, sizes, 64, latents)
                      for latents in (False, True)]
    assert encodes.remat > reads.remat
    assert reads.grid == 0 and encodes.needed(True) == encodes.remat
    draws = plan.tpu_working_memory(replace(run, sample_every=1), config, devices, sizes, 1, True)
    assert draws.needed(True) == draws.grid > draws.remat

    missing = "\n".join(show(flags(gemma_folder, tmp_path / "no", "y", *argv), capsys))
    assert "No latents are counted, because --data cannot be read here: no file matches" in missing


def test_the_plan_of_init_is_that_of_its_model(tmp_path, gemma_folder, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    config = model_config(parse_run(flags(gemma_folder, "x", "y"), ""))
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    argv = ["--init", str(folder), "--plan", "1xH100", "--batch", "8", "--steps", "100"]
    lines = show(argv, capsys)
    whole = costs.abstract_model(config)
    count = memory.count_parameters(whole.dit)
    assert lines[0].startswith(f"{folder} at 16 pixels, batch 8 = 1 H100")
    assert f"  DiT {count:,}, frozen Gemma" in lines[2]
    assert "paper" not in lines[-1] and "100 steps in 0.0 hours" in lines[-1]

    # with --lora: a backward pass without gradients of the weights
    lines = show([*argv, "--lora", "4"], capsys)
    run = parse_run([*argv, "--lora", "4"], "")
    model = costs.training_model(run, config)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < adapters < count / 2
    assert f"  adapters {adapters:,}, frozen DiT {count:,}, frozen Gemma" in lines[2]
    forward = costs.flops(model, config)
    with_lora = costs.step_flops(forward, lora=True)
    assert costs.step_flops(forward) - with_lora == forward.dit > costs.flops(whole, config).dit


EMA, ACTIVATIONS, SUM = 3, 7, 8             # columns of the plan's table


def zero_2_row(capsys, *more):
    """The numbers of the plan's row for --zero 2, for the single GPU of docs/training.md."""
    lines = show(["--preset", "fusedit/large-scale", "--plan", "1xH100", "--batch", "512",
                  "--micro-batch", "8", "--zero", "2", *more], capsys)
    (line,) = [line for line in lines if "<- --zero 2" in line]
    return [float(word) for word in line.split()[1:12]]


def test_flags_that_save_memory(capsys):
    """Compiling reduces the activations from 5.34 to 2.77 GB per image."""
    plain = zero_2_row(capsys)
    compiled = zero_2_row(capsys, "--compile")
    budget = zero_2_row(capsys, "--compile", "--memory-budget", "0.7")
    offload = zero_2_row(capsys, "--ema-offload")
    assert plain[ACTIVATIONS] / 8 == pytest.approx(5.34, abs=0.01)
    assert compiled[ACTIVATIONS] / 8 == pytest.approx(2.77, abs=0.15)  # the compiler may change
    assert compiled[:ACTIVATIONS] == plain[:ACTIVATIONS]
    assert budget[ACTIVATIONS] < 0.65 * compiled[ACTIVATIONS]
    assert plain[EMA] - offload[EMA] == pytest.approx(8.10)
    assert plain[SUM] - offload[SUM] == pytest.approx(8.10, abs=0.02)


@pytest.mark.parametrize("name, chips, tensor, by_libtpu", [
    ("v5e-256", 256, 1, 4.90),
    ("v4-256", 128, 2, None),
    pytest.param("v4-256", 128, 1, 9.08, marks=pytest.mark.slow),
    pytest.param("v5e-256", 256, 2, None, marks=pytest.mark.slow)])
def test_the_numbers_of_a_tpu_plan_add_up(capsys, name, chips, tensor, by_libtpu):
    """by_libtpu: the GB that libtpu's compiler gives, of benchmarks/tpu_compile.py."""
    argv = ["--preset", "fusedit/large-scale", "--plan", name, "--mesh", f"-1,{tensor}"]
    lines = show(argv, capsys, "tpu")
    assert f"batch 512 = {chips} " in lines[0]
    model = costs.abstract_model(preset("fusedit/large-scale"))
    check_sharding(lines, model, chips)

    # the table: titles, then numbers; two of the titles are "sum"
    titles = lines[-4].split()
    numbers = [float(word) for word in lines[-3].split()[:12]]
    base = sum(numbers[:-4])
    kept, kept_sum, remat, remat_sum = numbers[-4:]
    assert titles[-4:] == ["activations", "sum", "--remat", "sum"]
    assert base + kept == pytest.approx(kept_sum, abs=0.05)
    assert base + remat == pytest.approx(remat_sum, abs=0.05)
    assert remat < kept / 4
    assert lines[-3].endswith("fits")
    if by_libtpu:
        assert kept_sum == pytest.approx(by_libtpu, rel=0.1)

    # single numbers
    gb = dict(zip(titles[:-4], numbers, strict=False))
    sizes = dict(fsdp=chips // tensor, tensor=tensor)
    tensors = model.dit.named_parameters("dit")
    trained = sum(memory.chip(name, p.shape, sizes) for name, p in tensors)
    block = memory.count_parameters(model.dit.layers[0])
    assert trained < 1.1 * 2_024_828_480 / chips
    assert gb["Adam"] == pytest.approx(8 * trained / 1e9, abs=0.006)
    assert gb["weights"] == pytest.approx(4 * trained / 1e9, abs=0.006)
    assert gb["gathered"] == pytest.approx(4 * block / tensor / 1e9, abs=0.006)


def check_sharding(lines, model, chips):
    """The printed tensors are almost the whole model, and each chip has an equal share of them.

    Example of a line: "26 9216 x 2304 tensor, fsdp 552.1 4.31 name".
    """
    shown = 0.0
    for line in lines:
        if not line.endswith("weight"):
            continue
        layers, *middle, million, on_chip, _ = line.split()
        elements = int(layers)
        for word in middle:
            if word.isdigit():
                elements *= int(word)
        assert elements == pytest.approx(float(million) * 1e6, abs=0.06e6)
        assert float(million) / float(on_chip) == pytest.approx(chips, rel=0.02)
        shown += float(million)
    assert shown * 1e6 == pytest.approx(memory.count_parameters(model), rel=0.002)


# ------------------------------------------------------------------------------ devices

@pytest.mark.parametrize("text", ["8", "8xH999", "0xH100", "8xH100@2", "xH100", "8xH100@0.0",
                                  "v9-8", "v4-1", "v5e-0", "8xv4"])
def test_invalid_devices_are_refused(text):
    with pytest.raises(FuseDiTError, match="known: B200.* v4, v5e"):
        hardware.parse(text)


@pytest.mark.parametrize("text, devices", [
    ("v4-256", (128, "v4", 0.4)),
    ("V5E-16@.5", (16, "v5e", 0.5)),
    ("v5litepod-16", (16, "v5e", 0.4)),
    ("8 x a100", (8, "A100", 0.4)),
    ("2xH100 PCIe@0.5", (2, "H100 PCIe", 0.5))])
def test_valid_devices(text, devices):
    assert hardware.parse(text) == devices

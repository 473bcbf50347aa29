"""Prints the parameters, FLOPs, memory and time of a run without access to its devices.

    python train_gpu.py --preset fusedit/large-scale --plan 64xH100@0.4
"""
import itertools
import math
from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import torch

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib.backend import TILE
from fusedit_lib.data.shards import expand_shards
from fusedit_lib.train import sharding
from fusedit_lib.train.config import ZERO_STAGES, check_settings, split_batch
from fusedit_lib.train.costs import (
    activations,
    flops,
    step_flops,
    tpu_activations,
    training_model,
)
from fusedit_lib.train.flags import flag_text
from fusedit_lib.train.hardware import RESERVE, TPUS, parse
from fusedit_lib.train.memory import (
    ZeroMemory,
    chip,
    count_parameters,
    drawing_memory,
    elements,
    tensor_kinds,
    tpu_memory,
    vae_memory,
    zero_memory,
)
from fusedit_lib.train.text_cache import token_bytes
from fusedit_lib.vae import VAE, config_on_disk, latent_side, vae_config


PAPER_IMAGES = 800_000 * 512                # total images of the paper's large run


# ------------------------------------------------------------------------------ the plan

def show(run, config):
    """Print the plan of a run. Returns the exit code, 0.

    Raises FuseDiTError if --plan cannot be parsed, if the batch is not divisible by the number of
    devices, and for settings that training refuses.
    """
    check_settings(run)
    devices = parse(run.plan)
    micro_batch, accumulation = split_batch(run, devices.count)
    model = training_model(run, config)
    vae = 0
    if config.vae:
        with torch.device("meta"):
            vae = count_parameters(VAE(vae_config(config.vae)))
    name = run.init or run.preset
    if run.lora:
        name += f" with --lora {run.lora}"
    print(f"{name} at {config.image_size} pixels, batch {run.batch} = {devices.count} "
          f"{devices.kind} x {accumulation} x {micro_batch} (accumulation x micro-batch)\n")
    if config.vae and config.vae != FuseDiTConfig.vae and config_on_disk(config.vae) is None:
        print(f"  {config.vae} has not been downloaded, so its VAE is assumed to have the shape of "
              "Stable Diffusion 3's, with 8 x 8 pixels per latent\n")
    latents = has_latents(run, config)
    per_image = print_model(run, config, model, vae, latents)
    if devices.kind in TPUS:
        print_tpu_memory(run, config, devices, micro_batch, vae, latents)
    else:
        print_gpu_memory(run, config, devices, micro_batch, latents)
    print_time(run, config, devices, per_image)
    return 0


def has_latents(run, config):
    """True if --data names shards with latents that fit the run."""
    if not (config.vae and run.latents and run.data) or run.crop == "random":
        return False
    try:
        shards = sum([expand_shards(pattern) for pattern in run.data], [])
    except FuseDiTError as e:
        print(f"  No latents are counted, because --data cannot be read here: {e}\n")
        return False
    known = [shard.latents for shard in shards if shard.samples]
    fit = [latents and latents["image_size"] == config.image_size for latents in known]
    return bool(fit) and all(fit)


def image_tokens(config):
    return (latent_side(config) // config.patch_size) ** 2


def print_model(run, config, model, vae, latents):
    """Print parameters, tokens and FLOPs. Returns the FLOPs of training on one image."""
    forward = flops(model, config)
    if run.cache_text:
        forward = forward._replace(gemma=0)
    per_image = step_flops(forward, run.train_llm, run.lora > 0)
    others = f"{(per_image - forward.vae) / 1e12:.3g} with precomputed latents"
    if latents:
        others = f"{per_image / 1e12:.3g} without the latents of --data"
        per_image -= forward.vae
    state = "trained" if run.train_llm else "frozen"
    dit = f"DiT {count_parameters(model.dit):,}"
    if run.lora:
        adapters = elements(p for p in model.dit.parameters() if p.requires_grad)
        dit = f"adapters {adapters:,}, frozen DiT {count_parameters(model.dit) - adapters:,}"
    print(f"  {dit}, {state} Gemma {count_parameters(model.llm):,}, VAE {vae:,} parameters")
    print(f"  {image_tokens(config):,} image tokens, {config.max_text_tokens} text tokens at most")
    line = (f"  forward pass of an image: DiT {forward.dit / 1e12:.3g} TFLOP, "
            f"Gemma {forward.gemma / 1e12:.3g}, VAE {forward.vae / 1e12:.3g}; "
            f"training on an image: {per_image / 1e12:.3g} TFLOP")
    if vae:
        line += f" ({others})"
    print(line + "\n")
    return per_image


def print_time(run, config, devices, per_image):
    """Print the speed and the duration of the run. per_image: FLOPs of training on one image."""
    hardware = devices.hardware
    speed = devices.count * hardware.flops * devices.utilization / per_image   # images/s
    days = run.steps * run.batch / speed / 86400
    duration = f"{days:,.1f} days"
    if days < 1:
        duration = f"{24 * days:.1f} hours"
    digits = 0 if speed >= 10 else 1
    line = (f"\n  at {devices.utilization:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s per device: "
            f"{speed:,.{digits}f} images/s, {speed * image_tokens(config):,.0f} image tokens/s; "
            f"{run.steps:,} steps in {duration}")
    if not run.init:
        paper_days = math.ceil(PAPER_IMAGES / speed / 86400 * 10) / 10
        line += f", the paper's 800,000 x 512 images in {paper_days:,.1f} days"
    print(line)


def compute_dtype(run):
    """The dtype of the computation. The plan treats --dtype auto as bf16."""
    if run.dtype == "float32":
        return torch.float32
    return torch.bfloat16


def verdict(device, kept, remat):
    """A verdict on whether a run fits a device, given as Hardware.

    kept, remat: bytes needed without and with --remat.
    """
    if remat > device.usable:
        return "too much"
    if kept > device.usable:
        return "with --remat"
    return "fits"


def memory_text(devices):
    """The memory of one of the devices in GB, and how much of it a plan leaves free."""
    return f"of {devices.hardware.memory / 1e9:.0f}, {RESERVE:.0%} kept free"


def table_row(titles, cells):
    """A row of a table with these titles. cells: text, or bytes, which are shown in GB."""
    row = ""
    for title, cell in zip(titles, cells, strict=True):
        if not isinstance(cell, str):
            cell = f"{cell / 1e9:.2f}"
        row += cell.rjust(max(8, len(title) + 2))
    return row


# ------------------------------------------------------------------------------ GPUs

class Working(NamedTuple):
    """Bytes that a device needs at different times, in addition to its part of the model."""
    kept: float                             # in a training step
    remat: float                            # in a training step with --remat
    grid: float                             # for an image grid; 0 without one
    vae: float                              # the VAE's weights, if they are on the GPU

    def scaled(self, part):
        """The same for a part of the micro-batch."""
        return self._replace(kept=self.kept * part, remat=self.remat * part)

    def needed(self, remat):
        step = self.remat if remat else self.kept
        return self.vae + max(step, self.grid)


def working_memory(run, config, devices, micro_batch, latents):
    """Working of a run. latents: False if images are encoded at each step."""
    dtype = compute_dtype(run)
    budget = None
    if run.compile:
        budget = run.memory_budget
    kept, remat = activations(training_model(run, config), config, micro_batch, dtype,
                              run.train_llm, budget)
    drawing = drawing_memory(config, math.ceil(len(run.prompts) / devices.count), dtype,
                             text_tokens(run, config))
    grid = drawing.working
    vae = drawing.vae.weights
    if latents:                             # the VAE is on the CPU, except to decode images
        grid += vae
        vae = 0
    elif config.vae:                        # the images are encoded before the forward pass
        pixels = torch.empty(micro_batch, 3, config.image_size, config.image_size, device="meta")
        encoder = vae_memory(config, VAE.moments, pixels, dtype).working
        kept = max(kept, encoder)
        remat = max(remat, encoder)
    if run.sample_every == 0:
        grid = 0
    return Working(kept, remat, grid, vae)


def text_tokens(run, config):
    """The number of tokens to which the prompts of an image grid are padded on a GPU, estimated."""
    longest = max(len(prompt) for prompt in run.prompts) / 3       # characters in a token
    return min(config.max_text_tokens, TILE * math.ceil(longest / TILE))


def start_memory(model, held, vae, dtype):
    """Bytes on a GPU before DeepSpeed shards and converts the float32 weights.

    model: from training_model. held: its ZeroMemory. vae: bytes of its VAE.
    """
    trained = elements(p for p in model.parameters() if p.requires_grad)
    frozen = count_parameters(model) - trained
    return 4 * trained + frozen * dtype.itemsize + held.ema + vae


class Need(NamedTuple):
    """Bytes that a GPU needs."""
    held: ZeroMemory
    kept: float                             # at most, without --remat
    remat: float                            # at most, with --remat


def gpu_need(run, devices, model, working):
    """Need of a run. model: from training_model; working: Working."""
    dtype = compute_dtype(run)
    held = zero_memory(model, run.zero, devices.count, dtype, run.ema_offload)
    start = start_memory(model, held, working.vae, dtype)
    return Need(held, kept=max(start, held.gpu + working.needed(False)),
                remat=max(start, held.gpu + working.needed(True)))


def print_gpu_memory(run, config, devices, micro_batch, latents):
    """Print the memory of a GPU, with a row for each ZeRO stage, and notes on it."""
    model = training_model(run, config)
    blocks = "not compiled"
    if run.compile:
        blocks = f"compiled, --memory-budget {run.memory_budget:g}"
    print(f"  GB per GPU ({memory_text(devices)}), micro-batch {micro_batch}, blocks {blocks}:")
    titles = ("   --zero", "weights", "gradients", "Adam", "EMA", "frozen", "buffers", "VAE",
              "activations", "sum", "--remat", "sum", "CPU")
    print(table_row(titles, titles))

    working = working_memory(run, config, devices, micro_batch, latents)
    for zero in ZERO_STAGES:
        held, kept, remat = gpu_need(replace(run, zero=zero), devices, model, working)
        base = held.gpu + working.vae
        line = table_row(titles, [zero, *held[:-1], working.vae, working.kept, base + working.kept,
                                  working.remat, base + working.remat, held.cpu])
        line += f"   {verdict(devices.hardware, kept, remat)}"
        if zero == run.zero:
            line += f"   <- --zero {zero}"
        print(line)
    print("  CPU: in CPU memory, for each GPU: the EMA and, with -offload, Adam's state; the time "
          "that Adam's step takes there is not counted below\n"
          "  --remat costs a second forward pass of the DiT")
    print_notes(run, config, devices, model, working)
    print_remedy(run, config, devices, micro_batch, latents)


def print_grid(run, working):
    """Print it if an image grid takes more than the activations. Returns the activations' bytes."""
    step = working.remat if run.remat else working.kept
    if working.grid > step:
        print(f"  an image grid takes {working.grid / 1e9:.2f} GB, more than the activations: use "
              "fewer --prompts, or --sample-every 0 for none")
    return step


def print_notes(run, config, devices, model, working):
    """Print what can take more memory than a training step, and the memory of sample.py."""
    held = gpu_need(run, devices, model, working).held
    step = print_grid(run, working)
    start = start_memory(model, held, working.vae, compute_dtype(run))
    if start > held.gpu + working.vae + max(step, working.grid):
        print(f"  the start takes {start / 1e9:.2f} GB, more than a training step, because the "
              "weights are still in float32 and not yet sharded")
    drawing = drawing_memory(config, 1, compute_dtype(run))
    parts = f"Gemma {drawing.gemma.sum / 1e9:.2f}, DiT {drawing.dit.sum / 1e9:.2f}"
    if config.vae:
        parts += f", VAE {drawing.vae.sum / 1e9:.2f}"
    print(f"  sample.py takes {drawing.all / 1e9:.2f} GB for an image, and with --offload "
          f"{drawing.largest / 1e9:.2f}, as much as the largest part ({parts})")
    if run.cache_text:
        size = token_bytes(model, compute_dtype(run))
        print(f"  the memory of --cache-text is not counted: {size / 1e3:.3g} kB for each token of "
              "the distinct captions, on every GPU")


# ------------------------------------------------------------------------------ what would fit

def levels(run, count):
    """Changes that save more and more memory, in the order of docs/training.md#saving-memory.

    They are grouped: those in a group cost equally little. count: the number of GPUs.
    """
    compiled = dict(compile=True)
    if count == 1:                          # ZeRO 2 sends nothing, and ZeRO 3 saves nothing more
        sharded = compiled | higher(run, "2")
        cheap = [[{}, compiled, sharded]]
    else:
        sharded = compiled | higher(run, "3")
        cheap = [[{}, compiled], [compiled | higher(run, "2")], [sharded]]
    ema_offload = run.ema_offload or not run.zero.endswith("offload")   # which includes it
    sharded = sharded | dict(ema_offload=ema_offload)
    cheap.append([sharded])

    budget = dict(memory_budget=min(0.5, run.memory_budget))
    remat = dict(remat=True)
    costly = [[sharded | budget], [sharded | remat]]
    for zero in ("2-offload", "3-offload"):
        offloaded = compiled | higher(run, zero)
        costly += [[offloaded], [offloaded | budget], [offloaded | remat]]
    can_adapt = run.init and find_spec("peft") is not None
    if can_adapt and not (run.lora or run.init_raw or run.float8 or run.train_llm):
        lora = compiled | dict(lora=16)
        costly += [[lora], [lora | remat]]
    return cheap + without_grids(cheap) + costly + without_grids(costly)


def without_grids(groups):
    """The same levels without image grids."""
    return [[change | dict(sample_every=0) for change in group] for group in groups]


def higher(run, zero):
    """{"zero": zero} if that saves more memory than the run's --zero, otherwise {}."""
    if ZERO_STAGES.index(zero) > ZERO_STAGES.index(run.zero):
        return dict(zero=zero)
    return {}


def print_remedy(run, config, devices, micro_batch, latents):
    """If the run does not fit, print the first change of `levels` with which it does.

    In a group of levels, the largest micro-batch is preferred.
    """
    run = replace(run, micro_batch=micro_batch)
    known = {}                              # settings -> the model and its Working
    for group in levels(run, devices.count):
        for size, change in itertools.product(divisors(micro_batch), group):
            changed = replace(run, **change, micro_batch=size)
            settings = changed.lora, changed.compile, changed.memory_budget
            if settings not in known:
                working = working_memory(changed, config, devices, micro_batch, latents)
                known[settings] = training_model(changed, config), working
            model, working = known[settings]
            if changed.sample_every == 0:
                working = working._replace(grid=0)
            if fits(changed, devices, model, working.scaled(size / micro_batch)):
                print_flags(run, changed)
                return
    print("  none of the flags that save memory makes it fit")


def fits(run, devices, model, working):
    """True if a run fits its devices. model: from training_model; working: Working."""
    need = gpu_need(run, devices, model, working)
    return (need.remat if run.remat else need.kept) <= devices.hardware.usable


def print_flags(run, changed):
    """Print the flags in which the changed run differs, if any."""
    flags = [flag_text(name, value) for name, value in vars(changed).items()
             if value != getattr(run, name)]
    if flags:
        print("  it fits with " + " ".join(flags))


def divisors(number):
    """All divisors of a number, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


# ------------------------------------------------------------------------------ TPUs

def print_mesh(run, model, sizes):
    """Print how the large tensors are sharded on --mesh. sizes: {axis: devices}."""
    shape = " x ".join(f"{count} {axis}" for axis, count in sizes.items())
    print(f"  mesh {shape}; sharding of the tensors above 0.1 % of the model, in millions of "
          "elements:\n"
          f"{'layers':>8}{'dimensions':>16}  {'axes':16}{'total':>8}{'on chip':>8}")
    total = count_parameters(model)
    for kind in tensor_kinds(model):
        size = kind.count * math.prod(kind.shape)
        if size <= total / 1000:
            continue
        dimensions = " x ".join(str(size) for size in kind.shape)
        spec = sharding.partition_spec(kind.name, kind.shape, sizes)
        axes = ", ".join(axis or "-" for axis in spec)
        on_chip = kind.count * chip(kind.name, kind.shape, sizes)
        print(f"{kind.count:>8}{dimensions:>16}  {axes:16}{size / 1e6:8.1f}"
              f"{on_chip / 1e6:8.2f}  {kind.name}")


def tpu_working_memory(run, config, devices, sizes, micro_batch, latents):
    """Working of a run on TPUs, without the VAE's weights. sizes: {axis: devices}.

    latents: False if images are encoded at each step.
    """
    dtype = compute_dtype(run)
    # chips along the tensor axis share a micro-batch and its activations
    tensor = sizes["tensor"]
    batch = max(1, micro_batch * tensor)
    saved = tpu_activations(training_model(run, config), config, batch, dtype, run.train_llm)
    kept = saved.kept / tensor
    remat = saved.remat / tensor
    if config.vae and not latents:          # the images are encoded before the forward pass
        pixels = torch.empty(micro_batch, 3, config.image_size, config.image_size, device="meta")
        encoder = vae_memory(config, VAE.moments, pixels, dtype).working
        kept = max(kept, encoder)
        remat = max(remat, encoder)
    grid = 0
    if run.sample_every:
        images = math.ceil(len(run.prompts) / devices.count)
        grid = drawing_memory(config, images, dtype).working
    return Working(kept, remat, grid, 0)


def print_tpu_memory(run, config, devices, micro_batch, vae, latents):
    """Print how tensors are sharded on --mesh, and the memory of a chip."""
    mesh = sharding.mesh_shape(run.mesh, devices.count)
    sizes = dict(zip(sharding.AXES, mesh, strict=True))
    model = training_model(run, config)
    print_mesh(run, model, sizes)

    working = tpu_working_memory(run, config, devices, sizes, micro_batch, latents)
    kept = working.kept
    remat = working.remat
    parts = tpu_memory(run, model, sizes, compute_dtype(run), vae)
    base = sum(parts.values())
    titles = [*parts, "activations", "sum", "--remat", "sum"]
    print(f"\n  GB per chip ({memory_text(devices)}), micro-batch {micro_batch}:\n"
          + table_row(titles, titles))
    print(table_row(titles, [*parts.values(), kept, base + kept, remat, base + remat]) + "   "
          + verdict(devices.hardware, base + working.needed(False), base + working.needed(True)))
    print_grid(run, working)

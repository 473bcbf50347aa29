"""Estimates the parameters, FLOPs, memory and time of a run without access to its devices.

    python train_gpu.py --preset fusedit/large-scale --plan 64xH100@0.4
"""
import math
import re
from typing import NamedTuple

import torch

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib.train import sharding
from fusedit_lib.train.config import split_batch
from fusedit_lib.train.costs import (
    FusedAttention,
    UnfusedAttention,
    abstract_model,
    activations,
    flops,
    step_flops,
)
from fusedit_lib.vae import VAE, config_on_disk, latent_side, vae_config


class Hardware(NamedTuple):
    """The specification of a device, from its data sheet."""
    flops: float                            # dense bf16 FLOP/s
    memory: float                           # bytes


GPUS = {
    "B200": Hardware(2250e12, 180e9),
    "H200": Hardware(989e12, 141e9),
    "H100 PCIe": Hardware(756e12, 80e9),
    "H100 NVL": Hardware(835e12, 94e9),
    "H100": Hardware(989e12, 80e9),
    "A100": Hardware(312e12, 80e9),
    "L40S": Hardware(362e12, 48e9),
    "L4": Hardware(121e12, 24e9),
    "A10": Hardware(125e12, 24e9),
    "4090": Hardware(165e12, 24e9),
}
TPUS = {
    "v4": Hardware(275e12, 32e9),
    "v5e": Hardware(197e12, 16e9),
    "v5p": Hardware(459e12, 95e9),
    "v6e": Hardware(918e12, 32e9),
}
NAMED_BY_CORES = ("v4", "v5p")              # slice names count cores, two per chip

BUCKET = 200_000_000                        # gradients or weights that ZeRO communicates at a time
WHOLE = 100_000                             # ZeRO 3 does not shard tensors up to this size
PAPER_IMAGES = 800_000 * 512                # total images of the paper's large run


def peak_flops(device, world):
    """Total FLOP/s of `world` GPUs of this kind, or None if its FLOP/s are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for kind, hardware in GPUS.items():
        if re.search(rf"\b{kind}\b", name):
            return world * hardware.flops
    return None


class Devices(NamedTuple):
    """The devices of a plan."""
    count: int                              # of GPUs or TPU chips
    kind: str                               # a name in GPUS or TPUS
    utilization: float                      # assumed fraction of the peak FLOP/s

    @property
    def hardware(self):
        return (GPUS | TPUS)[self.kind]


def find_kind(name, known):
    """The name in `known` that matches, ignoring case, or None."""
    for kind in known:
        if kind.upper() == name.upper():
            return kind
    return None


def parse(text):
    """Parses "64xH100@0.4" or "v4-256" (128 chips) into Devices. Raises FuseDiTError."""
    text, _, share = text.strip().partition("@")
    utilization = 0.0                       # refused below
    if not share:
        utilization = 0.4
    elif re.fullmatch(r"[01]?(\.\d+)?", share):
        utilization = float(share)

    count = 0
    kind = None
    gpus = re.fullmatch(r"(\d+) *[xX*] *([\w ]+)", text)
    tpus = re.fullmatch(r"([vV]\w+)-(\d+)", text.replace("v5litepod", "v5e"))
    if gpus:
        count = int(gpus[1])
        kind = find_kind(gpus[2], GPUS)
    elif tpus:
        count = int(tpus[2])
        kind = find_kind(tpus[1], TPUS)
    if kind in NAMED_BY_CORES:
        count //= 2
    if kind is None or count < 1 or not 0 < utilization <= 1:
        raise FuseDiTError(f"--plan {text}: give a number and a kind of GPU, such as 8xH100 or "
                           "8xH100@0.4, or a TPU slice, such as v4-256; known: "
                           + ", ".join([*GPUS, *TPUS]))
    return Devices(count, kind, utilization)


# ------------------------------------------------------------------------------ memory on GPUs

class ZeroMemory(NamedTuple):
    """Bytes on one GPU, without activations."""
    weights: float                          # trained weights, in the dtype of the computation
    gradients: float
    adam: float                             # moments and float32 master weights
    ema: float
    gemma: float                            # if frozen, otherwise 0
    buffers: float                          # for weights and gradients that ZeRO gathers


def count_parameters(module, at_most=math.inf):
    """Number of parameters of a module, counting only tensors of up to `at_most` elements."""
    return sum(p.numel() for p in module.parameters() if p.numel() <= at_most)


def zero_memory(model, train_llm, stage, world, dtype):
    """ZeroMemory of an abstract_model.

    ZeRO stage 1 shards Adam's moments and the float32 master weights, stage 2 also the gradients,
    and stage 3 also the weights and Gemma, except for tensors of up to WHOLE elements. This was
    measured with DeepSpeed 0.19.
    """
    low = dtype.itemsize
    adam_share = 1 / world if stage >= 1 else 1
    gradient_share = 1 / world if stage >= 2 else 1
    total = count_parameters(model)

    def weight_bytes(module):
        if stage < 3:
            return count_parameters(module) * low
        return (count_parameters(module) / world + count_parameters(module, WHOLE)) * low

    # trained and frozen weights
    trained = count_parameters(model.dit)
    weights = weight_bytes(model.dit)
    gemma = weight_bytes(model.llm)
    if train_llm:
        trained += count_parameters(model.llm)
        weights += gemma
        gemma = 0

    # bytes per gradient, including its accumulator
    gradient_bytes = {0: low, 1: 4 + low, 2: 4, 3: 4}[stage]
    adam_tensors = 3                        # two moments and the master weights
    if stage == 0 and low == 4:             # plain float32 has no separate master weights
        adam_tensors = 2
    buffers = 0
    if stage >= 2:
        buffers += min(BUCKET, trained) * low
    if stage == 3:                          # weights that are gathered temporarily
        buffers += min(BUCKET, total) * low
    return ZeroMemory(weights=weights, gradients=trained * gradient_bytes * gradient_share,
                      adam=trained * 4 * adam_tensors * adam_share, ema=trained * 4 / world,
                      gemma=gemma, buffers=buffers)


# ------------------------------------------------------------------------------ memory on TPUs

def chip(name, shape, sizes):
    """The number of a tensor's elements on one chip of a mesh. sizes: {axis: devices}."""
    cuts = [sizes[axis] for axis in sharding.partition_spec(name, shape, sizes) if axis]
    return math.prod(shape) // math.prod(cuts)


class TensorKind(NamedTuple):
    """Tensors with the same name and shape in each layer of a stack, or a single tensor."""
    name: str                               # without the layer number
    shape: tuple
    count: int                              # number of layers, or 1


def tensor_kinds(model):
    """The parameters of a model, as [TensorKind]."""
    counts = {}
    for name, parameter in model.named_parameters():
        key = re.sub(r"layers\.\d+", "layers", name), tuple(parameter.shape)
        counts[key] = counts.get(key, 0) + 1
    return [TensorKind(name, shape, count) for (name, shape), count in counts.items()]


def tpu_memory(run, model, sizes, dtype, vae):
    """{item: bytes on one chip}, without activations.

    The item "gathered" is the complete weights of the current block and of the next one.
    vae: the number of the VAE's parameters.
    """
    low = dtype.itemsize
    dit = 0                                 # elements per chip
    gemma = 0
    for kind in tensor_kinds(model):
        elements = kind.count * chip(kind.name, kind.shape, sizes)
        if kind.name.startswith("dit."):
            dit += elements
        else:
            gemma += elements
    trained = dit
    frozen = gemma
    if run.train_llm:
        trained = dit + gemma
        frozen = 0
    cast = 0                                # the weights in the dtype of the computation
    if low < 4:
        cast = low * trained
    block = count_parameters(model.dit.layers[0])
    return dict(weights=4 * trained, gradients=4 * trained, Adam=8 * trained, EMA=4 * trained,
                cast=cast, Gemma=low * frozen, gathered=2 * low * block // sizes["tensor"],
                VAE=vae * low)


# ------------------------------------------------------------------------------ printing

def show(run, config):
    """Print the plan of a run. Returns the exit code, 0.

    Raises FuseDiTError if --plan cannot be parsed or the batch is not divisible by the number of
    devices.
    """
    devices = parse(run.plan)
    micro_batch, accumulation = split_batch(run, devices.count)
    model = abstract_model(config)
    vae = 0
    if config.vae:
        with torch.device("meta"):
            vae = count_parameters(VAE(vae_config(config.vae)))
    print(f"{run.preset} at {config.image_size} pixels, batch {run.batch} = {devices.count} "
          f"{devices.kind} x {accumulation} x {micro_batch} (accumulation x micro-batch)\n")
    if config.vae and config.vae != FuseDiTConfig.vae and config_on_disk(config.vae) is None:
        print(f"  {config.vae} has not been downloaded, so its VAE is assumed to have the shape of "
              "Stable Diffusion 3's, with 8 x 8 pixels per latent\n")
    per_image = print_model(run, config, model, vae)
    if devices.kind in TPUS:
        print_tpu_memory(run, config, devices, micro_batch, vae)
    else:
        print_gpu_memory(run, config, devices, micro_batch, vae)

    # time
    hardware = devices.hardware
    speed = devices.count * hardware.flops * devices.utilization / per_image   # images/s
    days = run.steps * run.batch / speed / 86400
    paper_days = math.ceil(PAPER_IMAGES / speed / 86400 * 10) / 10
    print(f"\n  at {devices.utilization:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s per device: "
          f"{speed:,.0f} images/s, {speed * image_tokens(config):,.0f} image tokens/s; "
          f"{run.steps:,} steps in {days:,.1f} days, the paper's 800,000 x 512 images in "
          f"{paper_days:,.1f} days")
    return 0


def image_tokens(config):
    return (latent_side(config) // config.patch_size) ** 2


def print_model(run, config, model, vae):
    """Print parameters, tokens and FLOPs. Returns the FLOPs of training on one image."""
    forward = flops(model, config)
    per_image = step_flops(forward, run.train_llm)
    state = "trained" if run.train_llm else "frozen"
    print(f"  DiT {count_parameters(model.dit):,}, {state} Gemma {count_parameters(model.llm):,}, "
          f"VAE {vae:,} parameters")
    print(f"  {image_tokens(config):,} image tokens, {config.max_text_tokens} text tokens at most")
    line = (f"  forward pass of an image: DiT {forward.dit / 1e12:.3g} TFLOP, "
            f"Gemma {forward.gemma / 1e12:.3g}, VAE {forward.vae / 1e12:.3g}; "
            f"training on an image: {per_image / 1e12:.3g} TFLOP")
    if vae:
        line += f" ({(per_image - forward.vae) / 1e12:.3g} with precomputed latents)"
    print(line + "\n")
    return per_image


def compute_dtype(run):
    """The dtype of the computation. The plan treats --dtype auto as bf16."""
    if run.dtype == "float32":
        return torch.float32
    return torch.bfloat16


def verdict(memory, kept, remat):
    """A verdict on whether a run fits. kept, remat: bytes needed without and with --remat."""
    if remat > memory:
        return "too much"
    if kept > memory:
        return "with --remat"
    return "fits"


def table_row(values):
    """A row of a table, in GB."""
    return "  " + "".join(f"{value / 1e9:12.2f}" for value in values)


def print_gpu_memory(run, config, devices, micro_batch, vae):
    """Print the memory of a GPU, with a row for each ZeRO stage."""
    dtype = compute_dtype(run)
    model = abstract_model(config)
    blocks = "not compiled"
    budget = None
    if run.compile:
        blocks = f"compiled, --memory-budget {run.memory_budget:g}"
        budget = run.memory_budget
    memory = devices.hardware.memory
    print(f"  GB per GPU (of {memory / 1e9:.0f}), micro-batch {micro_batch}, blocks {blocks}:")
    titles = ("--zero", "weights", "gradients", "Adam", "EMA", "Gemma", "buffers", "VAE",
              "activations", "sum", "--remat", "sum")
    print("  " + "".join(f"{title:>12}" for title in titles))

    kept, remat = activations(abstract_model(config), config, micro_batch, dtype, run.train_llm,
                              FusedAttention, budget)
    for stage in range(4):
        parts = zero_memory(model, run.train_llm, stage, devices.count, dtype)
        if run.ema_offload:
            parts = parts._replace(ema=0)
        parts = [*parts, vae * dtype.itemsize]
        base = sum(parts)
        numbers = table_row([*parts, kept, base + kept, remat, base + remat]).removeprefix("  ")
        line = f"  {stage:>12}{numbers}   {verdict(memory, base + kept, base + remat)}"
        if stage == int(run.zero[0]):
            line += f"   <- --zero {run.zero}"
        print(line)
    print("  1-offload, 2-offload, 3-offload: as 1, 2, 3, with Adam's state in CPU memory; --remat "
          "costs a second forward pass of the DiT")


def print_mesh(run, model, sizes):
    """Print how the large tensors are sharded on --mesh. sizes: {axis: devices}."""
    shape = " x ".join(f"{count} {axis}" for axis, count in sizes.items())
    print(f"  mesh {shape}; sharding of the tensors above 0.1 % of the model, in millions of "
          "elements:\n"
          f"{'layers':>8}{'dimensions':>16}  {'axes':16}{'total':>8}{'on chip':>8}")
    total = count_parameters(model)
    for kind in tensor_kinds(model):
        elements = kind.count * math.prod(kind.shape)
        if elements <= total / 1000:
            continue
        dimensions = " x ".join(str(size) for size in kind.shape)
        spec = sharding.partition_spec(kind.name, kind.shape, sizes)
        axes = ", ".join(axis or "-" for axis in spec)
        on_chip = kind.count * chip(kind.name, kind.shape, sizes)
        print(f"{kind.count:>8}{dimensions:>16}  {axes:16}{elements / 1e6:8.1f}"
              f"{on_chip / 1e6:8.2f}  {kind.name}")


def print_tpu_memory(run, config, devices, micro_batch, vae):
    """Print how tensors are sharded on --mesh, and the memory of a chip."""
    mesh = sharding.mesh_shape(run.mesh, devices.count)
    sizes = dict(zip(sharding.AXES, mesh, strict=True))
    dtype = compute_dtype(run)
    model = abstract_model(config)
    print_mesh(run, model, sizes)

    # chips along the tensor axis share a micro-batch and its activations
    tensor = sizes["tensor"]
    batch = max(1, micro_batch * tensor)
    saved = activations(abstract_model(config), config, batch, dtype, run.train_llm,
                        UnfusedAttention)
    kept = saved.kept // tensor
    remat = saved.remat // tensor

    parts = tpu_memory(run, model, sizes, dtype, vae)
    base = sum(parts.values())
    titles = [*parts, "activations", "sum", "--remat", "sum"]
    memory = devices.hardware.memory
    print(f"\n  GB per chip (of {memory / 1e9:.0f}), micro-batch {micro_batch}:\n  "
          + "".join(f"{title:>12}" for title in titles))
    print(table_row([*parts.values(), kept, base + kept, remat, base + remat]) + "   "
          + verdict(memory, base + kept, base + remat))

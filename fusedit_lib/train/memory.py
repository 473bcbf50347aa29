"""Estimates the bytes of a training run that are known before it starts: weights, Adam and so on.

What is kept for the backward pass is counted in costs.py.
"""
import math
import re
from typing import NamedTuple

import torch

import fusedit
from fusedit_lib.train import sharding
from fusedit_lib.train.costs import FusedAttention, PeakBytes, abstract_model, example_inputs
from fusedit_lib.vae import VAE, vae_config

BUCKET = 200_000_000                        # gradients or weights that ZeRO communicates at a time
WHOLE = 100_000                             # ZeRO 3 does not shard tensors up to this size


def count_parameters(module):
    """Number of parameters of a module."""
    return elements(module.parameters())


def elements(parameters, at_most=math.inf):
    """Number of elements of parameters, counting only tensors of up to `at_most` elements."""
    return sum(p.numel() for p in parameters if p.numel() <= at_most)


# ------------------------------------------------------------------------------ memory on GPUs

class ZeroMemory(NamedTuple):
    """Bytes of one rank, without activations. All but the last are on the GPU."""
    weights: float                          # trained weights, in the dtype of the computation
    gradients: float
    adam: float                             # moments and float32 master weights
    ema: float
    frozen: float                           # weights: Gemma's and, with --lora, the DiT's
    buffers: float                          # for weights and gradients that ZeRO communicates
    cpu: float                              # what is offloaded, in CPU memory

    @property
    def gpu(self):
        return sum(self) - self.cpu


def zero_memory(model, zero, world, dtype, ema_offload=False):
    """ZeroMemory of an abstract_model.

    ZeRO stage 1 shards Adam's moments and the float32 master weights, stage 2 also the gradients,
    and stage 3 also the weights, trained and frozen, except for tensors of up to WHOLE elements.
    This was measured with DeepSpeed 0.19, and so was the place of each tensor with "-offload".
    """
    stage = int(zero[0])
    low = dtype.itemsize
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    count = elements(trained)
    bucket = min(BUCKET, count)

    def weight_bytes(parameters):
        if stage < 3 or world == 1:
            return elements(parameters) * low
        return (elements(parameters) / world + elements(parameters, WHOLE)) * low

    # bytes per gradient, including its accumulator
    gradient_bytes = {0: low, 1: 4 + low, 2: 4, 3: 4}[stage]
    gradient_share = 1 / world if stage >= 2 else 1
    adam_tensors = 3                        # two moments and the master weights
    if low == 4 and stage in (0, 3):        # float32 weights need no separate master weights
        adam_tensors = 2
    adam_share = 1 / world if stage >= 1 else 1
    buffers = 0
    if stage >= 2:
        buffers += bucket * low
    if stage == 3 and world > 1:            # weights that are gathered temporarily
        sharded = elements(model.parameters()) - elements(model.parameters(), WHOLE)
        buffers += min(BUCKET, sharded) * low
    memory = ZeroMemory(weights=weight_bytes(trained), frozen=weight_bytes(frozen),
                        gradients=count * gradient_bytes * gradient_share,
                        adam=count * 4 * adam_tensors * adam_share, ema=count * 4 / world,
                        buffers=buffers, cpu=0)
    if zero.endswith("offload"):
        memory = offload_adam(memory, stage, trained, world, low)
    if ema_offload or zero.endswith("offload"):
        memory = memory._replace(ema=0, cpu=memory.cpu + memory.ema)
    return memory


def offload_adam(memory, stage, trained, world, low):
    """ZeroMemory with Adam's state on the CPU. trained: parameters. low: bytes per weight.

    Adam's float32 gradients are on the CPU as well. But in bf16, DeepSpeed 0.19 accumulates
    gradients on the GPU: stage 1 all of them, stage 2 those of this rank. Stage 3 accumulates them
    on the CPU. Stages 1 and 2 have a buffer on both sides for the largest gradient, and one on the
    CPU for the updated weights.
    """
    count = elements(trained)
    largest = max(p.numel() for p in trained) * low
    accumulated = {1: 4 * count, 2: 4 * count / world, 3: 4 * count / world}[stage]
    cpu = 16 * count / world                # moments, master weights and gradients
    gradients = accumulated
    buffers = memory.buffers
    if stage == 3 or (stage == 2 and low == 4):
        cpu += accumulated
        gradients = 0
    if stage == 1:                          # sent in float32
        buffers += 4 * min(BUCKET, count)
    if stage < 3:
        buffers += largest
        cpu += count * low / world + largest
    return memory._replace(gradients=gradients, adam=0, buffers=buffers, cpu=cpu)


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
        on_chip = kind.count * chip(kind.name, kind.shape, sizes)
        if kind.name.startswith("dit."):
            dit += on_chip
        else:
            gemma += on_chip
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


# ------------------------------------------------------------------------------ sampling

class Part(NamedTuple):
    """Bytes that a part of the model takes while it runs without gradients."""
    weights: int
    working: int                            # its inputs, outputs and what it computes on the way

    @property
    def sum(self):
        return self.weights + self.working


class DrawingMemory(NamedTuple):
    """The memory of drawing a batch of images, in which the parts run one after another."""
    gemma: Part
    dit: Part
    vae: Part                               # decodes one image at a time

    @property
    def working(self):
        return max(part.working for part in self)

    @property
    def all(self):
        """Bytes if all parts are in memory at the same time."""
        return sum(part.weights for part in self) + self.working

    @property
    def largest(self):
        """Bytes if only the part that runs is in memory, as with --offload of sample.py."""
        return max(part.sum for part in self)


@torch.no_grad()
def drawing_memory(config, images, dtype, text_tokens=None):
    """DrawingMemory of a batch of images. text_tokens: their number; by default the maximum."""
    model = abstract_model(config).to(dtype)
    x, _, ids, mask, pooled = example_inputs(config, images, dtype, text_tokens)
    weights = list(model.parameters())
    with FusedAttention(), PeakBytes(weights) as gemma:
        text = model.encode_ids(ids, mask, pooled)
        uncond = model.encode_ids(ids, mask, pooled)
    with FusedAttention(), PeakBytes(weights) as dit:
        x, text, uncond = x.clone(), text.map(torch.clone), uncond.map(torch.clone)
        fusedit.sample(model.dit, x, text, uncond, 2, config.guidance, config.shift)
    decoder = Part(0, 0)
    if config.vae:
        decoder = vae_memory(config, VAE.decode, x[:1], dtype)
    return DrawingMemory(Part(count_parameters(model.llm) * dtype.itemsize, gemma.peak),
                         Part(count_parameters(model.dit) * dtype.itemsize, dit.peak), decoder)


@torch.no_grad()
def vae_memory(config, method, x, dtype):
    """The Part of a method of a config's VAE. x: its input, on the meta device."""
    with torch.device("meta"):
        vae = VAE(vae_config(config.vae)).to(dtype)
    with FusedAttention(), PeakBytes(vae.parameters()) as peak:
        method(vae, x.to(dtype).clone())
    return Part(count_parameters(vae) * dtype.itemsize, peak.peak)

"""FLOPs and memory of a model, counted on the meta device, where tensors have no data.

They are counted while the model runs, because formulas could diverge from the code.
"""
import weakref
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fusedit import FuseDiT
from fusedit_lib import gemma_package
from fusedit_lib.files import read_json
from fusedit_lib.lora import add_adapters
from fusedit_lib.folders import resolve
from fusedit_lib.pretrained import gemma_config
from fusedit_lib.train.compiled import each_kind, gpu_layer, tpu_layer
from fusedit_lib.vae import VAE, latent_side, vae_config

# Shapes of Gemma models, so that none has to be downloaded: those in the paper, and the smallest.
_GEMMA_2B = dict(model_type="gemma", vocab_size=256000, hidden_size=2048, intermediate_size=16384,
                 num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1)
_GEMMA2_2B = dict(model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216,
                  num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4)
GEMMAS = {
    "google/gemma-2b": _GEMMA_2B,
    "google/gemma-2b-it": _GEMMA_2B,
    "google/paligemma-3b-pt-448": _GEMMA_2B | dict(vocab_size=257216),
    "google/gemma-2-2b": _GEMMA2_2B,
    gemma_package.NAME: gemma_package.CONFIG,
}


def abstract_model(config):
    """A FuseDiT on the meta device, where its tensors take no memory. config: a FuseDiTConfig."""
    if config.base in GEMMAS:
        shape = GEMMAS[config.base]
    else:
        shape = read_json(resolve(config.base) / "config.json")
    with torch.device("meta"):
        model = FuseDiT(config, gemma_config(shape))
    model.llm.keep_layers(model.last_layer)
    return model


def training_model(run, config):
    """An abstract_model with the adapters of --lora, whose trained parameters require gradients."""
    model = abstract_model(config)
    if run.lora:
        add_adapters(model.dit, run.lora)
    model.llm.requires_grad_(run.train_llm)
    return model


class Inputs(NamedTuple):
    """Inputs of the model, on the meta device."""
    x_t: torch.Tensor                       # [B,C,H,W]
    sigma: torch.Tensor                     # [B]
    ids: torch.Tensor                       # [B,T]
    mask: torch.Tensor                      # [B,T]
    pooled: torch.Tensor | None             # CLIP's pooled vector [B,D], if the model uses it


def example_inputs(config, batch, dtype, text_tokens=None):
    """Inputs of a micro-batch. text_tokens: caption length; by default the maximum."""
    side = latent_side(config)
    if text_tokens is None:
        text_tokens = config.max_text_tokens
    with torch.device("meta"):
        x_t = torch.empty(batch, config.in_channels, side, side)
        ids = torch.empty(batch, text_tokens, dtype=torch.long)
        pooled = None
        if config.text_modulation_embeds_dim:
            pooled = torch.empty(batch, config.text_modulation_embeds_dim, dtype=dtype)
        return Inputs(x_t, torch.empty(batch), ids, ids > 0, pooled)


# ------------------------------------------------------------------------------ FLOPs

class ForwardFlops(NamedTuple):
    """FLOPs for one image."""
    gemma: int                              # forward pass
    dit: int                                # forward pass
    vae: int                                # the encoder; 0 without a VAE


def count_flops(function, *args):
    """Returns (FLOPs of function(*args), its result)."""
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


@torch.no_grad()
def flops(model, config, text_tokens=None):
    """ForwardFlops of an abstract_model. text_tokens: caption length; by default the maximum."""
    x_t, sigma, ids, mask, pooled = example_inputs(config, 1, torch.float32, text_tokens)
    gemma, text = count_flops(model.encode_ids, ids, mask, pooled)
    dit, _ = count_flops(model.dit, x_t, sigma, text)
    encoder = 0
    if config.vae:
        with torch.device("meta"):
            vae = VAE(vae_config(config.vae))
            pixels = torch.empty(1, 3, config.image_size, config.image_size)
        encoder, _ = count_flops(vae.moments, pixels)
    return ForwardFlops(gemma, dit, encoder)


def step_flops(forward, train_llm=False, lora=False):
    """FLOPs of training on one image, from its ForwardFlops.

    A backward pass costs twice as much as the forward pass: once for the gradients of the inputs,
    and once for those of the weights, of which there are nearly none with lora.
    """
    gemma, dit, vae = forward
    if train_llm:
        gemma *= 3
    if lora:
        return gemma + 2 * dit + vae
    return gemma + 3 * dit + vae


class UsefulFlops(NamedTuple):
    """FLOPs of training on one image, as a linear function of the caption length."""
    per_image: float
    per_token: float                        # for each text token


def useful_flops(config, latents, train_llm, lora=False, cache_text=False):
    """UsefulFlops of a FuseDiTConfig, for the model FLOPs utilization (MFU).

    Padding is not counted, and neither is the VAE if latents are read, or Gemma with --cache-text.
    Attention in Gemma, which is quadratic in the caption length, takes less than 1 % and is treated
    as linear.
    """
    model = abstract_model(config)
    longest = config.max_text_tokens

    def cost(text_tokens):
        forward = flops(model, config, text_tokens)
        if latents:
            forward = forward._replace(vae=0)
        if cache_text:
            forward = forward._replace(gemma=0)
        return step_flops(forward, train_llm, lora)
    per_token = (cost(longest) - cost(1)) / (longest - 1)
    return UsefulFlops(cost(1) - per_token, per_token)


# ------------------------------------------------------------------------------ attention

class SavesLikeFused(torch.autograd.Function):
    """Saves the same tensors for the backward pass as a GPU's fused attention.

    These are the inputs, the output and, for each query, the logarithm of the softmax's sum.
    """
    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        logsumexp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out


class FusedAttention(TorchFunctionMode):
    """A context in which attention saves the same tensors as a GPU's fused kernel."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return self.attention(q, k, v)
        return function(*args, **(kwargs or {}))

    def attention(self, q, k, v):
        return SavesLikeFused.apply(q, k, v)


# ------------------------------------------------------------------------------ activations

class Activations(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass."""
    kept: int                               # without --remat
    remat: int                              # with --remat


class SavedTensors:
    """Adds up the bytes of saved tensors. Counts each storage once, and no weights."""

    def __init__(self, model):
        self.weights = {storage_id(p) for p in model.parameters()}
        self.storages = {}                  # id -> tensor; kept so that ids are not reused
        self.bytes = 0

    def add(self, tensor):
        """Count a tensor and return it."""
        key = storage_id(tensor)
        if key not in self.weights and key not in self.storages:
            self.storages[key] = tensor
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def record(self):
        """A context in which all tensors that autograd saves are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


def storage_id(tensor):
    return tensor.untyped_storage()._cdata


class BlockRecorder:
    """While attached, records the inputs of each DiT block and the bytes that it saves."""

    def __init__(self, saved):
        self.saved = saved
        self.inputs = []                    # of each block: (block, its arguments)
        self.bytes = []                     # saved by each block
        self.before = 0
        self.hooks = []

    def attach(self, layers):
        for block in layers:
            self.hooks.append(block.register_forward_pre_hook(self.enter))
            self.hooks.append(block.register_forward_hook(self.leave))

    def detach(self):
        for hook in self.hooks:
            hook.remove()

    def enter(self, block, args):
        self.inputs.append((block, args))
        self.before = self.saved.bytes

    def leave(self, block, args, output):
        self.bytes.append(self.saved.bytes - self.before)


def record_forward(model, config, batch, dtype, train_llm, stacks):
    """Runs a forward pass. Returns (bytes saved outside the layers of stacks, a BlockRecorder).

    The text's keys and values are among these bytes, or in shallow fusion its hidden states and
    what context_embedder makes of them. model: an abstract_model, which is modified.
    stacks: lists of layers.
    """
    model.to(dtype)
    model.llm.requires_grad_(train_llm)
    x_t, sigma, ids, mask, pooled = example_inputs(config, batch, dtype)
    saved = SavedTensors(model)
    blocks = BlockRecorder(saved)
    for layers in stacks:
        blocks.attach(layers)
    if config.fusion == "shallow":
        model.dit.context_embedder.register_forward_hook(lambda module, args, out: saved.add(out))
    with FusedAttention(), saved.record():
        text = model.encode_ids(ids, mask, pooled)
        for tensor in (*text.keys, *text.values, text.hidden):
            if tensor is not None:
                saved.add(tensor)
        model.dit(x_t, sigma, text)
    blocks.detach()
    return saved.bytes - sum(blocks.bytes), blocks


def activations(model, config, batch, dtype, train_llm=False, budget=None):
    """Activations of a micro-batch on a GPU, including the text's keys and values.

    With remat, each block keeps only its input, and one block at a time recomputes the rest.

    model: an abstract_model, which is modified.
    budget: --memory-budget if the blocks are compiled, otherwise None.
    """
    outside, blocks = record_forward(model, config, batch, dtype, train_llm, [model.dit.layers])
    inside = blocks.bytes
    if budget is not None:
        inside = each_kind(partial(gpu_layer, budget=budget), blocks.inputs)
    tokens = (latent_side(config) // config.patch_size) ** 2
    block_input = batch * tokens * model.dit.width * dtype.itemsize
    return Activations(kept=outside + sum(inside),
                       remat=outside + len(inside) * block_input + max(inside))


def tpu_activations(model, config, batch, dtype, train_llm=False):
    """Activations of a micro-batch on TPUs, where the layers are scanned (see scan.py).

    They include what the backward pass of one layer takes. model: an abstract_model, which is
    modified.
    """
    stacks = [model.dit.layers]
    if train_llm:
        stacks.append(model.llm.layers)
    outside, blocks = record_forward(model, config, batch, dtype, train_llm, stacks)
    found = []
    for remat in (False, True):
        layers = each_kind(partial(tpu_layer, remat=remat), blocks.inputs)
        saved = sum(layer.saved for layer in layers)
        found.append(outside + saved + max(layer.backward for layer in layers))
    return Activations(*found)


# ------------------------------------------------------------------------------ without gradients

class PeakBytes(TorchDispatchMode):
    """A context that records the most bytes that tensors created in it take at any moment.

    known: tensors that are not counted, such as weights.
    """
    def __init__(self, known):
        super().__init__()
        self.storages = {storage_id(tensor) for tensor in known}
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return result

    def add(self, storage):
        """Count a storage until it is freed. A view has the storage of another tensor."""
        key = storage._cdata
        if key in self.storages:
            return
        self.storages.add(key)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.remove, key, storage.nbytes())

    def remove(self, key, size):
        self.storages.discard(key)
        self.bytes -= size

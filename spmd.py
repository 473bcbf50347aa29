"""What a mesh of devices takes apart: weights into shards, towers into stacks, and back.

Plain torch, for train_tpu.py: which mesh axis cuts which dimension, a tower as one block with
stacked weights, the step that XLA compiles, how a host names its pieces in a checkpoint, and how
the errors of its data thread are kept.
"""
import contextlib
import copy
import math
import re
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from fusedit import FuseDiTError

AXES = "fsdp", "tensor"                     # of a TPU mesh; the first also shares the batch
RULES = (  # which of them cut a tensor's dimensions: the first that is found in its name
    (r"(q|k|v|gate|up)_proj\.weight", ("tensor", "fsdp")),         # [heads or MLP width, D]
    (r"embed_tokens\.weight", ("tensor", "fsdp")),                 # [vocabulary, D]
    (r"norm\.weight|bias|scale_shift_table", ()),                  # small: whole everywhere
    (r"patch_embed", ("fsdp",)),
    (r"", ("fsdp", "tensor")))              # o_proj and down_proj, [D, heads or MLP width]; others

# ------------------------------------------------------------------------------ which axis

def mesh_shape(text, n):
    """(devices along fsdp, along tensor) of --mesh "64,2", of n in all; -1 fills."""
    found = re.fullmatch(r"(-1|[1-9]\d*)(?:[,x](-1|[1-9]\d*))?", text)
    sizes = [int(s or 1) for s in found.groups()] if found else [-1, -1]
    if sizes.count(-1) == 1 and n % -math.prod(sizes) == 0:
        sizes = [n // -math.prod(sizes) if s == -1 else s for s in sizes]
    if math.prod(sizes) != n or -1 in sizes:
        raise FuseDiTError(f"--mesh {text} does not make up {n} devices: two numbers whose product "
                           f"is {n}, as in {n},1 or -1,1 (-1: all others)")
    return tuple(sizes)


def spec(name, shape, sizes):
    """The mesh axis that cuts each dimension of a tensor, or None; sizes: {axis: devices}.

    One whose dimension does not divide is left out. Weights of a stack have layers first.
    """
    axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
    axes = ((None,) * (".block." in name) + axes + (None,) * 4)[:len(shape)]
    return tuple(a if a and n % sizes[a] == 0 else None for a, n in zip(axes, shape, strict=True))


# ------------------------------------------------------------------------------ which block

class Stack(nn.Module):
    """fusedit.Blocks as one block in a scan, whose weights have a first dimension of layers.

    scan(step, carry, rows) -> carry, outs is JAX's and torch_xla's: carry, out = step(carry, row)
    for each row of rows. shard(t, name="") tells how a block's weight, or x [B,S,D], and its
    gradient lie on the mesh: else a partitioner may cut D of x, as the weights', and not B, and
    have gradients whole on every device.
    """

    def __init__(self, blocks, scan, shard):
        super().__init__()
        kinds = [[(k, v.shape) for k, v in b.named_parameters()] + [
            (k, v) for k, v in vars(b).items() if isinstance(v, (bool, str))] for b in blocks]
        self.n = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(blocks))
        self.scan, self.shard, self.steps, self.block = scan, shard, {}, copy.deepcopy(blocks[0])
        for name, p in list(self.block.named_parameters()):
            rows = [b.get_parameter(name).detach() for b in blocks[:self.n]]
            put(self.block, name, nn.Parameter(torch.stack(rows), p.requires_grad))
        for i in range(self.n, len(blocks)):    # of another kind, as the reader's last layer is
            self.add_module(str(i), blocks[i])

    def forward(self, x, own, shared):
        """As Blocks.forward. What has a gradient is carried along; the rest has a row a layer."""
        k, weights = len(own[0]), dict(self.block.named_parameters())
        args = [c[0] if c[0] is None else torch.stack(c) for c in zip(*own[:self.n])] + [*shared]
        are = {i for i, a in enumerate(args) if torch.is_tensor(a)}
        carried = {i: args[i] for i in are if i >= k and args[i].requires_grad}
        rows = {i: args[i] if i < k else args[i].expand(self.n, *args[i].shape)
                for i in are - carried.keys()}
        fixed = tuple(None if i in are else a for i, a in enumerate(args))
        learns = torch.is_grad_enabled() and any(w.requires_grad for w in weights.values())
        key = fixed, tuple(carried), learns                # scan keeps its graphs by function
        step = self.steps.setdefault(key, partial(self.step, fixed))
        (x, _), outs = self.scan(step, (x, carried), (weights, rows))
        outs = [None] * self.n if outs is None else [*zip(*(o.unbind() for o in outs))]
        for i in range(self.n, min(len(own), self.n + len(self._modules) - 1)):
            x, out = self.get_submodule(str(i))(x, *own[i], *shared)
            outs.append(out)
        return x, outs

    def step(self, fixed, carry, row):
        (x, carried), (weights, rows) = carry, row
        weights = {name: self.shard(w, name) for name, w in weights.items()}
        args = [carried.get(i, rows.get(i, a)) for i, a in enumerate(fixed)]
        x, out = functional_call(self.block, weights, (self.shard(x), *args))
        return (self.shard(x), carried), out


def put(model, name, value):
    """Give a module a parameter of this (dotted) name."""
    where, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(where), leaf, value)


# ------------------------------------------------------------------------------ which step

@contextlib.contextmanager
def lent(model, weights):
    """Within it the model has these weights, {name: tensor}."""
    own = {name: model.get_parameter(name).data for name in weights}
    for name, value in weights.items():
        model.get_parameter(name).data = value
    yield model
    for name, value in own.items():
        model.get_parameter(name).data = value


@torch.no_grad()
def adam_step(adam, state, lr, rate, max_norm):
    """Clip, step and average with no wait for the device; returns the gradients' norm.

    state: (average, weight, exp_avg, exp_avg_sq) of each of adam's parameters, one group of them.
    lr, rate: tensors; the averages move to the new weights by `rate`. A step whose gradient is not
    finite changes nothing.
    """
    weights = [p for _, p, *_ in state if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights], foreach=False)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm, foreach=False)
    changed = [t for _, *rest in state for t in rest] + [adam.state[p]["step"] for p in weights]
    before = [t.clone() for t in changed]
    adam.param_groups[0]["lr"] = lr
    adam.step()
    for new, old in zip(changed, before, strict=True):
        new.copy_(torch.where(norm.isfinite(), new, old))
    for average, p, *_ in state:
        average.lerp_(p, rate)
    adam.zero_grad()
    return norm


# ------------------------------------------------------------------------------ which piece

def stored_names(name, p):
    """Of a parameter, its names in checkpoints: a train_tpu.Stack's has one for each layer."""
    return [name.replace(".block.", f".{i}.") for i in range(len(p))] if ".block." in name else [
        name]


def first_state(saved, name, p):
    """(average, exp_avg, exp_avg_sq) of a parameter to begin with, on the CPU."""
    if not saved:
        return p.detach().cpu(), torch.zeros(p.shape), torch.zeros(p.shape)
    names = stored_names(name, p)
    return tuple(torch.stack([file.get_tensor(stored) for file, stored in (
        where[key + n] for n in names)]).view(p.shape) for where, key in (
            (saved.ema, ""), (saved.state, "exp_avg."), (saved.state, "exp_avg_sq.")))


def pieces(key, name, shards, shape):
    """What is stored of a parameter's shards, [(slices or ..., values)]: {NAME: values} if whole.

    key: before its stored_names. shape: of all of it. Shards that fill a box become one.
    """
    full = tuple(slice(0, n) for n in shape)
    shards = [(full if where is ... else tuple(where), values) for where, values in shards]
    shards = [(where, values[tuple(slice(0, s.stop - s.start) for s in where)])    # no padding
              for where, values in shards]
    box = tuple(slice(min(s.start for s in dim), max(s.stop for s in dim))
                for dim in zip(*(where for where, _ in shards), strict=True))
    sizes = [s.stop - s.start for s in box]
    if len(shards) > 1 and sum(v.numel() for _, v in shards) == math.prod(sizes):
        values = shards[0][1].new_empty(sizes)
        for where, part in shards:
            values[tuple(slice(s.start - b.start, s.stop - b.start)
                         for s, b in zip(where, box, strict=True))] = part
        shards = [(box, values)]
    found = {}
    for where, values in shards:
        if stacked := ".block." in name:    # layers are never cut
            where, shape = where[1:], shape[-len(where) + 1:]
        place = "" if list(values.shape[stacked:]) == list(shape) else "[" + ",".join(
            f"{s.start}:{s.stop}" for s in where) + "]"
        for i, stored in enumerate(stored_names(name, values)):
            found[key + stored + place] = (values[i] if stacked else values).contiguous()
    return found


def until_error(batches, problems):
    """The batches, read by a thread, whose error would be lost: it is appended to `problems`."""
    try:
        yield from batches
    except Exception as e:
        problems.append(e)

"""What a mesh of devices takes apart: weights into shards, towers into stacks, and back.

Plain torch, for train_tpu.py: which mesh axis cuts which dimension, a tower as one block with
stacked weights, the step that XLA compiles, how a host names its pieces in a checkpoint, and how
the errors of its data thread are kept.
"""
import contextlib
import copy
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

# ------------------------------------------------------------------------------ which block

class Stack(nn.Module):
    """fusedit.LayerStack as one block in a scan, whose weights have a first dimension of layers.

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
        """As LayerStack.forward. What has a gradient is carried along; the rest has a row a layer."""
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


def until_error(batches, problems):
    """The batches, read by a thread, whose error would be lost: it is appended to `problems`."""
    try:
        yield from batches
    except Exception as e:
        problems.append(e)

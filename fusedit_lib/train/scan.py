"""A stack of layers as a scan over their weights, which XLA compiles as a loop.

The graph of a scan contains one layer, however many there are. This file is plain PyTorch: the scan
itself, torch_xla's, is given to ScannedStack (see make_scan in xla.py).
"""
import copy
from functools import partial

import torch
import torch._functorch.config as functorch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch.func import functional_call

from fusedit_lib.train.attention import UseSmallAttention


class ScannedStack(nn.ModuleDict):
    """Replaces fusedit.LayerStack: one layer, compiled once and applied in a scan over the weights.

    The weights of all layers are stacked in one layer called "block", with the layer as the first
    dimension. Layers of another kind at the end, such as Gemma's last layer, which only computes
    keys and values, keep their numbers as names and run after the scan.

    scan(step, carry, rows) -> (carry, outputs) is that of torch_xla (and JAX). For each row of
    rows, step(carry, row) returns (carry, output).
    mark(tensor, name) annotates the sharding of a tensor and its gradient, and returns it. The name
    is that of a weight of the layer, "tokens" for its input and output, or NAME.input for the input
    of its module NAME.
    """

    def __init__(self, layers, scan, mark):
        super().__init__()
        self.scan = scan
        self.mark = mark
        self.steps = {}                     # step functions; scan caches a graph for each
        self.count = count_alike(layers)    # number of layers in the scan
        self["block"] = stack_layers(layers[:self.count])
        for i in range(self.count, len(layers)):
            self[str(i)] = layers[i]
        for name, module in self["block"].named_modules():
            # The sharding of a weight would otherwise spread to its inputs, which are kept for the
            # backward pass.
            if name.endswith(("o_proj", "down_proj")):
                module.register_forward_pre_hook(partial(mark_input, mark, f"{name}.input"))

    def forward(self, x, per_layer, common):
        """The same as fusedit.LayerStack.forward. Returns (x, output of each layer).

        A scan computes gradients of its carry and its rows only, so inputs with a gradient that
        are the same for all layers are carried from layer to layer. They may be common inputs, or
        in the tuples of all layers, as the text of shallow fusion. All other tensors are rows, one
        per layer.
        """
        inputs = list(zip(*per_layer[:self.count], strict=True)) + [(value,) for value in common]
        rows, carried, constants = {}, {}, {}
        for i, values in enumerate(inputs):
            value = values[0]
            if not torch.is_tensor(value):
                constants[i] = value
            elif any(other is not value for other in values):
                rows[i] = torch.stack(values)
            elif value.requires_grad:
                carried[i] = value
            else:
                rows[i] = value.expand(self.count, *value.shape)

        weights = dict(self["block"].named_parameters())
        step = self.step_function(weights, carried, constants)
        with UseSmallAttention():
            (x, _), outputs = self.scan(step, (x, carried), (weights, rows))
            outputs = unstack_outputs(outputs, self.count)

            for i in range(self.count, min(len(per_layer), self.count + len(self) - 1)):
                x, output = self[str(i)](x, *per_layer[i], *common)
                outputs.append(output)
        return x, outputs

    def step_function(self, weights, carried, constants):
        """The function that scan applies. It is the same object for calls of the same kind."""
        trains = torch.is_grad_enabled() and any(w.requires_grad for w in weights.values())
        key = (tuple(constants.items()), tuple(carried), trains)
        if key not in self.steps:
            self.steps[key] = partial(self.step, constants)
        return self.steps[key]

    def step(self, constants, carry, row):
        """Applies one layer: ((x, carried), (weights, rows)) -> ((x, carried), output)."""
        x, carried = carry
        weights, rows = row
        weights = {name: self.mark(weight, name) for name, weight in weights.items()}
        inputs = constants | carried | rows
        args = [inputs[i] for i in sorted(inputs)]
        x, output = functional_call(self["block"], weights, (self.mark(x, "tokens"), *args))
        return (self.mark(x, "tokens"), carried), output


def mark_input(mark, name, module, args):
    """A forward pre-hook of a module with one argument, which it annotates."""
    return (mark(args[0], name),)


def partition_scanned(remat, joint, inputs, **options):
    """Divides the graph of a layer's forward and backward pass into the two that a scan runs.

    All that is cheap is recomputed in the backward pass: everything but matrix products, and with
    remat these as well. By default, inputs of matrix products would be kept, such as the MLP's
    product and float32 copies of q and k, and so would the results of operations that the
    partitioner does not know, such as those of ScannedStack's `mark`.
    """
    with functorch.patch(activation_memory_budget=0 if remat else 1,
                         ban_recompute_materialized_backward=False,
                         ban_recompute_not_in_allowlist=False):
        return min_cut_rematerialization_partition(joint, inputs, **options)


def count_alike(layers):
    """The number of layers at the beginning that are of the same kind."""
    kinds = [layer_kind(layer) for layer in layers]
    count = 1
    while count < len(kinds) and kinds[count] == kinds[0]:
        count += 1
    return count


def layer_kind(layer):
    """The properties that layers in a scan must share: names and shapes of weights, and options."""
    shapes = [(name, weight.shape) for name, weight in layer.named_parameters()]
    choices = [(key, value) for key, value in vars(layer).items() if isinstance(value, bool | str)]
    return shapes + choices


def stack_layers(layers):
    """One layer that holds the weights of all layers, stacked along a new first dimension."""
    stacked = copy.deepcopy(layers[0])
    for name, weight in list(stacked.named_parameters()):
        rows = [layer.get_parameter(name).detach() for layer in layers]
        set_parameter(stacked, name, nn.Parameter(torch.stack(rows), weight.requires_grad))
    return stacked


def unstack_outputs(outputs, count):
    """Unstacks scan's outputs into a list with a tuple or None for each of `count` layers."""
    if outputs is None:
        return [None] * count
    return list(zip(*(output.unbind() for output in outputs), strict=True))


def set_parameter(model, name, parameter):
    """Replaces the parameter with this dotted name in a module."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)

"""The memory of compiled layers: for the backward pass, and while the backward pass runs.

Both come from PyTorch's own partitioner, which torch.compile and scan on TPUs use. It divides the
graph of a layer's forward and backward pass into two, and recomputes in the backward pass what
costs less to compute than to read from memory. The tensors are fake and take no memory.
"""
from functools import partial
from typing import NamedTuple

import torch
import torch._functorch.config as functorch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusedit_lib.train.attention import UseSmallAttention
from fusedit_lib.train.scan import partition_scanned


class Graphs(NamedTuple):
    """The graphs of a layer."""
    forward: torch.fx.GraphModule           # its outputs: those of the layer, then what it saves
    backward: torch.fx.GraphModule          # its inputs: what was saved, then gradients
    outputs: int                            # the number of the layer's outputs


class LayerBytes(NamedTuple):
    saved: int                              # by the forward pass, including the layer's input
    backward: int                           # in addition, at most, while its backward pass runs


def gpu_layer(layer, args, budget):
    """The bytes that torch.compile saves for a layer's backward pass, including its input.

    args: tensors of any kind with the shapes of its arguments. budget: --memory-budget.
    """
    from torch._inductor.decomposition import select_decomp_table
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), functorch.patch(activation_memory_budget=budget):
        graphs = partition(layer, args, min_cut_rematerialization_partition, select_decomp_table())
    return sum(saved_bytes(graphs).values())


def tpu_layer(layer, args, remat):
    """The LayerBytes of a layer in a scan on a TPU (see ScannedStack)."""
    with UseSmallAttention():
        graphs = partition(layer, args, partial(partition_scanned, remat))
    saved = saved_bytes(graphs)
    low = next(layer.parameters()).dtype
    for node in graphs.backward.graph.find_nodes(op="placeholder"):
        # A TPU multiplies float32 in bf16 unless all else is float32 too, so XLA keeps in bf16 what
        # is only multiplied.
        key = storage_id(node)
        if key in saved and low != torch.float32 and is_only_multiplied(node):
            elements = node.meta["val"].untyped_storage().nbytes() // node.meta["val"].itemsize
            saved[key] = elements * low.itemsize
    return LayerBytes(sum(saved.values()), peak_bytes(graphs.backward))


def each_kind(function, calls):
    """[function(layer, arguments)] of [(layer, arguments)], computed once for each kind of call."""
    known = {}
    results = []
    for layer, args in calls:
        leaves, _ = tree_flatten(args)
        kinds = [leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        kinds += [parameter.shape for parameter in layer.parameters()]
        if tuple(kinds) not in known:
            known[tuple(kinds)] = function(layer, args)
        results.append(known[tuple(kinds)])
    return results


def partition(layer, args, partitioner, decompositions=None):
    """The Graphs of a layer, as divided by a partitioner."""
    parameters = dict(layer.named_parameters())
    leaves, structure = tree_flatten((args, parameters))
    leaves = fake_tensors(leaves)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    found = []

    def run(*tensors):
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        filled_args, weights = tree_unflatten(filled, structure)
        return torch.func.functional_call(layer, weights, filled_args)

    def divide(joint, inputs, **options):
        # weights are in memory in any case
        count = len(places)
        options["static_lifetime_input_indices"] = list(range(count - len(parameters), count))
        graphs = partitioner(joint, inputs, **options)
        found.append(Graphs(*graphs, options["num_fwd_outputs"]))
        return graphs

    def keep(graph, _):
        return graph

    aot_function(run, keep, keep, divide, decompositions)(*[leaves[i] for i in places])
    return found[0]


def fake_tensors(leaves):
    """The leaves with each tensor replaced by a fake CPU tensor, which takes no memory.

    The compiler keeps attention as one operation for fake tensors, but not for meta tensors.
    """
    fake = []
    with FakeTensorMode(allow_non_fake_inputs=True):    # constants in the layer
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                leaf = torch.empty(leaf.shape, dtype=leaf.dtype, requires_grad=leaf.requires_grad)
            fake.append(leaf)
    return fake


def storage_id(node):
    """The storage of a node's value, or None if the value is not a tensor."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.untyped_storage()._cdata
    return None


def storage_bytes(node):
    return node.meta["val"].untyped_storage().nbytes()


def saved_bytes(graphs):
    """{storage: bytes} of what the forward graph saves for the backward pass.

    The first input, that of the layer, is counted if it is saved. Other inputs, such as weights and
    text keys, are not, because they are kept elsewhere.
    """
    (output,) = graphs.forward.graph.find_nodes(op="output")
    saved = output.args[0][graphs.outputs:]
    _, *other_inputs = graphs.forward.graph.find_nodes(op="placeholder")
    others = [storage_id(node) for node in other_inputs]
    sizes = {}
    for node in saved:
        key = storage_id(node)
        if key is not None and key not in others:
            sizes[key] = storage_bytes(node)
    return sizes


def is_only_multiplied(node):
    """True if matrix products are all that a value of a graph is used for."""
    aten = torch.ops.aten
    for user in node.users:
        is_view = storage_id(user) == storage_id(node)
        if user.target not in (aten.mm.default, aten.bmm.default):
            if not (is_view and is_only_multiplied(user)):
                return False
    return True


def peak_bytes(graph):
    """The most bytes that the values of a graph take at any moment, without its inputs."""
    nodes = list(graph.graph.nodes)
    last_use = {}                           # storage -> the last node that uses it
    for node in nodes:
        for used in (node, *node.all_input_nodes):
            last_use[storage_id(used)] = node
    known = {storage_id(node) for node in graph.graph.find_nodes(op="placeholder")} | {None}
    live = {}                               # storage -> bytes
    peak = 0
    for node in nodes:
        key = storage_id(node)
        if key not in known:
            live[key] = storage_bytes(node)
            peak = max(peak, sum(live.values()))
        for used in (node, *node.all_input_nodes):
            if last_use[storage_id(used)] is node:
                live.pop(storage_id(used), None)
    return peak

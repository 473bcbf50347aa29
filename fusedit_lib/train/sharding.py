"""Sharding of tensors on a mesh of devices, and the names of shards in checkpoints.

The mesh has two axes. The axis "fsdp" shards the batch and all large tensors. The axis "tensor"
shards the attention heads and the width of the MLP. RULES maps the name of a tensor to the axis
that shards each of its dimensions.

This file is plain Python and PyTorch. train/xla.py applies the rules, and train/plan.py uses them
to compute the memory of a device.
"""
import math
import re
from functools import partial
from typing import NamedTuple

import torch

from fusedit import FuseDiTError

AXES = ("fsdp", "tensor")

# The axis that shards each dimension of a tensor. The first pattern that matches its name applies.
RULES = (
    (r"(q|k|v|gate|up)_proj\.weight", ("tensor", "fsdp")),      # [heads or MLP width, D]
    (r"(o|down)_proj\.input", ("fsdp", None, "tensor")),        # [B,S,heads or MLP width]
    (r"^tokens$", ("fsdp",)),                                   # [B,S,D], between two blocks
    (r"norm\.weight|bias|scale_shift_table|text_mix", ()),      # small: replicated
    (r"patch_embed", ("fsdp",)),                                # [D, channels, P, P]
    (r"", ("fsdp", "tensor")),                                  # o_proj, down_proj and all others
)

# The first rules for a mesh with one device along "tensor". The heads and the width of the MLP are
# wider than D: a device's part of them fills the tiles of a TPU's memory, so that gathering the
# weights does not move padding. And a device that has all tokens' parts of D looks up the tokens of
# the whole batch without a sum over all devices. (docs/tpu.md has the compiler's figures.)
ONE_AXIS_RULES = (
    (r"(q|k|v|gate|up)_proj\.weight", ("fsdp",)),
    (r"(o|down)_proj\.weight|embed_tokens", (None, "fsdp")),
)

# A scanned stack of layers (train/scan.py) keeps the weights of all its layers in one tensor. The
# first dimension is the layer, and the name has this in place of the layer number.
STACKED = ".block."


# ------------------------------------------------------------------------------ mesh and rules

def mesh_shape(text, devices):
    """Parses --mesh for a number of devices.

    text: "64,2" or "64x2". -1 stands for all remaining devices, and "64" means "64,1".
    Returns (devices along fsdp, devices along tensor). Raises FuseDiTError if their product is not
    the number of devices.
    """
    sizes = [-1, -1]                        # refused below
    match = re.fullmatch(r"(-1|[1-9]\d*)(?:[,x](-1|[1-9]\d*))?", text)
    if match:
        sizes = [int(match[1]), int(match[2] or 1)]

    if sizes.count(-1) == 1:
        known = -math.prod(sizes)
        if devices % known == 0:
            sizes[sizes.index(-1)] = devices // known

    if -1 in sizes or math.prod(sizes) != devices:
        raise FuseDiTError(f"--mesh {text} does not match {devices} devices: give two numbers with "
                           f"product {devices}, such as {devices},1 or -1,1 (-1: the remaining "
                           "devices)")
    return tuple(sizes)


def partition_spec(name, shape, sizes):
    """The mesh axis that shards each dimension of a tensor, or None where it is not sharded.

    sizes: {axis: devices along it}. A dimension that is not divisible by its axis is not sharded,
    and neither is the layer dimension of a stacked weight.
    """
    rules = RULES
    if sizes["tensor"] == 1:
        rules = ONE_AXIS_RULES + RULES
    wanted = next(axes for pattern, axes in rules if re.search(pattern, name))
    if STACKED in name:
        wanted = (None, *wanted)

    spec = [None] * len(shape)
    for dim, axis in enumerate(wanted[:len(shape)]):
        if axis is not None and shape[dim] % sizes[axis] == 0:
            spec[dim] = axis
    return tuple(spec)


# ------------------------------------------------------------------------------ checkpoints

class ParameterState(NamedTuple):
    """The float32 training state of one parameter: tensors, or a list of Shards for each."""
    ema: torch.Tensor                       # exponential moving average of the weight
    weight: torch.Tensor
    exp_avg: torch.Tensor                   # AdamW's first moment
    exp_avg_sq: torch.Tensor                # AdamW's second moment


class Shard(NamedTuple):
    """A part of a tensor."""
    slices: tuple                           # location: one slice per dimension
    values: torch.Tensor


def stored_names(name, tensor):
    """A parameter's names in checkpoints: one, or one per layer for a stacked weight."""
    if STACKED not in name:
        return [name]
    return [name.replace(STACKED, f".{layer}.") for layer in range(len(tensor))]


def device_slices(name, shape, sizes, device):
    """The part of a tensor that a device of the mesh holds, as one slice per dimension.

    sizes: {axis: devices along it}. device: its number in the mesh, where the neighbour along the
    last axis has the next number. The devices of a host need not have consecutive numbers.
    """
    place = {}                              # position along each axis
    for axis in reversed(AXES):
        device, place[axis] = divmod(device, sizes[axis])

    slices = []
    for size, axis in zip(shape, partition_spec(name, shape, sizes), strict=True):
        start = 0
        if axis is not None:
            size //= sizes[axis]
            start = place[axis] * size
        slices.append(slice(start, start + size))
    return tuple(slices)


def read_shards(tensors, prefix, name, parameter, places):
    """Reads parts of a parameter from disk. Returns a Shard for each of its places.

    tensors: stored tensors, in the form of files.open_tensors, by the names in a checkpoint.
    prefix: of these names, such as "exp_avg.".
    places: the slices of each device; what several devices hold is read once.

    Nothing else is read, except that the disk delivers whole pages: in a tensor whose columns are
    cut, the rest of a row may come with its part.
    """
    stored = [tensors[prefix + stored_name] for stored_name in stored_names(name, parameter)]
    read = {}                               # {location: values}
    for slices in places:
        where = location(slices, parameter.shape)
        if where not in read:
            read[where] = read_part(stored, slices, STACKED in name).to(parameter.dtype)
    return [Shard(slices, read[location(slices, parameter.shape)]) for slices in places]


def read_part(stored, slices, is_stacked):
    """Reads a part of a tensor, or of the tensors of all layers, stacked."""
    if not is_stacked:
        file, key = stored[0]
        return file.get_slice(key)[slices].contiguous()
    return torch.stack([file.get_slice(key)[slices[1:]] for file, key in stored[slices[0]]])


def initial_state(weights, checkpoint, name, parameter, places):
    """The initial ParameterState of a parameter. Each field is a list of a Shard for each place.

    weights: the stored tensors of all weights, in the form of files.open_tensors.
    checkpoint: a Checkpoint, or None for a new run, whose EMA starts at the weight and whose
    moments start at zero.
    """
    weight = read_shards(weights, "", name, parameter, places)
    if checkpoint is None:
        zeros = [Shard(shard.slices, torch.zeros(shard.values.shape)) for shard in weight]
        return ParameterState(ema=weight, weight=weight, exp_avg=zeros, exp_avg_sq=zeros)
    return ParameterState(
        ema=read_shards(checkpoint.ema, "", name, parameter, places), weight=weight,
        exp_avg=read_shards(checkpoint.state, "exp_avg.", name, parameter, places),
        exp_avg_sq=read_shards(checkpoint.state, "exp_avg_sq.", name, parameter, places))


def slices_to_store(prefix, name, shards, shape):
    """The part of a parameter that a host writes, as {name in the checkpoint: values}.

    shards: the (slices, values) on this host's devices, as torch_xla lists them: slices may be
        Ellipsis for a whole tensor, and values may be padded at the end.
    shape: the shape of the whole parameter.
    prefix: a prefix for every name, such as "exp_avg.".

    Neighbouring shards are joined. A piece of a tensor is stored under a name that includes its
    location, as in "dit.proj_out.weight[0:8,0:512]". files.open_tensors reads such pieces as one
    tensor.
    """
    shards = [without_padding(slices, values, shape) for slices, values in shards]
    if len(shards) > 1:
        shards = join(shards)

    stored = {}
    for shard in shards:
        if STACKED not in name:
            key = prefix + name + location(shard.slices, shape)
            stored[key] = shard.values.contiguous()
            continue
        # A stacked weight is stored layer by layer. Its layer dimension is never sharded.
        suffix = location(shard.slices[1:], shape[1:])
        for layer_name, values in zip(stored_names(name, shard.values), shard.values, strict=True):
            stored[prefix + layer_name + suffix] = values.contiguous()
    return stored


def without_padding(slices, values, shape):
    """A Shard whose values are cut to the size of its slices."""
    if slices is ...:
        slices = [slice(0, size) for size in shape]
    sizes = [s.stop - s.start for s in slices]
    kept = tuple(slice(0, size) for size in sizes)
    return Shard(tuple(slices), values[kept])


def join(shards):
    """Joins neighbouring shards into larger boxes. Returns the boxes, as Shards."""
    for dim in reversed(range(len(shards[0].slices))):
        boxes = []
        for shard in sorted(shards, key=partial(starts, dim)):
            if boxes and follows(dim, boxes[-1], shard):
                slices = list(shard.slices)
                slices[dim] = slice(boxes[-1].slices[dim].start, slices[dim].stop)
                values = torch.cat([boxes.pop().values, shard.values], dim)
                shard = Shard(tuple(slices), values)
            boxes.append(shard)
        shards = boxes
    return shards


def starts(dim, shard):
    """Where a shard starts in each dimension, with `dim` last."""
    found = [s.start for s in shard.slices]
    return [*found[:dim], *found[dim + 1:], found[dim]]


def follows(dim, first, second):
    """Returns True if the second shard begins where the first one ends, in this dimension only."""
    pairs = list(zip(first.slices, second.slices, strict=True))
    a, b = pairs.pop(dim)
    return a.stop == b.start and all(a == b for a, b in pairs)


def location(slices, shape):
    """The suffix of a stored name with the location of a piece; empty for a whole tensor."""
    whole = all(s.start == 0 and s.stop == size for s, size in zip(slices, shape, strict=True))
    if whole:
        return ""
    return "[" + ",".join(f"{s.start}:{s.stop}" for s in slices) + "]"

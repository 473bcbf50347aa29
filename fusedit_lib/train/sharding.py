"""TODO."""
import math
import re

import torch

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

"""Reads the text of an HLO module that libtpu has optimised: its collectives and its cycles.

Text such as this is divided into computations, which are called by others:

    %fused_computation.3 (param_0: bf16[36,9216]) -> bf16[2304,9216] {
      %param_0 = bf16[36,9216]{1,0:T(8,128)(2,1)} parameter(0)
      ROOT %all-gather.1 = bf16[2304,9216]{1,0:T(8,128)(2,1)} all-gather(%param_0), ...
    }

{1,0:T(8,128)(2,1)} is a layout: the dimensions from minor to major, and the tile. The two minor
dimensions are padded to multiples of 8 and 128.
"""
import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = dict(pred=8, s4=4, u4=4, s8=8, u8=8, s16=16, u16=16, bf16=16, f16=16, s32=32, u32=32, f32=32,
            s64=64, u64=64, f64=64)

HEADER = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%\S+)")


# ---------------------------------------------------------------------------- text
class Instruction(NamedTuple):
    """A line of a computation."""
    name: str
    type: str                               # of its result, with layouts
    opcode: str
    rest: str                               # operands and attributes
    is_root: bool

    @property
    def operands(self):
        """The names of its operands."""
        return re.findall(r"%([^\s,()]+)", self.rest.partition(")")[0])

    def attribute(self, name):
        """The name of the computation that an attribute such as body refers to."""
        return re.search(rf"\b{name}=%([^\s,]+)", self.rest)[1]

    @property
    def called(self):
        """The names of all computations that it calls."""
        return re.findall(r"%([^\s,}]+)", " ".join(CALLS.findall(self.rest)))


def parse(text):
    """({name of a computation: {name: Instruction}}, the name of the entry computation)."""
    computations = {}
    entry = None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = computations[header[1]] = {}
            if line.startswith("ENTRY"):
                entry = header[1]
            continue
        match = INSTRUCTION.match(line)
        if match:
            root, name, kind, opcode, rest = match.groups()
            current[name] = Instruction(name, kind, opcode, rest, bool(root))
    return computations, entry


# ---------------------------------------------------------------------------- how often it runs
def runs(computations, entry):
    """{name of a computation: how often it runs}. Loops count as often as their body runs."""
    callers = defaultdict(list)             # computation -> [(caller, times)]
    for name, instructions in computations.items():
        for instruction in instructions.values():
            for called in instruction.called:
                times = 1
                if instruction.opcode == "while" and called == instruction.attribute("body"):
                    times = trip_count(computations, instruction)
                callers[called].append((name, times))

    known = {entry: 1}

    def count(name):
        if name not in known:
            known[name] = sum(times * count(caller) for caller, times in callers[name])
        return known[name]
    return {name: count(name) for name in computations}


def trip_count(computations, loop):
    """The number of times a while loop runs.

    Its counter must start at 0 and have a constant limit and a constant step; otherwise this raises
    ValueError.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])

    condition = computations[loop.attribute("condition")]
    body = computations[loop.attribute("body")]
    (root,) = [i for i in body.values() if i.is_root]
    counts = []
    for compare in condition.values():
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            continue
        counter, limit = [condition[name] for name in compare.operands]
        if counter.opcode == "get-tuple-element" and limit.opcode == "constant":
            index = int(re.search(r"index=(\d+)", counter.rest)[1])
            step = constant_step(body, body[root.operands[index]])
            counts.append(math.ceil(constant(limit) / step))
    if len(counts) != 1:
        raise ValueError(f"cannot tell how often {loop.name} runs, from {counts}")
    return counts[0]


def constant(instruction):
    """The value of a constant."""
    return int(instruction.rest.partition(")")[0])


def constant_step(body, update):
    """The constant that a loop's body adds to a counter. update: the counter's new value."""
    while update.opcode == "copy":
        update = body[update.operands[0]]
    steps = [constant(body[name]) for name in update.operands if body[name].opcode == "constant"]
    if update.opcode != "add" or len(steps) != 1:
        raise ValueError(f"{update.name} does not add a constant to a counter")
    return steps[0]


# ---------------------------------------------------------------------------- sizes
class Size(NamedTuple):
    """Bytes of an array."""
    dense: int
    padded: int                             # in memory, with the padding of its tiles


def array_size(dtype, dimensions, order="", tiles=""):
    """The Size of an array, from the parts of its type: see ARRAY."""
    sizes = [int(size) for size in dimensions.split(",") if size]
    dense = math.prod(sizes)
    in_order = sizes
    if order:
        in_order = [sizes[int(dim)] for dim in reversed(order.split(","))]     # major to minor
    tile = re.match(r"T\(([\d,]+)\)", tiles or "")
    if tile and in_order:
        tile = [int(size) for size in tile[1].split(",")]
        minor = in_order[-len(tile):]
        kept = tile[-len(minor):]
        rounded = [math.ceil(a / b) * b for a, b in zip(minor, kept, strict=True)]
        in_order = in_order[:-len(tile)] + rounded
    bits = BITS[dtype]
    return Size(dense * bits // 8, math.prod(in_order) * bits // 8)


def type_size(text):
    """The total Size of the arrays in a type."""
    sizes = [array_size(*match.groups()) for match in ARRAY.finditer(text)]
    return Size(sum(size.dense for size in sizes), sum(size.padded for size in sizes))


# ---------------------------------------------------------------------------- collectives
class Collective(NamedTuple):
    """A collective operation. Sizes are those of the whole arrays, before or after the exchange."""
    kind: str                               # one of KINDS
    type: str                               # the type of its larger side
    size: Size
    group: int                              # number of chips that take part
    runs: int                               # how often it runs in a step
    source: str                             # op_name, which names the operation before partitioning

    @property
    def sent(self):
        """Bytes that each chip sends in a step, if the chips form a ring."""
        passes = {"all-reduce": 2, "collective-permute": self.group / (self.group - 1)}
        share = (self.group - 1) / self.group * passes.get(self.kind, 1)
        return share * self.size.padded * self.runs


def collectives(computations, counts, chips):
    """The Collectives of a program. counts: from runs(). chips: number of all chips.

    The compiler divides an asynchronous collective into parts with the same channel_id, which count
    as one. It also joins an all-reduce and the slices of its result in a computation named
    all-reduce-scatter, which is a reduce-scatter.
    """
    found = {}
    for name, instructions in computations.items():
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not counts[name]:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel[1] if channel else instruction.name
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            kind_text = larger_side(instruction, instructions)
            found[key] = Collective(kind, kind_text, type_size(kind_text),
                                    group_size(instruction, chips), counts[name],
                                    source[1] if source else "")
    return list(found.values())


def larger_side(instruction, computation):
    """The type of a collective's operands or of its result, whichever is larger.

    The result of an operation named -start also contains the operands.
    """
    operands = ", ".join(computation[name].type for name in instruction.operands)
    sides = [operands, instruction.type]
    if instruction.opcode.endswith("-start"):
        arrays = [match[0] for match in ARRAY.finditer(instruction.type)]
        sides = [operands, max(arrays, key=type_size)]
    return max(sides, key=type_size)


def group_size(instruction, chips):
    """The number of chips in a group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.rest)
    computed = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest)
    if listed:
        return listed[1].count(",") + 1
    if computed:
        return int(computed[1])
    return chips


# ---------------------------------------------------------------------------- FLOPs and cycles
class Work(NamedTuple):
    """The work of one chip in a step."""
    flops: int                              # of matrix products and convolutions
    cycles: int                             # the compiler's estimate, without waiting for others


def work(computations, counts):
    """The Work of a program. counts: from runs()."""
    flops = 0
    cycles = 0
    for name, instructions in computations.items():
        for instruction in instructions.values():
            if instruction.opcode == "convolution":
                flops += counts[name] * convolution_flops(instruction, instructions)
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if estimate:
                cycles += counts[name] * int(estimate[1])
    return Work(flops, cycles)


def convolution_flops(convolution, computation):
    """FLOPs of a convolution, as which libtpu writes every matrix product.

    A batch of products is a convolution over the batch in which most of the input is padding.
    Multiplications with padding are not counted.
    """
    sides = [dimensions(computation[name].type) for name in convolution.operands]
    sides.append(dimensions(convolution.type))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest).groups()
    image, kernel, result = [dict(zip(names, sizes, strict=True))
                             for names, sizes in zip(labels, sides, strict=True)]
    flops = 2 * result["b"] * result["f"] * kernel["i"]
    for axis in (name for name in kernel if name.isdigit()):
        window = window_of(convolution, int(axis))
        flops *= products(image[axis], kernel[axis], result[axis], **window)
    return flops


def dimensions(text):
    """The sizes of the dimensions of a type that is one array."""
    return [int(size) for size in ARRAY.search(text)[2].split(",")]


def window_of(convolution, axis):
    """{"stride", "pad", "lhs_dilate", "rhs_dilate": number} of an axis of a convolution's window.

    pad: only that before the first element.
    """
    values = dict(stride="1", pad="0_0", lhs_dilate="1", rhs_dilate="1")
    text = re.search(r"window=\{([^}]*)\}", convolution.rest)[1]
    for name, per_axis in re.findall(r"(\w+)=(\S+)", text):
        if name in values:
            values[name] = per_axis.split("x")[axis]
    values["pad"] = values["pad"].partition("_")[0]
    return {name: int(value) for name, value in values.items()}


def products(image, kernel, result, stride, pad, lhs_dilate, rhs_dilate):
    """The number of products of an element of the image and one of the kernel, along one axis."""
    count = 0
    for i in range(result):
        for k in range(kernel):
            place = i * stride + k * rhs_dilate - pad
            count += place % lhs_dilate == 0 and 0 <= place // lhs_dilate < image
    return count

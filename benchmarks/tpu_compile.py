"""Compiles the training step for TPUs, on a machine that has none, and prints what it takes.

    python benchmarks/tpu_compile.py v5e:8x8 --layers 2 --batch 128         3 minutes, two CPU cores
    python benchmarks/tpu_compile.py v4:4x4x4 --batch 512 --remat           all 26 layers

libtpu contains the compiler for every kind of TPU, and it needs no chip. tpu_trace.py writes the
program of train_tpu.py's training step; this program compiles it for the chips of a topology and
reads memory, FLOPs and collectives from the result. Nothing is run, so no time is measured.

"arrays" are the bytes of what a collective gathers or sums, "padded" the same in the tiles of a
TPU's memory, and "sent" what a chip sends if the chips form a ring, which is all of an array once,
or twice for an all-reduce. Loops count as often as they run.

It needs the extras [tpu,compile], which install PyTorch/XLA, libtpu and JAX.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hlo
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from fusedit import FuseDiTError
from fusedit_lib import cli
from fusedit_lib.files import atomic_write
from fusedit_lib.train.flags import join_mesh
from fusedit_lib.train.hardware import TPUS

HERE = Path(__file__).parent
PLACEHOLDER = "fusedit_placeholder"         # as in tpu_trace.py
DATA = "fusedit_placeholder_data"
CLOCKS = dict(v4=1.05e9, v5e=1.5e9)       # Hz


# ---------------------------------------------------------------------------- the program
def to_module(proto):
    """A StableHLO module of the bytes of an HLO module from tpu_trace.py, as bytes.

    The weights become parameters, and those that the program updates are donated, as torch_xla does
    it in a real run.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    computation = xla_client.XlaComputation(proto)
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        main = ir.SymbolTable(module.operation)["main"]
        block = main.regions[0].blocks[0]
        attributes = list(main.attributes["arg_attrs"])
        weights = []                        # their numbers among the parameters
        for op in list(block.operations):
            if call_target(op).startswith(PLACEHOLDER):
                added = to_parameter(op, block)
                if added and not call_target(op).startswith(DATA):
                    weights.append(len(attributes))
                attributes += added
        outputs = trim_outputs(block)
        donate_updated(block, attributes, weights, outputs)

        inputs = [argument.type for argument in block.arguments]
        results = [value.type for value in outputs]
        main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, results))
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
        if "res_attrs" in main.attributes:
            del main.attributes["res_attrs"]
        module.operation.verify()
        return mlir.module_to_bytecode(module)


def call_target(op):
    """The target of a custom call, and "" of any other operation."""
    if op.operation.name != "stablehlo.custom_call":
        return ""
    target = op.attributes["call_target_name"]
    return target.value


def to_parameter(op, block):
    """Replaces a placeholder by a new parameter. Returns a list of the parameter's attributes.

    Its sharding is that of the operation after it. The list is empty if nothing uses it.
    """
    from jax._src.lib.mlir import ir
    users = [use.owner for use in op.results[0].uses]
    attributes = {}
    if users and call_target(users[0]) == "Sharding":
        (annotation,) = users
        attributes["mhlo.sharding"] = annotation.attributes["mhlo.sharding"]
        users = [use.owner for use in annotation.results[0].uses]
        annotation.results[0].replace_all_uses_with(op.results[0])
    if all(user.operation.name == "func.return" for user in users):
        return []
    parameter = block.add_argument(op.results[0].type, ir.Location.unknown())
    op.results[0].replace_all_uses_with(parameter)
    return [ir.DictAttr.get(attributes)]


def trim_outputs(block):
    """Leaves out outputs that are parameters or placeholders, and copies. Returns the rest."""
    from jax._src.lib.mlir import ir
    returned = list(block.operations)[-1]
    outputs = []
    for value in returned.operands:
        is_parameter = ir.BlockArgument.isinstance(value)
        if is_parameter or value in outputs or call_target(value.owner).startswith(PLACEHOLDER):
            continue
        outputs.append(value)
    ir.Operation.create("func.return", operands=outputs, ip=ir.InsertionPoint(returned))
    returned.operation.erase()
    for op in reversed(list(block.operations)):
        unused = not any(any(result.uses) for result in op.results)
        if unused and (call_target(op) == "Sharding" or call_target(op).startswith(PLACEHOLDER)):
            op.operation.erase()
    return outputs


def donate_updated(block, attributes, weights, outputs):
    """Marks the weights that the program updates. Each update has the type of its weight."""
    from jax._src.lib.mlir import ir
    updates = Counter(str(value.type) for value in outputs)
    for i in weights:
        kind = str(block.arguments[i].type)
        if updates[kind] > 0:
            updates[kind] -= 1
            old = {named.name: named.attr for named in attributes[i]}
            attributes[i] = ir.DictAttr.get(old | {"jax.buffer_donor": ir.BoolAttr.get(True)})


# ---------------------------------------------------------------------------- compiling
def compile_for(topology, proto, devices):
    """The compiled program. topology: its name, such as v5e:8x8. proto: from tpu_trace.py."""
    from jax._src import compiler
    from jax._src.lib import xla_client
    from jax.experimental import topologies
    options = {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"           # a chip's two cores act as one device
    description = topologies.get_topology_desc(topology, "tpu", **options)
    chips = sorted(description.devices, key=lambda device: device.id)[:devices]
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=devices, use_spmd_partitioning=True,
        device_assignment=np.array([[chip.id for chip in chips]]), use_auto_spmd_partitioning=False)
    options.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
    return chips[0].client.compile(to_module(proto), xla_client.DeviceList(tuple(chips)), options)


def set_environment(flags):
    """Variables that libtpu reads when it is loaded. flags: those of torch_xla."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu",
                      TPU_ACCELERATOR_TYPE="v5litepod-256", TPU_WORKER_HOSTNAMES="localhost",
                      TPU_WORKER_ID="0", LIBTPU_INIT_ARGS=flags)


# ---------------------------------------------------------------------------- the figures
def memory_of(executable):
    """{kind: bytes} of a compiled program on one chip. Donated arguments are also outputs."""
    stats = executable.get_compiled_memory_stats()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = dict(arguments=stats.argument_size_in_bytes, outputs=outputs,
                  temporaries=stats.temp_size_in_bytes, program=stats.generated_code_size_in_bytes)
    return memory | dict(donated=stats.alias_size_in_bytes, sum=sum(memory.values()))


def figures(executable, chips):
    """Memory, work and collectives of a compiled program, as a dict of numbers, for one chip."""
    computations, entry = hlo.parse(executable.hlo_modules()[0].to_string())
    counts = hlo.runs(computations, entry)
    done = hlo.work(computations, counts)
    found = hlo.collectives(computations, counts, chips)
    rows = {}
    for kind in hlo.KINDS:
        alike = [collective for collective in found if collective.kind == kind]
        rows[kind] = dict(runs=sum(c.runs for c in alike), sent=sum(c.sent for c in alike),
                          dense=sum(c.size.dense * c.runs for c in alike),
                          padded=sum(c.size.padded * c.runs for c in alike))
    return dict(memory=memory_of(executable), flops=done.flops, cycles=done.cycles,
                collectives=rows)


def print_figures(kind, found):
    """Print what figures() returned. kind: of TPU, such as v5e."""
    memory = found["memory"]
    hardware = TPUS[kind]
    print(f"GB per chip (of {hardware.memory / 1e9:.0f}): {memory['sum'] / 1e9:.2f} = "
          f"arguments {memory['arguments'] / 1e9:.2f} ({memory['donated'] / 1e9:.2f} updated in "
          f"place), outputs {memory['outputs'] / 1e9:.2f}, temporaries "
          f"{memory['temporaries'] / 1e9:.2f}, program {memory['program'] / 1e9:.2f}")
    seconds = found["cycles"] / CLOCKS[kind]
    share = found["flops"] / seconds / hardware.flops
    print(f"TFLOP per chip and step: {found['flops'] / 1e12:.2f}; the compiler's estimate of its "
          f"time, without collectives: {1000 * seconds:.0f} ms, {share:.0%} of peak FLOP/s\n")
    print(f"{'collectives, MB per chip and step':34}{'runs':>8}{'arrays':>10}{'padded':>10}"
          f"{'sent':>10}")
    for name, row in found["collectives"].items():
        sizes = [f"{row[column] / 1e6:10.1f}" for column in ("dense", "padded", "sent")]
        print(f"{name:34}{row['runs']:8}" + "".join(sizes))


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("topology", help="kind of TPU and shape of the slice, such as v5e:16x16 or "
                                    "v4:4x4x8")
    p.add_argument("--program", choices=("step", "encoder", "decoder"), default="step",
                   help="step: the training step; encoder: only the VAE's, for a batch; decoder: "
                        "only the VAE's, for one image")
    p.add_argument("--layers", type=cli.positive,
                   help="layers of Gemma and of the DiT, instead of the preset's")
    p.add_argument("--latents", action="store_true",
                   help="train on precomputed latents, without the VAE")
    p.add_argument("--hlo", type=Path, metavar="FILE", help="also write the optimised HLO")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures")
    g = p.add_argument_group("as in train_tpu.py")
    g.add_argument("--preset", default="fusedit/large-scale", help="the model")
    g.add_argument("--batch", type=cli.positive, default=512, help="images in a step, on all chips")
    g.add_argument("--mesh", default="-1,1", help="chips along fsdp and along tensor")
    g.add_argument("--remat", action="store_true", help="recompute activations")
    g.add_argument("--train-llm", action="store_true", help="train Gemma as well")
    return p.parse_args(join_mesh(sys.argv[1:]))


def trace(args, kind, devices, out):
    """Writes the program to the file `out`, in a process of its own. Returns libtpu's flags."""
    command = [sys.executable, HERE / "tpu_trace.py", "--devices", devices, "--kind", kind,
               "--program", args.program]
    if args.layers:
        command += ["--layers", args.layers]
    if args.latents:
        command.append("--latents")
    command += [out, "--preset", args.preset, "--batch", args.batch, f"--mesh={args.mesh}"]
    if args.remat:
        command.append("--remat")
    if args.train_llm:
        command.append("--train-llm")
    subprocess.run([str(word) for word in command], check=True)
    return Path(f"{out}.flags").read_text()


def main():
    args = parse_arguments()
    kind, _, shape = args.topology.partition(":")
    if kind not in CLOCKS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise FuseDiTError(f"{args.topology} is not a topology: give a kind of TPU and a shape, "
                           "such as v5e:16x16; known kinds: " + ", ".join(CLOCKS))
    devices = math.prod(map(int, shape.split("x")))
    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder) / "step.pb"
        set_environment(trace(args, kind, devices, traced))
        start = time.perf_counter()
        executable = compile_for(args.topology, traced.read_bytes(), devices)
    print(f"compiled for {devices} x {kind} in {time.perf_counter() - start:.0f} s; on one chip:")
    if args.hlo:
        args.hlo.write_text(executable.hlo_modules()[0].to_string())
    found = figures(executable, devices)
    print_figures(kind, found)
    if args.out:
        with atomic_write(args.out) as tmp:
            tmp.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, "fewer --layers")

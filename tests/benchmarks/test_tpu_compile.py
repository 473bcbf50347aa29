"""benchmarks/tpu_compile.py: what it reads from HLO, and the limits of the 2B model's step."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from unittest import mock

import pytest
from conftest import ROOT

import fusedit
from fusedit_lib.train import costs, memory

sys.path.insert(0, str(ROOT / "benchmarks"))
import hlo
import tpu_compile

# A loop of 3 layers over weights on 4 chips: a gather in two parts, a gradient that is scattered, a
# product of 2 batches as a convolution; then a whole gradient and a ring.
PROGRAM = """HloModule step, is_scheduled=true

%add.1 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%gather_start (p.1: bf16[1,6,128]) -> bf16[1,24,128] {
  %p.1 = bf16[1,6,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[1,24,128]{2,0,1:T(2,128)(2,1)} all-gather(%p.1), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={1}, metadata={op_name="dot.5"}
}

%gather_done (p.2: bf16[1,6,128]) -> bf16[1,24,128] {
  %p.2 = bf16[1,6,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,24,128]{2,0,1:T(2,128)(2,1)} all-gather(%p.2), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={1}, metadata={op_name="dot.5"}
}

%all-reduce-scatter.3 (p.3: bf16[32,128]) -> bf16[8,128] {
  %p.3 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-reduce(%p.3), channel_id=8, \
replica_groups=[1,4]<=[4], to_apply=%add.1
  ROOT %slice = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1)
}

%product (p.4: bf16[2,8,16], p.5: bf16[2,16,4]) -> bf16[2,8,4] {
  %p.4 = bf16[2,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.5 = bf16[2,16,4]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[2,8,4]{2,1,0:T(8,128)(2,1)} convolution(%p.4, %p.5), \
window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf
}

%body (p.6: (s32[], bf16[1,6,128])) -> (s32[], bf16[1,6,128]) {
  %p.6 = (s32[]{:T(128)}, bf16[1,6,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %copy.1 = s32[]{:T(128)} copy(%next)
  %w = bf16[1,6,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.6), index=1
  %f.1 = bf16[1,24,128]{2,0,1:T(2,128)(2,1)} fusion(%w), kind=kCustom, calls=%gather_start
  %f.2 = bf16[1,24,128]{2,0,1:T(2,128)(2,1)} fusion(%w), kind=kCustom, calls=%gather_done
  %f.3 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.3
  %f.4 = bf16[2,8,4]{2,1,0:T(8,128)(2,1)} fusion(%f.3, %f.3), kind=kOutput, calls=%product, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[]{:T(128)}, bf16[1,6,128]{2,1,0:T(8,128)(2,1)}) tuple(%copy.1, /*index=1*/%w)
}

%condition (p.7: (s32[], bf16[1,6,128])) -> pred[] {
  %p.7 = (s32[]{:T(128)}, bf16[1,6,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.7), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%j, %five), direction=LT
}

ENTRY %main (w.1: bf16[1,6,128]) -> f32[3] {
  %w.1 = bf16[1,6,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t.1 = (s32[]{:T(128)}, bf16[1,6,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %w.1)
  %loop = (s32[]{:T(128)}, bf16[1,6,128]{2,1,0:T(8,128)(2,1)}) while(%t.1), \
condition=%condition, body=%body
  %g = f32[3]{0:T(128)} fusion(%w.1), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"11"}}
  %ring = (bf16[1,6,128]{2,1,0:T(8,128)(2,1)}, bf16[1,6,128]{2,1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) collective-permute-start(%w.1), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %ring.done = bf16[1,6,128]{2,1,0:T(8,128)(2,1)} collective-permute-done(%ring)
  ROOT %all-reduce.2 = f32[3]{0:T(128)} all-reduce(%g), channel_id=10, replica_groups={}, \
to_apply=%add.1
}
"""


def test_collectives_are_counted_as_often_as_their_loop_runs():
    """Parts of one gather count once; an all-reduce that is sliced at once is a reduce-scatter."""
    computations, entry = hlo.parse(PROGRAM)
    counts = hlo.runs(computations, entry)
    assert (counts["main"], counts["body"], counts["gather_done"]) == (1, 3, 3)
    found = {c.kind: c for c in hlo.collectives(computations, counts, 4)}
    gather = found["all-gather"]
    assert (gather.runs, gather.group, gather.source) == (3, 4, "dot.5")
    assert gather.size == (24 * 128 * 2, 24 * 2 * 128 * 2)          # 1 is padded to 2
    assert gather.sent == 3 * 3 / 4 * gather.size.padded
    scatter = found["reduce-scatter"]
    assert (scatter.runs, scatter.size.dense, scatter.group) == (3, 32 * 128 * 2, 4)
    reduce = found["all-reduce"]
    assert (reduce.runs, reduce.size, reduce.group) == (1, (12, 512), 4)
    assert reduce.sent == 2 * 3 / 4 * 512
    ring = found["collective-permute"]
    assert ring.size == (6 * 128 * 2, 8 * 128 * 2)
    assert ring.sent == ring.size.padded
    assert len(hlo.collectives(computations, counts, 4)) == 4


def test_products_with_padding_are_not_counted():
    """A product of 2 batches is a convolution whose input is dilated."""
    computations, entry = hlo.parse(PROGRAM)
    done = hlo.work(computations, hlo.runs(computations, entry))
    assert done == (3 * 2 * 2 * 8 * 16 * 4, 3 * 100 + 11)


@pytest.mark.parametrize("old, new", [
    ("constant(5)", "parameter(1)"), ("add(%i, %two)", "multiply(%i, %two)"),
    ("direction=LT", "direction=GT")])
def test_a_loop_of_unknown_length_is_an_error(old, new):
    assert old in PROGRAM
    computations, entry = hlo.parse(PROGRAM.replace(old, new))
    with pytest.raises(ValueError, match="loop|counter"):
        hlo.runs(computations, entry)


# ------------------------------------------------------------------------------ with libtpu

def needs_libtpu(test):
    """Marks a test that compiles for a TPU."""
    found = all(map(importlib.util.find_spec, ("torch_xla", "libtpu", "jax")))
    test = pytest.mark.skipif(
        not found, reason="needs PyTorch/XLA and JAX: pip install -e '.[tpu,compile,test]'")(test)
    return pytest.mark.slow(pytest.mark.timeout(3000)(test))


def run(*argv, **variables):
    """Runs a program of the repository. variables: of its environment."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=os.environ | variables,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def operations(text):
    """{operation: number of times it occurs in HLO}, without parameters and custom calls."""
    found = Counter(re.findall(r" = \S+ ([a-z][a-z0-9-]*)\(", text))
    del found["parameter"]
    del found["custom-call"]                # annotations and placeholders
    return found


def parameters(text):
    """{type: number of parameters of the entry computation of HLO}."""
    entry = text[text.index("\nENTRY"):]
    return Counter(re.findall(r" = (\w+\[[\d,]*\])\S* parameter\(", entry))


def results(text):
    """{type: number of results of the entry computation of HLO}."""
    root = re.search(r"\nENTRY .*?\) -> (.*) \{", text)[1]
    return Counter(re.findall(r"\w+\[[\d,]*\]", root))


def donated(text):
    """The number of parameters that HLO donates."""
    return len(re.findall(r"\(\d+, \{\}\)", text[:text.index("entry_computation_layout")]))


@needs_libtpu
def test_the_traced_step_is_the_one_that_train_tpu_compiles(tmp_path):
    """On 4 devices: the same operations, parameters and outputs, and as many donated weights."""
    from jax._src.lib import xla_client
    run("prepare_data.py", "shapes", tmp_path / "shards", "-n", 64)
    flags = ["--preset", "demo", "--batch", 8]
    run("train_tpu.py", *flags, "--data", tmp_path / "shards", "--dtype", "bf16", "--steps", 1,
        "--sample-every", 0, "--out", tmp_path / "run", PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4",
        XLA_PERSISTENT_CACHE_PATH=str(tmp_path / "cache"),
        XLA_FLAGS=f"--xla_dump_to={tmp_path}/dump --xla_dump_hlo_as_text "
                  "--xla_backend_optimization_level=0")
    dumps = (tmp_path / "dump").glob("*SyncTensorsGraph*before_optimizations.txt")
    real = max((path.read_text() for path in dumps), key=len)

    run("benchmarks/tpu_trace.py", "--devices", 4, tmp_path / "step.pb", *flags)
    traced = (tmp_path / "step.pb").read_bytes()
    text = xla_client.XlaComputation(traced).get_hlo_module().to_string()
    assert operations(text) == operations(real)

    module = tpu_compile.to_module(traced)
    computation = xla_client._xla.mlir.mlir_module_to_xla_computation(module)
    text = computation.get_hlo_module().to_string()
    assert parameters(text) - parameters(real) == {"f32[1]": 1}    # the operand of placeholders
    assert not parameters(real) - parameters(text)
    assert results(text) == results(real)
    assert donated(text) == donated(real) > 90


def trained_parameters(layers):
    """The number of the 2B model's trained parameters, if it had this many layers."""
    config = fusedit.preset("fusedit/large-scale")
    with mock.patch.dict(costs.GEMMAS[config.base], num_hidden_layers=layers):
        return memory.count_parameters(costs.abstract_model(config).dit)


@needs_libtpu
@pytest.mark.parametrize("topology, temporaries", [("v5e:8x8", 1.6e9), ("v4:4x4x4", 3.1e9)])
def test_limits_of_the_step_compiled_for_64_chips(tmp_path, topology, temporaries):
    """The 2B model's widths, 2 layers, without the VAE; 2 images on a v5e chip and 4 on a v4."""
    batch = 128
    if topology.startswith("v4"):
        batch = 256
    run("benchmarks/tpu_compile.py", topology, "--layers", 2, "--batch", batch, "--latents",
        "--out", tmp_path / "figures.json")
    step = json.loads((tmp_path / "figures.json").read_text())
    moved = step["collectives"]
    gathered = moved["all-gather"]
    assert gathered["runs"] > 20                           # no sums in their place
    assert gathered["padded"] < 1.02 * gathered["dense"]
    assert moved["all-reduce"]["dense"] < 320e6            # the gradients, once
    assert moved["all-to-all"]["padded"] < 7e6             # no activations
    assert step["memory"]["temporaries"] < temporaries
    assert step["memory"]["outputs"] < 0.1e9
    assert step["memory"]["donated"] == pytest.approx(16 * trained_parameters(2) / 64, rel=0.02)

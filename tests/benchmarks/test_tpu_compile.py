"""benchmarks/tpu_compile.py: what it reads from HLO, and the limits of the 2B model's step."""
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import hlo

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


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """The figures of a step of the 2B model's widths with 2 layers, for 64 chips."""
    out = tmp_path_factory.mktemp("step") / "figures.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "tpu_compile.py", "v5e:8x8", "--layers",
                    "2", "--batch", "128", "--latents", "--out", out], check=True)
    return json.loads(out.read_text())


needs_libtpu = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch_xla", "libtpu", "jax"))),
    reason="needs libtpu and JAX: pip install -e '.[tpu,compile,test]'")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_libtpu
def test_the_step_compiled_for_64_chips(step):
    """Weights are gathered without padding, and a chip's memory has its share of the state."""
    gathered = step["collectives"]["all-gather"]
    assert gathered["padded"] < 1.02 * gathered["dense"]

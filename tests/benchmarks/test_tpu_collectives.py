"""libtpu's compiler: where it makes a reduce-scatter of a gradient's sum (docs/tpu.md)."""
import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (importlib.util.find_spec("libtpu") and importlib.util.find_spec("jax")),
                       reason="needs libtpu and jax"),
]

# A program that only sums an array [1024,1024] of every chip and leaves each chip its own rows.
PROGRAM = """
import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chips = topologies.get_topology_desc(sys.argv[1], "tpu").devices
mesh = Mesh(np.array(sorted(chips, key=lambda chip: chip.id)), ["fsdp"])
rows = PartitionSpec("fsdp", None)
arrays = jax.ShapeDtypeStruct((len(chips) * 1024, 1024), jax.numpy.bfloat16,
                              sharding=NamedSharding(mesh, rows))
scatter = jax.shard_map(lambda array: jax.lax.psum_scatter(array, "fsdp", tiled=True), mesh=mesh,
                        in_specs=rows, out_specs=rows)
print(jax.jit(scatter).lower(arrays).compile().as_text())
"""


def compiled(topology):
    """The optimised HLO of PROGRAM for the chips of a topology."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_ID="0",
               ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_ACCELERATOR_TYPE="v5litepod-256",
               TPU_WORKER_HOSTNAMES="localhost")
    command = [sys.executable, "-c", PROGRAM, topology]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:8x16"])
def test_a_slice_whose_sides_differ_scatters(topology):
    assert "reduce-scatter(" in compiled(topology)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5e:16x16", "v5p:4x4x4"])
def test_a_square_slice_reduces_whole_arrays(topology):
    """It prefers an all-reduce along all links. If this fails, docs/tpu.md must be corrected."""
    hlo = compiled(topology)
    assert "bf16[1024,1024]" in hlo.partition(" all-reduce(")[0].splitlines()[-1]
    assert "reduce-scatter(" not in hlo

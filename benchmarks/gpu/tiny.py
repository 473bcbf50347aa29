"""Runs a benchmark with a model of two layers and a tiny matrix product, for SMALL=1.

    python benchmarks/gpu/tiny.py train --batch 1 --rounds 1 --no-compile
"""
import runpy
import sys

import kit  # isort: skip (before torch)
import common
import torch


def small_product(case, device, dtype, rows, train):
    """Replacement for common.product, which takes seconds to measure a reliable rate."""
    a = torch.randn(256, 256, device=device, dtype=dtype)
    return lambda: a @ a, 2 * 256**3


def main():
    common.SMALL["num_hidden_layers"] = 2
    common.product = small_product
    path = kit.ROOT / "benchmarks" / f"{sys.argv.pop(1)}.py"
    sys.argv[0] = str(path)
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()

"""OpenMP threads that leave a busy machine usable.

PyTorch's threads synchronise at the end of every operation. GNU OpenMP lets a thread that finishes
early spin 300,000 times (a few milliseconds) before it sleeps. On a machine with other work to do,
it spins on the very core that the last thread is waiting for. 3,000 spins are just enough to bridge
the gap between two operations. Measured with `sample.py --num-images 8` and the demo, on two cores
of an AMD EPYC limited to AVX2: 6.2 to 6.4 s on an idle machine with either setting; next to two
other busy processes, 15 s instead of 29 s.
"""
import os


def limit_spinning():
    """Set GOMP_SPINCOUNT for this process and its children, unless the user has set a policy.

    OpenMP reads the variable when it is loaded, so call this before importing torch.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"

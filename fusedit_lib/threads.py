"""Threads that leave a busy machine usable. Call this before torch is
imported: OpenMP reads the setting as it loads.

PyTorch's threads meet at the end of every operation, and whoever comes first waits for the others
awake: GNU's OpenMP lets it spin 300,000 times (milliseconds) before it sleeps. On a machine with
something else to do it spins on the very core that the last thread is waiting for. 3,000 times
bridge the gap between two operations as well, and no more. `sample.py --num-images 8` with the demo
on two cores of an AMD EPYC, limited to AVX2: idle 6.2 s with either (6.4), beside two processes
that never rest 15 s in place of 29.
"""
import os


def limit_spinning():
    """Set GOMP_SPINCOUNT for this process and its children, unless the user has set a policy."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"

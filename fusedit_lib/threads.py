"""OpenMP threads that leave a busy machine usable.

PyTorch's threads meet at the end of every operation, and those that come first wait for the others
awake: GNU's OpenMP lets them spin 300,000 times (milliseconds) before they sleep. On a machine with
other work to do, they spin on the very core that the last thread is waiting for. 3,000 times is
long enough to bridge the gap between two operations, and no longer. `sample.py --num-images 8` with
the demo on two cores of an AMD EPYC, limited to AVX2: idle 6.2 s with either setting (6.4), beside
two processes that never rest 15 s instead of 29.
"""
import os


def limit_spinning():
    """Set GOMP_SPINCOUNT for this process and its children, unless the user has set a policy.

    OpenMP reads it as it is loaded, so this has to be called before torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"

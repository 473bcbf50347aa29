"""Threads that leave a busy machine usable. Import this before torch, which reads it as it loads.

PyTorch's threads meet at the end of every operation, and whoever comes first waits for the others
awake: GNU's OpenMP lets it spin 300,000 times (milliseconds) before it sleeps. On a machine with
something else to do it spins on the very core that the last thread is waiting for. 3,000 times
bridge the gap between two operations as well, and no more: 8 pictures of the demo took 2.9 s on two
idle cores of an AMD EPYC with either, and with two other processes beside them 9 s in place of 30.
"""
import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"

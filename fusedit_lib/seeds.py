"""Seeds of up to 64 bits, and -1 for a random one, as in many other programs.

Some random number generators read only 32 bits. The functions here give such a generator a seed of
its own for each larger seed, too; seeds below 2^32 are used as they are.
"""
import secrets
import sys

import numpy as np

RANDOM = -1                                 # draw a seed
LIMIT = 2**64                               # seeds are smaller than this


def settle(seed, stored=None):
    """The seed, or for -1 that with which the work was started, or one drawn at random.

    stored: the seed with which the work was started; None: it is new. Prints the seed that replaces
    -1. It has 32 bits, so that any other program accepts it.
    """
    if seed != RANDOM:
        return seed
    chosen = secrets.randbits(32)
    source = "drew"
    if stored is not None:
        chosen = stored
        source = "keeps"
    print(f"--seed -1: {source} seed {chosen}", file=sys.stderr, flush=True)
    return chosen


def words(seed):
    """The seed as a list of numbers below 2^32, as NumPy's RandomState takes them."""
    if seed < 2**32:
        return [seed]
    return [seed % 2**32, seed // 2**32]


def torch_seed(seed):
    """The number to pass to manual_seed, whose generator on a CPU reads only the low 32 bits."""
    if seed < 2**32:
        return seed
    return int(np.random.SeedSequence(words(seed)).generate_state(1)[0])


def consecutive(seed, count):
    """The seeds seed, seed + 1, ..., as a list; after the largest one comes 0."""
    return [(seed + i) % LIMIT for i in range(count)]

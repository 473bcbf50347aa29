"""TODO."""
import functools

import numpy as np

from fusedit import FuseDiTError

CYCLE = 1000                                # places over which data sets keep their shares exactly


# ------------------------------------------------------------------------------ in which order

class Order:
    """The sample at a place of one data set: a function of the seed and of nothing else.

    In each epoch every sample comes once. The shards are shuffled and dealt out in pools of
    `pool`, and the samples of a pool are shuffled among themselves: a reader has a few shards
    open at a time, and nobody holds a list of all samples.
    """

    def __init__(self, counts, seed, pool):
        self.counts, self.seed, self.pool = np.array(counts), seed, pool
        self.total = int(self.counts.sum())

    def shuffled(self, n, *which):
        # numpy keeps what RandomState gives for a seed as it is, for good
        return np.random.RandomState([self.seed, *which]).permutation(n)

    @functools.lru_cache(16)
    def epoch(self, e):
        """Its shards in order, and the place in it at which each one begins."""
        order = self.shuffled(len(self.counts), e)
        return order, np.concatenate([[0], np.cumsum(self.counts[order])])

    @functools.lru_cache(16)
    def mix(self, e, first):
        """The samples, in order, of the pool that begins with the first-th shard of an epoch."""
        begins = self.epoch(e)[1]
        last = min(first + self.pool, len(self.counts))
        return begins[first] + self.shuffled(begins[last] - begins[first], e, first)

    def __getitem__(self, place):
        """(shard, number of the sample in it)"""
        e, at = divmod(place, self.total)
        order, begins = self.epoch(e)
        first = (np.searchsorted(begins, at, "right") - 1) // self.pool * self.pool
        at = self.mix(e, first)[at - begins[first]]
        nth = np.searchsorted(begins, at, "right") - 1
        return int(order[nth]), int(at - begins[nth])


class Mixture:
    """Several data sets in fixed shares: of every 1000 places each has its own, spread out."""

    def __init__(self, sets, weights, seed, pool):
        """sets: lists of expand_shards."""
        self.orders = [Order([n for _, n, *_ in s], seed, pool) for s in sets]
        self.begin = np.cumsum([0] + [len(s) for s in sets]).tolist()      # first shard of each
        ends = np.round(np.cumsum(weights) / sum(weights) * CYCLE).astype(int)
        self.share = np.diff(ends, prepend=0)
        if not self.share.all():
            raise FuseDiTError(f"--data-weights: less than one in {CYCLE} is never read")
        self.slots = np.random.RandomState([seed]).permutation(np.repeat(range(len(sets)),
                                                                         self.share))
        self.nth = np.array([(self.slots[:i] == s).sum() for i, s in enumerate(self.slots)])

    def __getitem__(self, place):
        cycle, slot = divmod(place, CYCLE)
        which = self.slots[slot]
        shard, i = self.orders[which][cycle * int(self.share[which]) + int(self.nth[slot])]
        return self.begin[which] + shard, i

"""The order of training samples, which depends only on the seed.

A position is the number of a sample in the run, counted over all steps and ranks: 0, 1, 2, ...
Order maps a position to a sample of one data set; Mixture maps it to one from several data sets.
Neither keeps state, so a run can resume at any position, on any number of ranks, without replaying
earlier positions.
"""
import functools

import numpy as np

from fusedit import FuseDiTError
from fusedit_lib import seeds

CYCLE = 1000                                # number of positions over which weights are exact


class Order:
    """The order in which the samples of one data set are read.

    Every epoch contains each sample once. The shards are shuffled and divided into pools of `pool`
    shards, and the samples of each pool are shuffled. A process therefore has only a few shards
    open at a time, and a permutation of the whole data set is never held in memory.
    """

    def __init__(self, counts, seed, pool):
        """counts: the number of samples in each shard."""
        self.counts = np.array(counts)
        self.seed = seed
        self.pool = pool
        self.total = int(self.counts.sum())

    def permutation(self, size, *stream):
        """A permutation of range(size), determined by the seed and the numbers `stream`."""
        # NumPy guarantees that RandomState's numbers never change; Generator's may change.
        return np.random.RandomState([*seeds.words(self.seed), *stream]).permutation(size)

    @functools.lru_cache(16)
    def epoch(self, number):
        """(shards in the order of this epoch, offset of each in the epoch [shards + 1])"""
        shards = self.permutation(len(self.counts), number)
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        return shards, starts

    @functools.lru_cache(16)
    def pool_samples(self, number, first):
        """The shuffled samples of a pool, as offsets in the unshuffled epoch.

        first: index of the pool's first shard in the order of the epoch.
        """
        _, starts = self.epoch(number)
        last = min(first + self.pool, len(self.counts))
        size = starts[last] - starts[first]
        return starts[first] + self.permutation(size, number, first)

    def __getitem__(self, position):
        """(shard, index of the sample in it) at a position of the run."""
        number, offset = divmod(position, self.total)
        shards, starts = self.epoch(number)

        # the pool that this position falls into
        index = np.searchsorted(starts, offset, "right") - 1
        first = index // self.pool * self.pool

        # the sample at this position in the pool's permutation
        sample = self.pool_samples(number, first)[offset - starts[first]]
        index = np.searchsorted(starts, sample, "right") - 1
        return int(shards[index]), int(sample - starts[index])


class Mixture:
    """The order of samples from several data sets, mixed by weight.

    Each data set gets a fixed number of every CYCLE positions. These are scattered at random, and
    the pattern repeats. Each data set keeps its own order and epochs.
    """

    def __init__(self, sets, weights, seed, pool, start=0, taken=0):
        """sets: the shards of each data set, as from expand_shards; weights: one for each set.

        start: the first position that has these weights. taken: the number of samples that each
        data set has given before it, from taken_before of the Mixture with the earlier weights.
        Raises FuseDiTError if a weight is too small for one position in CYCLE.
        """
        self.start = start
        self.taken = np.zeros(len(sets), int) + taken
        self.orders = []
        for shards in sets:
            counts = [shard.samples for shard in shards]
            self.orders.append(Order(counts, seed, pool))
        sizes = [len(shards) for shards in sets]
        self.first_shard = np.cumsum([0, *sizes]).tolist()     # of each set, among all shards

        # positions of each set in a cycle
        ends = np.round(np.cumsum(weights) / sum(weights) * CYCLE).astype(int)
        self.per_cycle = np.diff(ends, prepend=0)
        if not self.per_cycle.all():
            raise FuseDiTError(f"--data-weights: a data set with a share below 1 in {CYCLE} would "
                               "never be read; give it a larger weight")

        # the set at each position of a cycle, and how often it occurred earlier in the cycle
        slots = np.repeat(range(len(sets)), self.per_cycle)
        self.slots = np.random.RandomState(seeds.words(seed)).permutation(slots)
        earlier = [(self.slots[:i] == chosen).sum() for i, chosen in enumerate(self.slots)]
        self.earlier = np.array(earlier)

    def __getitem__(self, position):
        """(shard, index of the sample in it) at a position; shards are numbered over all sets."""
        cycle, slot = divmod(position - self.start, CYCLE)
        chosen = self.slots[slot]
        position_in_set = cycle * int(self.per_cycle[chosen]) + int(self.earlier[slot])
        position_in_set += int(self.taken[chosen])
        shard, sample = self.orders[chosen][position_in_set]
        return self.first_shard[chosen] + shard, sample

    def taken_before(self, position):
        """The number of samples that each data set gives before a position, as int [sets]."""
        cycle, slot = divmod(position - self.start, CYCLE)
        in_cycle = np.bincount(self.slots[:slot], minlength=len(self.per_cycle))
        return self.taken + cycle * self.per_cycle + in_cycle

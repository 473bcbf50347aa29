"""The order of training samples, which depends only on the seed.

A position is the number of a sample in the run, counted over all steps and ranks: 0, 1, 2, ...
Order maps a position to a sample of one data set; Mixture maps it to one from several data sets.
Neither keeps state, so a run can resume at any position, on any number of ranks, without replaying
earlier positions.

The positions are dealt to S streams in turn: positions s, s + S, s + 2 * S, ... are stream s. Every
epoch of a data set is cut into S parts, each with shards of its own, and a stream reads one part of
each epoch. A rank or host reads whole streams where their number is a multiple of that of the ranks
(see streams_per_rank). The order is the same for any number of ranks.
"""
import functools
import math

import numpy as np

from fusedit import FuseDiTError
from fusedit_lib import seeds

CYCLE = 1000                                # number of positions over which weights are exact


class Order:
    """The order in which the samples of one data set are read.

    Every epoch contains each sample once. The shards are shuffled and divided into pools of `pool`
    shards, and the samples of each pool are shuffled. A process therefore has only a few shards
    open at a time, and a permutation of the whole data set is never held in memory.

    The shuffled epoch is then cut into `streams` parts of equal length, from which the samples are
    taken in turn: every streams-th sample of an epoch comes from the same part, and a process that
    reads only one stream opens only the shards of one part.
    """

    def __init__(self, counts, seed, pool, streams=1):
        """counts: the number of samples in each shard."""
        self.counts = np.array(counts)
        self.seed = seed
        self.pool = pool
        self.streams = streams
        self.total = int(self.counts.sum())
        self.part_starts = part_starts(self.total, streams)
        self.recent_pools = {}              # results of pool_samples, oldest first

    def permutation(self, size, *words):
        """A permutation of range(size), determined by the seed and some more numbers."""
        # NumPy guarantees that RandomState's numbers never change; Generator's may change.
        return np.random.RandomState([*seeds.words(self.seed), *words]).permutation(size)

    @functools.lru_cache(64)
    def epoch(self, number):
        """(shards in the order of this epoch, offset of each in the epoch [shards + 1])"""
        shards = self.permutation(len(self.counts), number)
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        return shards, starts

    def pool_samples(self, number, first):
        """The shuffled samples of a pool, as offsets in the unshuffled epoch.

        first: index of the pool's first shard in the order of the epoch.
        """
        if (number, first) not in self.recent_pools:
            # room for the pool that each stream reads, the next one (for prefetching), and a few
            while len(self.recent_pools) >= 2 * self.streams + 16:
                del self.recent_pools[next(iter(self.recent_pools))]
            _, starts = self.epoch(number)
            last = min(first + self.pool, len(self.counts))
            size = starts[last] - starts[first]
            samples = starts[first] + self.permutation(size, number, first)
            self.recent_pools[number, first] = samples
        return self.recent_pools[number, first]

    def __getitem__(self, position):
        """(shard, index of the sample in it) at a position of the run."""
        number, offset = divmod(position, self.total)
        index, part = divmod(offset, self.streams)
        offset = self.part_starts[part] + index
        shards, starts = self.epoch(number)

        # the pool that this offset falls into
        index = starts.searchsorted(offset, "right") - 1
        first = index // self.pool * self.pool

        # the sample at this offset in the pool's permutation
        sample = self.pool_samples(number, first)[offset - starts[first]]
        index = starts.searchsorted(sample, "right") - 1
        return int(shards[index]), int(sample - starts[index])


def streams_per_rank(streams, ranks):
    """The number of streams that a rank reads at a time if its positions are `ranks` apart."""
    return streams // math.gcd(streams, ranks)


def part_starts(total, parts):
    """The offset in an epoch of `total` samples at which each part starts, as a list.

    Parts whose numbers have the same last bits are neighbours in the epoch. A host that reads every
    second, fourth, ... stream therefore reads one contiguous piece of the epoch, and few shards lie
    on the border of two hosts.
    """
    starts = [0] * parts
    start = 0
    for part in sorted(range(parts), key=lambda number: f"{number:b}"[::-1]):
        starts[part] = start
        start += -(-(total - part) // parts)               # 0 if there are fewer samples
    return starts


class Mixture:
    """The order of samples from several data sets, mixed by weight, in `streams` streams.

    Each data set gets a fixed number of every CYCLE positions of a stream. These are scattered at
    random, and the pattern repeats. Every stream begins at another place of it, so that any CYCLE
    positions of the run have nearly the same shares. Each data set keeps its own order and epochs,
    and a stream reads one part of each of its epochs.
    """

    def __init__(self, sets, weights, seed, pool, streams=1, start=0, taken=0):
        """sets: the shards of each data set, as from expand_shards; weights: one for each set.

        pool: the number of shards whose samples are shuffled together, in each stream. start: the
        first position that has these weights. taken: the number of samples that each data set has
        given to each stream before it, from taken_before of the Mixture with the earlier weights.
        Raises FuseDiTError if a weight is too small for one position in CYCLE.
        """
        self.streams = streams
        self.start = start
        self.orders = []
        for shards in sets:
            counts = [shard.samples for shard in shards]
            self.orders.append(Order(counts, seed, pool, streams))
        sizes = [len(shards) for shards in sets]
        self.first_shard = np.cumsum([0, *sizes]).tolist()     # of each set, among all shards

        # positions of each set in a cycle
        ends = np.round(np.cumsum(weights) / sum(weights) * CYCLE).astype(int)
        self.per_cycle = np.diff(ends, prepend=0)
        if not self.per_cycle.all():
            raise FuseDiTError(f"--data-weights: a data set with a share below 1 in {CYCLE} would "
                               "never be read; give it a larger weight")

        # the set at each position of a cycle, and how often each set occurs before it
        slots = np.repeat(range(len(sets)), self.per_cycle)
        self.slots = np.random.RandomState(seeds.words(seed)).permutation(slots)
        is_set = self.slots == np.arange(len(sets))[:, None]
        self.earlier = np.cumsum(is_set, 1) - is_set           # [sets, CYCLE]

        # Where each stream begins in the cycle. At slot k of its cycle c, it has had
        #     taken_before_cycle + c * per_cycle + earlier[:, k]
        # samples of each set, which are `taken` where it begins: c = 0 and k = its shift.
        self.shifts = np.arange(streams) * CYCLE // streams
        self.taken_before_cycle = taken - self.earlier[:, self.shifts]     # [sets, streams]

    def __getitem__(self, position):
        """(shard, index of the sample in it) at a position; shards are numbered over all sets."""
        stream = position % self.streams
        passed = (position - self.start) // self.streams       # positions of the stream since start
        cycle, slot = divmod(passed + int(self.shifts[stream]), CYCLE)
        chosen = self.slots[slot]
        taken = int(self.taken_before_cycle[chosen, stream])
        taken += cycle * int(self.per_cycle[chosen]) + int(self.earlier[chosen, slot])
        shard, sample = self.orders[chosen][stream + taken * self.streams]
        return self.first_shard[chosen] + shard, sample

    def taken_before(self, position):
        """The number of samples that each data set gives each stream before a position.

        Returns int [sets, streams].
        """
        streams = np.arange(self.streams)
        first = (streams - self.start) % self.streams          # of each stream, after start
        passed = -((first + self.start - position) // self.streams)
        cycle, slot = np.divmod(passed + self.shifts, CYCLE)
        return self.taken_before_cycle + cycle * self.per_cycle[:, None] + self.earlier[:, slot]

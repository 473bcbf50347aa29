"""The order of samples: each once per epoch, shuffled within pools, data sets in fixed shares."""
from collections import Counter

import pytest

from fusedit import FuseDiTError
from fusedit_lib.data.order import Mixture, Order
from fusedit_lib.data.shards import Shard


def shard(samples):
    return Shard("", samples, None, None, 0)


# two data sets, the first with two shards and the second with one
SETS = [
    [shard(30), shard(30)],
    [shard(7)],
]


def epoch_of(order, number):
    """All samples of an epoch, in order."""
    first = number * order.total
    return [order[position] for position in range(first, first + order.total)]


@pytest.mark.parametrize("counts, pool", [
    ([8, 8, 8], 8),
    ([5, 0, 9, 1, 7], 2),
    ([13], 4),
    ([2] * 9, 1),
])
def test_every_epoch_has_each_sample_once_in_a_new_order(counts, pool):
    order = Order(counts, 7, pool)
    every = set()
    for s, count in enumerate(counts):
        every |= {(s, i) for i in range(count)}
    epochs = [epoch_of(order, number) for number in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(every)
        assert set(epoch) == every
    assert epochs[0] != epochs[1] != epochs[2]
    if pool < len(counts):                  # the order of shards differs as well
        shards = [[s for s, _ in epoch] for epoch in epochs]
        assert shards[0] != shards[1]
    assert epochs[1] == epoch_of(Order(counts, 7, pool), 1)
    assert epochs[0] != epoch_of(Order(counts, 8, pool), 0)


def test_samples_mix_within_a_pool_of_shards():
    order = Order([100] * 8, 0, 2)
    for first in range(0, 800, 200):
        pool = [order[position] for position in range(first, first + 200)]
        assert len({s for s, _ in pool}) == 2              # only two shards are open
        in_first_half = sum(s == pool[0][0] for s, _ in pool[:100])
        assert 30 < in_first_half < 70
        samples = [i for _, i in pool]
        assert samples != sorted(samples)


def test_data_sets_keep_their_shares_and_their_epochs():
    mixture = Mixture(SETS, [3.0, 1.0], 5, 8)
    samples = [mixture[position] for position in range(4000)]
    is_second = [s == 2 for s, _ in samples]
    assert Counter(is_second) == {False: 3000, True: 1000}

    of_second = [i for s, i in samples if s == 2]
    for epoch in range(142):
        first = 7 * epoch
        assert sorted(of_second[first:first + 7]) == list(range(7))
    # scattered, not consecutive
    for first in range(0, 4000, 100):
        assert sum(is_second[first:first + 100]) < 45


def test_a_share_too_small_to_be_read_is_an_error():
    with pytest.raises(FuseDiTError, match="--data-weights.*below 1 in 1000"):
        Mixture(SETS, [10_000.0, 1.0], 5, 8)


def test_the_order_of_a_seed_never_changes():
    """A run resumed with a later version must continue with the same order."""
    order = Order([5, 0, 9, 1, 7], 7, 2)
    assert order[0] == (4, 1)
    assert order[1] == (4, 2)
    assert order[22] == (2, 1)
    assert order[1000] == (4, 1)

    mixture = Mixture(SETS, [3.0, 1.0], 5, 8)
    assert mixture[0] == (1, 6)
    assert mixture[1] == (0, 14)
    assert mixture[4] == (1, 11)
    assert mixture[5000] == (1, 9)

    taken = mixture.taken_before(1234)
    assert taken.tolist() == [[916], [318]]
    mixture = Mixture(SETS, [1.0, 4.0], 5, 8, 1, 1234, taken)
    assert mixture[1234] == (2, 6)
    assert mixture[1235] == (1, 5)
    assert mixture[1240] == (2, 6)
    assert mixture[9000] == (2, 3)


def test_nor_does_the_order_of_several_streams():
    order = Order([5, 0, 9, 1, 7], 7, 2, 4)
    assert order[0] == (4, 1)
    assert order[1] == (2, 5)
    assert order[22] == (2, 1)
    assert order[1000] == (4, 0)

    mixture = Mixture(SETS, [3.0, 1.0], 5, 1, 64)
    assert mixture[0] == (1, 21)
    assert mixture[1] == (0, 9)
    assert mixture[64] == (0, 24)
    assert mixture[5000] == (0, 28)
    taken = mixture.taken_before(1234)
    assert taken.sum(1).tolist() == [930, 304]
    mixture = Mixture(SETS, [1.0, 4.0], 5, 1, 64, 1234, taken)
    assert mixture[1234] == (0, 4)
    assert mixture[1235] == (2, 6)
    assert mixture[9000] == (1, 16)

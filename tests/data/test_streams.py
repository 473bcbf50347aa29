"""Streams: the same order on any number of ranks, each of which opens only its own shards."""
import copy
import json
import random
from collections import Counter

import pytest
from tiny_shards import tiny_batches

from fusedit import FuseDiTError
from fusedit_lib.data.order import CYCLE, Mixture, Order, part_starts
from fusedit_lib.data.shards import SPARE, Shard, read_index

HOSTS = (1, 2, 4, 8, 16, 32, 64)


def shard(samples):
    return Shard("", samples, None, None, 0)


def listed(folder, counts):
    """A folder whose index.json lists shards of these numbers of samples. The tars are empty."""
    folder.mkdir()
    entries = []
    for s, count in enumerate(counts):
        name = f"s-{s:04d}.tar"
        (folder / name).touch()
        entries.append(dict(name=name, samples=count, bytes=0))
    (folder / "index.json").write_text(json.dumps({"shards": entries}))
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder that lists 320 shards of 15 to 30 samples."""
    rng = random.Random(0)
    counts = [rng.randrange(15, 31) for _ in range(320)]
    return listed(tmp_path_factory.mktemp("many") / "data", counts)


@pytest.fixture(autouse=True)
def empty_index_cache():
    read_index.cache_clear()


def ranks_of(gemma, data, world, *flags, micro_batch=0, accumulation=1, start=0):
    """The Batches of all ranks. micro_batch: 0 for that of a global batch of 192."""
    first = tiny_batches(gemma, data, *flags, world=world, start=start,
                         micro_batch=micro_batch or 192 // world, accumulation=accumulation)
    ranks = []
    for rank in range(world):
        batches = copy.copy(first)
        batches.rank = rank
        ranks.append(batches)
    return ranks


def samples_of(batches, first, end):
    """{position: (shard, sample)} of a rank, for its positions from first to end - 1."""
    found = {}
    m = 0
    while batches.positions(m)[0] < end:
        for position in batches.positions(m):
            if first <= position < end:
                found[position] = batches.order[position]
        m += 1
    return found


# ------------------------------------------------------------------------------ ranks and hosts

@pytest.mark.parametrize("flags", [[], ["--data-weights", "3", "1"]])
def test_the_order_is_the_same_on_any_number_of_ranks(gemma_folder, many, tmp_path, flags):
    data = [many, listed(tmp_path / "few", [5, 0, 9, 1])]
    whole = samples_of(tiny_batches(gemma_folder, data, *flags, micro_batch=192), 0, 192 * 5)
    assert sorted(whole) == list(range(192 * 5))
    splits = [(2, 1), (3, 4), (4, 2), (6, 1), (8, 1), (8, 3), (64, 1), (64, 3), (96, 2), (192, 1)]
    for world, accumulation in splits:
        together = {}
        for batches in ranks_of(gemma_folder, data, world, *flags, accumulation=accumulation,
                                micro_batch=192 // world // accumulation):
            step = set()                    # of all its micro-batches
            for m in range(accumulation):
                step.update(batches.positions(m))
            assert len(step) == 192 // world
            assert max(step) < 192
            found = samples_of(batches, 0, 192 * 5)
            assert not found.keys() & together.keys()
            together |= found
        assert together == whole


def test_a_host_opens_its_share_of_the_shards(gemma_folder, many):
    """1/n of them on n hosts, plus at most those of one stream."""
    order = tiny_batches(gemma_folder, many).order
    total = order.orders[0].total
    most = 0
    for stream in range(64):
        of_stream = {order[position][0] for position in range(stream, total, 64)}
        most = max(most, len(of_stream))
    assert most <= 320 / 64 * 1.5 + 1
    for epoch in (0, 1):
        for hosts in HOSTS:
            counts = []
            for batches in ranks_of(gemma_folder, many, hosts):
                found = samples_of(batches, epoch * total, (epoch + 1) * total)
                counts.append(len({s for s, _ in found.values()}))
            assert max(counts) <= 320 / hosts + most
            assert sum(counts) >= 320


@pytest.mark.parametrize("world, local, streams, of_host", [
    (1, 1, 64, 64), (8, 8, 8, 64), (64, 1, 1, 1), (64, 8, 1, 8), (128, 4, 1, 4), (6, 6, 32, 64),
    (7, 1, 64, 64)])
def test_a_rank_keeps_the_shards_of_its_streams_open(gemma_folder, many, monkeypatch, world, local,
                                                     streams, of_host):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    for flags, per_stream in [([], 1), (["--mix-shards", "100"], 2),
                            (["--mix-shards", "100", "--data-weights", "3", "1"], 4)]:
        batches = tiny_batches(gemma_folder, [many, many], *flags, rank=world - 1, world=world)
        met = {position % 64 for m in range(64) for position in batches.positions(m)}
        assert len(met) == streams
        assert batches.reader.keep == streams * per_stream
        assert batches.reader.cache.kept == 2 * of_host * per_stream + SPARE


# ------------------------------------------------------------------------------ epochs

def test_every_epoch_has_each_sample_once():
    """For any number of shards and streams, also with fewer samples than streams."""
    rng = random.Random(1)
    for _ in range(60):
        counts = [rng.choice([0, 1, 2, 5, 30]) for _ in range(rng.randrange(1, 12))] + [3]
        streams = rng.choice([1, 2, 3, 8, 48, 64, 100])
        order = Order(counts, rng.randrange(99), rng.randrange(1, 4), streams)
        every = {(s, i) for s, count in enumerate(counts) for i in range(count)}
        for epoch in range(3):
            first = epoch * len(every)
            samples = [order[position] for position in range(first, first + len(every))]
            assert len(samples) == len(every) and set(samples) == every


def test_a_few_samples_come_in_a_new_order_in_each_epoch():
    order = Order([8], 0, 1, 64)
    epochs = [tuple(order[8 * epoch + i] for i in range(8)) for epoch in range(50)]
    assert len(set(epochs)) == 50


def test_parts_that_a_host_reads_are_neighbours():
    for total, streams in [(1000, 64), (7, 64), (999, 48), (640, 1)]:
        starts = part_starts(total, streams)
        sizes = [len(range(stream, total, streams)) for stream in range(streams)]
        assert sum(sizes) == total
        for hosts in (1, 2, 4, 8, 16):
            for host in range(min(hosts, streams)):
                parts = sorted(zip(starts[host::hosts], sizes[host::hosts], strict=True))
                end = parts[0][0]
                for begin, size in parts:
                    assert begin == end
                    end += size


# ------------------------------------------------------------------------------ several data sets

def by_stream(samples, streams, shards):
    """{stream: the samples of some shards that it has}, in order. samples: by position."""
    found = {stream: [] for stream in range(streams)}
    for position in sorted(samples):
        if samples[position][0] in shards:
            found[position % streams].append(samples[position])
    return found


@pytest.mark.parametrize("streams", [1, 5, 16])
def test_data_sets_keep_their_shares_and_their_epochs(streams):
    sets = [[shard(30), shard(30)], [shard(17)], [shard(13), shard(0), shard(40)]]
    mixture = Mixture(sets, [3.0, 1.0, 2.0], 5, 1, streams)
    end = CYCLE * streams
    samples = {position: mixture[position] for position in range(end)}
    shares = [500, 167, 333]
    for order, first, last, share in zip(mixture.orders, (0, 2, 3), (2, 3, 6), shares, strict=True):
        counts = Counter()
        for stream in by_stream(samples, streams, range(first, last)).values():
            assert len(stream) == share
            counts.update(stream)
        assert len(counts) == order.total
        assert max(counts.values()) - min(counts.values()) <= 1

    # in any CYCLE positions as well, nearly
    for begin in range(0, end - CYCLE, max(CYCLE, end // 20)):
        window = [samples[position][0] for position in range(begin, begin + CYCLE)]
        assert abs(sum(s < 2 for s in window) - 500) < 40
        assert abs(sum(s == 2 for s in window) - 167) < 40
    # and a batch
    for begin in range(0, end - 256, max(256, end // 20)):
        window = [samples[position][0] for position in range(begin, begin + 256)]
        assert 80 < sum(s < 2 for s in window) < 176


@pytest.mark.parametrize("streams", [1, 3, 16])
def test_other_weights_keep_the_place_of_every_stream(streams):
    """Changed at any positions, each stream goes on in each data set where it was."""
    sets = [[shard(30), shard(30)], [shard(17)]]
    of_sets = [(0, 1), (2,)]                # their shards
    rng = random.Random(streams)
    unchanged = Mixture(sets, [1.0, 1.0], 5, 1, streams)
    expected = {position: unchanged[position] for position in range(600 * streams)}
    for _ in range(2):
        mixture = Mixture(sets, [3.0, 1.0], 5, 1, streams)
        begin = 0
        samples = {}
        for weights in [[1.0, 4.0], [2.0, 1.0], [1.0, 1.0]]:
            end = begin + rng.randrange(200 * streams)
            samples |= {position: mixture[position] for position in range(begin, end)}
            taken = mixture.taken_before(end)
            for count, of_set in zip(taken, of_sets, strict=True):
                of_streams = by_stream(samples, streams, of_set)
                assert [len(stream) for stream in of_streams.values()] == count.tolist()
            mixture = Mixture(sets, weights, 5, 1, streams, end, taken)
            begin = end
        end = begin + 300 * streams
        samples |= {position: mixture[position] for position in range(begin, end)}
        for of_set in of_sets:
            got = by_stream(samples, streams, of_set)
            want = by_stream(expected, streams, of_set)
            for stream in range(streams):
                both = min(len(got[stream]), len(want[stream]))
                assert both > 50
                assert got[stream][:both] == want[stream][:both]


# ------------------------------------------------------------------------------ damaged samples

class Positions:
    """An order that records which positions are asked for."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, position):
        self.asked.append(position)
        return 0, 0


def test_a_damaged_sample_is_replaced_by_one_of_its_stream(gemma_folder, many):
    asked = {}
    for streams in (1, 64):
        batches = tiny_batches(gemma_folder, many, "--streams", str(streams))
        batches.order = Positions()
        with pytest.raises(FuseDiTError, match="100 samples in a row cannot be read"):
            batches.sample(5, [])
        asked[streams] = batches.order.asked
    # with one stream, as in the versions that had no more
    assert asked[1][:5] == [5, 697, 1524, 1992, 2161]
    assert asked[64] == [5 + 64 * (position - 5) for position in asked[1]]

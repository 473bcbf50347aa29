"""Seeds of 64 bits, and -1 for a random one."""
import argparse
import json

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from PIL import Image

from fusedit_lib import cli, seeds
from fusedit_lib.data.order import Mixture, Order
from fusedit_lib.data.shards import Shard

LARGE = 2**64 - 1


def test_seeds_below_32_bits_are_used_as_they_are():
    for seed in (0, 1, 42, 2**32 - 1):
        assert seeds.words(seed) == [seed]
        assert seeds.torch_seed(seed) == seed

    shards, _ = Order([5, 3, 4], 42, pool=2).epoch(1)
    expected = np.random.RandomState([42, 1]).permutation(3)
    assert shards.tolist() == expected.tolist()

    shard = Shard("", samples=4, bytes=None, latents=None, first=0)
    mixture = Mixture([[shard], [shard]], [1, 1], 42, pool=8)
    halves = np.repeat([0, 1], 500)
    expected = np.random.RandomState([42]).permutation(halves)
    assert mixture.slots.tolist() == expected.tolist()


def test_larger_seeds_differ_from_each_other_and_from_their_low_bits():
    some = [5, 5 + 2**32, 5 + 2**33, 2**32, 0, LARGE, 2**32 - 1]
    noises = set()
    orders = set()
    for seed in some:
        generator = torch.Generator().manual_seed(seeds.torch_seed(seed))
        noises.add(torch.rand((), generator=generator).item())
        shards, _ = Order([1] * 50, seed, pool=8).epoch(0)
        orders.add(tuple(shards))
        assert all(0 <= word < 2**32 for word in seeds.words(seed))
    assert len(noises) == len(orders) == len(some)


def test_consecutive_seeds_begin_again_after_the_largest():
    assert seeds.consecutive(7, 3) == [7, 8, 9]
    assert seeds.consecutive(LARGE, 2) == [LARGE, 0]


def test_minus_one_is_replaced_and_printed(capsys):
    assert seeds.settle(5, 6) == 5
    assert capsys.readouterr().err == ""
    drawn = [seeds.settle(-1) for _ in range(4)]
    assert len(set(drawn)) == 4
    lines = [f"--seed -1: drew seed {seed}\n" for seed in drawn]
    assert capsys.readouterr().err == "".join(lines)
    assert seeds.settle(-1, 0) == 0
    assert capsys.readouterr().err == "--seed -1: keeps seed 0\n"


@pytest.mark.parametrize("text", ["-2", str(2**64), "1.5", "x"])
def test_other_seeds_are_refused(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        cli.seed(text)


def test_sample_py_draws_and_stores_a_random_seed(tmp_path):
    words = ["--prompt", "a star", "--steps", 1, "--num-images", 2, "--dtype", "float32"]
    done = warm.run([ROOT / "sample.py", *words, "--seed", -1, "--out", tmp_path / "a"])
    assert done.returncode == 0, done.stderr
    stored = []
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as image:
            stored.append(int(image.text["seed"]))
    first = min(stored)
    assert sorted(stored) == [first, first + 1]
    assert f"--seed -1: drew seed {first}\n" in done.stderr

    done = warm.run([ROOT / "sample.py", *words, "--seed", LARGE, "--out", tmp_path / "b"])
    assert done.returncode == 0, done.stderr
    large = Image.open(tmp_path / "b" / f"a-star-{LARGE}.png")
    next_seed = Image.open(tmp_path / "b" / "a-star-0.png")
    assert large.text["seed"] == str(LARGE)
    assert large.tobytes() != next_seed.tobytes()


def test_packing_keeps_a_random_seed(tmp_path):
    words = ["shapes", tmp_path / "out", "-n", 3, "--workers", 1, "--image-size", 8, "--seed"]

    def pack(*more, code=0):
        done = warm.run([ROOT / "prepare_data.py", *words, *more])
        assert done.returncode == code, done.stderr
        return done
    first = pack(-1)
    seed = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["seed"]
    assert f"drew seed {seed}\n" in first.stderr
    again = pack(-1)
    assert f"keeps seed {seed}\n" in again.stderr
    assert "already complete" in again.stdout
    assert "drew" in pack(-1, "--overwrite").stderr
    pack(LARGE, "--overwrite")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["seed"] == LARGE

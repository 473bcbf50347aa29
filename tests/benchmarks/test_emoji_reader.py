"""benchmarks/emoji_reader.py: its texts, its scores, and a tiny run from shards to a text tower."""
import random
from collections import Counter
from itertools import islice

import pytest
import torch
import warm
from conftest import ROOT
from launching import ENV
from safetensors.torch import load_file
from tiny_shards import index, scene, write_shard

from benchmarks import emoji_reader
from benchmarks.emoji_reader import Pair
from fusedit import FuseDiTError, preset
from fusedit_lib.pretrained import build_model
from fusedit_lib.shapes.training_text import PAD_ID, SPECIAL_TOKENS

NAMES = "apple", "boat", "camel", "drum", "eagle", "flute"
BOS = SPECIAL_TOKENS.index("<bos>")
EOS = SPECIAL_TOKENS.index("<eos>")
UNK = SPECIAL_TOKENS.index("<unk>")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards: each of NAMES in two styles, with four captions."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for name in NAMES:
        for style in ("flat", "3d"):
            synthetic = f"{name}, {style}\n{style} {name.upper()}\n{style} emoji: tag{name}\n"
            files = {"synthetic_caption.txt": synthetic,
                     "original_caption.txt": f"{name} drawn {style}"}
            samples.append(scene(f"{style}-{name}", **files))
    write_shard(folder / "a.tar", samples[:5])
    write_shard(folder / "b.tar", samples[5:])
    index(folder)
    return folder


@pytest.fixture(scope="module")
def captions(shards):
    return emoji_reader.read_captions(shards)


@pytest.fixture(scope="module")
def words(captions):
    return emoji_reader.vocabulary(captions)


def test_the_words_are_those_of_the_captions(captions, words):
    assert len(captions) == 2 * len(NAMES)
    assert captions[0] == ["apple, flat", "flat APPLE", "flat emoji: tagapple",
                           "apple drawn flat"]
    tags = [f"tag{name}" for name in NAMES]
    expected = [*SPECIAL_TOKENS, *NAMES, *tags, ",", ":", "flat", "3d", "emoji", "drawn"]
    assert Counter(words) == Counter(expected)
    assert words[:len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    encoded = emoji_reader.encode_captions([["APPLE, zebra"]], words)
    assert encoded == [[[words.index("apple"), words.index(","), UNK]]]


def test_held_out_captions_are_in_no_training_text(captions, words):
    encoded = emoji_reader.encode_captions(captions, words)
    remaining, pairs = emoji_reader.hold_out(encoded, random.Random(0), count=9)
    held_out = [pair.first for pair in pairs]
    assert len(pairs) == 9
    assert sum(map(len, remaining)) == sum(map(len, encoded)) - 9

    texts = emoji_reader.training_texts(remaining, words, 8, random.Random(0))
    firsts = []
    unknown = 0
    for batch, _ in islice(texts, 50):
        assert batch.shape[0] == 8
        for row in batch.tolist():
            tokens = [token for token in row if token != PAD_ID]
            assert tokens[0] == BOS and tokens[-1] == EOS and tokens.count(BOS) == 2
            middle = tokens.index(BOS, 1)
            first = tokens[1:middle]
            second = tokens[middle + 1:-1]
            sample = [of_sample for of_sample in remaining if second in of_sample]
            assert len(sample) == 1 and UNK not in second
            if UNK in first:
                unknown += first.count(UNK)
            else:
                assert first in sample[0] and first != second
                firsts.append(first)
    assert not any(first in held_out for first in firsts)
    assert 0 < unknown < 0.15 * sum(map(len, firsts))


def test_samples_with_few_captions_are_an_error():
    with pytest.raises(FuseDiTError, match="three different captions"):
        emoji_reader.hold_out([[[4, 5], [6, 7]]], random.Random(0))


class Copier:
    """A model that predicts the next token of the row itself with a logit of 50, and others 0."""
    device = "cpu"

    def __call__(self, input_ids):
        following = torch.roll(input_ids, -1, dims=1)
        self.logits = 50.0 * torch.nn.functional.one_hot(following, 12)
        return self


def test_scores_are_of_the_second_captions_words():
    words = [*SPECIAL_TOKENS, *"abcdefgh"]
    pairs = [Pair([4, 5, 6], [7, 8]), Pair([4], [9, 9, 9])]
    score = emoji_reader.score_model(Copier(), pairs, words)
    assert score == pytest.approx((0, 1), abs=1e-6)

    class OnlyNines(Copier):
        def __call__(self, input_ids):
            return super().__call__(torch.full_like(input_ids, 9))

    score = emoji_reader.score_model(OnlyNines(), pairs, words)
    assert score == pytest.approx((2 / 5 * 50, 3 / 5))

    # 12 words, each counted once more: 9 has 3 of 16 counts, and 7 and 8 have one
    score = emoji_reader.score_frequencies([[[9, 9, 7]]], [Pair([4], [9, 8])], words)
    expected = -sum(torch.tensor([3 / 15, 1 / 15]).log().tolist()) / 2
    assert score == pytest.approx((expected, 1 / 2))


def test_the_dit_is_that_of_the_real_gemma(shards, tmp_path):
    out = tmp_path / "reader"
    argv = [ROOT / "benchmarks/emoji_reader.py", shards, out, "--steps", "2", "--batch-size", "2",
            "--layers", "2", "--device", "cpu"]
    done = warm.run(argv, ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after a caption of another image" in done.stdout

    config = preset("demo", base=str(out), dit_num_hidden_layers=2, dit_hidden_size=64)
    model = build_model(config)
    heads = model.dit.layers[0].self_attn
    assert heads.q_proj.weight.shape == (4 * 256, 64)
    assert heads.k_proj.weight.shape == (256, 64)
    assert model.dit.layers[0].mlp.up_proj.weight.shape == (2048, 64)
    text = model.encode(["apple, flat", "zebra"])
    assert text.mask.sum(1).tolist() == [4, 2]

    before = load_file(out / "model.safetensors")
    again = warm.run(argv, ENV)
    assert again.returncode == 1 and "is not empty" in again.stderr
    assert len(again.stderr.strip().split("\n")[-1]) < 300 and "Traceback" not in again.stderr
    again = warm.run([*argv, "--overwrite"], ENV)
    assert again.returncode == 0, again.stderr[-3000:]
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, before[name]), name

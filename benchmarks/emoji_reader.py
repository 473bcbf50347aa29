"""Trains a small Gemma 3 that knows only the words of the emoji's captions, as a baseline.

    python prepare_data.py emoji shards/emoji
    python benchmarks/emoji_reader.py shards/emoji/train my-reader
    python train_gpu.py --preset emoji --base my-reader --set initial_layers=0 ...

A DiT trained on this text tower, instead of the real Gemma 3 270M, shows how much of the real one's
knowledge of other words reaches the images. The attention heads and the MLP have the real one's
shape, so that the DiT has the same number of parameters.

A text is a caption of an image, followed by another caption of the same image. To predict the
second one, the keys and values at the words of the first have to carry what it says. The report
shows how well the second caption is predicted after a caption that training has never contained,
and as controls, after a caption of another image and from the frequencies of the words alone.
"""
import argparse
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fusedit_lib import seeds, threads

threads.limit_spinning()                    # before torch is imported

import torch
import torch.nn.functional as F

from fusedit import FuseDiTError
from fusedit_lib import cli
from fusedit_lib.backend import pick_device
from fusedit_lib.data.layout import caption_lines, find_captions
from fusedit_lib.data.shards import ShardReader, expand_shards
from fusedit_lib.shapes import tiny_gemma
from fusedit_lib.shapes.training_text import PAD_ID, SPECIAL_TOKENS, padded_batches

HELD_OUT = 256                              # captions that training never contains
UNKNOWN = 0.05                              # share of the first captions' words that become <unk>


class Pair(NamedTuple):
    """Two captions of the same image, as token ids without special tokens."""
    first: list[int]
    second: list[int]


class Score(NamedTuple):
    """Prediction of the words of second captions."""
    loss: float                             # mean cross entropy in nats
    accuracy: float                         # share of words that are the most likely ones


# ---------------------------------------------------------------------------- captions
def read_captions(folder: Path) -> list[list[str]]:
    """The different captions of each sample of a folder of shards. Raises FuseDiTError."""
    shards = expand_shards(str(folder))
    reader = ShardReader(shards, len(shards), cache="")
    result = []
    for number, shard in enumerate(shards):
        for i in range(shard.samples):
            try:
                texts = find_captions(reader.read(number, i)).values()
            except ValueError as e:
                raise FuseDiTError(f"cannot read sample {i} of {shard.path} ({e}): `python "
                                   f"prepare_data.py check {folder}` lists all problems") from None
            lines = [line for text in texts for line in caption_lines(text)]
            result.append(list(dict.fromkeys(lines)))
    return result


def vocabulary(captions: list[list[str]]) -> list[str]:
    """Special tokens and then every word of the captions. A word's index is its token id."""
    tokenizer = tiny_gemma.build_tokenizer(list(SPECIAL_TOKENS)).backend_tokenizer
    words = dict.fromkeys(SPECIAL_TOKENS)
    for caption in (caption for of_sample in captions for caption in of_sample):
        text = tokenizer.normalizer.normalize_str(caption)
        words |= dict.fromkeys(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return list(words)


def encode_captions(captions: list[list[str]], words: list[str]) -> list[list[list[int]]]:
    """The token ids of each caption of each sample, without special tokens."""
    tokenizer = tiny_gemma.build_tokenizer(words)
    return [tokenizer(of_sample, add_special_tokens=False)["input_ids"] for of_sample in captions]


def hold_out(captions: list[list[list[int]]], rng: random.Random, count=HELD_OUT):
    """Remove one caption each from `count` random samples.

    Returns the captions that remain, and a Pair of each removed caption and one that remains.
    Raises FuseDiTError if no sample has the three captions that this takes.
    """
    enough = [i for i, of_sample in enumerate(captions) if len(of_sample) >= 3]
    if not enough:
        raise FuseDiTError("no sample has three different captions: make the shards with "
                           "`prepare_data.py emoji`, and give its OUT/train")
    remaining = [list(of_sample) for of_sample in captions]
    pairs = []
    for i in rng.sample(enough, min(count, len(enough))):
        first = remaining[i].pop(rng.randrange(len(remaining[i])))
        pairs.append(Pair(first, rng.choice(remaining[i])))
    return remaining, pairs


def join(pair: Pair, words: list[str]) -> list[int]:
    """The token ids of the text "<bos> first <bos> second <eos>"."""
    bos = words.index("<bos>")
    return [bos, *pair.first, bos, *pair.second, words.index("<eos>")]


def training_texts(captions: list[list[list[int]]], words: list[str], batch_size: int,
                   rng: random.Random):
    """Yield batches of random texts, as tiny_gemma.train takes them.

    A share UNKNOWN of the first captions' words is replaced by <unk>, which would otherwise have an
    embedding that was never used, and the other words would have to be understood beside it.
    """
    several = [of_sample for of_sample in captions if len(of_sample) > 1]
    unknown = words.index("<unk>")

    def draw_row():
        pair = Pair(*rng.sample(rng.choice(several), 2))
        first = list(pair.first)
        for i in range(len(first)):
            if rng.random() < UNKNOWN:
                first[i] = unknown
        return join(pair._replace(first=first), words), None

    return padded_batches(rng, batch_size, draw_row)


# ---------------------------------------------------------------------------- model
def build(vocab_size: int, layers: int):
    """A randomly initialised Gemma 3 with the heads and the MLP of the 270M, and narrower."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    config = Gemma3TextConfig(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=layers, intermediate_size=2048,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        max_position_embeddings=512, sliding_window=512, tie_word_embeddings=True,
        attn_implementation="sdpa", pad_token_id=PAD_ID, eos_token_id=1, bos_token_id=2,
        initializer_range=0.05)
    return Gemma3ForCausalLM(config)


# ---------------------------------------------------------------------------- report
@torch.no_grad()
def score_model(model, pairs: list[Pair], words: list[str]) -> Score:
    """The Score of a model that predicts the second captions after the first ones."""
    losses = []
    right = []
    for start in range(0, len(pairs), 64):
        batch = pairs[start:start + 64]
        rows = [torch.tensor(join(pair, words)) for pair in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        logits = model(input_ids=ids.to(model.device)).logits.float().cpu()
        for pair, row, row_logits in zip(batch, ids, logits, strict=True):
            begin = len(pair.first) + 2
            end = begin + len(pair.second)
            target = row[begin:end]
            predicted = row_logits[begin - 1:end - 1]
            losses.append(F.cross_entropy(predicted, target, reduction="none"))
            right.append(predicted.argmax(-1) == target)
    return Score(torch.cat(losses).mean().item(), torch.cat(right).float().mean().item())


def score_frequencies(captions: list[list[list[int]]], pairs: list[Pair], words) -> Score:
    """The Score of the frequencies that the words have in the captions, each counted once more."""
    counts = Counter(range(len(words)))
    for of_sample in captions:
        for caption in of_sample:
            counts.update(caption)
    log_p = torch.tensor([counts[i] for i in range(len(words))]).float().log()
    log_p -= log_p.logsumexp(0)
    target = torch.tensor([word for pair in pairs for word in pair.second])
    accuracy = (target == log_p.argmax()).float().mean()
    return Score(-log_p[target].mean().item(), accuracy.item())


def print_report(model, captions, pairs: list[Pair], words) -> None:
    """Print the scores of held-out pairs and of both controls."""
    others = pairs[1:] + pairs[:1]
    shuffled = [pair._replace(first=other.first) for pair, other in zip(pairs, others, strict=True)]
    scores = {
        "after a caption that is not in training": score_model(model, pairs, words),
        "after a caption of another image": score_model(model, shuffled, words),
        "from the frequencies of words": score_frequencies(captions, pairs, words),
    }
    print(f"words of {len(pairs)} second captions           loss    correct")
    for name, score in scores.items():
        print(f"{name:<40}{score.loss:8.3f}{score.accuracy:11.1%}")


# ---------------------------------------------------------------------------- program
def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("shards", type=Path, metavar="SHARDS",
                   help="the folder OUT/train of prepare_data.py emoji")
    p.add_argument("out", type=Path, metavar="OUT", help="folder for the model and its tokenizer")
    p.add_argument("--layers", type=cli.positive, default=4, metavar="N",
                   help="number of layers; the DiT of the preset emoji reads 4")
    p.add_argument("--steps", type=cli.positive, default=2000, metavar="N",
                   help="number of training steps")
    p.add_argument("--batch-size", type=cli.positive, default=64, metavar="N",
                   help="number of texts per step")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--seed", type=cli.seed, default=0, help="random seed; -1: draw one")
    p.add_argument("--overwrite", action="store_true", help="replace the model in OUT")
    return p.parse_args()


def main():
    args = parse_args()
    args.seed = seeds.settle(args.seed)
    device = pick_device(args.device)
    with tiny_gemma.replaced_folder(args.out, args.overwrite) as tmp:
        captions = read_captions(args.shards)
        words = vocabulary(captions)
        rng = random.Random(f"emoji text {args.seed}")
        captions, pairs = hold_out(encode_captions(captions, words), rng)

        torch.manual_seed(seeds.torch_seed(args.seed))
        model = build(len(words), args.layers).to(device)
        print(f"{len(words)} words, {model.num_parameters() / 1e6:.1f} M parameters")
        texts = training_texts(captions, words, args.batch_size, rng)
        tiny_gemma.train(model, texts, args.steps, args.lr, device)
        print_report(model, captions, pairs, words)
        tiny_gemma.save(model, words, tmp)


if __name__ == "__main__":
    cli.run(main, "--batch-size")

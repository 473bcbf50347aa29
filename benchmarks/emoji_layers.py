"""Shows in which layers of a Gemma words with similar meanings are alike.

    python benchmarks/emoji_layers.py google/gemma-3-270m

A DiT that reads a layer can draw a word that it was never trained on only if Gemma's values there
resemble those of a word that it was trained on. This script measures how much they do, without
training anything. The words are emojibase's: every tag that at most three emoji have is looked up
among all labels, by the cosine similarity of the values, which are averaged over the tokens and
standardised. The table shows how often the nearest labels include one of an emoji with this tag.
Tags that are a word of such a label do not count.
"""
import argparse
import json
from collections import defaultdict
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch
import torch.nn.functional as F

from fusedit import FuseDiTConfig, FuseDiTError, tokenize
from fusedit_lib import backend, cli
from fusedit_lib.data.emoji_captions import tags_of
from fusedit_lib.pretrained import build_model

RARE = 3                                    # emoji that a tag may have
BATCH = 64                                  # texts that Gemma encodes at a time
NEAREST = (1, 5, 20)                        # columns of the table


def rare_tags(entries):
    """{tag: the labels of the emoji that have it}, for words that are in no such label."""
    labels_with = defaultdict(set)
    for entry in entries:
        label = entry["label"].lower()
        for tag in tags_of(entry):
            labels_with[tag].add(label)
    rare = {}
    for tag, labels in labels_with.items():
        words = " ".join(labels).replace(":", "").split()
        if len(labels) <= RARE and tag.isalpha() and tag not in words:
            rare[tag] = labels
    return rare


@torch.no_grad()
def mean_values(model, texts):
    """The values of each layer, averaged over the tokens of a text: [texts, layers, K*h]."""
    means = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start:start + BATCH]
        ids, mask = tokenize(model.tokenizer, batch, model.config)
        features = model.encode_ids(ids, mask)
        is_word = mask.clone()
        is_word[:, 0] = False                                           # <bos>
        weight = is_word / is_word.sum(1, keepdim=True)                 # [B,T]
        for_layers = [torch.einsum("bkth,bt->bkh", values.float(), weight).flatten(1)
                      for values in features.values]
        means.append(torch.stack(for_layers, 1))
    return torch.cat(means)


def ranks(queries, labels, answers):
    """The rank, from 0, of the first right label for each query.

    queries [Q,D], labels [N,D]; answers: a set of indices of labels for each query.
    """
    similarity = F.normalize(queries, dim=-1) @ F.normalize(labels, dim=-1).T        # [Q,N]
    order = similarity.argsort(1, descending=True).tolist()
    return [next(rank for rank, label in enumerate(row) if label in right)
            for row, right in zip(order, answers, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("base", metavar="GEMMA", help="folder or hub id of a Gemma")
    parser.add_argument("--words", type=Path, metavar="FILE",
                        default=Path("~/.cache/fusedit/emoji/words/data.json").expanduser(),
                        help="emojibase's data.json, which `prepare_data.py emoji` downloads")
    args = parser.parse_args()
    if not args.words.exists():
        raise FuseDiTError(f"{args.words} does not exist: run `prepare_data.py emoji` first")
    entries = json.loads(args.words.read_text())
    tags = rare_tags(entries)
    all_labels = sorted({entry["label"].lower() for entry in entries})
    index = {label: i for i, label in enumerate(all_labels)}
    answers = [{index[label] for label in labels} for labels in tags.values()]

    backend.configure(torch.device("cpu"), torch.bfloat16)
    config = FuseDiTConfig(base=args.base, dit_hidden_size=16, in_channels=3, vae=None)
    model = build_model(config, dtype=torch.bfloat16)
    labels = mean_values(model, all_labels)
    queries = mean_values(model, list(tags))
    mean = labels.mean(0)
    std = labels.std(0)
    labels = (labels - mean) / std
    queries = (queries - mean) / std

    print(f"{len(tags)} tags, {len(all_labels)} labels")
    print("layer" + "".join(f"{f'top-{k}':>8}" for k in NEAREST))
    for layer in range(labels.shape[1]):
        found = ranks(queries[:, layer], labels[:, layer], answers)
        shares = [sum(rank < k for rank in found) / len(found) for k in NEAREST]
        print(f"{layer:5}" + "".join(f"{share:8.3f}" for share in shares))


if __name__ == "__main__":
    cli.run(main, "a smaller Gemma")

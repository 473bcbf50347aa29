"""The readers of ablations.py: small frozen Gemmas that differ in the text they were trained on.

A reader is an entry of READERS. docs/ablations.md says how to add one.
"""
import random
from pathlib import Path

import torch

from fusedit import FuseDiTError
from fusedit_lib.cli import DEMO
from fusedit_lib.seeds import torch_seed
from fusedit_lib.shapes import scenes, tiny_gemma
from fusedit_lib.shapes.training_text import (
    Part,
    encode,
    padded_batches,
    split_words,
    vocabulary,
)

BUNDLED = DEMO / "gemma"                    # the reader "questions"
BATCH = 64                                  # texts per step; this and the rate are the defaults of
LEARNING_RATE = 2e-3                        # prepare_data.py tiny-gemma, with which the bundled
                                            # reader was made


def captions_alone(caption, rng):
    return [caption]


def captions_twice(caption, rng):
    return [caption, caption]


# name -> the function that makes a training text from a caption, which ends with " .". It returns a
# list of pieces, of which those that no longer fit into MAX_TOKENS are left out. rng is a
# random.Random for texts that vary. All words have to be in the vocabulary of the shapes, because
# the readers share a tokenizer.
READERS = {
    "questions": None,                      # comes with the repository (training_text.py)
    "captions": captions_alone,
    "twice": captions_twice,
}


def reader_batches(reader, rng, ids):
    """Yield batches of token ids [B,T] of a reader's text indefinitely, with notes.

    ids: {word: its token id}. Raises FuseDiTError for a word that is not there.
    """
    def draw_row():
        description = scenes.omit_defaults(scenes.training_scene(rng), rng)
        caption = scenes.caption(description, rng) + " ."
        pieces = READERS[reader](caption, rng)
        for word in split_words(" ".join(pieces)):
            if word not in ids:
                raise FuseDiTError(f"reader {reader!r}: {word!r} is not in the vocabulary of the "
                                   "shapes (fusedit_lib/shapes/training_text.py)")
        return encode([Part(words, kind="") for words in pieces], ids)

    return padded_batches(rng, BATCH, draw_row)


def make_reader(reader, out: Path, steps, device) -> Path:
    """Train a reader in OUT/readers, unless it is there. Returns its folder.

    It is trained like the bundled one (tiny_gemma.make), on other text. out: OUT.
    """
    if reader == "questions":
        return BUNDLED
    folder = out / "readers" / f"{reader}-{steps}-steps"
    if folder.exists():
        return folder
    print(f"training the reader {reader!r}: {steps} steps")
    torch.manual_seed(torch_seed(0))
    words = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    with tiny_gemma.replaced_folder(folder, overwrite=False) as tmp:
        model = tiny_gemma.build(len(words)).to(device)
        texts = reader_batches(reader, random.Random(f"text {reader}"), ids)
        tiny_gemma.train(model, texts, steps, LEARNING_RATE, device)
        tiny_gemma.save(model, words, tmp)
    return folder

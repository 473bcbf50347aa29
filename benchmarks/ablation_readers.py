"""The readers of ablations.py: small frozen Gemmas that differ in the text they were trained on."""
import random
from pathlib import Path

import torch

from fusedit import FuseDiTError
from fusedit_lib.cli import DEMO
from fusedit_lib.seeds import torch_seed
from fusedit_lib.shapes import scenes, tiny_gemma
from fusedit_lib.shapes.training_text import Part, encode, padded_batches, vocabulary

BUNDLED = DEMO / "gemma"                    # the reader "questions"
BATCH = 64                                  # texts per step; this and the rate are the defaults of
LEARNING_RATE = 2e-3                        # prepare_data.py tiny-gemma, with which the bundled
                                            # reader was made


def reader_text(reader, description, rng):
    """A training text of the reader "captions" or "twice", as a list of Parts."""
    caption = scenes.caption(description, rng) + " ."
    if reader == "captions":
        return [Part(caption, "")]
    if reader == "twice":
        return [Part(caption, ""), Part(caption, "twice")]
    raise FuseDiTError(f"no text is known for the reader {reader!r}: add it to reader_text in "
                       "benchmarks/ablation_readers.py")


def reader_batches(reader, rng, ids):
    """Yield batches of token ids [B,T] of a reader's text indefinitely, with notes.

    ids: {word: its token id}.
    """
    def draw_row():
        description = scenes.omit_defaults(scenes.training_scene(rng), rng)
        return encode(reader_text(reader, description, rng), ids)

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

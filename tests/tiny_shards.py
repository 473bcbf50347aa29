"""Small shards in the training format, and batches from them, for tests of loading and training."""
import io
import tarfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from fusedit_lib import pretrained
from fusedit_lib.data import index as index_module
from fusedit_lib.data.batches import Batches
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
# --set for a tiny model; the last two are as in the paper's final model
SHAPE = [
    "image_size=16",
    "patch_size=4",
    "dit_hidden_size=32",
    "initial_layers=0",
    "dit_num_hidden_layers=null",
    "max_text_tokens=8",
    "sandwich_norm=true",
    "timestep_conditioning=null",
]
# Flags that give every sample its original caption, which ends with its key.
ORIGINAL_CAPTIONS = ["--caption-drop", "0", "--original-caption-rate", "1"]


# ------------------------------------------------------------------------------ shards

def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def add_file(tar, name, content):
    """Add a file of bytes or text to an open tar."""
    if isinstance(content, str):
        content = content.encode()
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shard(path, samples):
    """Write a tar; samples: a list of (key, {extension: bytes or str})."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, content in files.items():
                add_file(tar, f"{key}.{extension}", content)


def scene(key, colour="red", size=(16, 16), **changes):
    """A single-colour sample for write_shard. changes: {extension: content, or None to omit it}."""
    files = {
        "image.png": png(Image.new("RGB", size, COLOURS[colour])),
        "synthetic_caption.txt": f"a {colour} square",
        "original_caption.txt": f"{colour} of {key}",
    }
    files |= changes
    files = {name: content for name, content in files.items() if content is not None}
    return key, files


def index(folder, offsets=True):
    """Write index.json and, unless offsets is False, offsets.npy for a folder of shards."""
    index_module.index(Namespace(folder=Path(folder), workers=1, image_key="", caption_key=""))
    if not offsets:
        (Path(folder) / "offsets.npy").unlink()


def sample_names(first, last):
    """The keys of samples of numbered(): "n00", "n01", ..."""
    return [f"n{i:02d}" for i in range(first, last)]


def numbered(folder, shards=3, samples=8, colour=None):
    """A folder of indexed shards, whose keys and original captions contain the sample's number."""
    folder.mkdir(exist_ok=True)
    colours = list(COLOURS)
    for s in range(shards):
        names = sample_names(samples * s, samples * (s + 1))
        scenes = []
        for i, name in enumerate(names):
            scenes.append(scene(name, colour or colours[i % 3]))
        write_shard(folder / f"s-{s}.tar", scenes)
    index(folder)
    return folder


# ------------------------------------------------------------------------------ batches

def tiny_batches(gemma, data, *flags, micro_batch=4, accumulation=1, rank=0, world=1, start=0,
                 changes=()):
    """Batches from a folder or pattern, or from a list of them. changes: of a RunConfig."""
    if isinstance(data, str | Path):
        data = [data]
    batch = micro_batch * accumulation * world
    argv = ["--base", str(gemma), "--batch", str(batch), "--set", *SHAPE, *flags]
    if data:
        argv += ["--data", *map(str, data)]
    run = replace(parse_run(argv, ""), changes=changes)
    files = pretrained.open_gemma(gemma)
    tokenizer = pretrained.load_tokenizer(files.tokenizer, files.config["vocab_size"])
    return Batches(run, model_config(run), tokenizer, micro_batch, accumulation, rank, world,
                   start)


def in_turn(tensors):
    """Tensors of the ranks, each [B,...], as one [W*B,...] in the order of the positions."""
    return torch.stack(tensors, 1).flatten(0, 1)


def batch_keys(batch):
    """The keys of a batch's samples, read from the end of their original captions."""
    return [caption.split()[-1] for caption in batch["captions"]]


def sample_keys(batches, count):
    """The keys of micro-batches 0 .. count - 1, as one list per micro-batch."""
    return [batch_keys(batches[m]) for m in range(count)]

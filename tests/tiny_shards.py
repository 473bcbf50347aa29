"""Small shards in the data sets' format, for the tests of loading and of training."""
import io
import tarfile
from argparse import Namespace
from pathlib import Path

from PIL import Image

from fusedit_lib.data import check

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SHAPE = ["image_size=16", "patch_size=4", "dit_hidden_size=32", "initial_layers=0",
         "dit_num_hidden_layers=null", "max_text_tokens=8",
         "sandwich_norm=true", "timestep_conditioning=null"]    # as the paper's final model


def png(image):
    box = io.BytesIO()
    image.save(box, "png")
    return box.getvalue()


def write_shard(path, samples):
    """samples: (key, {extension: bytes or str})"""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for ext, content in files.items():
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def scene(key, colour="red", size=(16, 16), **changes):
    files = {"image.png": png(Image.new("RGB", size, COLOURS[colour])),
             "synthetic_caption.txt": f"a {colour} square",
             "original_caption.txt": f"{colour} of {key}"}
    return key, {k: v for k, v in (files | changes).items() if v is not None}


def index(folder, offsets=True):
    check.index(Namespace(folder=Path(folder), workers=1))
    if not offsets:
        (Path(folder) / "offsets.npy").unlink()


def numbered(folder, shards=3, samples=8, colour=None):
    """Shards of samples whose original captions carry their number."""
    folder.mkdir(exist_ok=True)
    for s in range(shards):
        write_shard(folder / f"s-{s}.tar", [
            scene(f"n{samples * s + i:02d}", colour or list(COLOURS)[i % 3])
            for i in range(samples)])
    index(folder)
    return folder

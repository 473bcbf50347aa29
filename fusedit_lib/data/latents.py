"""A VAE's latents of shards, written once beside them, so that training need not encode pictures.

    cc12m-000012.tar                    the samples
    cc12m-000012.latents.safetensors    latents [samples, 2*16, H/8, W/8], bf16: the posterior's
                                        mean and log variance of each picture, its shorter side
                                        resized to H, cut to its central square, not flipped;
                                        whole [samples]: 0 where the picture cannot be read

Training draws from the posterior with the noise that it would have used on pixels.
"""
import json
import sys

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.backend import rank_and_world
from fusedit_lib.cli import pick_dtype
from fusedit_lib.data import check, packing
from fusedit_lib.data.images import read_square
from fusedit_lib.data.shards import LATENTS, read_index, read_sample
from fusedit_lib.files import atomic_write, save_file
from fusedit_lib.pretrained import vae_fingerprint
from fusedit_lib.vae import load_vae


class Pictures(Dataset):
    """Every picture of a shard as uint8 [3,H,W], and whether it could be read."""

    def __init__(self, path, offsets, size):
        self.path, self.offsets, self.size = path, offsets, size

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        try:
            with open(self.path, "rb") as tar:
                _, files = read_sample(tar, self.offsets, i)
            name = next(k for k in files if k.startswith("image."))
            return read_square(files[name], self.size), 1
        except MemoryError:
            raise
        except Exception:                   # Pillow raises a dozen kinds on broken files
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0


def beside(tar):
    return tar.with_name(tar.stem + LATENTS)


def stored(tar):
    """What the latents of a shard say of themselves, or {} if there are none that can be read."""
    try:
        with safe_open(beside(tar), "pt") as file:
            return json.loads(file.metadata()["encoded"])
    except (OSError, SafetensorError, TypeError, KeyError):
        return {}


@torch.no_grad()
def encode_shard(tar, vae, args, said, saw):
    """Write one shard's latents."""
    pictures = Pictures(tar, packing.index_entry(tar)["offsets"], args.image_size)
    device, n, side = next(vae.parameters()).device, len(pictures), args.image_size // vae.factor
    latents = torch.empty(n, 2 * vae.config.latent_channels, side, side, dtype=torch.bfloat16)
    whole, at = torch.empty(n, dtype=torch.uint8), 0
    for pixels, ok in DataLoader(pictures, args.batch_size, num_workers=args.workers,
                                 pin_memory=device.type == "cuda"):
        x = pixels.to(device, non_blocking=True).float().div_(127.5).sub_(1)   # [B,3,H,W]
        latents[at:at + len(ok)] = torch.cat(vae.moments(x), 1)
        whole[at:at + len(ok)] = ok
        at += len(ok)
        saw(len(ok))
    with atomic_write(beside(tar)) as tmp:
        save_file(dict(latents=latents, whole=whole), tmp,
                  dict(encoded=json.dumps(said)))          # one entry: several have no fixed order


def encode(args):
    rank, world = rank_and_world()
    (device, dtype), tars = pick_dtype(args), check.shards_of(args.folder)
    counts = {name: n for name, (n, *_) in read_index(str(args.folder)).items()}
    vae = load_vae(args.vae, device, dtype)
    if args.compile:
        backend.compile_vae(vae)
    if rank == 0:
        slow = backend.emulation_note(args.dtype, device)
        print(f"encoding in {args.dtype} on {device}", slow, file=sys.stderr)
    if args.image_size % vae.factor:
        raise FuseDiTError(f"--image-size {args.image_size} is not a multiple of {vae.factor}")
    of = dict(vae=vae_fingerprint(args.vae), image_size=args.image_size)
    said = {t: of | dict(shard=t.stat().st_size) for t in tars}
    other = [t.name for t in tars if stored(t) not in ({}, said[t])]
    if other and not args.overwrite:
        raise FuseDiTError(f"{other[0]} has latents of another VAE, size or shard already (as have "
                           f"{len(other) - 1} more): --overwrite replaces them")
    todo = [t for t in tars[rank::world] if stored(t) != said[t] and counts.get(t.name)]
    with tqdm(total=sum(counts[t.name] for t in todo), unit="image", desc="encoding",
              disable=None if rank == 0 else True, smoothing=0.05) as bar:
        for tar in todo:
            for old in args.folder.glob(f".{beside(tar).name}.*.tmp"):         # of a killed run
                old.unlink()
            encode_shard(tar, vae, args, said[tar], bar.update)
    if all(stored(t) == said[t] for t in tars if counts.get(t.name)):          # whoever ends last
        announce(args.folder, of)


def announce(folder, of):
    """Say in index.json which latents there are: the loader looks nowhere else."""
    index = packing.read(folder / "index.json")
    for shard in index["shards"]:
        if shard["samples"]:
            shard["latents"] = of | dict(bytes=beside(folder / shard["name"]).stat().st_size)
    with atomic_write(folder / "index.json") as tmp:
        tmp.write_text(json.dumps(index, indent=1) + "\n")
    read_index.cache_clear()
    size = sum(shard["latents"]["bytes"] for shard in index["shards"] if shard["samples"])
    print(f"latents of {index['samples']} samples, {size / 1e9:.3f} GB: {folder}/*{LATENTS}")

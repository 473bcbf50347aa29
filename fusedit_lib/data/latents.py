"""`prepare_data.py encode`: encodes the images of shards to VAE latents, stored beside the shards.

Training then reads the latents and does not have to encode images at every step.

    cc12m-000012.tar                    the samples
    cc12m-000012.latents.safetensors    latents bf16 [samples,2*C,H/8,W/8]: mean and log variance of
                                        each image's posterior, after resizing the shorter side to H
                                        and cropping to the central square;
                                        whole uint8 [samples]: 0 where the image cannot be read

Training samples the posterior with the same noise that it would use with pixels.
"""
import json
import sys
from collections import Counter

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.backend import rank_and_world
from fusedit_lib.cli import pick_dtype
from fusedit_lib.data import packing
from fusedit_lib.data.images import Notes, read_square
from fusedit_lib.data.index import list_tars
from fusedit_lib.data.layout import find_image
from fusedit_lib.data.shards import LATENTS_SUFFIX, read_index, read_sample
from fusedit_lib.files import atomic_write, save_file
from fusedit_lib.folders import vae_fingerprint
from fusedit_lib.vae import load_vae


UNREADABLE = "unreadable image, which training skips"


class ShardImages(Dataset):
    """The images of a shard. self[i] is (uint8 [3,size,size], 1, notes on its flaws, a line each).

    An image that cannot be read is (zeros, 0, UNREADABLE).
    """

    def __init__(self, path, offsets, size, resize, image_key):
        self.path = path
        self.offsets = offsets
        self.size = size
        self.resize = resize
        self.image_key = image_key

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        try:
            with open(self.path, "rb") as tar:
                _, files = read_sample(tar, self.offsets, i)
            name = find_image(files, self.image_key)
            with Notes() as notes:
                pixels = read_square(files[name], self.size, resize=self.resize)
            return pixels, 1, "\n".join(notes.take())
        except MemoryError:
            raise
        except Exception:                   # Pillow raises many kinds of errors on broken files
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, UNREADABLE


# ------------------------------------------------------------------------------ one shard

def latents_path(tar):
    """The path of a shard's latents; tar: path of the shard."""
    return tar.with_name(tar.stem + LATENTS_SUFFIX)


def read_description(tar):
    """The description stored with a shard's latents; {} if they are missing or unreadable."""
    try:
        with safe_open(latents_path(tar), "pt") as file:
            # Latents of an earlier version do not name their filter, which was bicubic.
            return {"resize": "bicubic"} | json.loads(file.metadata()["encoded"])
    except (OSError, SafetensorError, TypeError, KeyError):
        return {}


@torch.no_grad()
def encode_shard(tar, vae, args, description, progress):
    """Write the latents of one shard. Returns the number of notes on its images, by kind.

    description: a dict to store with them; progress: called with the number of images encoded.
    """
    offsets = packing.index_entry(tar)["offsets"]
    images = ShardImages(tar, offsets, args.image_size, args.resize, args.image_key)
    device = next(vae.parameters()).device
    loader = DataLoader(images, args.batch_size, num_workers=args.workers,
                        pin_memory=device.type == "cuda")

    side = args.image_size // vae.factor
    channels = 2 * vae.config.latent_channels
    latents = torch.empty(len(images), channels, side, side, dtype=torch.bfloat16)
    whole = torch.empty(len(images), dtype=torch.uint8)
    begin = 0
    noted = Counter()
    for pixels, readable, notes in loader:                 # uint8 [B,3,H,W], [B], B strings
        end = begin + len(pixels)
        x = pixels.to(device, non_blocking=True).float().div_(127.5).sub_(1)
        latents[begin:end] = torch.cat(vae.moments(x), 1)  # [B,2*C,h,w]
        whole[begin:end] = readable
        begin = end
        noted.update("\n".join(notes).split("\n"))
        progress(len(pixels))

    tensors = dict(latents=latents, whole=whole)
    # This is a single entry, since safetensors writes several entries in no fixed order.
    metadata = dict(encoded=json.dumps(description))
    with atomic_write(latents_path(tar)) as tmp:
        save_file(tensors, tmp, metadata)
    del noted[""]                           # of images without notes
    return noted


# ------------------------------------------------------------------------------ the command

def check_overwrite(descriptions, overwrite):
    """Raise FuseDiTError if shards have different latents already, unless overwrite is True."""
    other = []
    for tar, description in descriptions.items():
        if read_description(tar) not in ({}, description):
            other.append(tar.name)
    if other and not overwrite:
        raise FuseDiTError(f"{len(other)} shards, such as {other[0]}, already have latents "
                           "made with a different VAE, image size, --resize or --image-key, or "
                           "from an earlier version of the shard: --overwrite replaces them")


def encode_shards(tars, vae, args, descriptions, samples, rank):
    """Write the latents of several shards, with a progress bar on rank 0.

    At the end, a line for each kind of note says how many images have it. samples: {tar name:
    number of samples}.
    """
    disable = None                          # tqdm: show no bar if stderr is not a terminal
    if rank != 0:
        disable = True
    total = sum(samples[tar.name] for tar in tars)
    noted = Counter()
    finished = 0
    bar = tqdm(total=total, unit="image", desc="encoding", disable=disable, smoothing=0.05)
    try:
        with bar:
            for tar in tars:
                # delete temporary files of a killed run
                for old in args.folder.glob(f".{latents_path(tar).name}.*.tmp"):
                    old.unlink()
                noted += encode_shard(tar, vae, args, descriptions[tar], bar.update)
                finished += 1
    except BaseException:
        print(f"stopped: {finished} of {len(tars)} shards are encoded; repeat the command to "
              "resume", file=sys.stderr)
        raise
    for kind, count in noted.items():
        print(f"noted {kind}: {count} images", file=sys.stderr)


def encode(args):
    """Run `prepare_data.py encode`: write missing latents and list them in index.json.

    Under torchrun, the shards are divided among the ranks. Shards that already have these latents
    are skipped, so repeating the command resumes an interrupted run.
    """
    rank, world = rank_and_world()
    device, dtype = pick_dtype(args)
    tars = list_tars(args.folder)
    index = read_index(str(args.folder))
    samples = {name: shard.samples for name, shard in index.items()}

    if args.compile and device.type == "cuda":             # see compile_vae
        backend.check_compiler(device)
    vae = load_vae(args.vae, device, dtype)
    if args.compile:
        backend.compile_vae(vae)
    if rank == 0:
        text = f"encoding in {args.dtype} on {device}"
        slow = backend.emulation_note(args.dtype, device)
        if slow:
            text += f" ({slow})"
        print(text, file=sys.stderr)
    if args.image_size % vae.factor:
        raise FuseDiTError(f"--image-size {args.image_size} is not a multiple of {vae.factor}")

    # Existing latents are kept if they were made from the same shard, with these settings.
    wanted = dict(vae=vae_fingerprint(args.vae), image_size=args.image_size, resize=args.resize)
    if args.image_key:                      # left out otherwise, as in latents of earlier versions
        wanted["image_key"] = args.image_key
    descriptions = {tar: wanted | dict(shard=tar.stat().st_size) for tar in tars}
    check_overwrite(descriptions, args.overwrite)

    def is_missing(tar):
        return samples.get(tar.name) and read_description(tar) != descriptions[tar]

    missing = [tar for tar in tars[rank::world] if is_missing(tar)]
    encode_shards(missing, vae, args, descriptions, samples, rank)
    if not any(is_missing(tar) for tar in tars):           # true on the last rank to finish
        list_in_index(args.folder, wanted)


def list_in_index(folder, wanted):
    """List the latents in index.json, where training looks for them.

    wanted: vae, image_size, resize and perhaps image_key of all latents.
    """
    index = packing.read_json_or_none(folder / "index.json")
    size = 0
    for shard in index["shards"]:
        if shard["samples"]:
            file_size = latents_path(folder / shard["name"]).stat().st_size
            shard["latents"] = wanted | dict(bytes=file_size)
            size += file_size
    with atomic_write(folder / "index.json") as tmp:
        tmp.write_text(json.dumps(index, indent=1) + "\n")
    read_index.cache_clear()
    print(f"latents of {index['samples']} samples, {size / 1e9:.3f} GB: {folder}/*{LATENTS_SUFFIX}")

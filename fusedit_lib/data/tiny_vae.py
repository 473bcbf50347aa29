"""`prepare_data.py tiny-vae`: trains a small autoencoder on the images of shards.

It is a VAE of fusedit_lib/vae.py with narrow layers, for images such as 64 x 64 emoji, and is saved
like any other. It compresses every 4 x 4 patch of pixels (48 numbers) into a vector of 8.
"""
import json
import math
import sys
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.backend import pick_device
from fusedit_lib.data import packing
from fusedit_lib.data.index import list_tars
from fusedit_lib.data.latents import ShardImages
from fusedit_lib.files import atomic_folder, save_file
from fusedit_lib.seeds import torch_seed
from fusedit_lib.shapes.tiny_gemma import learning_rate
from fusedit_lib.vae import VAE, VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8,
    scaling_factor=1.0, shift_factor=0.0, mid_block_add_attention=False)

# The weight of the KL divergence, per latent, beside the error of the pixels, per pixel. A higher
# weight makes the posterior wider, so that the decoder tolerates larger errors of a diffusion model
# but draws less detail.
KL_WEIGHT = 5e-4

HELD_OUT = 50                               # one image in this many is only used for the report
MEASURED_IMAGES = 2000                      # maximum number for the statistics of the latents
NOISE = 0.2                                 # standard deviation, for the report

# The files that save() writes; --overwrite replaces a folder only if it contains nothing else.
FILES = {"config.json", "diffusion_pytorch_model.safetensors"}


# ---------------------------------------------------------------------------- images
def load_images(folder, size):
    """The readable images of a folder's shards, uint8 [N,3,size,size], in the order of the shards.

    Each is the central square of an image, resized. Raises FuseDiTError if there are fewer than 2.
    """
    found = []
    unreadable = 0
    for tar in tqdm(list_tars(folder), unit="shard", desc="reading", disable=None):
        offsets = packing.index_entry(tar)["offsets"]
        images = ShardImages(tar, offsets, size, "bicubic", "")
        for i in range(len(images)):
            pixels, readable, _ = images[i]
            if readable:
                found.append(pixels)
            else:
                unreadable += 1
    if unreadable:
        print(f"left out {unreadable} images that cannot be read", file=sys.stderr)
    if len(found) < 2:
        raise FuseDiTError(f"{folder} has {len(found)} readable images; at least 2 are needed")
    return torch.stack(found)


def to_pixels(images):
    """Images uint8 [B,3,H,W] as the VAE takes them, float32 in [-1,1]."""
    return images.float() / 127.5 - 1


def random_batch(images, count):
    """Pixels [count,3,H,W] of images drawn at random, half of them mirrored.

    In half of them the colour channels are in random order. Otherwise the VAE would not learn the
    colours that are rare in the images for a long time: of emoji, which are mostly yellow, it drew
    the green ones gray.
    """
    chosen = images[torch.randint(len(images), (count,))]
    mirrored = torch.rand(count) < 0.5
    chosen = torch.where(mirrored[:, None, None, None], chosen.flip(3), chosen)

    order = torch.rand(count, 3).argsort(1)                                      # [count,3]
    recoloured = chosen[torch.arange(count)[:, None], order]
    is_recoloured = torch.rand(count) < 0.5
    return to_pixels(torch.where(is_recoloured[:, None, None, None], recoloured, chosen))


# ---------------------------------------------------------------------------- training
def reconstruction_and_kl(vae, pixels):
    """The error of pixels [B,3,H,W] after encoding and decoding, and the KL divergence of the
    latents' posteriors from N(0,1) in nats: means over all pixels and over all latents.

    The error is the absolute plus the squared difference: the first keeps edges sharp, the second
    corrects areas of a wrong colour sooner.
    """
    mean, logvar = (moment.float() for moment in vae.moments(pixels))
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    decoded = vae.decoder(z.to(vae.decoder.conv_in.weight))
    difference = decoded.float() - pixels
    error = difference.abs().mean() + difference.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error, kl


def update(vae, weights, optimizer):
    """Update the VAE's parameters by their gradients.

    weights: the same parameters in float32, which the optimizer holds. In bfloat16 alone, small
    updates would be rounded away.
    """
    for weight, p in zip(weights, vae.parameters(), strict=True):
        weight.grad = p.grad.float()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    with torch.no_grad():
        for weight, p in zip(weights, vae.parameters(), strict=True):
            p.copy_(weight)


def train(images, steps, batch_size, lr, device, dtype):
    """A VAE trained on images [N,3,H,W], which computes in dtype. lr: the peak learning rate.

    Raises FuseDiTError if the loss is not finite.
    """
    vae = VAE(CONFIG).to(device)
    weights = [p.detach().clone() for p in vae.parameters()]
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.99), weight_decay=0.0)
    vae.to(dtype)

    start = time.time()
    logged = []                         # (error, KL) of each step since the last log line
    for step in tqdm(range(1, steps + 1), unit="step", desc="training", disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        error, kl = reconstruction_and_kl(vae, random_batch(images, batch_size).to(device))
        vae.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        update(vae, weights, optimizer)

        logged.append((error.item(), kl.item()))
        if not math.isfinite(sum(logged[-1])):
            raise FuseDiTError(f"the loss is not finite at step {step}: try a lower --lr than {lr}")
        if step % 100 == 0 or step == steps:
            error_mean, kl_mean = torch.tensor(logged).mean(0).tolist()
            tqdm.write(f"step {step}/{steps}  error {error_mean:.4f}  KL {kl_mean:.2f}  "
                       f"{time.time() - start:.0f} s")
            logged = []
    return vae.to(torch.bfloat16).to(dtype).eval()         # as it is saved


# ---------------------------------------------------------------------------- measuring
@torch.no_grad()
def measure_latents(vae, images, device):
    """The mean and the standard deviation of each channel of z, two lists of [C] numbers.

    z: a sample of the posterior of one of images [N,3,H,W], before it is shifted and scaled.
    """
    step = math.ceil(len(images) / MEASURED_IMAGES)
    total = 0
    means = 0                               # sums of [C] over batches, images and positions
    squares = 0
    for batch in images[::step].split(64):
        mean, logvar = vae.moments(to_pixels(batch).to(device))
        mean = mean.double().cpu()
        variance = logvar.double().exp().cpu()
        means = means + mean.sum((0, 2, 3))
        squares = squares + (mean.square() + variance).sum((0, 2, 3))
        total += mean[:, 0].numel()
    mean = means / total
    std = (squares / total - mean.square()).sqrt()
    return mean.tolist(), std.tolist()


@torch.no_grad()
def decoded_psnr(vae, images, device, noise=0.0):
    """The mean PSNR in dB of images [N,3,H,W] after encoding and decoding.

    noise: the standard deviation of noise added to the latents, whose own is about 1.
    """
    values = []
    for batch in images.split(64):
        pixels = to_pixels(batch).to(device)
        latents = vae.encode(pixels)
        decoded = vae.decode(latents + noise * torch.randn_like(latents)).clamp(-1, 1).float()
        error = ((decoded - pixels) / 2).square().mean((1, 2, 3))
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()


# ---------------------------------------------------------------------------- the command
def save(vae, folder):
    """Save as diffusers does: config.json and diffusion_pytorch_model.safetensors (bfloat16)."""
    stages = len(vae.config.block_out_channels)
    config = dict(
        _class_name="AutoencoderKL", act_fn="silu", out_channels=vae.config.in_channels,
        down_block_types=["DownEncoderBlock2D"] * stages,
        up_block_types=["UpDecoderBlock2D"] * stages)
    config |= asdict(vae.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    tensors = {}
    for name, tensor in vae.state_dict().items():
        tensors[name] = tensor.to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def tiny_vae(args):
    """Run `prepare_data.py tiny-vae`: train a VAE on args.folder and save it to args.out.

    If anything fails, args.out is left unchanged.
    """
    if args.image_size % CONFIG.factor:
        raise FuseDiTError(f"--image-size {args.image_size} is not a multiple of {CONFIG.factor}")
    device = pick_device(args.device)
    dtype = backend.torch_dtype(backend.dtype_name("auto", device))
    backend.configure(device, dtype)
    with atomic_folder(args.out, FILES, "a VAE", args.overwrite) as tmp:
        images = load_images(args.folder, args.image_size)
        held_out = images[::HELD_OUT]
        used = torch.ones(len(images), dtype=torch.bool)
        used[::HELD_OUT] = False

        torch.manual_seed(torch_seed(args.seed))
        vae = train(images[used], args.steps, args.batch_size, args.lr, device, dtype)
        mean, std = measure_latents(vae, images[used], device)
        vae.config = replace(vae.config, latents_mean=tuple(mean), latents_std=tuple(std))
        clean = decoded_psnr(vae, held_out, device)
        noisy = decoded_psnr(vae, held_out, device, NOISE)
        print(f"PSNR of {len(held_out)} images that it was not trained on: {clean:.1f} dB, and "
              f"{noisy:.1f} dB with noise of {NOISE} in the latents")
        save(vae, tmp)
    print(f"wrote {args.out}")

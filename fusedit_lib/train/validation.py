"""Image grids and the validation loss during training."""
import math
from dataclasses import replace

import torch
import torch.distributed as dist

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend, seeds
from fusedit_lib.data.batches import Batches, to_device
from fusedit_lib.sampling import (
    decode_latents,
    draw_latents,
    encode_prompts,
    image_grid,
    latent_size,
    padded_text_length,
)
from fusedit_lib.train import distributed

VALIDATION_SIGMAS = [(i + 0.5) / 8 for i in range(8)]      # noise levels of the validation loss


# ------------------------------------------------------------------------------ image grids

def sample_images(run, model, vae, indices, devices):
    """Generates the images i in indices, which ascend, as a list of PIL images.

    Image i has the prompt i % len(run.prompts), which always starts from the same noise, with its
    own seed from run.seed on. Repetitions, from len(run.prompts) on, are drawn but not returned.
    devices: monitor.SeparateDevices or xla.MeshDevices.
    """
    def after_step(step, x):
        devices.sync()

    count = len(run.prompts)
    of_prompts = seeds.consecutive(run.seed, count)
    length = padded_text_length(model, run.prompts, "")     # the same on all ranks
    encoded = encode_prompts(model, [run.prompts[i % count] for i in indices], text_length=length)
    text, uncond = (features.map(devices.split_rows) for features in encoded.of_images())
    x = draw_latents(model, text, uncond, [of_prompts[i % count] for i in indices],
                     latent_size(model.config, vae), run.sample_steps, callback=after_step)

    # By way of the CPU, each image is a tensor of its own. XLA would otherwise compile a program
    # for each, because a slice's location is part of its program.
    images = []
    latents = x.cpu()
    for n, i in enumerate(indices):
        if i < count:
            images += decode_latents(latents[n:n + 1].to(x.device), vae)
    return images


def sample_grid(run, model, vae, devices, rank, world):
    """Generates an image for each of the run's prompts, and returns the grid as a PIL image.

    Each device generates its share. Some prompts are repeated to give every device the same number
    of images, because the devices gather weights from each other at the same time.
    """
    count = len(run.prompts)
    padded = math.ceil(count / devices.count) * devices.count
    if devices.as_one:                      # every rank records all images, and has them all
        images = sample_images(run, model, vae, range(padded), devices)
    else:
        images = sample_images(run, model, vae, range(rank, padded, world), devices)
        of_ranks = distributed.gather_from_all_ranks(images)
        images = [of_ranks[i % world][i // world] for i in range(count)]
    return image_grid(images, math.ceil(math.sqrt(count)))


# ------------------------------------------------------------------------------ validation loss

def held_out_batches(run, config, model, micro_batch, rank, world):
    """This rank's batches of the held-out samples, as a list that is kept in memory.

    Captions are never dropped, images are cropped at the centre, and the noise is always the same.
    batch["counts"] [B] is 1 for samples that count, and 0 for those that only fill the last batch.
    """
    held_out = replace(run, data=run.val_data, data_weights=[], caption_drop=0.0, seed=0,
                       original_caption_rate=0.0, crop="center", batch=micro_batch * world,
                       changes=())
    source = Batches(held_out, config, model.tokenizer, micro_batch, 1, rank, world)
    samples = min(run.val_samples, len(source))
    batches = []
    for index in range(math.ceil(samples / held_out.batch)):
        batch = source[index]
        if "error" in batch:
            raise FuseDiTError(batch["error"])
        positions = torch.tensor(source.positions(index))
        batch["counts"] = (positions < samples).float()
        batches.append(batch)
    return batches


@torch.no_grad()
def validation_losses(batches, model, vae, device, sync):
    """Mean loss over all held-out samples at each of VALIDATION_SIGMAS, as a list.

    batches: from held_out_batches, placed on the mesh if there is one.
    sync: called once a batch's latents and text features have been computed. Without it, XLA would
        compute them again at every noise level.
    """
    sums = torch.zeros(len(VALIDATION_SIGMAS), dtype=torch.float64)
    samples = torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        counts = batch["counts"]
        moved = to_device(batch, device)
        x = moved.x
        if vae is not None:
            x = vae.encode(x, moved.vae_noise)
        pooled = None
        if model.clip_encoder is not None:
            pooled = model.clip_encoder(moved.clip_ids)
        text = model.encode_ids(moved.ids, moved.mask, pooled)
        sync()
        for k, level in enumerate(VALIDATION_SIGMAS):
            sigma = torch.full((len(x),), level, device=device)
            loss = fusedit.flow_loss(model.dit, x, text, sigma, moved.eps)
            sums[k] += (loss * counts.to(device)).sum().cpu()
        samples += counts.sum().cpu()

    # If all hosts act as one device, this multiplies both sums by the number of hosts, which leaves
    # the means unchanged.
    if backend.several_ranks():
        both = torch.cat([sums, samples])
        dist.all_reduce(both)
        sums = both[:-1]
        samples = both[-1:]
    return (sums / samples).tolist()

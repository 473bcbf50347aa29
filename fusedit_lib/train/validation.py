"""TODO."""
from dataclasses import replace

import torch
import torch.distributed as dist

import fusedit
from fusedit import FuseDiTError
from fusedit_lib.data.batches import Batches, tensors_only, to_device
from fusedit_lib.sampling import padded_text_length, to_images

LEVELS = [(i + 0.5) / 8 for i in range(8)]  # sigmas of the validation loss


@torch.no_grad()
def draw(run, config, model, vae, sync, rank, world):
    """The run's prompts, always from the same noise, as images. sync: after each sampler step.

    Each rank draws its part, all of them the same number: ZeRO 3 fetches weights from all ranks
    at once.
    """
    n, side = len(run.prompts), config.image_size // (vae.factor if vae else 1)
    mine = [i % n for i in range(rank, -(-n // world) * world, world)]
    length = padded_text_length(model, [*run.prompts, ""])        # of all ranks' prompts
    texts = model.encode([run.prompts[i] for i in mine] + [""], length)
    noise = torch.stack([torch.randn(config.in_channels, side, side,
                                     generator=torch.Generator().manual_seed(run.seed + i))
                         for i in mine]).to(texts.mask.device)
    x = fusedit.sample(model.dit, noise, texts.map(lambda t: t[:-1]),
                       texts.map(lambda t: t[[-1] * len(mine)]), run.sample_steps,
                       config.guidance, config.shift, callback=lambda i, x: sync())
    images = to_images(x, vae)
    if world == 1:
        return images
    dist.all_gather_object(box := [None] * world, images)
    return [box[i % world][i // world] for i in range(n)]


def validation(run, config, model, micro, rank, world):
    """This rank's batches of the held-out samples, kept in memory; counts [B]: 1, or 0 if extra."""
    held = replace(run, data=run.val_data, data_weights=[], caption_drop=0.0, seed=0,
                            original_caption_rate=0.0, crop="center", batch=micro * world)
    source = Batches(held, config, model.tokenizer, micro, 1, rank, world)
    n = min(run.val_samples, sum(s[1] for s in source.shards))
    batches = [source[m] for m in range(-(-n // held.batch))]
    for m, batch in enumerate(batches):
        if "error" in batch:
            raise FuseDiTError(batch["error"])
        place = m * held.batch + rank * micro + torch.arange(micro)
        batch["counts"] = (place < n).float()
    return list(tensors_only(batches, []))


@torch.no_grad()
def validate(batches, model, vae, device, sync=lambda: None):
    """Mean loss at each of LEVELS over all held-out samples, with the same noise each time."""
    sums = torch.zeros(len(LEVELS) + 1, dtype=torch.float64)
    for batch in batches:
        x, ids, mask, clip, _, eps, vae_noise = to_device(batch, device)
        x = vae.encode(x, vae_noise) if vae else x
        text, counts = model.encode_ids(ids, mask, model.clip_encoder and model.clip_encoder(clip)), batch["counts"]
        sync()                              # else all of the above again at every level
        for k, level in enumerate(LEVELS):
            sigma = torch.full((len(x),), level, device=device)
            loss = fusedit.flow_loss(model.dit, x, text, sigma, eps)
            sums[k] += (loss * counts.to(device)).sum().cpu()
        sums[-1] += counts.sum().cpu()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)               # where all ranks are one device, so many times the sum
    return (sums[:-1] / sums[-1]).tolist()

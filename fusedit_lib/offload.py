"""Draws with one part of the model in memory at a time, for `sample.py --offload`.

    Gemma (with CLIP)   encodes the prompts of all batches
    the DiT             draws the latents of all batches
    the VAE             decodes the latents one by one

A part is read from disk onto the device when its turn comes, and freed when it is done. The peak is
therefore that of the largest part, not the sum of all three. Results wait in CPU memory for the
next part. The phases and the batches are those of sampling.generate(), so the images are the same
to the byte.
"""
from typing import NamedTuple

from fusedit_lib import backend
from fusedit_lib.sampling import (
    batches_of,
    decode_latents,
    draw_latents,
    encode_prompts,
    latent_size,
)
from fusedit_lib.vae import load_vae

# The number of images for which the parts are loaded anew, since the text features of all of them
# wait in memory. In Gemma 2 2B the keys and values of a prompt of 60 tokens take 6.4 MB.
GROUP = 64


class Settings(NamedTuple):
    """Arguments of generate() that are the same for all batches."""
    height: int | None
    width: int | None
    steps: int
    guidance: float
    guidance_span: tuple
    negative: str
    keep_steps: bool                        # not of generate(): return the image after each step


def generate_batches(loaded, batches, settings, bar):
    """Yields a list for each batch: its PIL images after each step that is kept, in order.

    Its last element has the finished images; without settings.keep_steps it is the only one.
    loaded: the LoadedModel of cli.open_model(..., offload=True). batches: lists of jobs, which have
    a prompt and a seed. bar: the progress_bar().
    """
    per_group = max(1, GROUP // len(batches[0]))
    for group in batches_of(batches, per_group):
        encoded = encode(loaded, group, settings)
        backend.release_memory()
        drawn = draw(loaded, group, encoded, settings, bar)
        del encoded
        backend.release_memory()
        yield from decode(loaded, drawn)
        backend.release_memory()


# Each of these functions loads a part, which is freed when the function returns.

def encode(loaded, group, settings):
    """EncodedPrompts of each batch, in CPU memory."""
    model = loaded.load(parts=("llm",))
    model.tokenizer = loaded.model.tokenizer
    encoded = []
    for batch in group:
        prompts = [job.prompt for job in batch]
        encoded.append(encode_prompts(model, prompts, settings.negative).to("cpu"))
    return encoded


def draw(loaded, group, encoded, settings, bar):
    """The latents [B,C,h,w] after each step that is kept, a list for each batch, in CPU memory.

    encoded: EncodedPrompts of each batch.
    """
    model = loaded.load(parts=("dit",))
    size = latent_size(model.config, loaded.vae, settings.height, settings.width)
    drawn = []

    def after_step(step, x):
        if settings.keep_steps or step == settings.steps - 1:
            drawn[-1].append(x.cpu())
        bar.update(len(x) / settings.steps)

    for batch, prompts in zip(group, encoded, strict=True):
        drawn.append([])
        text, uncond = prompts.to(loaded.device).of_images()
        seeds = [job.seed for job in batch]
        draw_latents(model, text, uncond, seeds, size, settings.steps, settings.guidance,
                     settings.guidance_span, after_step)
        del text, uncond                    # before those of the next batch are made
    return drawn


def decode(loaded, drawn):
    """Yields the images of each batch: see generate_batches. drawn: what draw() returned."""
    vae = None
    if loaded.vae is not None:
        vae = load_vae(loaded.model.config.vae, loaded.device, backend.torch_dtype(loaded.dtype))
    for steps in drawn:
        yield [decode_latents(x.to(loaded.device), vae) for x in steps]

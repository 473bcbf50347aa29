"""Draws images from prompts, one batch at a time.

In a notebook:

    from fusedit_lib import pretrained, sampling
    model = pretrained.load_model("demo")
    sampling.generate(model, ["a large red circle", "a small blue star"])

sample.py, evaluate.py and the image grids of a training run all draw with generate(). A model that
works on the latents of a VAE also needs vae=load_vae(model.config.vae, ...).

generate() has three phases, and each needs one part of the model: encode_prompts() Gemma,
draw_latents() the DiT, decode_latents() the VAE. With `sample.py --offload` only one part is in
memory at a time: see offload.py.
"""
import math
import shlex
from typing import NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.seeds import torch_seed

# ---- drawing -------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, prompts, seeds=None, *, vae=None, height=None, width=None, steps=25,
             guidance=None, guidance_span=(0, 1), negative="", text_length=None, callback=None):
    """Draw one batch: a PIL image for each pair of prompts[i] and seeds[i] (default: 0, 1, 2, ...).

    model          FuseDiT, as load_model returns it
    vae            its VAE; None for a model that draws pixels
    height, width  in pixels; by default the size that the model was trained at
    steps          number of Euler steps
    guidance       scale of classifier-free guidance; by default the model's own; 1 turns it off
    guidance_span  lowest and highest noise level (0 to 1) at which guidance is applied
    negative       prompt to steer away from
    text_length    tokens to pad all prompts to; by default padded_text_length() of this batch
    callback       called as callback(step, x) after each step, with the noisy x [B,C,h,w]

    A seed gives the same noise regardless of what else is in the batch. Raises FuseDiTError.
    """
    seeds = check_seeds(prompts, seeds)
    if model.config.vae and vae is None:
        raise FuseDiTError(f"this model draws latents of the VAE {model.config.vae}: pass it as "
                           "vae=load_vae(model.config.vae, ...)")
    check_guidance_span(guidance_span)
    size = latent_size(model.config, vae, height, width)
    text, uncond = encode_prompts(model, prompts, negative, text_length).of_images()
    x = draw_latents(model, text, uncond, seeds, size, steps, guidance, guidance_span, callback)
    return decode_latents(x, vae)


class EncodedPrompts(NamedTuple):
    """The text features of a batch of images."""
    text: fusedit.TextFeatures              # of each distinct prompt
    uncond: fusedit.TextFeatures            # of the negative prompt, padded to the same length
    rows: list                              # image i has the prompt text[rows[i]]

    def to(self, device):
        """A copy on another device."""
        text = self.text.map(lambda t: t.to(device))
        uncond = self.uncond.map(lambda t: t.to(device))
        return EncodedPrompts(text, uncond, self.rows)

    def of_images(self):
        """(text, uncond) with a row for each image."""
        text = self.text.map(lambda t: t[self.rows])
        uncond = self.uncond.map(lambda t: t[[0] * len(self.rows)])
        return text, uncond


@torch.no_grad()
def encode_prompts(model, prompts, negative="", text_length=None):
    """EncodedPrompts of the prompts of a batch. Each distinct prompt is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    rows = [distinct.index(prompt) for prompt in prompts]
    if text_length is None:
        text_length = padded_text_length(model, distinct, negative)
    text = model.encode(distinct, text_length)
    uncond = model.encode([negative], text_length, instruction="")
    return EncodedPrompts(text, uncond, rows)


@torch.no_grad()
def draw_latents(model, text, uncond, seeds, size, steps=25, guidance=None, guidance_span=(0, 1),
                 callback=None):
    """The latents (without a VAE, the pixels) x [B,C,h,w] of a batch.

    text, uncond: from EncodedPrompts.of_images(), on the device of the DiT. size: (h, w), from
    latent_size(). The other arguments are those of generate().
    """
    config = model.config
    if guidance is None:
        guidance = config.guidance

    # Noise is drawn on the CPU, where a seed gives the same numbers on every machine.
    generators = [torch.Generator().manual_seed(torch_seed(seed)) for seed in seeds]
    shape = (config.in_channels, *size)
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    noise = torch.stack(noise).to(text.mask.device)                    # [B,C,h,w]
    return fusedit.sample(model.dit, noise, text, uncond, steps, guidance, config.shift,
                          guidance_span, callback)


def decode_latents(x, vae):
    """PIL images of x [B,C,h,w], decoded one at a time, because decoding takes a lot of memory."""
    images = []
    for latents in x.split(1):
        images += to_images(latents, vae)
    return images


def check_seeds(prompts, seeds):
    """The seeds, by default 0, 1, 2, ...; raises FuseDiTError unless each prompt has one."""
    if isinstance(prompts, str):
        raise FuseDiTError(f"prompts must be a list, such as [{prompts!r}]")
    if seeds is None:
        return range(len(prompts))
    if len(prompts) != len(seeds):
        raise FuseDiTError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one per prompt")
    return seeds


def check_guidance_span(span):
    """Raise FuseDiTError unless span is (low, high) with 0 <= low <= high <= 1."""
    low, high = span
    if not 0 <= low <= high <= 1:
        raise FuseDiTError(f"guidance span {low:g} {high:g}: give two noise levels from 0 to 1, "
                           "the lower one first, as in 0 0.9")


def latent_size(config, vae, height=None, width=None):
    """Height and width of x for an image of height x width pixels (None: the training size).

    Without a VAE x is the pixels themselves. Raises FuseDiTError if a side is not a multiple of
    the patch size.
    """
    factor = 1
    if vae is not None:
        factor = vae.factor
    if height is None:
        height = config.image_size
    if width is None:
        width = config.image_size
    check_side("height", height, config.patch_size * factor)
    check_side("width", width, config.patch_size * factor)
    return height // factor, width // factor


def check_side(name, pixels, patch):
    """Raise FuseDiTError unless a side is a positive multiple of `patch` pixels."""
    if pixels >= patch and pixels % patch == 0:
        return
    below = pixels // patch * patch
    near = f"{below + patch}"
    if below:
        near = f"{below} or {below + patch}"
    raise FuseDiTError(f"{name} {pixels} is not a multiple of {patch} pixels, the size of a patch; "
                       f"try {near}")


def padded_text_length(model, prompts, negative):
    """The number of tokens to pad all prompts to: that of the longest, rounded up on a GPU."""
    token_ids, limit = fusedit.token_ids(model.tokenizer, prompts, model.config)
    negative_ids, _ = fusedit.token_ids(model.tokenizer, [negative], model.config, instruction="")
    longest = max(len(ids) for ids in token_ids + negative_ids)
    device = model.llm.embed_tokens.weight.device
    return backend.round_up_to_tile(min(longest, limit), limit, device)


# ---- images --------------------------------------------------------------------------------------

@torch.no_grad()
def to_images(x, vae):
    """PIL images of x [B,C,h,w]: latents of vae or, if vae is None, pixels in [-1, 1]."""
    pixels = x
    if vae is not None:
        pixels = vae.decode(x)
    pixels = pixels.float().clamp(-1, 1).permute(0, 2, 3, 1)           # [B,H,W,3]
    pixels = ((pixels + 1) * 127.5).round().byte().cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def image_grid(images, columns, side=192):
    """One image that shows all `images`, which have the same size, in rows of `columns`.

    Images at most half as wide as `side` are enlarged by an integer factor, without smoothing.
    """
    margin = 2                              # white pixels around each image
    scale = max(1, side // images[0].width)
    width = images[0].width * scale
    height = images[0].height * scale
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)

    size = (columns * (width + 2 * margin), rows * (height + 2 * margin))
    grid = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x = column * (width + 2 * margin) + margin
        y = row * (height + 2 * margin) + margin
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
    return grid


def png_info(prompt, seed, steps, guidance, guidance_span, negative, model, ema=True,
             overrides=()):
    """PNG text chunks from which an image can be drawn again.

    model: path of its checkpoint. ema: whether the EMA of its weights was used. overrides: the
    words of --set.
    """
    low, high = guidance_span
    fields = {"prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance,
              "guidance_span": f"{low:g} {high:g}", "negative": negative, "model": model}
    if not ema:
        fields["weights"] = "raw (--no-ema)"
    if overrides:
        fields["set"] = shlex.join(overrides)
    info = PngInfo()
    for key, value in fields.items():
        info.add_itxt(key, str(value))
    return info


# ---- for programs that draw many batches ---------------------------------------------------------

def batches_of(jobs, size):
    """Split a list into consecutive batches of `size`; the last one may be shorter."""
    return [jobs[start:start + size] for start in range(0, len(jobs), size)]


def progress_bar(total, done=0, hidden=False):
    """A tqdm progress bar that counts images, `done` of which were drawn earlier.

    Update it from generate()'s callback with len(x) / steps, so that it moves at every step.
    """
    disable = None                          # tqdm then hides it if stderr is not a terminal
    if hidden:
        disable = True
    return tqdm(total=total, initial=done, disable=disable, desc="drawing", unit="image",
                bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining} {rate_fmt}]")

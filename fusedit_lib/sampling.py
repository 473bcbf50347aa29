"""TODO."""
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import fusedit
from fusedit_lib import backend


def to_images(x, vae):
    """Latents, or pixels where there is no VAE, x [B,C,H,W] -> PIL images."""
    with torch.no_grad():
        pixels = (vae.decode(x) if vae else x).float().clamp(-1, 1).permute(0, 2, 3, 1)
    return [Image.fromarray(p) for p in ((pixels + 1) * 127.5).round().byte().cpu().numpy()]


def sheet(images, columns, side=192):
    """All images on one picture; small ones magnified to about `side`, pixel by pixel."""
    k, columns = max(1, side // images[0].width), min(columns, len(images))
    w, h = images[0].width * k, images[0].height * k
    page = Image.new("RGB", ((w + 4) * columns, (h + 4) * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        x, y = i % columns * (w + 4) + 2, i // columns * (h + 4) + 2
        page.paste(image.resize((w, h), Image.Resampling.NEAREST), (x, y))
    return page


def text_length(model, prompts):
    """How many tokens to pad prompts to: as many as the longest has, or what suits a GPU."""
    rows, limit = fusedit.token_ids(model.tokenizer, prompts, model.config)
    device = model.llm.embed_tokens.weight.device
    return backend.round_up_to_tile(min(max(map(len, rows)), limit), limit, device)


def draw(batches, model, vae, size, args, device, done=0, quiet=False):
    """(prompt, seed, image, frames) of each (prompt, seed) of lists; done: images drawn before."""
    c, total, read = model.config, done + sum(map(len, batches)), None
    with tqdm(total=total, initial=done, disable=quiet or None, desc="drawing", unit="image",
              bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining} {rate_fmt}]") as bar:
        for part in batches:
            if (prompts := list(dict.fromkeys(prompt for prompt, _ in part))) != read:
                read, words = prompts, [*prompts, args.negative]
                texts = model.encode(words, text_length(model, words))
            frames, rngs = [], [torch.Generator().manual_seed(seed) for _, seed in part]

            def step(i, x, part=part, frames=frames):
                bar.update(len(part) / args.steps)
                if args.gif:
                    frames.append([sheet([im], 1, 256) for im in to_images(x, vae)])
            noise = [torch.randn(c.in_channels, *size, generator=rng) for rng in rngs]
            rows, last = [prompts.index(prompt) for prompt, _ in part], [-1] * len(part)
            x = fusedit.sample(model.dit, torch.stack(noise).to(device),
                               texts.map(lambda t: t[rows]), texts.map(lambda t: t[last]),
                               args.steps, args.guidance, c.shift, args.guidance_span, step)
            for i, one in enumerate(x.split(1)):            # decoding takes memory
                yield *part[i], *to_images(one, vae), [f[i] for f in frames]


def notes(prompt, seed, args):              # what a PNG says of itself
    info = PngInfo()
    span = "{:g} {:g}".format(*args.guidance_span)
    for key, value in dict(prompt=prompt, seed=seed, steps=args.steps, guidance=args.guidance,
                           guidance_span=span, negative=args.negative, model=args.model).items():
        info.add_itxt(key, str(value))
    return info

"""Draw pictures of prompts.

    python sample.py --prompt "a large red circle above a small blue square"
    python sample.py --prompts prompts.txt --num-images 4 --grid
    python sample.py --model PATH_OR_HUB_ID --prompt "a red fox in the snow" --gif
    python sample.py --model runs/demo --export my-model

Every PNG carries its prompt, seed and settings as text, enough to draw it again. The pictures of
a prompt take the seeds from --seed on; a seed gives one picture, whatever else is drawn.
"""
import argparse
import re
from pathlib import Path

import threads  # isort: skip (before torch)
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import fusedit
import speed
from cli import DTYPE, SPAN, announce, open_model, positive, read_prompts, run, uint32
from fusedit import FuseDiTError
from weights import atomic_write, export, untaken


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, settings, about in (
            ("--prompt", dict(action="append", default=[]), "what to draw; repeat it for more"),
            ("--prompts", dict(type=Path), "a text file (UTF-8) with a prompt a line"),
            ("--model", dict(default=Path(__file__).parent / "demo"), "a model's folder or hub id"),
            ("--steps", dict(type=positive, default=25), "Euler steps; more: finer, slower (25)"),
            ("--guidance", dict(type=float), "how strictly to follow the prompt (the model's)"),
            ("--guidance-span", SPAN, "noise levels at which guidance is on (0 1); fewer: faster"),
            ("--negative", dict(default="", metavar="TEXT"), "what to steer away from (nothing)"),
            ("--seed", dict(type=uint32, default=0), "of a prompt's first picture (0)"),
            ("--num-images", dict(type=positive, default=1), "pictures of a prompt (1)"),
            ("--height", dict(type=positive), "pixels (as trained)"),
            ("--width", dict(type=positive), "pixels (as trained)"),
            ("--batch-size", dict(type=positive, default=8), "pictures drawn at once (8)"),
            ("--out", dict(type=Path, default="samples"), "folder for the pictures (samples)"),
            ("--device", dict(default="auto"), "auto, cpu, cuda, cuda:1, ... (auto)"),
            ("--no-ema", dict(action="store_true"), "a checkpoint's raw, not averaged weights"),
            ("--dtype", DTYPE, "auto, bf16 or float32; auto: bf16 where the device has it (auto)"),
            ("--compile", dict(action="store_true"), "faster after a minute: for many pictures"),
            ("--grid", dict(action="store_true"), "also save all of them on one sheet, grid.png"),
            ("--gif", dict(action="store_true"), "also save an animation of the denoising"),
            ("--export", dict(type=Path, metavar="DIR"), "write the model, released layout")):
        p.add_argument(name, help=about, **settings)
    args = p.parse_args()
    if not (args.prompt or args.prompts or args.export):
        p.error('say what to draw: --prompt "a large red circle", or --prompts FILE')
    return args


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
    return speed.on_tiles(min(max(map(len, rows)), limit), limit, device)


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
                               texts.apply(lambda t: t[rows]), texts.apply(lambda t: t[last]),
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


def save(prompt, seed, image, frames, args):
    """Write the PNG (and GIF), over nothing that is there."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
    path = untaken(args.out / f"{slug}-{seed}.png", ".gif")
    with atomic_write(path) as tmp:
        image.save(tmp, "PNG", pnginfo=notes(prompt, seed, args))
    if frames:
        with atomic_write(path.with_suffix(".gif")) as tmp:
            frames[0].save(tmp, "GIF", save_all=True, append_images=frames[1:], loop=0,
                           duration=[80] * (len(frames) - 1) + [1500])
    tqdm.write(str(path))


def main():
    args = arguments()
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    model, vae, device = open_model(args)
    if args.export:
        export(model, args.export)
    if not prompts:
        return
    args.out.mkdir(parents=True, exist_ok=True)            # fails now rather than after the drawing
    c, factor = model.config, vae.factor if vae else 1
    size, unit = [n or c.image_size for n in (args.height, args.width)], c.patch_size * factor
    for side, n in zip(("height", "width"), size, strict=True):
        if n < unit or n % unit:
            near = f"{n // unit * unit} or " * (n > unit) + f"{(n // unit + 1) * unit}"
            raise FuseDiTError(f"--{side} {n} is not whole patches of {unit} pixels; try {near}")
    announce(args, model, list(dict.fromkeys([*prompts, args.negative])))
    jobs, images = [(p, args.seed + k) for p in prompts for k in range(args.num_images)], []
    batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    for prompt, seed, image, frames in draw(batches, model, vae, [n // factor for n in size], args,
                                            device):
        save(prompt, seed, image, frames, args)
        images.append(image)
    if args.grid:
        with atomic_write(path := untaken(args.out / "grid.png")) as tmp:
            sheet(images, args.num_images if args.num_images > 1 else 4).save(tmp, "PNG")
        print(path)


if __name__ == "__main__":
    run(main, "--batch-size, or --height and --width")

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

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.cli import DTYPE, SPAN, announce, open_model, positive, read_prompts, run, uint32
from fusedit_lib.files import atomic_write, unused_path
from fusedit_lib.pretrained import export
from fusedit_lib.sampling import draw, notes, sheet


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


def save(prompt, seed, image, frames, args):
    """Write the PNG (and GIF), over nothing that is there."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
    path = unused_path(args.out / f"{slug}-{seed}.png", ".gif")
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
        with atomic_write(path := unused_path(args.out / "grid.png")) as tmp:
            sheet(images, args.num_images if args.num_images > 1 else 4).save(tmp, "PNG")
        print(path)


if __name__ == "__main__":
    run(main, "--batch-size, or --height and --width")

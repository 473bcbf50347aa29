"""Draw pictures of prompts.

    python sample.py --prompt "a large red circle above a small blue square"
    python sample.py --prompts prompts.txt --num-images 4 --grid
    python sample.py --model runs/demo --prompt "a green star" --gif
    python sample.py --model path/or/hub-id --prompt "a red fox in the snow" --device cuda
    python sample.py --model runs/demo --export my-model

Every PNG carries its prompt, seed and settings as text, enough to draw it again.
"""
import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import fusedit
from fusedit import FuseDiTError
from vae import load_vae
from weights import atomic_write, export, load_model, pick_device, run

DEMO = Path(__file__).parent / "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a = p.add_argument
    a("--prompt", action="append", default=[], help="what to draw; may be given several times")
    a("--prompts", type=Path, metavar="FILE", help="a text file (UTF-8) with a prompt a line")
    a("--model", default=str(DEMO), help="checkpoint, run, released-layout folder or hub id;\n"
      "default: the demo of this repository, which knows coloured shapes")
    a("--steps", type=int, default=25, help="Euler steps; more is finer and slower (25)")
    a("--guidance", type=float, default=6.0, help="how strictly to follow the prompt: 1 is none,\n"
      "too much makes harsh pictures (6)")
    a("--negative", default="", metavar="TEXT", help="what to steer away from (nothing)")
    a("--seed", type=int, default=0, help="of a prompt's first picture; the next ones take the\n"
      "next seeds. A seed gives one picture, whatever else is drawn (0)")
    a("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (1)")
    a("--height", type=int, help="pixels; default: the size the model was trained at")
    a("--width", type=int)
    a("--batch-size", type=int, default=8, help="pictures drawn at once; lower it if memory is\n"
      "short (8)")
    a("--out", type=Path, default=Path("samples"), metavar="DIR", help="folder (samples)")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    a("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    a("--grid", action="store_true", help="also save all pictures on one sheet, grid.png")
    a("--gif", action="store_true", help="also save an animation of each picture's denoising")
    a("--export", type=Path, metavar="DIR", help="write the model in the released layout, alone\n"
      "in one folder, instead of or besides drawing")
    args = p.parse_args(argv)
    for name in ("steps", "num_images", "batch_size"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (args.prompt or args.prompts or args.export):
        p.error('say what to draw: --prompt "a large red circle", or --prompts FILE')
    return args


@dataclass
class Job:
    prompt: str
    seed: int
    frames: list


def read_prompts(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise FuseDiTError(f"cannot read --prompts {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise FuseDiTError(f"--prompts {path} is not UTF-8 (byte {e.start}): save it as UTF-8 "
                           "text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise FuseDiTError(f"--prompts {path} has no prompt: write one a line")
    return prompts


def size_of(args, model, factor):
    """Height and width, checked: whole patches of whole latents."""
    unit = model.config.patch_size * factor
    for name in ("height", "width"):
        n = getattr(args, name) or model.config.image_size
        if n < unit or n % unit:
            near = sorted({max(n // unit, 1) * unit, (n // unit + 1) * unit})
            raise FuseDiTError(f"--{name} {n} is not a multiple of {unit} pixels (patch x VAE); "
                               f"nearest: {' or '.join(map(str, near))}")
        yield n


def warn(model, prompts):
    """Say which words the model cannot read, and where a long prompt is cut."""
    tok, c = model.tokenizer, model.config
    rows, limit = fusedit.token_ids(tok, prompts, c)
    for prompt, row in zip(prompts, rows, strict=True):
        if tok.unk_token_id in row:
            words = [w for w in re.findall(r"\w+|[^\w\s]", prompt) if tok.unk_token_id in
                     tok(w, add_special_tokens=False)["input_ids"]]
            print(f"warning: the model does not know {', '.join(map(repr, words))} in "
                  f"{prompt!r}", file=sys.stderr)
        if len(row) > limit:
            kept = tok.decode(row[:limit], skip_special_tokens=True)
            print(f"warning: a prompt of {len(row)} tokens is cut after {limit}, at "
                  f"...{kept[-40:]!r}", file=sys.stderr)


def to_images(x, vae):
    """Latents or pixels x [B,C,H,W] -> PIL images."""
    pixels = (vae.decode(x) if vae else x).float().clamp(-1, 1)
    pixels = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(p.numpy()) for p in pixels]


def magnify(image, side=256):
    k = max(1, side // max(image.size))
    return image.resize((image.width * k, image.height * k), Image.NEAREST)


def draw(jobs, model, vae, size, args, device):
    """Sample all jobs in batches; yields (job, image)."""
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    with torch.no_grad():                   # Gemma reads every distinct text once
        texts = model.encode([*prompts, args.negative])
    shape = (model.config.in_channels, *(n // (vae.factor if vae else 1) for n in size))
    bar = tqdm(total=args.steps * len(jobs), unit="step", desc="drawing", disable=None)
    for start in range(0, len(jobs), args.batch_size):
        part = jobs[start:start + args.batch_size]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
                             for job in part]).to(device)

        def step(i, x):
            bar.update(len(part))
            for job, frame in zip(part, to_images(x, vae) if args.gif else ()):
                job.frames.append(magnify(frame))
        x = fusedit.sample(
            model.dit, noise, texts.rows([prompts.index(job.prompt) for job in part]),
            texts.rows([len(prompts)] * len(part)), args.steps, args.guidance,
            model.config.shift, step)
        yield from zip(part, to_images(x, vae), strict=True)
    bar.close()


def save(image, job, args):
    """PNG (and GIF) under a name that is not taken yet."""
    slug = re.sub(r"\W+", "-", job.prompt.lower()).strip("-")[:60] or "empty"
    path, n = args.out / f"{slug}-{job.seed}.png", 1
    while path.exists():
        path, n = args.out / f"{slug}-{job.seed}_{n}.png", n + 1
    info = PngInfo()
    for key in ("steps", "guidance", "negative", "model"):
        info.add_itxt(key, str(getattr(args, key)))
    info.add_itxt("prompt", job.prompt)
    info.add_itxt("seed", str(job.seed))
    with atomic_write(path) as tmp:
        image.save(tmp, "PNG", pnginfo=info)
    if args.gif:
        frames = job.frames + [job.frames[-1]] * 15                # rest on the picture
        with atomic_write(path.with_suffix(".gif")) as tmp:
            frames[0].save(tmp, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
    return path


def save_grid(images, columns, path):
    tiles = [magnify(im, 192) for im in images]
    w, h = tiles[0].width + 4, tiles[0].height + 4
    sheet = Image.new("RGB", (w * columns + 4, h * -(-len(tiles) // columns) + 4), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (4 + i % columns * w, 4 + i // columns * h))
    with atomic_write(path) as tmp:
        sheet.save(tmp, "PNG")


def main():
    args = arguments()
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    device = pick_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model = load_model(args.model, device, DTYPES[dtype])
    if args.export:
        export(model, args.export)
        print(f"wrote {args.export}")
    if not prompts:
        return
    vae = load_vae(model.config.vae, device, DTYPES[dtype]) if model.config.vae else None
    size = list(size_of(args, model, vae.factor if vae else 1))
    warn(model, list(dict.fromkeys([*prompts, args.negative])))
    jobs = [Job(p, args.seed + k, []) for p in prompts for k in range(args.num_images)]
    images = []
    for job, image in draw(jobs, model, vae, size, args, device):
        images.append(image)
        tqdm.write(str(save(image, job, args)))
    if args.grid:
        columns = args.num_images if args.num_images > 1 else min(4, len(jobs))
        save_grid(images, columns, args.out / "grid.png")
        print(args.out / "grid.png")


if __name__ == "__main__":
    run(main, "--batch-size, or --height and --width")

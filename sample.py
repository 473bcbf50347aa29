"""Draw images from prompts.

    python sample.py --prompt "a large red circle above a small blue square"
    python sample.py --prompts prompts.txt --num-images 4 --grid
    python sample.py --model PATH_OR_HUB_ID --prompt "a red fox in the snow" --gif
    python sample.py --model runs/demo --export my-model

Each PNG stores its prompt, seed and settings as text, which is enough to draw it again. The images
of a prompt use consecutive seeds, starting at --seed. A seed gives the same image, up to
rounding, regardless of what else is drawn.
"""
import argparse
from pathlib import Path
from typing import NamedTuple

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib import backend, cli, offload, seeds
from fusedit_lib.cli import positive
from fusedit_lib.export import check_new, export
from fusedit_lib.files import atomic_write, file_stem, unused_path
from fusedit_lib.pretrained import base_model, load_model, model_folder
from fusedit_lib.sampling import (
    batches_of,
    check_guidance_span,
    decode_latents,
    generate,
    image_grid,
    latent_size,
    png_info,
    progress_bar,
)


class Job(NamedTuple):
    """One image to draw."""
    prompt: str
    seed: int


# ---- the command line ----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add_prompt_flags(parser)
    model = cli.add_model_flags(parser)
    model.add_argument("--offload", action="store_true",
                       help="keep one part of the model in memory at a time: Gemma encodes all "
                            "prompts, the DiT draws, the VAE decodes; takes a few seconds more "
                            "and draws the same images")
    model.add_argument("--set", nargs="+", action="extend", default=[],
                       metavar="FIELD=VALUE",
                       help="override fields of the model's config: base=FOLDER or vae=FOLDER if "
                            "its Gemma or VAE has moved, or 'instruction=Imagine: ' for a model "
                            "that was trained with one")
    add_sampler_flags(parser)
    add_output_flags(parser)
    model.add_argument("--lora", metavar="PATH_OR_HUB_ID",
                       help="a LoRA adapter to merge into the model: a folder in peft's format, or "
                            "a run of train_gpu.py --lora or one of its checkpoints; --model is "
                            "then by default the model that the adapter was trained on")
    parser.set_defaults(model=None)
    args = parser.parse_args()
    if args.model is None and not args.lora:
        args.model = str(cli.DEMO)
    if args.lora and args.no_ema:
        parser.error("--no-ema has no effect with --lora, because a run stores only the EMA of its "
                     "adapters: leave it out")
    if args.offload and args.compile:
        parser.error("--offload loads the parts of the model again and again, so that --compile "
                     "would not pay off: leave out one of them")
    if not (args.prompt or args.prompts or args.export):
        parser.error('nothing to draw: give --prompt "a large red circle", or --prompts FILE')
    return args


def add_prompt_flags(parser):
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                       help="a description of the image; repeat the flag for several prompts")
    group.add_argument("--prompts", type=Path, metavar="FILE",
                       help="a UTF-8 text file with one prompt per line")
    group.add_argument("--negative", default="", metavar="TEXT",
                       help="negative prompt: a description of what to steer away from")
    group.add_argument("--num-images", type=positive, default=1, metavar="N",
                       help="number of images per prompt")
    group.add_argument("--seed", type=cli.seed, default=0, metavar="N",
                       help="random seed of the first image of each prompt; -1: draw one")
    group.add_argument("--height", type=positive, metavar="PIXELS",
                       help="height of the images (default: the size the model was trained at)")
    group.add_argument("--width", type=positive, metavar="PIXELS",
                       help="width of the images (default: the size the model was trained at)")


def add_sampler_flags(parser):
    group = parser.add_argument_group("sampler")
    group.add_argument("--steps", type=positive, default=25, metavar="N",
                       help="number of Euler steps; more steps give finer images and take longer")
    group.add_argument("--guidance", type=float, metavar="SCALE",
                       help="scale of classifier-free guidance: how closely images follow the "
                            "prompt; 1 turns it off (default: the model's own)")
    cli.add_guidance_span(group)
    group.add_argument("--batch-size", type=positive, default=8, metavar="N",
                       help="number of images drawn at once; lower it if memory runs out")


def add_output_flags(parser):
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR",
                       help="folder for the images; nothing in it is overwritten")
    group.add_argument("--grid", action="store_true",
                       help="also save all images side by side in grid.png")
    group.add_argument("--gif", action="store_true",
                       help="also save an animation of the denoising of each image")
    group.add_argument("--export", type=Path, metavar="DIR",
                       help="write the model to a new folder in the layout of the published "
                            "models, in its stored precision unless --dtype is given; a "
                            "prompt is then optional")


# ---- drawing -------------------------------------------------------------------------------------

def draw(loaded, jobs, args):
    """Draw and save the image of each job and, with --gif, its animation. Returns the images."""
    batches = batches_of(jobs, args.batch_size)
    images = []
    with progress_bar(len(jobs)) as bar:
        if args.offload:
            settings = offload.Settings(args.height, args.width, args.steps, args.guidance,
                                        args.guidance_span, args.negative, args.gif)
            drawn = offload.generate_batches(loaded, batches, settings, bar)
        else:
            drawn = generate_batches(loaded, batches, args, bar)
        for batch, frames in zip(batches, drawn, strict=True):
            for i, job in enumerate(batch):
                path = save_png(job, frames[-1][i], loaded.path, args)
                if args.gif:
                    save_gif([step[i] for step in frames], path.with_suffix(".gif"))
                tqdm.write(str(path))
            images += frames[-1]
    return images


def generate_batches(loaded, batches, args, bar):
    """Yield the images of each batch of jobs after each step or, without --gif, after the last."""
    frames = []                             # of the current batch

    def after_step(step, x):
        bar.update(len(x) / args.steps)
        if args.gif and step < args.steps - 1:
            frames.append(decode_latents(x, loaded.vae))

    for batch in batches:
        frames.clear()
        images = generate(
            loaded.model, [job.prompt for job in batch], [job.seed for job in batch],
            vae=loaded.vae, height=args.height, width=args.width, steps=args.steps,
            guidance=args.guidance, guidance_span=args.guidance_span, negative=args.negative,
            callback=after_step)
        yield [*frames, images]


def save_png(job, image, model_path, args):
    """Write the image to a file named after its prompt and seed. Returns the path."""
    path = unused_path(args.out / f"{file_stem(job.prompt)}-{job.seed}.png", ".gif")
    info = png_info(job.prompt, job.seed, args.steps, args.guidance, args.guidance_span,
                    args.negative, model_path, not args.no_ema, args.set)
    if args.lora:
        info.add_itxt("lora", args.lora)
    with atomic_write(path) as tmp:
        image.save(tmp, "PNG", pnginfo=info)
    return path


def save_gif(frames, path):
    """Write an animation that shows the last frame longer than the others."""
    frames = [image_grid([frame], 1, 256) for frame in frames]
    milliseconds = [80] * (len(frames) - 1) + [1500]
    with atomic_write(path) as tmp:
        frames[0].save(tmp, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=milliseconds)


def save_grid(images, args):
    """Save all images as a grid: one row per prompt, or four in a row if each has one image."""
    columns = 4
    if args.num_images > 1:
        columns = args.num_images
    path = unused_path(args.out / "grid.png")
    with atomic_write(path) as tmp:
        image_grid(images, columns).save(tmp, "PNG")
    print(path)


def adapter_folder(name):
    """The folder of an adapter in peft's format, or of that in a run or checkpoint of --lora.

    name: a path or a hub id. Raises FuseDiTError.
    """
    folder = model_folder(name)
    if (folder / "lora").is_dir():
        folder = folder / "lora"
    if not (folder / "adapter_config.json").exists():
        raise FuseDiTError(f"{name} has no adapter_config.json, so it is neither a LoRA adapter "
                           "nor a run of train_gpu.py --lora; give a whole model to --model")
    return folder


def settle_adapter(args):
    """Replace --lora by the folder of the adapter, and set --model if it is not given.

    Returns the further arguments of load_model.
    """
    folder = adapter_folder(args.lora)
    args.lora = str(folder)
    checkpoint = folder.parent
    if args.model is None and (checkpoint / "train_state").is_dir():
        args.model = str(checkpoint)        # of a run of --lora: it has a config, and the adapter
        return {}
    args.model = args.model or base_model(folder)
    return {"lora": (folder,)}


def export_model(args, changes):
    """Write the model to the folder --export. changes: as load_model takes them."""
    check_new(args.export)                  # before minutes of loading
    dtype = None                            # as stored: float32 in the checkpoints of a run
    if args.dtype != "auto":
        dtype = backend.torch_dtype(args.dtype)
    model = load_model(args.model, "cpu", None, not args.no_ema, **changes)
    export(model, args.export, dtype)


def main():
    args = parse_args()
    check_guidance_span(args.guidance_span)
    prompts = args.prompt
    if args.prompts:
        prompts = prompts + cli.read_prompts(args.prompts)
    changes = cli.parse_overrides(args.set)
    if args.lora:
        changes |= settle_adapter(args)
    if args.export:
        export_model(args, changes)
    if not prompts:
        return

    loaded = cli.open_model(args.model, args.device, args.dtype, not args.no_ema, args.compile,
                            changes, args.offload)
    config = loaded.model.config
    if args.guidance is None:
        args.guidance = config.guidance

    # Fail now rather than after minutes of drawing.
    args.out.mkdir(parents=True, exist_ok=True)
    latent_size(config, loaded.vae, args.height, args.width)

    cli.announce(loaded, list(dict.fromkeys(prompts)), args.negative)
    first_seed = seeds.settle(args.seed)
    jobs = []
    for prompt in prompts:
        for seed in seeds.consecutive(first_seed, args.num_images):
            jobs.append(Job(prompt, seed))
    images = draw(loaded, jobs, args)
    if args.grid:
        save_grid(images, args)


if __name__ == "__main__":
    cli.run(main, "--batch-size, or --height and --width, or use --offload")

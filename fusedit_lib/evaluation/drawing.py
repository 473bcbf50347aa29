"""Draws the images of a benchmark in one or more processes, and resumes interrupted runs.

    OUT/run.json     the settings, and how many prompts have all their images; a folder with other
                     settings is refused
    OUT/images/...   the images, named as the benchmark's scorer expects

The noise of an image depends only on the seed, the index of its prompt in the benchmark and the
number of the image among those of its prompt. A run may draw only the first prompts of a benchmark;
a later run adds the rest to the same folder.
"""
import hashlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from fusedit import FuseDiTError
from fusedit_lib import backend, cli, seeds
from fusedit_lib.evaluation.benchmarks import parse_object, read_text
from fusedit_lib.files import atomic_write
from fusedit_lib.sampling import batches_of, generate, png_info, progress_bar


JPEG_QUALITY = 95                           # of MJHQ's images, unless --jpeg-quality is given


class SamplingRun(NamedTuple):
    """A benchmark, the settings to draw it with, and the folder for its images."""
    name: str                               # of the benchmark
    out: Path
    model: str                              # path of the checkpoint
    ema: bool                               # whether the EMA of its weights is used
    seed: int
    steps: int
    guidance: float
    guidance_span: list[float]              # lowest and highest noise level with guidance
    negative: str                           # prompt to steer away from
    height: int                             # of the images, in pixels
    width: int
    n: int                                  # the number of prompts to draw, from the first
    jpeg_quality: int | None                # None: the benchmark's images are PNGs
    batch_size: int


class ImageNumber(NamedTuple):
    """One image of a benchmark."""
    prompt: int                             # index of the prompt
    image: int                              # number of the image among those of its prompt


def image_seed(seed, prompt, image):
    """The seed of an image's noise, from which `sample.py --seed` draws the same image."""
    return int(np.random.SeedSequence((seed, prompt, image)).generate_state(1)[0])


# ---- settings ------------------------------------------------------------------------------------

def started_dtype(folder):
    """The dtype with which the runs below a folder were started; "auto" if there are none.

    It replaces --dtype auto, so that resuming a run on another machine does not mix precisions.
    """
    for path in folder.glob("*/run.json"):
        settings = parse_object(read_text(path), str(path))
        return cli.dtype(settings.get("dtype", "auto"))
    return "auto"


def shared_seed(folder):
    """The seed for --seed -1: that of the runs below a folder or, if there are none, a new one.

    The first of several processes to get here draws it, and stores it for the others in .seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".seed"
    with FileLock(folder / ".seed.lock"):
        stored = None
        if path.exists():
            stored = int(path.read_text())
        for run in sorted(folder.glob("*/run.json")):
            stored = read_settings(run)["seed"]
        seed = seeds.settle(seeds.RANDOM, stored)
        if stored is None:
            write_bytes(path, f"{seed}\n".encode())
    return seed


def weights_digest(model):
    """A short hash of a model's weights, computed from about 64 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        stride = max(1, tensor.numel() // 64)
        values = tensor.detach().flatten()[::stride].float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def run_settings(run, benchmark, model):
    """The settings of a run, for run.json.

    Two runs with the same settings draw the same images, up to rounding. The number of prompts to
    draw is not a setting: run.json contains the number that has been drawn (see write_progress).
    """
    prompts = json.dumps([benchmark.prompts, benchmark.files])
    dtype = next(model.dit.parameters()).dtype
    settings = {
        "benchmark": run.name,
        "model": run.model,
        "weights": weights_digest(model),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        "images": benchmark.images_per_prompt,
        "height": run.height,
        "width": run.width,
        "seed": run.seed,
        "steps": run.steps,
        "guidance": run.guidance,
        "guidance_span": list(run.guidance_span),
        "negative": run.negative,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if run.jpeg_quality is not None:
        settings["jpeg_quality"] = run.jpeg_quality
    return settings


def read_settings(path):
    """The content of a run.json, with the settings that earlier versions did not store."""
    settings = parse_object(read_text(path), str(path))
    size = settings.pop("size", None)
    defaults = {"height": size, "width": size, "guidance_span": [0, 1], "negative": ""}
    if settings.get("benchmark") == "mjhq":
        defaults["jpeg_quality"] = JPEG_QUALITY
    return defaults | settings


def claim_folder(run, benchmark, model):
    """Write run.json or, if it exists, compare the settings with it. Returns its content.

    Raises FuseDiTError if the settings differ or the folder contains something else.
    """
    settings = run_settings(run, benchmark, model)
    path = run.out / "run.json"
    # List the folder before looking for run.json, which another process may be about to write.
    names = []
    if run.out.exists():
        names = [p.name for p in run.out.iterdir() if not p.name.startswith(".")]

    if path.exists():
        before = read_settings(path)
        changes = []
        for key, value in settings.items():
            if key != "model" and before.get(key) != value:        # a model may have moved
                changes.append(f"{key} {before.get(key)!r}, now {value!r}")
        if changes:
            raise FuseDiTError(f"{run.out} contains images drawn with other settings "
                               f"({'; '.join(changes)}): choose a different --out or delete the "
                               "folder")
        return before

    if names:
        raise FuseDiTError(f"{run.out} is not empty and has no run.json: choose a different "
                           "--out")
    write_progress(settings, 0, run, benchmark)
    return settings


def write_progress(settings, drawn, run, benchmark):
    """Write run.json with the number of prompts, from the first, whose images exist."""
    settings |= {"prompts_drawn": drawn, "prompts_total": len(benchmark.prompts)}
    write_settings(settings, run.out)


def write_settings(settings, folder):
    text = json.dumps(settings, indent=1) + "\n"
    write_bytes(folder / "run.json", text.encode())


# ---- drawing -------------------------------------------------------------------------------------

class ImagePaths:
    """The paths of a benchmark's images, and of the scorer's text files for the run's prompts."""

    def __init__(self, run, benchmark):
        folder = run.out / "images"
        self.by_prompt = [[folder / name for name in names] for names in benchmark.files]
        # The scorer of GenEval expects images beside each of these files.
        self.texts = {folder / name: text for name, text in benchmark.texts[:run.n]}

    def path(self, number):
        """The file of an image, or of the grid that contains it."""
        paths = self.by_prompt[number.prompt]
        if len(paths) == 1:
            return paths[0]
        return paths[number.image]

    def prompts_drawn(self):
        """The number of prompts before the first one that lacks an image."""
        for number, paths in enumerate(self.by_prompt):
            if not all(path.exists() for path in paths):
                return number
        return len(self.by_prompt)


def draw_missing(run, benchmark, model, vae, settings):
    """Draw this process's share of the missing images of the first run.n prompts.

    Adds the speed, if it could be measured, and the number of prompts whose images exist to
    run.json and to settings. Returns True if this process has to score the images: all exist, and
    it drew some of them or is rank 0.

    A batch always consists of the same images, regardless of which process draws it and which of
    them already exist, because in another batch a sum may differ in the last bit and a pixel by one
    level. (Only the last batch of the first n prompts may be smaller than that of a larger n.) All
    images of an incomplete batch are therefore drawn again; existing files are kept.
    """
    rank, world = backend.rank_and_world()
    paths = ImagePaths(run, benchmark)
    share = share_of_batches(run, benchmark, rank, world)
    prepare_folder(run, paths, share, rank, world)
    # run.json may be out of date: a process was killed, or images were deleted.
    drawn = paths.prompts_drawn()
    if rank == 0 and settings.get("prompts_drawn") != drawn:
        write_progress(settings, drawn, run, benchmark)

    missing = []
    done = 0
    for batch in share:
        if all(paths.path(number).exists() for number in batch):
            done += len(batch)
        else:
            missing.append(batch)

    count = sum(len(batch) for batch in missing)
    start = time.monotonic()
    with progress_bar(done + count, done, hidden=rank > 0) as bar:
        draw_batches(run, benchmark, model, vae, missing, paths, bar)
    if count > done and world == 1:                        # the speed of most of the images
        settings["images_per_s"] = round(count / (time.monotonic() - start), 3)
        settings["device"] = str(model.llm.embed_tokens.weight.device)
        write_settings(settings, run.out)

    took_part = bool(missing) or rank == 0
    if not took_part:
        return False
    drawn = paths.prompts_drawn()
    if drawn < run.n:                                      # other processes are still drawing
        return False
    write_progress(settings, drawn, run, benchmark)
    return True


def share_of_batches(run, benchmark, rank, world):
    """The batches that a rank draws: lists of ImageNumber.

    A batch contains all images of one or more prompts or, if they do not fit, some images of one.
    """
    images = benchmark.images_per_prompt
    prompts_per_batch = max(1, run.batch_size // images)
    groups = batches_of(range(run.n), prompts_per_batch)
    batches = []
    for group in groups[rank::world]:
        numbers = [ImageNumber(prompt, image) for prompt in group for image in range(images)]
        batches += batches_of(numbers, run.batch_size)
    return batches


def prepare_folder(run, paths, share, rank, world):
    """Delete the half-written files of a killed process, and write the scorer's text files.

    Each rank deletes only files of its own images, since other ranks may be writing theirs. Every
    rank may write run.json.
    """
    own = {paths.path(number) for batch in share for number in batch}
    if rank == 0:
        own |= paths.texts.keys()
    if world == 1:
        own.add(run.out / "run.json")
    for partial in run.out.rglob(".*.tmp"):
        name = partial.name[1:].rsplit(".", 2)[0]          # see files.atomic_write
        if partial.with_name(name) in own:
            partial.unlink()

    if rank == 0:
        for path, text in paths.texts.items():
            if not path.exists():
                write_bytes(path, text.encode())


def draw_batches(run, benchmark, model, vae, batches, paths, bar):
    """Draw and store the images of these batches."""
    def after_step(step, x):
        bar.update(len(x) / run.steps)

    # On a GPU, compressing a PNG can take as long as a sampling step.
    with ThreadPoolExecutor(4) as pool:
        writer = ImageWriter(run, benchmark, paths, pool)
        for batch in batches:
            images = generate(
                model, [benchmark.prompts[number.prompt] for number in batch],
                [image_seed(run.seed, *number) for number in batch], vae=vae, height=run.height,
                width=run.width, steps=run.steps, guidance=run.guidance,
                guidance_span=run.guidance_span, negative=run.negative, callback=after_step)
            for number, image in zip(batch, images, strict=True):
                writer.add(number, image)
        writer.wait()


# ---- storing -------------------------------------------------------------------------------------

class ImageWriter:
    """Stores images with the threads of a pool. The images of a grid are collected first."""

    def __init__(self, run, benchmark, paths, pool):
        self.run = run
        self.benchmark = benchmark
        self.paths = paths
        self.pool = pool
        self.jobs = []                      # jobs that were unfinished at the last check
        self.grid = []                      # images of the current prompt's grid
        self.grid_seeds = []

    def add(self, number, image):
        """Store an image. Raises the error of an earlier image that could not be stored."""
        seed = image_seed(self.run.seed, *number)
        path = self.paths.path(number)
        images = self.benchmark.images_per_prompt
        if len(self.paths.by_prompt[number.prompt]) == images:
            self.submit(image, path, number, str(seed))
            return
        self.grid.append(image)
        self.grid_seeds.append(str(seed))
        if len(self.grid) == images:
            self.submit(grid_of_four(self.grid), path, number, " ".join(self.grid_seeds))
            self.grid = []
            self.grid_seeds = []

    def submit(self, image, path, number, seeds):
        unfinished = []
        for job in self.jobs:
            if job.done():
                job.result()                # raises the job's error
            else:
                unfinished.append(job)
        run = self.run
        info = png_info(self.benchmark.prompts[number.prompt], seeds, run.steps, run.guidance,
                        run.guidance_span, run.negative, run.model, run.ema)
        job = self.pool.submit(save_image, image, path, info, run.jpeg_quality)
        self.jobs = [*unfinished, job]

    def wait(self):
        """Wait until all images are stored."""
        for job in self.jobs:
            job.result()


def grid_of_four(images):
    """Four images in two rows, in the order in which DPG-Bench's scorer cuts them out again."""
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        grid.paste(image, (column * width, row * height))
    return grid


def save_image(image, path, info, quality):
    """Write a PNG with text chunks or, if quality is not None, a JPEG. An existing file is kept.

    Quality 75 gives the same file as image.save(path), which the published script calls.
    """
    if path.exists():
        return
    data = io.BytesIO()
    if quality is None:
        image.save(data, format="PNG", pnginfo=info)
    else:
        subsampling = "4:2:0"               # colour at half the resolution
        if quality >= 90:
            subsampling = "4:4:4"
        image.save(data, format="JPEG", quality=quality, subsampling=subsampling)
    write_bytes(path, data.getvalue())


def write_bytes(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        tmp.write_bytes(data)

"""What both launchers share: run settings, EMA, checkpoints, signals.

Functions that know nothing of DeepSpeed or XLA. A launcher tells them its rank, hands them
tensors, and keeps the training loop itself in plain sight.

"""
import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend, cli
from fusedit_lib.data.shards import expand_shards

# ------------------------------------------------------------------------------ run settings

PROMPTS = ("a large red circle above a small blue square", "two small green circles",
           "a large yellow star on a black background", "a small pink heart left of a gray cross",
           "three white triangles on a blue background", "one large black heart",
           "a large purple square below a small orange circle",
           "a small cyan cross on a white background")


def flag(default, about, free=False, low=None, high=None, choices=None, only=""):
    """A setting: default, line of --help, and `free` if a run may be resumed with another.

    only: "gpu" or "tpu", where that launcher alone has it as a flag.
    """
    return field(default=default, metadata=dict(about=about, free=free, low=low, high=high,
                                                choices=choices, only=only))


@dataclass
class RunConfig:
    """One training run. Every field is a flag: image_size is --image-size."""
    preset: str = flag("demo", "model configuration, a name in fusedit.PRESETS")
    set: tuple = flag((), "other values of its fields: --set patch_size=2 qk_norm=false")
    base: str = flag("", "another frozen Gemma than the preset's: a folder or a hub id")
    image_size: int = flag(0, "side of the pictures in pixels; 0: the preset's", low=0)
    data: tuple = flag((), "shards: folders, 'a*.tar' or 'a-{000..031}.tar', also of http(s):// "
                       "or gs://; several make one data set", True)
    data_weights: tuple = flag((), "instead the share of each of the --data, as in 3 1")
    val_data: tuple = flag((), "held-out shards, for the validation loss", True)
    cache: str = flag("", "folder for copies of remote shards; if none, a temporary one", True)
    out: str = flag("", "run folder, runs/PRESET if none; goes on from its checkpoints", True)
    batch: int = flag(512, "pictures a step, over all devices together", low=1)
    micro_batch: int = flag(0, "pictures a device takes at once; 0: its whole share", True, low=0)
    steps: int = flag(500_000, "optimizer steps in all", True, low=1)
    lr: float = flag(1e-4, "learning rate of AdamW", low=0)
    warmup_steps: int = flag(0, "steps in which --lr is reached, from zero in a line", low=0)
    lr_schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = flag(1e-4, "of AdamW", low=0)
    beta1: float = flag(0.9, "decay of AdamW's mean", low=0, high=0.99999)
    beta2: float = flag(0.999, "decay of AdamW's variance", low=0, high=0.99999)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to it; 0: none", low=0)
    caption_drop: float = flag(0.1, "share of captions emptied, for guidance", low=0, high=1)
    original_caption_rate: float = flag(0.0, "share of original, not synthetic captions",
                                        low=0, high=1)
    crop: str = flag("center", "which square of a picture", choices=("center", "random"))
    latents: bool = flag(True, "read latents that `prepare_data.py encode` left beside the shards")
    ema_decay: float = flag(0.99, "decay of the averaged weights", low=0, high=1)
    ema_every: int = flag(100, "steps between two updates of the average", low=1)
    ema_offload: bool = flag(False, "keep the averaged weights in the CPU's memory: 4 bytes a "
                             "weight less on the GPU", True, only="gpu")
    train_llm: bool = flag(False, "train the Gemma as well")
    seed: int = flag(42, "of weights, noise, data order and samples", low=0, high=2**32 - 1)
    dtype: str = flag("auto", "of compute; weights are kept in float32. auto: bf16 where the "
                      "device has it, else float32; a run goes on in its own",
                      choices=("auto", "bf16", "float32"))
    device: str = flag("auto", "where to train", True, choices=("auto", "cuda", "cpu"), only="gpu")
    zero: str = flag("1", "ZeRO: devices share 1 Adam's state, 2 gradients too, 3 weights too; "
                     "offload: Adam on the CPU", True, only="gpu",
                     choices=("0", "1", "2", "3", "1-offload", "2-offload", "3-offload"))
    deepspeed_config: str = flag("", "JSON of more DeepSpeed settings", True, only="gpu")
    compile: bool = flag(False, "compile the blocks: faster, after a minute", True, only="gpu")
    memory_budget: float = flag(1.0, "with --compile, the share of activations kept; the cheapest "
                                "of the rest are computed again: between 1 and --remat", True,
                                low=0, high=1, only="gpu")
    mesh: str = flag("-1,1", "devices along fsdp, which share the batch and all tensors, and along "
                     "tensor, which share heads and the MLP's width; -1: all others", True,
                     only="tpu")
    float8: bool = flag(False, "the DiT's products in float8 (torchao; an H100 or newer): faster, "
                        "not quite the same", only="gpu")
    remat: bool = flag(False, "recompute activations: less memory, slower", True)
    workers: int = flag(-1, "data processes of a GPU, or of a TPU's host; 0: none; -1: its share "
                        "of the cores but one, 16 at most", True, low=-1)
    mix_shards: int = flag(8, "shards read at a time, their samples mixed", low=1)
    max_skipped: float = flag(0.01, "share of samples that may be unreadable", True, low=0, high=1)
    log_every: int = flag(20, "steps between two lines of the log", True, low=1)
    tensorboard: bool = flag(False, "log there too, in the run folder", True)
    wandb: str = flag("", "project of Weights & Biases to log to", True)
    resume: str = flag("auto", "auto: the newest whole checkpoint; a step; or none: only a new run",
                       True)
    save_every: int = flag(1000, "steps between two checkpoints", True, low=1)
    save_minutes: float = flag(0.0, "also after so many minutes; 0: not", True, low=0)
    keep: int = flag(3, "number of checkpoints kept; the oldest go", True, low=1)
    keep_every: int = flag(0, "but those of every so many steps stay; 0: none do", True, low=0)
    sample_every: int = flag(1000, "steps between two sample grids; 0: none", True, low=0)
    val_every: int = flag(1000, "steps between two validation losses", True, low=1)
    val_samples: int = flag(256, "held-out samples of one", True, low=1)
    prompts: tuple = flag(PROMPTS, "of the sample grid: texts, or .txt files of them", True)
    sample_steps: int = flag(25, "sampler steps of the grid", True, low=1)
    plan: str = flag("", "train nothing: print parameters, memory and time on these, as in 8xH100 "
                     "or v5e-256; 8xH100@0.5: at half of their peak (0.4)", True)


def parse_run(argv, description, engine="gpu"):
    """RunConfig from the command line; argparse is generated from the fields above."""
    mine = [f for f in fields(RunConfig) if f.metadata["only"] in ("", engine)]
    parser = argparse.ArgumentParser(description=description,
                                     usage="%(prog)s [--flag value ...]; --help lists the flags",
                                     formatter_class=argparse.RawTextHelpFormatter)
    for f in mine:
        about, kind = f.metadata["about"], type(f.default)
        shown = f.default if kind is not tuple else f"{len(f.default)} of them" if f.default else ""
        extra = dict(type=kind, choices=f.metadata["choices"], metavar=kind.__name__.upper())
        if kind is bool:
            extra = dict(action=argparse.BooleanOptionalAction)
        if kind is tuple:
            extra = dict(nargs="+", action="extend", metavar="TEXT")
        if f.metadata["choices"]:
            extra |= dict(metavar=None)
        parser.add_argument("--" + f.name.replace("_", "-"), **extra, default=None,
                            help=about + (f" ({shown})" if shown != "" else ""))
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers add it
    words = iter(sys.argv[1:] if argv is None else argv)
    argv = [f"{w}={next(words, '')}" if w == "--mesh" else w for w in words]  # else -1,2 is a flag
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    given.pop("local_rank", None)
    for f in (f for f in mine if f.name in given):
        low, high = f.metadata["low"], f.metadata["high"]
        if low is not None and not low <= given[f.name] <= (math.inf if high is None else high):
            parser.error(f"--{f.name.replace('_', '-')} is {given[f.name]}; it must be "
                         + (f"at least {low}" if high is None else f"from {low} to {high}"))
    try:
        weights = [float(w) for w in given.get("data_weights", ())]
    except ValueError:
        weights = [-1]
    if not all(0 < w < math.inf for w in weights):
        parser.error("--data-weights must be positive numbers, one for each of --data")
    run = replace(RunConfig(**given), data_weights=weights)
    texts = [cli.read_prompts(Path(p)) if p.endswith(".txt") else [p] for p in run.prompts]
    return replace(run, prompts=sum(texts, []), out=run.out or f"runs/{run.preset}")


def check(run):
    """Raise what can be known to be wrong before the model loads."""
    for pattern in (*run.data, *run.val_data):
        expand_shards(pattern)
    if Path(run.out).is_file():
        raise FuseDiTError(f"--out {run.out} is a file; it must be a folder")
    if run.memory_budget < 1 and not run.compile:
        raise FuseDiTError("--memory-budget is the compiler's: add --compile, or use --remat")
    if run.deepspeed_config:
        try:
            json.loads(Path(run.deepspeed_config).read_text())
        except (OSError, ValueError) as e:
            raise FuseDiTError(f"--deepspeed-config {run.deepspeed_config}: "
                               f"{getattr(e, 'strerror', None) or f'not JSON ({e})'}") from None


def model_config(run):
    """The preset with the run's changes. Folders become absolute, for sample.py's sake."""
    changes = {k: getattr(run, k) for k in ("base", "image_size") if getattr(run, k)}
    for item in run.set:
        key, sign, text = item.partition("=")
        if not sign:
            raise FuseDiTError(f"--set takes field=value, not {item!r}")
        try:
            changes[key] = json.loads(text)
        except ValueError:
            changes[key] = text             # a plain word needs no quotes
    config = fusedit.preset(run.preset, **changes)
    unit = config.patch_size * (8 if config.vae else 1)
    if config.image_size % unit:
        near = config.image_size // unit * unit
        raise FuseDiTError(f"image_size {config.image_size} does not divide into patches of {unit} "
                           f"pixels; nearest: {near or near + unit} or {near + unit}")
    named = {k: getattr(config, k) for k in ("base", "vae", "clip") if getattr(config, k)}
    roots = (Path(fusedit.__file__).parent, Path())
    return replace(config, **{k: str((root / name).resolve()) for k, name in named.items()
                              for root in roots if (root / name).exists()})


def split_batch(run, world):
    """(pictures a device takes at once, times a step). Refuses what does not divide."""
    unit = world * (run.micro_batch or 1)
    if run.batch % unit == 0:
        micro = run.micro_batch or run.batch // world
        return micro, run.batch // (micro * world)
    near = [n for n in (run.batch // unit * unit, (run.batch // unit + 1) * unit) if n]
    fits = [m for m in range(1, run.micro_batch) if run.batch % (m * world) == 0]
    each = f" x --micro-batch {run.micro_batch}" if run.micro_batch else ""
    raise FuseDiTError(
        f"--batch {run.batch} does not divide into {world} devices{each}; "
        f"--batch {' or '.join(map(str, near))} would"
        + (f", or --micro-batch {fits[-1]}" if fits else ""))


def data_workers(run):
    """How many processes make this rank's batches: --workers, or by the cores of this machine."""
    if run.workers >= 0:
        return run.workers
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return max(1, min(16, cores // backend.local_world() - 1))

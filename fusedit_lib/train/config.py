"""Run settings: every setting of a training run, its command line flag, and what follows from it.

RunConfig is shared by both launchers. Its fields are also stored, under the same names, in the
config.json of a run folder.
"""
import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend, cli
from fusedit_lib.data.shards import expand_shards

PROMPTS = (
    "a large red circle above a small blue square",
    "two small green circles",
    "a large yellow star on a black background",
    "a small pink heart left of a gray cross",
    "three white triangles on a blue background",
    "one large black heart",
    "a large purple square below a small orange circle",
    "a small cyan cross on a white background",
)
ZERO_STAGES = ("0", "1", "2", "3", "1-offload", "2-offload", "3-offload")


# ------------------------------------------------------------------------------ settings

def flag(default, about, free=False, low=None, high=None, choices=None, only="", group=""):
    """A field of RunConfig with what its command line flag needs.

    about: the flag's line of --help.
    free: whether a run may be resumed with another value.
    low, high: smallest and largest allowed number, both included.
    only: "gpu" or "tpu" if one launcher alone has this flag.
    group: title of the group of --help that begins with this field.
    """
    metadata = dict(about=about, free=free, low=low, high=high, choices=choices, only=only,
                    group=group)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """Settings of one training run. Every field is a flag: image_size is --image-size."""

    # Which model is trained. All of these define the run and cannot change on resume.
    preset: str = flag("demo", "model configuration: a name in fusedit.PRESETS", group="model")
    set: tuple = flag((), "other values for fields of the preset, as in --set patch_size=2 "
                      "qk_norm=false")
    base: str = flag("", "folder or hub id of a frozen Gemma other than the preset's")
    image_size: int = flag(0, "side of the square images in pixels; 0: as the preset says", low=0)
    train_llm: bool = flag(False, "also train Gemma, not only the DiT")

    # What it is trained on, and how samples become batches.
    data: tuple = flag((), "training shards: folders, 'a*.tar' or 'a-{000..031}.tar', also at "
                       "http(s):// or gs://; several patterns form one data set", True,
                       group="data")
    data_weights: tuple = flag((), "draw from the --data patterns in these proportions, as in "
                               "3 1, instead of forming one data set")
    cache: str = flag("", "folder for copies of remote shards; without it, a temporary folder",
                      True)
    latents: bool = flag(True, "read the latents that `prepare_data.py encode` has written beside "
                         "the shards, where there are any")
    crop: str = flag("center", "which square is cut out of an image", choices=("center", "random"))
    caption_drop: float = flag(0.1, "probability of an empty caption, which classifier-free "
                               "guidance needs", low=0, high=1)
    original_caption_rate: float = flag(0.0, "probability of the original caption in place of the "
                                        "synthetic one", low=0, high=1)
    mix_shards: int = flag(8, "number of shards that are read at a time with their samples mixed",
                           low=1)
    max_skipped: float = flag(0.01, "share of samples that may be unreadable before the run stops",
                              True, low=0, high=1)
    workers: int = flag(-1, "data loading processes for each GPU or TPU host; 0: none; -1: its "
                        "share of the CPU cores less one, at most 16", True, low=-1)

    # The optimization itself: these decide what the weights become.
    batch: int = flag(512, "global batch size: images in an optimizer step, over all devices",
                      low=1, group="optimization")
    micro_batch: int = flag(0, "images that a device processes at once; the rest of its share of "
                            "--batch is accumulated; 0: its whole share", True, low=0)
    steps: int = flag(500_000, "number of optimizer steps of the whole run", True, low=1)
    lr: float = flag(1e-4, "learning rate of AdamW", low=0)
    warmup_steps: int = flag(0, "steps in which the learning rate rises linearly from zero to --lr",
                             low=0)
    lr_schedule: str = flag("constant", "learning rate after the warmup",
                            choices=("constant", "cosine"))
    weight_decay: float = flag(1e-4, "weight decay of AdamW", low=0)
    beta1: float = flag(0.9, "decay of AdamW's first moment", low=0, high=0.99999)
    beta2: float = flag(0.999, "decay of AdamW's second moment", low=0, high=0.99999)
    max_grad_norm: float = flag(1.0, "gradients with a larger norm are scaled down to it; 0: no "
                                "clipping", low=0)
    ema_decay: float = flag(0.99, "decay of the EMA of the weights at each update", low=0, high=1)
    ema_every: int = flag(100, "steps between two updates of the EMA", low=1)
    seed: int = flag(42, "seed of the initial weights, noise, data order and sample grids",
                     low=0, high=2**32 - 1)

    # Number formats, and speed against memory.
    dtype: str = flag("auto", "data type of the computation; weights are kept in float32. auto: "
                      "bf16 where the device supports it, otherwise float32; a resumed run keeps "
                      "its own", choices=("auto", "bf16", "float32"), group="precision and memory")
    float8: bool = flag(False, "matrix products of the DiT in float8 (torchao; needs an H100 or "
                        "newer): faster, with slightly different results", only="gpu")
    compile: bool = flag(False, "compile the transformer blocks, which takes a minute: faster "
                         "steps and less memory", True, only="gpu")
    memory_budget: float = flag(1.0, "with --compile, the share of activations that is kept; the "
                                "cheapest of the others are recomputed: between 1, which keeps "
                                "all, and --remat", True, low=0, high=1, only="gpu")
    remat: bool = flag(False, "recompute all activations of a block in the backward pass: less "
                       "memory, slower steps", True)
    ema_offload: bool = flag(False, "keep the EMA in CPU memory, which saves 4 bytes a weight on "
                             "the GPU", True, only="gpu")

    # Which devices, and what they share among them.
    device: str = flag("auto", "device to train on", True, choices=("auto", "cuda", "cpu"),
                       only="gpu", group="devices")
    zero: str = flag("1", "ZeRO stage: the GPUs shard Adam's state (1), also gradients (2), also "
                     "weights (3); offload: Adam's state and step on the CPU", True, only="gpu",
                     choices=ZERO_STAGES)
    deepspeed_config: str = flag("", "JSON file of further DeepSpeed settings", True, only="gpu")
    mesh: str = flag("-1,1", "number of devices along two axes: fsdp, which shards the batch and "
                     "all tensors, and tensor, which shards heads and the MLP's width; -1: all "
                     "that remain", True, only="tpu")

    # The run folder and its checkpoints.
    out: str = flag("", "run folder, runs/PRESET by default; a run that it holds is resumed", True,
                    group="run folder and checkpoints")
    resume: str = flag("auto", "auto: resume from the newest undamaged checkpoint; a step: from "
                       "that one; none: start a new run, and refuse a folder that has "
                       "checkpoints", True)
    save_every: int = flag(1000, "steps between two checkpoints", True, low=1)
    save_minutes: float = flag(0.0, "also save after so many minutes; 0: by steps alone", True,
                               low=0)
    keep: int = flag(3, "number of checkpoints to keep; older ones are deleted", True, low=1)
    keep_every: int = flag(0, "never delete checkpoints at multiples of this step; 0: delete them "
                           "like the others", True, low=0)

    # What the run reports while it trains.
    log_every: int = flag(20, "steps between two lines of the log", True, low=1,
                          group="log, validation and sample grids")
    tensorboard: bool = flag(False, "also log to TensorBoard, in the run folder", True)
    wandb: str = flag("", "Weights & Biases project to also log to", True)
    val_data: tuple = flag((), "held-out shards for the validation loss, as in --data", True)
    val_every: int = flag(1000, "steps between two validation losses", True, low=1)
    val_samples: int = flag(256, "number of held-out samples in a validation loss", True, low=1)
    sample_every: int = flag(1000, "steps between two sample grids; 0: none", True, low=0)
    prompts: tuple = flag(PROMPTS, "prompts of the sample grid: texts, or .txt files with a prompt "
                          "in each line", True)
    sample_steps: int = flag(25, "sampler steps for the sample grid", True, low=1)

    # Instead of training.
    plan: str = flag("", "print the parameters, memory and time that the run would need on these "
                     "devices, and do not train: 8xH100, v5e-256, or 8xH100@0.5 to assume half of "
                     "their peak FLOP/s (without it, 0.4 of the peak)", True, group="planning")


# ------------------------------------------------------------------------------ command line

def flag_name(name):
    return "--" + name.replace("_", "-")


def default_text(default):
    """The default as --help shows it; empty if there is nothing to show."""
    if default == "" or default == ():
        return ""
    if isinstance(default, bool):
        return " (default: on)" if default else " (default: off)"
    if isinstance(default, tuple):
        return f" (default: {len(default)} of them)"
    return f" (default: {default})"


def add_flag(parser, setting):
    """Add the flag of a field of RunConfig to a parser or argument group.

    Its value is None when the flag is not given.
    """
    kind = type(setting.default)
    choices = setting.metadata["choices"]
    if kind is bool:
        options = dict(action=argparse.BooleanOptionalAction)
    elif kind is tuple:
        options = dict(nargs="+", action="extend", metavar="TEXT")
    elif choices:
        options = dict(type=kind, choices=choices)
    else:
        options = dict(type=kind, metavar=kind.__name__.upper())
    about = setting.metadata["about"] + default_text(setting.default)
    parser.add_argument(flag_name(setting.name), default=None, help=about, **options)


def make_parser(description, engine):
    """The argument parser of a launcher; engine: "gpu" or "tpu"."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...]; --help lists the flags")
    for setting in fields(RunConfig):
        title = setting.metadata["group"]
        if title:
            group = parser.add_argument_group(title)
        if setting.metadata["only"] in ("", engine):
            add_flag(group, setting)

    # torchrun and DeepSpeed add this one for the process; LOCAL_RANK says the same
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def join_mesh(words):
    """The command line with "--mesh -1,2" as "--mesh=-1,2": argparse would take -1,2 as a flag."""
    joined = []
    words = iter(words)
    for word in words:
        if word == "--mesh":
            word = f"--mesh={next(words, '')}"
        joined.append(word)
    return joined


def check_range(parser, setting, value):
    """Exit with a usage error if value is not within the setting's limits."""
    low = setting.metadata["low"]
    high = setting.metadata["high"]
    if low is None:
        return
    if high is None:
        inside = low <= value <= math.inf   # not NaN
        allowed = f"at least {low}"
    else:
        inside = low <= value <= high
        allowed = f"from {low} to {high}"
    if not inside:
        parser.error(f"{flag_name(setting.name)} is {value}; it must be {allowed}")


def read_weights(parser, words):
    """The numbers of --data-weights; a usage error if one is not positive."""
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = [-1]
    if not all(0 < weight < math.inf for weight in weights):
        parser.error("--data-weights must be positive numbers, one for each of --data")
    return weights


def parse_run(argv, description, engine="gpu"):
    """RunConfig from the command line.

    argv: the words after the program's name; None takes those of this process.
    description: the launcher's docstring, for --help. engine: "gpu" or "tpu".
    Exits with code 2 on a usage error; raises FuseDiTError if a prompt file cannot be read.
    """
    parser = make_parser(description, engine)
    if argv is None:
        argv = sys.argv[1:]
    args = vars(parser.parse_args(join_mesh(argv)))
    del args["local_rank"]
    provided = {name: value for name, value in args.items() if value is not None}

    # what argparse cannot check
    for setting in fields(RunConfig):
        if setting.name in provided:
            check_range(parser, setting, provided[setting.name])
    provided["data_weights"] = read_weights(parser, provided.get("data_weights", ()))
    run = RunConfig(**provided)

    # prompts of files, and the default folder
    prompts = []
    for prompt in run.prompts:
        if prompt.endswith(".txt"):
            prompts += cli.read_prompts(Path(prompt))
        else:
            prompts.append(prompt)
    return replace(run, prompts=prompts, out=run.out or f"runs/{run.preset}")


def check_run(run):
    """Raise FuseDiTError for what can be known to be wrong before the model is loaded."""
    for pattern in (*run.data, *run.val_data):
        expand_shards(pattern)
    if Path(run.out).is_file():
        raise FuseDiTError(f"--out {run.out} is a file; it must be a folder")
    if run.memory_budget < 1 and not run.compile:
        raise FuseDiTError("--memory-budget is a setting of the compiler: add --compile, or use "
                           "--remat instead")
    if run.deepspeed_config:
        check_json(run.deepspeed_config)


def check_json(path):
    """Raise FuseDiTError if --deepspeed-config's file cannot be read or is not JSON."""
    try:
        json.loads(Path(path).read_text())
    except OSError as e:
        raise FuseDiTError(f"--deepspeed-config {path}: {e.strerror}") from None
    except ValueError as e:
        raise FuseDiTError(f"--deepspeed-config {path}: not JSON ({e})") from None


def multiples_around(number, unit):
    """The multiples of unit below and above a number, as text for a message: "28 or 32"."""
    below = number // unit * unit
    above = below + unit
    if below == 0:
        return f"{above}"
    return f"{below} or {above}"


# ------------------------------------------------------------------------------ the model

def parse_overrides(words):
    """{field: value} of --set, whose values are JSON or plain words."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise FuseDiTError(f"--set takes field=value, not {word!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text             # a word that is not JSON needs no quotes
    return values


def absolute(name):
    """The absolute path of a folder here or beside fusedit.py; any other name is a hub id."""
    for root in (Path(), Path(fusedit.__file__).parent):
        if (root / name).exists():
            return str((root / name).resolve())
    return name


def model_config(run):
    """FuseDiTConfig of the run: its preset with the changes that the flags make.

    Paths of model folders become absolute, so that the run folder can be used from anywhere.
    Raises FuseDiTError for an unknown preset or field, and for an image size that does not
    divide into patches.
    """
    changes = {}
    if run.base:
        changes["base"] = run.base
    if run.image_size:
        changes["image_size"] = run.image_size
    config = fusedit.preset(run.preset, **changes | parse_overrides(run.set))

    patch = config.patch_size               # in pixels
    if config.vae:
        patch *= 8
    if config.image_size % patch:
        raise FuseDiTError(f"image_size {config.image_size} does not divide into patches of "
                           f"{patch} pixels; nearest: {multiples_around(config.image_size, patch)}")

    paths = {}
    for name in ("base", "vae", "clip"):
        value = getattr(config, name)
        if value:
            paths[name] = absolute(value)
    return replace(config, **paths)


# ------------------------------------------------------------------------------ shares of devices

class BatchSplit(NamedTuple):
    """How the global batch is split into forward passes."""
    micro_batch: int                        # images of a device in one forward pass
    accumulation: int                       # forward and backward passes in a step


def split_batch(run, devices):
    """BatchSplit of run.batch over so many devices; raises FuseDiTError if it does not divide."""
    unit = devices * (run.micro_batch or 1)
    if run.batch % unit == 0:
        micro_batch = run.micro_batch or run.batch // devices
        return BatchSplit(micro_batch, run.batch // (micro_batch * devices))

    # what would divide
    each = ""
    remedy = ""
    if run.micro_batch:
        each = f" x --micro-batch {run.micro_batch}"
        fitting = [size for size in range(1, run.micro_batch)
                   if run.batch % (size * devices) == 0]
        if fitting:
            remedy = f", or --micro-batch {fitting[-1]}"
    raise FuseDiTError(f"--batch {run.batch} does not divide into {devices} devices{each}; "
                       f"--batch {multiples_around(run.batch, unit)} would{remedy}")


def data_workers(run):
    """Number of data loading processes for this rank: --workers, or its share of the cores."""
    if run.workers >= 0:
        return run.workers
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return max(1, min(16, cores // backend.local_world() - 1))

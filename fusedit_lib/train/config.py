"""The settings of a training run, and values derived from them. flags.py has their flags.

train_gpu.py and train_tpu.py both use RunConfig. Its fields are stored under the same names in the
config.json of a run folder.
"""
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import fusedit
from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib import backend, cli, published, seeds
from fusedit_lib.data.layout import MAX_SKIPPED
from fusedit_lib.data.shards import expand_shards, is_url
from fusedit_lib.files import read_json
from fusedit_lib.folders import find_local, is_hub_id, repository
from fusedit_lib.pretrained import model_folder, open_config
from fusedit_lib.vae import vae_config

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
# What --resume-with may change in a run; naming one of SCHEDULE also starts the schedule anew.
SCHEDULE = ("lr_schedule", "warmup_steps")
CHANGEABLE = ("batch", "lr", *SCHEDULE, "weight_decay", "ema_decay", "data_weights")


# ------------------------------------------------------------------------------ settings

def flag(default, about, free=False, low=None, high=None, choices=None, only="", group=""):
    """A field of RunConfig, with the description of its command line flag.

    about: the flag's text in --help. A field without one has no flag.
    free: True if the value may change when a run is resumed.
    low, high: the smallest and the largest allowed value.
    only: "gpu" or "tpu" if only one of the training programs has this flag.
    group: title of the --help group that begins with this field.
    """
    metadata = dict(about=about, free=free, low=low, high=high, choices=choices, only=only,
                    group=group)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """The settings of a training run. Each field but `changes` is a flag, such as --image-size."""

    # The model to train. Of these settings, only like_published may change when a run is resumed.
    preset: str = flag("demo", "model preset: a name in fusedit.PRESETS; leave it out with --init",
                       group="model")
    init: str = flag("", "model to start from instead of random weights, as --model of sample.py: "
                     "a run, a checkpoint (its EMA), a model folder or a hub id. The config is "
                     "that of the model, changed by --set, --base and --image-size; a resumed run "
                     "remembers it")
    init_raw: bool = flag(False, "with --init, start from a checkpoint's raw weights instead of "
                          "their EMA")
    lora: int = flag(0, "with --init, train LoRA adapters of this rank instead of the DiT's "
                     "weights: less memory and small checkpoints; 0: none", low=0, only="gpu")
    like_published: bool = flag(False, "settings that are not given are those of the preset's "
                                "published run: steps, EMA, resizing, checkpoints and so on "
                                "(docs/glossary.md lists them); --data must be given; a resumed "
                                "run remembers this flag", True)
    set: tuple = flag((), "override fields of the config, for example --set patch_size=2 "
                      "qk_norm=false")
    base: str = flag("", "Gemma to use, as a folder or hub id (default: that of the preset or of "
                     "--init)")
    image_size: int = flag(0, "width and height of the images in pixels; 0: those of the preset or "
                           "of --init", low=0)
    train_llm: bool = flag(False, "train Gemma as well as the DiT")

    # The training data, and how samples become batches.
    data: tuple = flag((), "training shards: folders, or patterns such as 'a*.tar' and "
                       "'a-{000..031}.tar', local or at http(s):// or gs://; several of them are "
                       "combined into one data set", True, group="data")
    data_weights: tuple = flag((), "sample from the --data patterns in these proportions, for "
                               "example 3 1, instead of combining them into one data set; none: "
                               "combine them, as without this flag")
    cache: str = flag("", "folder in which remote shards are cached (default: a temporary folder)",
                      True)
    latents: bool = flag(True, "train on the latents that `prepare_data.py encode` has written "
                         "beside the shards, where there are any")
    image_key: str = flag("", "extension of the images in the shards (default: image.*, jpg, jpeg, "
                              "png, webp or another image's, see docs/data.md)")
    caption_key: str = flag("", "extension of the captions in the shards, or a field of KEY.json "
                                "(default: synthetic_caption.txt and original_caption.txt, txt, or "
                                "caption, text, ..., see docs/data.md)")
    caption_pick: str = flag("random", "which of several captions of an image is used: random: "
                             "another one at every visit; first; whole: all lines of the caption "
                             "file as one caption, as in the published code",
                             choices=("random", "first", "whole"))
    crop: str = flag("center", "how images are cropped to squares", choices=("center", "random"))
    resize: str = flag("bicubic", "how images are resized; bilinear gives the same pixels as "
                       "the published code, but is slower", choices=("bicubic", "bilinear"))
    caption_drop: float = flag(0.1, "probability of replacing a caption with an empty one, which "
                               "classifier-free guidance requires", low=0, high=1)
    original_caption_rate: float = flag(0.0, "probability of using the original caption instead of "
                                        "the synthetic one", low=0, high=1)
    streams: int = flag(64, "number of streams, from which samples are taken in turn. Each reads "
                        "its own part of the shards, and each GPU or TPU host its own streams if "
                        "their number is a multiple of that of GPUs or hosts. Kept on resume",
                        low=1)
    mix_shards: int = flag(8, "shards whose samples are shuffled together, over all streams; "
                           "rounded up to a multiple of --streams", low=1)
    max_skipped: float = flag(MAX_SKIPPED, "stop the run if more than this fraction of the samples "
                              "cannot be read", True, low=0, high=1)
    workers: int = flag(-1, "data loading processes per GPU or per TPU host; 0: load in "
                        "the training process; -1: one less than its share of the CPU cores, at "
                        "most 16", True, low=-1)

    # Optimization. These settings determine the trained weights.
    batch: int = flag(512, "global batch size: images per optimizer step, across all devices",
                      low=1, group="optimization")
    micro_batch: int = flag(0, "images per device in one forward pass; gradients are accumulated "
                            "to reach --batch; 0: no accumulation", True, low=0)
    steps: int = flag(500_000, "total number of optimizer steps", True, low=1)
    lr: float = flag(1e-4, "AdamW learning rate", low=0)
    warmup_steps: int = flag(0, "steps over which the learning rate rises linearly from zero to "
                             "--lr", low=0)
    lr_schedule: str = flag("constant", "learning rate schedule after the warmup",
                            choices=("constant", "cosine"))
    weight_decay: float = flag(1e-4, "AdamW weight decay", low=0)
    beta1: float = flag(0.9, "AdamW beta1, the decay of the first moment", low=0, high=0.99999)
    beta2: float = flag(0.999, "AdamW beta2, the decay of the second moment", low=0, high=0.99999)
    max_grad_norm: float = flag(1.0, "clip gradients to this norm; 0: no clipping", low=0)
    ema_decay: float = flag(0.99, "decay of the EMA weights at each update", low=0, high=1)
    ema_every: int = flag(100, "steps between EMA updates", low=1)
    ema_warmup: bool = flag(True, "use a decay of n / (9 + n) for the n-th EMA update until it "
                            "reaches --ema-decay; off: --ema-decay from the first update on, as in "
                            "the published code")
    seed: int = flag(42, "seed for the initial weights, noise, data order and image grids; -1: "
                     "draw one, which the run keeps when it is resumed", low=seeds.RANDOM,
                     high=seeds.LIMIT - 1)

    # Precision, and trade-offs between speed and memory.
    dtype: str = flag("auto", "data type of the computation; weights are kept in float32. auto: "
                      "bf16 if the device supports it natively, otherwise float32; a resumed run "
                      "keeps its data type",
                      choices=("auto", "bf16", "float32"), group="precision and memory")
    float8: bool = flag(False, "compute the DiT's matrix products in float8, with torchao, on an "
                        "Ada or Hopper (H100) GPU or newer: faster, with slightly different "
                        "results", only="gpu")
    compile: bool = flag(False, "compile the transformer blocks, which takes about a minute: "
                         "faster steps and less memory", True, only="gpu")
    cache_text: bool = flag(False, "run Gemma once per distinct caption, before the first step, "
                            "and keep its keys and values in memory: faster steps, for data sets "
                            "with at most some 100,000 captions", True, only="gpu")
    memory_budget: float = flag(1.0, "with --compile, the fraction of the activations to keep; the "
                                "others, the cheapest ones first, are recomputed in the backward "
                                "pass. A compromise between 1, which keeps all, and --remat",
                                True, low=0, high=1, only="gpu")
    remat: bool = flag(False, "recompute all activations of each block in the backward pass: "
                       "less memory, slower steps", True)
    ema_offload: bool = flag(False, "keep the EMA in CPU memory, which saves 4 bytes per weight, "
                             "divided among the GPUs; --zero with -offload always does this", True,
                             only="gpu")

    # The devices, and how they share the work.
    device: str = flag("auto", "device to train on", True, choices=("auto", "cuda", "cpu"),
                       only="gpu", group="devices")
    zero: str = flag("1", "ZeRO stage: 1 shards Adam's state across the GPUs, 2 also the "
                     "gradients, 3 also the weights; -offload keeps Adam's state and the "
                     "EMA in CPU memory and runs Adam's step there", True, only="gpu",
                     choices=ZERO_STAGES)
    deepspeed_config: str = flag("", "JSON file with more DeepSpeed settings", True, only="gpu")
    mesh: str = flag("-1,1", "device mesh, as the number of devices along two axes: fsdp, which "
                     "shards the batch and all large tensors, and tensor, which shards attention "
                     "heads and the MLP width; -1: all remaining devices", True, only="tpu")

    # The run folder and its checkpoints.
    out: str = flag("", "run folder (default: runs/PRESET or, with --init, runs/NAME-finetuned); "
                    "if it holds a run, that run is resumed", True,
                    group="run folder and checkpoints")
    resume: str = flag("auto", "auto: resume from the newest undamaged checkpoint; a step number: "
                       "resume from that checkpoint; none: start a new run, and refuse a folder "
                       "that has checkpoints", True)
    resume_with: tuple = flag((), "names of the settings to change on resume, such as lr,batch; "
                              "their own flags give the new values. Allowed: "
                              f"{', '.join(CHANGEABLE)}. Naming lr_schedule or warmup_steps also "
                              "restarts the learning rate schedule, with its warmup", True)
    changes: tuple = flag((), "", True)     # made by --resume-with so far: see changes.py
    save_every: int = flag(1000, "steps between checkpoints", True, low=1)
    save_minutes: float = flag(0.0, "also save once this many minutes have passed since the last "
                               "checkpoint; 0: save by steps only", True, low=0)
    keep: int = flag(3, "number of newest checkpoints to keep; older ones are deleted", True, low=1)
    keep_every: int = flag(0, "never delete checkpoints whose step is a multiple of this; 0: "
                           "delete them like any other", True, low=0)

    # Logging, validation and image grids.
    log_every: int = flag(20, "steps between log lines", True, low=1,
                          group="logging, validation and image grids")
    tensorboard: bool = flag(False, "also log to TensorBoard, in the run folder", True)
    wandb: str = flag("", "also log to this Weights & Biases project", True)
    val_data: tuple = flag((), "held-out shards for the validation loss, given as in --data", True)
    val_every: int = flag(1000, "steps between validations", True, low=1)
    val_samples: int = flag(256, "number of held-out samples per validation", True, low=1)
    sample_every: int = flag(1000, "steps between image grids; 0: none", True, low=0)
    prompts: tuple = flag(PROMPTS, "prompts for the image grid, or .txt files with one prompt per "
                          "line", True)
    sample_steps: int = flag(25, "number of sampler steps for the image grid", True, low=1)

    # Instead of training.
    plan: str = flag("", "print the parameters, memory and time that the run would need on these "
                     "devices, such as 8xH100 or v5e-256, and exit. 8xH100@0.5 assumes half of "
                     "their peak FLOP/s instead of the default of 0.4", True, group="planning")


# ------------------------------------------------------------------------------ before the start

def is_resumed(out):
    """True if a folder holds a run with checkpoints."""
    return bool(stored_settings(out)) and any(Path(out).glob("step-*"))


def stored_settings(out):
    """The settings of the run that a folder holds, by name; {} if it holds none."""
    path = Path(out) / "config.json"
    if not path.exists():
        return {}
    return read_json(path).get("run", {})


def run_of(path):
    """The Path of the run that a checkpoint belongs to; that of any other model as it is.

    The run may also be one of the published code, whose checkpoints are named by their step alone,
    as DIR/2024 is; but that may be a model as well.
    """
    path = Path(path)
    if path.name.startswith("step-"):
        return path.parent
    if path.name.isdigit() and (published.is_checkpoint(path) or not path.exists()):
        return path.parent
    return path


def check_run(run):
    """Raise FuseDiTError for mistakes that can be found before the model is loaded."""
    for pattern in (*run.data, *run.val_data):
        expand_shards(pattern)
    check_settings(run)


def check_settings(run):
    """Raise FuseDiTError for mistakes that can be found without the data, as --plan does."""
    if Path(run.out).is_file():
        raise FuseDiTError(f"--out {run.out} is a file; it must be a folder")
    source = None
    if run.init:
        source = find_local(run.init, (".", repository()))
    if source is not None and Path(run.out).resolve() in (source, run_of(source)):
        raise FuseDiTError(f"--out {run.out} is what --init starts from: choose another --out")
    if run.memory_budget < 1 and not run.compile:
        raise FuseDiTError("--memory-budget has no effect without --compile: add --compile, or use "
                           "--remat instead")
    if run.lora and (not run.init or run.init_raw or run.float8 or run.train_llm):
        raise FuseDiTError("--lora needs a model to adapt, which --init names, and does not work "
                           "with --init-raw, --float8 or --train-llm")
    if run.cache_text and run.train_llm:
        raise FuseDiTError("--cache-text needs a frozen Gemma, whose text features stay the same: "
                           "leave it out, or leave out --train-llm")
    if run.cache_text and any(map(is_url, run.data)):
        raise FuseDiTError("--cache-text reads all shards at each start, on every rank, so --data "
                           "must not be URLs: copy the shards to a local folder first, or leave "
                           "out --cache-text")
    if run.deepspeed_config:
        check_json(run.deepspeed_config)


def check_json(path):
    """Raise FuseDiTError if the --deepspeed-config file cannot be read or is not JSON."""
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

def lasting_name(name):
    """A name by which a model folder can be found from any working directory.

    A folder inside the repository is named by its path from there, such as demo/gemma, so that the
    repository can be moved; any other folder, and one that the working directory would hide, by its
    absolute path. A name that is not a folder is a hub id and is returned unchanged.
    """
    home = repository().resolve()
    for root in (Path(), home):
        if not (root / name).exists():
            continue
        folder = (root / name).resolve()
        if not folder.is_relative_to(home):
            return str(folder)
        inside = folder.relative_to(home)
        if inside.exists() and inside.resolve() != folder:
            return str(folder)
        return inside.as_posix()
    return name


# Fields of the config that name a folder: the part of the model in it, and the flag to change it.
MODEL_PARTS = {"base": ("Gemma", "--base FOLDER"), "vae": ("VAE", "--set vae=FOLDER"),
               "clip": ("CLIP", "--set clip=FOLDER")}


def initial_config(run, changes):
    """FuseDiTConfig of the model that --init names, with some fields changed.

    A run that is resumed has stored it, and no longer needs the model, except for the parts of
    MODEL_PARTS that lie in it, or if it trains adapters. Raises FuseDiTError if one of those parts
    is missing.
    """
    if not is_resumed(run.out):
        return open_config(model_folder(run.init), changes)
    stored = read_json(Path(run.out) / "config.json")["model"]
    config = FuseDiTConfig.from_dict(stored | changes)
    for name, (part, remedy) in MODEL_PARTS.items():
        folder = getattr(config, name)
        if not folder or is_hub_id(folder) or find_local(folder, (".", repository())):
            continue
        raise FuseDiTError(f"{run.out} needs {folder}, its {part}, which does not exist. If it "
                           f"has been moved, use {remedy}")
    return config


def model_config(run):
    """FuseDiTConfig of the run: that of its preset or of --init, with overrides from the flags.

    Model folders are named such that the run folder can be used from anywhere (lasting_name).
    Raises FuseDiTError for an unknown preset or field, or an image size that is not a multiple of
    the patch size.
    """
    changes = {}
    if run.base:
        changes["base"] = run.base
    if run.image_size:
        changes["image_size"] = run.image_size
    changes |= cli.parse_overrides(run.set)
    if run.init:
        config = initial_config(run, changes)
    else:
        config = fusedit.preset(run.preset, **changes)

    patch = config.patch_size               # in pixels
    if config.vae:
        patch *= vae_config(config.vae).factor
    if config.image_size % patch:
        raise FuseDiTError(f"image_size {config.image_size} is not a multiple of the patch size of "
                           f"{patch} pixels; nearest: {multiples_around(config.image_size, patch)}")

    paths = {}
    for name in MODEL_PARTS:
        value = getattr(config, name)
        if value:
            paths[name] = lasting_name(value)
    return replace(config, **paths)


# ------------------------------------------------------------------------------ per device

class BatchSplit(NamedTuple):
    """The split of the global batch into forward passes."""
    micro_batch: int                        # images per device in one forward pass
    accumulation: int                       # forward and backward passes per step


def split_batch(run, devices):
    """Splits run.batch over the devices. Raises FuseDiTError if it is not divisible."""
    unit = devices * (run.micro_batch or 1)
    if run.batch % unit == 0:
        micro_batch = run.micro_batch or run.batch // devices
        return BatchSplit(micro_batch, run.batch // (micro_batch * devices))

    # suggest values that are divisible
    each = ""
    remedy = ""
    if run.micro_batch:
        each = f" x --micro-batch {run.micro_batch}"
        fitting = [size for size in range(1, run.micro_batch)
                   if run.batch % (size * devices) == 0]
        if fitting:
            remedy = f", or --micro-batch {fitting[-1]}"
    raise FuseDiTError(f"--batch {run.batch} is not divisible by {devices} devices{each}; use "
                       f"--batch {multiples_around(run.batch, unit)}{remedy}")


def data_workers(run):
    """The number of data loading processes of this rank; see --workers."""
    if run.workers >= 0:
        return run.workers
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return max(1, min(16, cores // backend.local_world() - 1))

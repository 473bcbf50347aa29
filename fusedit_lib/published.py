"""Read the folders that the published code writes: pipelines and training checkpoints.

    a pipeline              what utils/save_pipeline.py writes, and our export.py:
        transformer/        config.json and model.safetensors. In deep fusion they contain both
                            towers ("llm.*" and "dit.*"); in shallow fusion only the DiT, whose
                            tensors have no prefix
        llm/                shallow fusion: Gemma
        tokenizer/          Gemma's tokenizer
        clip/, clip_tokenizer/   for CLIP modulation
        vae/, scheduler/
    a training checkpoint   what diffusion/trainers.py writes: config.json, in this folder or the
                            one above, and at least one of the files in CHECKPOINT_FILES

A training checkpoint names its Gemma, from which the tokenizer is taken. It contains neither a VAE
nor a noise schedule: published runs all use those of Stable Diffusion 3, which are our defaults.
References such as trainers.py:496 are to github.com/tang-bd/fuse-dit at commit 5e6431a.
"""
import pickle
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib.files import InMemoryTensor, open_tensors, read_json, tensors_below

# The files of a training checkpoint, and the key under which a file contains the state dict (None:
# it is the whole file). DeepSpeedTrainer writes the first, both trainers the others. Uncompressed
# files come first, because they do not have to be unpacked.
EMA_FILES = {"mp_rank_00_model_states.pt": "ema", "ema.pt": None, "ema.pt.zst": None}
RAW_FILES = {"mp_rank_00_model_states.pt": "module", "model.pt": None, "model.pt.zst": None}
CHECKPOINT_FILES = (*EMA_FILES, *RAW_FILES)

# Settings of diffusers' FlowMatchEulerDiscreteScheduler that change the noise levels and that our
# sampler does not support.
OTHER_SCHEDULES = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas",
                   "use_beta_sigmas", "invert_sigmas", "shift_terminal", "stochastic_sampling")


# Both classes describe files on disk, in any layout. Tensors that have not been read yet are in the
# form that files.open_tensors returns, without a prefix such as "dit.".

class GemmaFiles(NamedTuple):
    """A Gemma."""
    folder: Path
    config: dict                            # the text model's part of config.json
    tokenizer: Path | None = None           # the folder of its tokenizer
    tensors: dict | None = None             # None: those in folder


class StoredModel(NamedTuple):
    """The weights of a model."""
    folder: Path                            # for error messages
    dit: dict                               # tensors of the DiT
    trained_llm: dict | None = None         # of the layers of config.base that were trained as well
    gemma: GemmaFiles | None = None         # the whole text tower, if it is not that of config.base
    adapters: tuple = ()                    # folders of LoRA adapters to merge into the DiT


# ---- the configuration ---------------------------------------------------------------------------

def is_pipeline(folder):
    """True for a pipeline of the published code."""
    return (folder / "transformer").is_dir()


def fusedit_config(d, folder, **changes):
    """FuseDiTConfig from a published config.json (a dict), with some fields changed.

    Keys that we do not have, such as text_hidden_size, only state what follows from the others.
    """
    if not isinstance(d, dict):
        raise FuseDiTError(f"the config.json in {folder} is not a JSON object")
    fusion = {"FuseDiT": "deep", "DiT": "shallow"}.get(d.get("model_type"))
    if fusion is None:
        raise FuseDiTError(f"{folder} is another kind of model: its model_type is "
                           f"{d.get('model_type')!r}; it must be FuseDiT or DiT")
    if d.get("out_channels", 16) != d.get("in_channels", 16):
        raise FuseDiTError(f"{folder}: out_channels {d.get('out_channels')} differs from "
                           "in_channels; fusedit predicts as many channels as it is given")
    known = {f.name: d[f.name] for f in fields(FuseDiTConfig) if f.name in d}
    return FuseDiTConfig.from_dict(known | {"fusion": fusion} | changes)


def schedule_shift(folder):
    """The shift of the noise levels, from scheduler/scheduler_config.json of a pipeline."""
    path = folder / "scheduler" / "scheduler_config.json"
    d = read_json(path)
    others = [name for name in OTHER_SCHEDULES if d.get(name)]
    if d.get("num_train_timesteps", 1000) != 1000:
        others.append("num_train_timesteps")
    if others or not d.get("shift"):
        problem = "needs a shift"
        if others:
            problem = f"sets {', '.join(others)}, which fusedit does not support"
        raise FuseDiTError(f"{path} {problem}: the published models use the scheduler of Stable "
                           "Diffusion 3, a FlowMatchEulerDiscreteScheduler with shift 3")
    return float(d["shift"])


# ---- pipelines -----------------------------------------------------------------------------------

def pipeline_config(folder):
    """FuseDiTConfig of a pipeline's folder."""
    transformer = folder / "transformer"
    d = read_json(transformer / "config.json")
    changes = {"base": str(transformer), "shift": schedule_shift(folder), "vae": None, "clip": None}
    if (folder / "llm").is_dir():
        changes["base"] = str(folder / "llm")
    if (folder / "vae").is_dir():
        changes["vae"] = str(folder / "vae")
    if d.get("text_modulation_embeds_dim"):
        changes["clip"] = str(folder)
    return fusedit_config(d, folder, **changes)


def open_pipeline(folder):
    """StoredModel of a pipeline's folder."""
    transformer = folder / "transformer"
    return StoredModel(transformer, dit_tensors(open_tensors(transformer)))


def dit_tensors(tensors):
    """The DiT's tensors, without their prefix, among those of a published model or of ours."""
    if any(name.startswith("dit.") for name in tensors):        # the FuseDiT of deep fusion
        tensors = tensors_below("dit.", tensors)
    # a constant of ape models, which fusedit.sincos_2d computes
    return {name: stored for name, stored in tensors.items() if name != "patch_embed.pos_embed"}


# ---- training checkpoints ------------------------------------------------------------------------

def is_checkpoint(folder):
    """True for a training checkpoint of the published code.

    It may be one that consists of the shards of each TPU host, from which nothing can be loaded.
    """
    return has_weights(folder) or (folder / ".metadata").exists()


def has_weights(folder):
    return any((folder / name).exists() for name in CHECKPOINT_FILES)


def last_checkpoint(folder):
    """The newest checkpoint OUT/STEP in the folder of a published TPU run, or None.

    The newest one that can be loaded is preferred; if a later one cannot, a line on stderr says so.
    """
    steps = [path for path in Path(folder).glob("[0-9]*")
             if path.name.isdigit() and is_checkpoint(path)]
    steps.sort(key=lambda path: int(path.name))
    whole = [path for path in steps if has_weights(path)]
    if not whole:
        return steps[-1] if steps else None
    if steps[-1] != whole[-1]:
        print(f"{steps[-1]} has no consolidated weights: using step {whole[-1].name}",
              file=sys.stderr)
    return whole[-1]


def checkpoint_json(folder):
    """The config.json of a training checkpoint, as a dict."""
    paths = [folder / "config.json", folder.parent / "config.json"]     # below: DeepSpeedTrainer's
    for path in paths:
        if path.exists():
            return read_json(path)
    raise FuseDiTError(f"cannot read {paths[0]}, nor is there one in the folder above: copy the "
                       "config.json of the run")


def checkpoint_config(folder):
    """FuseDiTConfig of a training checkpoint. Its base may be "": see pretrained.load_model."""
    d = checkpoint_json(folder)
    config = fusedit_config(d, folder)
    base = (d.get("base_config") or {}).get("_name_or_path") or ""
    clip = None
    if config.text_modulation_embeds_dim:
        clip = FuseDiTConfig.vae            # the published run takes both from SD 3
    return replace(config, base=base, clip=clip)


def open_checkpoint(folder, ema):
    """StoredModel of a training checkpoint; ema=False: its raw weights instead of their EMA."""
    state = read_state_dict(folder, ema)
    # SPMDTrainer wraps modules, which adds this to their names (save_pipeline.py:31)
    tensors = {name.replace("_orig_module.", ""): (InMemoryTensor(tensor), name)
               for name, tensor in state.items()}
    d = checkpoint_json(folder)
    if d["model_type"] == "DiT":            # shallow fusion: Gemma is not in the checkpoint
        return StoredModel(folder, dit_tensors(tensors))
    if not d.get("base_config"):
        raise FuseDiTError(f"the config.json of {folder} has no base_config, which describes Gemma")
    gemma = GemmaFiles(folder, d["base_config"], tensors=tensors_below("llm.", tensors))
    return StoredModel(folder, dit_tensors(tensors), gemma=gemma)


def read_state_dict(folder, ema):
    """{name: tensor} of the weights in a training checkpoint, mapped from disk."""
    for name, key in (EMA_FILES if ema else RAW_FILES).items():
        path = folder / name
        if not path.exists():
            continue
        state = load_torch_file(path)
        if key is not None and isinstance(state, dict):
            state = state.get(key)
        if state and not is_state_dict(state):
            raise FuseDiTError(f"{path} contains something other than the weights of a model")
        if state:
            return state

    if ema and any((folder / name).exists() for name in RAW_FILES):
        print(f"{folder} has no EMA: using its raw weights", file=sys.stderr)
        return read_state_dict(folder, ema=False)
    if not ema:
        raise FuseDiTError(f"{folder} has only EMA weights: leave out --no-ema or --init-raw")
    raise FuseDiTError(f"{folder} has only shards of its weights: the published TPU trainer writes "
                       "whole weights, ema.pt.zst, every consolidation_steps steps")


def is_state_dict(value):
    return isinstance(value, dict) and all(isinstance(t, torch.Tensor) for t in value.values())


def load_torch_file(path):
    """The contents of a .pt or .pt.zst file. Only tensors and plain values are unpickled."""
    if path.suffix != ".zst":
        return load_mapped(path)
    import zstandard
    # Where a file cannot be removed while it is mapped (NFS, Windows), it stays behind.
    with tempfile.TemporaryDirectory(prefix="fusedit-", ignore_cleanup_errors=True) as folder:
        plain = Path(folder) / path.stem
        print(f"decompressing {path}", file=sys.stderr)
        try:
            with open(path, "rb") as source, open(plain, "wb") as target:
                size = zstandard.get_frame_parameters(source.read(18)).content_size
                check_space(size, path)
                source.seek(0)
                zstandard.ZstdDecompressor().copy_stream(source, target)
        except zstandard.ZstdError as e:
            raise FuseDiTError(f"{path} is truncated or corrupt ({e}): copy it again") from None
        return load_mapped(plain, path)     # stays mapped once the file has been deleted


def check_space(size, path):
    """Raise FuseDiTError if the temporary folder has no room for the `size` bytes of a file.

    size: 0 or CONTENTSIZE_UNKNOWN, which is larger than any disk, if the file does not say.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < size < 2**60:
        raise FuseDiTError(f"decompressing {path} takes {size / 1e9:.1f} GB in "
                           f"{tempfile.gettempdir()}, which has {free / 1e9:.1f} GB left: set "
                           "TMPDIR to a folder on a larger disk")


def load_mapped(path, original=None):
    """torch.load of a file whose tensors are read when they are used.

    original: the file to name in errors.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise FuseDiTError(f"{original or path} is truncated or corrupt, or contains more than "
                           "tensors and plain values, which is not loaded") from e

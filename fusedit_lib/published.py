"""Read the folders that the published code writes: pipelines and training checkpoints.

    a pipeline              what utils/save_pipeline.py writes, and our export.py:
        transformer/        config.json and model.safetensors. In deep fusion they contain both
                            towers ("llm.*" and "dit.*"); in shallow fusion only the DiT, whose
                            tensors have no prefix
        llm/                shallow fusion: Gemma
        tokenizer/          Gemma's tokenizer
        clip/, clip_tokenizer/   for CLIP modulation
        vae/, scheduler/
    a training checkpoint   what diffusion/trainers.py writes: a config.json, in the folder or the
                            one above, and at least one of the files in CHECKPOINT_FILES

A training checkpoint names its Gemma, from which the tokenizer is taken. It contains neither VAE
nor noise schedule: published runs all use those of Stable Diffusion 3, which are our defaults.
References such as trainers.py:496 are to github.com/tang-bd/fuse-dit at commit 5e6431a.
"""
import pickle
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib.files import open_tensors, read_json

# The files of a training checkpoint, and the key under which a file contains the state dict (None:
# it is the whole file). SPMDTrainer writes the first four, DeepSpeedTrainer all of them.
EMA_FILES = {"ema.pt.zst": None, "ema.pt": None, "mp_rank_00_model_states.pt": "ema"}
RAW_FILES = {"model.pt.zst": None, "model.pt": None, "mp_rank_00_model_states.pt": "module"}
CHECKPOINT_FILES = (*EMA_FILES, *RAW_FILES)

# Settings of diffusers' FlowMatchEulerDiscreteScheduler that change the noise levels, and that our
# sampler does not have.
OTHER_SCHEDULES = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas",
                   "use_beta_sigmas", "invert_sigmas", "shift_terminal", "stochastic_sampling")


# Both classes describe files, of which no tensor has been read yet. Their tensors are in the form
# that files.open_tensors returns, without a prefix such as "dit.".

class GemmaFiles(NamedTuple):
    """A Gemma on disk."""
    folder: Path                            # for error messages
    config: dict                            # its text model's part of config.json
    tensors: dict
    tokenizer: Path | None                  # the folder of its tokenizer


class Stored(NamedTuple):
    """A model on disk."""
    config: FuseDiTConfig
    folder: Path                            # for error messages
    dit: dict                               # the DiT's tensors
    trained_llm: dict | None = None         # those of layers of config.base that were trained too
    gemma: GemmaFiles | None = None         # the whole text tower, if it is not that of config.base


# ---- the configuration ---------------------------------------------------------------------------

def is_pipeline(folder):
    """True for a pipeline of the published code."""
    return (folder / "transformer").is_dir()


def model_config(d, folder, **changes):
    """FuseDiTConfig from a published config.json (a dict), with some fields changed.

    The keys that are not ours describe what follows from the others, such as text_hidden_size.
    """
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

def open_pipeline(folder):
    """Stored, of a pipeline's folder."""
    transformer = folder / "transformer"
    d = read_json(transformer / "config.json")
    changes = {"base": str(transformer), "shift": schedule_shift(folder), "vae": None, "clip": None}
    if (folder / "llm").is_dir():
        changes["base"] = str(folder / "llm")
    if (folder / "vae").is_dir():
        changes["vae"] = str(folder / "vae")
    if d.get("text_modulation_embeds_dim"):
        changes["clip"] = str(folder)
    config = model_config(d, folder, **changes)
    return Stored(config, transformer, dit_tensors(open_tensors(transformer)))


def dit_tensors(tensors):
    """The DiT's tensors, without their prefix, among those of a published model or of ours."""
    if any(name.startswith("dit.") for name in tensors):        # the FuseDiT of deep fusion
        tensors = tensors_below("dit.", tensors)
    # a constant of ape models, which fusedit.sincos_2d computes
    return {name: stored for name, stored in tensors.items() if name != "patch_embed.pos_embed"}


def tensors_below(prefix, tensors):
    """The tensors whose names start with a prefix, which is removed."""
    return {name.removeprefix(prefix): stored for name, stored in tensors.items()
            if name.startswith(prefix)}


# ---- training checkpoints ------------------------------------------------------------------------

def is_checkpoint(folder):
    """True for a training checkpoint of the published code, and for one that lacks its weights."""
    return any((folder / name).exists() for name in (*CHECKPOINT_FILES, ".metadata"))


def last_checkpoint(folder):
    """The newest checkpoint OUT/STEP in the folder of a published TPU run, or None."""
    steps = [path for path in Path(folder).glob("[0-9]*")
             if path.name.isdigit() and is_checkpoint(path)]
    return max(steps, key=lambda path: int(path.name), default=None)


def open_checkpoint(folder, ema):
    """Stored, of a training checkpoint; ema=False: its raw weights instead of their EMA."""
    config_path = folder / "config.json"
    if not config_path.exists():            # DeepSpeedTrainer writes it once for all checkpoints
        config_path = folder.parent / "config.json"
    d = read_json(config_path)
    base = (d.get("base_config") or {}).get("_name_or_path") or FuseDiTConfig.base
    clip = None
    if d.get("text_modulation_embeds_dim"):
        clip = FuseDiTConfig.vae            # the published run takes both from SD 3
    config = model_config(d, folder, base=base, clip=clip)

    state = read_state_dict(folder, ema)
    # SPMDTrainer wraps modules, which adds this to their names (save_pipeline.py:31)
    tensors = {name.replace("_orig_module.", ""): (InMemory(tensor), name)
               for name, tensor in state.items()}
    if config.fusion == "shallow":
        return Stored(config, folder, dit_tensors(tensors))
    gemma = GemmaFiles(folder, d["base_config"], tensors_below("llm.", tensors), tokenizer=None)
    return Stored(config, folder, dit_tensors(tensors), gemma=gemma)


def read_state_dict(folder, ema):
    """{name: tensor} of the weights in a training checkpoint, mapped from disk."""
    for name, key in (EMA_FILES if ema else RAW_FILES).items():
        path = folder / name
        if not path.exists():
            continue
        state = load_torch_file(path)
        if key is not None:
            state = state.get(key)
        if state:
            return state

    if ema and any((folder / name).exists() for name in RAW_FILES):
        print(f"{folder} has no EMA: using its raw weights", file=sys.stderr)
        return read_state_dict(folder, ema=False)
    if not ema:
        raise FuseDiTError(f"{folder} has EMA weights only")
    raise FuseDiTError(f"{folder} has no whole weights: the published trainer adds ema.pt.zst to "
                       "the checkpoints whose step is a multiple of consolidation_steps")


def load_torch_file(path):
    """The contents of a .pt or .pt.zst file. Only tensors and plain values are unpickled."""
    if path.suffix != ".zst":
        return load_mapped(path)
    import zstandard
    with tempfile.TemporaryDirectory(prefix="fusedit-") as folder:
        plain = Path(folder) / path.stem
        print(f"decompressing {path}", file=sys.stderr)
        try:
            with open(path, "rb") as source, open(plain, "wb") as target:
                zstandard.ZstdDecompressor().copy_stream(source, target)
        except zstandard.ZstdError as e:
            raise FuseDiTError(f"{path} is truncated or corrupt ({e}): copy it again") from None
        return load_mapped(plain, path)     # stays mapped once the file has been deleted


def load_mapped(path, original=None):
    """torch.load of a file whose tensors are read when they are used.

    original: the file to name in errors.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        reason = str(e).strip().splitlines()[0]
        raise FuseDiTError(f"{original or path} is truncated or corrupt, or contains more than "
                           f"tensors and plain values ({reason})") from None


class InMemory:
    """A tensor, with the methods of an open safetensors file that contains it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def metadata(self):
        return {}

    def get_slice(self, _):
        return self

    def get_shape(self):
        return list(self.tensor.shape)

    def get_tensor(self, _):
        return self.tensor

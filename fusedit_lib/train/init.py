"""The initial weights of a run that starts from a trained model: --init."""
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fusedit import DiT, FuseDiTError
from fusedit_lib.files import check_tensors, read_tensor
from fusedit_lib.lora import merge
from fusedit_lib.pretrained import (
    config_hint,
    gemma_tensors,
    model_folder,
    open_weights,
    stored_config,
)
from fusedit_lib.train.checkpoints import is_first_rank

# Layers whose shape depends on the number of channels and on the patch size alone. If these change,
# as with another VAE, the layers start fresh.
INPUT_AND_OUTPUT = ("patch_embed.proj.", "proj_out.")
# Fields of the config on which neither the shape nor the place of any weight depends.
WITHOUT_WEIGHTS = ("base", "vae", "clip", "text_hidden_states_index", "max_text_tokens",
                   "instruction", "apply_chat_template", "pos_embed", "image_size", "shift",
                   "guidance")


@torch.no_grad()
def load_initial_weights(run, model):
    """Copies the weights of run.init into a newly initialised FuseDiT, on all ranks.

    These are the weights of its DiT and, with --train-llm, of a Gemma that was trained as well.
    What the config adds to the DiT keeps its fresh weights; rank 0 prints its names. Raises
    FuseDiTError if the weights are incomplete or do not fit.
    """
    folder = model_folder(run.init)
    stored = open_weights(folder, ema=not run.init_raw)
    fresh = fresh_weights(model, stored.dit, folder)
    copy_weights(model.dit, stored.dit, fresh)
    for adapter in stored.adapters:
        merge(model.dit, adapter)
    load_text_tower(run, model, stored)
    if is_first_rank():
        print(describe(run, folder, model.dit, fresh), file=sys.stderr, flush=True)


def fresh_weights(model, tensors, folder):
    """The names of the DiT's weights that the stored DiT lacks.

    tensors: those of the DiT stored in `folder`, in the form of open_tensors. Raises FuseDiTError
    if they are not the ones that its own config calls for, if one of them has no place in the new
    DiT, or if it has another shape there that does not follow from the number of channels.
    """
    config = stored_config(folder)
    with torch.device("meta"):
        stored = DiT(config, model.llm.config)
    check_tensors(stored, tensors, folder, hint(config, model.config, tensors))

    old = {name: tuple(weight.shape) for name, weight in stored.state_dict().items()}
    new = {name: tuple(weight.shape) for name, weight in model.dit.state_dict().items()}
    changed = changed_fields(config, model.config)
    misfits = [f"{name} has no place" for name in old if name not in new]
    if "sandwich_norm" in changed:          # same name and shape, but applied elsewhere
        misfits.append("post_attention_layernorm has another place")
    fresh = []
    for name, shape in new.items():
        if old.get(name) == shape:
            continue
        if name not in old or name.startswith(INPUT_AND_OUTPUT):
            fresh.append(name)
        else:
            misfits.append(f"{name} is {old[name]}, not {shape}")

    if misfits:
        fields = "; ".join(f"{name} was {before!r}, is now {after!r}"
                           for name, (before, after) in changed.items())
        raise FuseDiTError(f"the weights of --init {folder} do not fit fields that --set changes: "
                           f"{fields}. Leave out what does not fit ({misfits[0]}; {len(misfits)} "
                           "in all)")
    return fresh


def hint(config, new, tensors):
    """For an error message: why stored tensors might not fit their own config.

    config, new: FuseDiTConfig of the stored model and of the run.
    """
    text = config_hint(config, tensors)
    if config.base and Path(config.base).name != Path(new.base).name:
        text += (f"; they were trained with the Gemma {config.base}, and this run has {new.base}, "
                 "whose shape must be the same")
    return text


def changed_fields(config, new):
    """{field: (value in config, value in new)} where two configs differ and weights depend on it"""
    old = asdict(config)
    return {name: (old[name], value) for name, value in asdict(new).items()
            if old[name] != value and name not in WITHOUT_WEIGHTS}


def copy_weights(module, tensors, fresh=()):
    """Copies the stored tensors into a module, except the names in fresh."""
    for name, weight in module.state_dict().items():
        if name not in fresh:
            weight.copy_(read_tensor(tensors, name))


def load_text_tower(run, model, stored):
    """Copies a Gemma that was trained as well, or checks that the frozen one is that of the model.

    A run stores only what it trains, so a frozen Gemma must be the one that config.base names.
    """
    if stored.trained_llm and run.train_llm:
        check_tensors(model.llm, stored.trained_llm, stored.folder)
        copy_weights(model.llm, stored.trained_llm)
        return
    if not stored.trained_llm and is_gemma_of(stored, model.llm):
        return
    remedy = "Write a complete model first, with sample.py --export DIR, and start from DIR"
    if stored.trained_llm:
        remedy += ", or go on training it, with --train-llm"
    raise FuseDiTError(f"the Gemma of --init {stored.folder} was trained as well, and differs from "
                       f"{model.config.base}, which this run has. {remedy}")


def is_gemma_of(stored, llm):
    """True if the text tower has the weights of the Gemma that a StoredModel contains, if any."""
    if stored.gemma is None:
        return True
    tensors = gemma_tensors(stored.gemma)   # of a published training checkpoint
    for name, weight in llm.state_dict().items():
        if name not in tensors:
            return False
        value = read_tensor(tensors, name).to(weight.device, torch.bfloat16)
        if not weight.bfloat16().equal(value):
            return False
    return True


def describe(run, folder, dit, fresh):
    """A line for the log about the initial weights. fresh: the names of those that start fresh."""
    kind = ""
    if run.init_raw:
        kind = " (its raw weights)"
    elif (folder / "train_state").exists():
        kind = " (its EMA weights)"
    text = f"starting from {folder}{kind}"
    if fresh:
        state = dit.state_dict()
        count = sum(state[name].numel() for name in fresh)
        text += f"; {count:,} weights start fresh: {', '.join(modules_of(fresh, state))}"
    return text


def modules_of(names, state):
    """The names of weights, in short: a module stands for its weights if all of them are listed.

    state: the names of all weights. Layers that have the same ones are layers.*
    """
    others = [name for name in state if name not in names]
    short = []
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            module = ".".join(parts[:i + 1])
            if not any(f"{other}.".startswith(f"{module}.") for other in others):
                break
        short.append(re.sub(r"\.\d+\.", ".*.", module))
    return list(dict.fromkeys(short))

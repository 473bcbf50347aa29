"""The initial weights of a run that starts from a trained model: --init."""
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

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
from fusedit_lib.train.distributed import gather_from_all_ranks

# Layers whose shape depends on the number of channels and on the patch size alone. If these change,
# as with another VAE, the layers start fresh.
INPUT_AND_OUTPUT = ("patch_embed.proj.", "proj_out.")
# Fields of the config on which neither the shape nor the place of any weight depends.
WITHOUT_WEIGHTS = ("base", "vae", "clip", "text_hidden_states_index", "max_text_tokens",
                   "instruction", "apply_chat_template", "pos_embed", "image_size", "shift",
                   "guidance")


class InitialWeights(NamedTuple):
    """The weights that a new run takes from the model of --init.

    The tensors are still on disk, in the form of files.open_tensors.
    """
    dit: dict                               # of the DiT, save those that start fresh
    llm: dict                               # of a Gemma that was trained as well, or {}
    adapters: tuple                         # folders of LoRA adapters to merge into the DiT


def open_initial_weights(run, model):
    """Returns the InitialWeights of run.init for a FuseDiT, which may be on the meta device.

    What the config adds to the DiT is left out, because it starts fresh; rank 0 prints its names.
    Raises FuseDiTError if the weights are incomplete or do not fit.
    """
    folder = model_folder(run.init)
    stored = open_weights(folder, ema=not run.init_raw)
    fresh = fresh_weights(model, stored.dit, folder)
    dit = {name: tensor for name, tensor in stored.dit.items() if name not in fresh}
    llm = {}
    if takes_trained_llm(run, model, stored):
        llm = stored.trained_llm
    if is_first_rank():
        print(describe(run, folder, model.dit, fresh), file=sys.stderr, flush=True)
    return InitialWeights(dit, llm, stored.adapters)


def load_initial_weights(model, initial):
    """Copies InitialWeights into a newly initialised FuseDiT."""
    load_initial_dit(model.dit, initial)
    copy_weights(model.llm, initial.llm)


def load_initial_dit(dit, initial):
    """Copies the DiT's InitialWeights into a newly initialised DiT, and merges the adapters."""
    copy_weights(dit, initial.dit)
    for adapter in initial.adapters:
        merge(dit, adapter)


@torch.no_grad()
def copy_weights(module, tensors):
    """Copies stored tensors into the parameters of a module that have their names."""
    for name in tensors:
        module.get_parameter(name).copy_(read_tensor(tensors, name))


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


def takes_trained_llm(run, model, stored):
    """True if a run starts from a Gemma that was trained as well; False if from config.base's.

    A run stores only what it trains, so a frozen Gemma must be the one that config.base names.
    Raises FuseDiTError if it is not.
    """
    if stored.trained_llm and run.train_llm:
        check_tensors(model.llm, stored.trained_llm, stored.folder)
        return True
    if not stored.trained_llm and is_gemma_of(stored, model):
        return False
    remedy = "Write a complete model first, with sample.py --export DIR, and start from DIR"
    if stored.trained_llm:
        remedy += ", or go on training it, with --train-llm"
    raise FuseDiTError(f"the Gemma of --init {stored.folder} was trained as well, and differs from "
                       f"{model.config.base}, which this run has. {remedy}")


def is_gemma_of(stored, model):
    """True if the Gemma of a FuseDiT is the one that a StoredModel contains, if it contains any.

    All ranks must call it. Rank 0 reads both from disk, and tells the others.
    """
    if stored.gemma is None:
        return True
    theirs = gemma_tensors(stored.gemma)    # of a published training checkpoint
    ours = gemma_tensors(model.gemma_files)
    is_same = None
    if is_first_rank():
        is_same = all(is_equal(name, ours, theirs) for name in model.llm.state_dict())
    return gather_from_all_ranks(is_same)[0]


def is_equal(name, ours, theirs):
    """True if two sets of stored tensors have the same one of this name, in bfloat16."""
    if name not in theirs:
        return False
    return read_tensor(ours, name).bfloat16().equal(read_tensor(theirs, name).bfloat16())


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

"""The initial weights of a run that starts from a trained model: --init."""
import re
import sys
from dataclasses import asdict

import torch

from fusedit import FuseDiTError
from fusedit_lib.files import check_tensors
from fusedit_lib.pretrained import gemma_tensors, model_folder, open_config, open_weights
from fusedit_lib.train.checkpoints import is_first_rank

# Layers whose shape depends on the number of channels and on the patch size alone. If these change,
# as with another VAE, the layers start fresh.
INPUT_AND_OUTPUT = ("patch_embed.proj.", "proj_out.")


@torch.no_grad()
def load_initial_weights(run, model):
    """Copies the weights of run.init into a newly initialised FuseDiT, and prints which it lacks.

    The copied weights are those of the DiT and, with --train-llm, of a Gemma that was trained as
    well. A field of the config that adds weights, such as text_modulation_embeds_dim, leaves these
    at their initial values. Raises FuseDiTError if the weights do not fit.
    """
    folder = model_folder(run.init)
    stored = open_weights(folder, ema=not run.init_raw)
    changed = changed_fields(open_config(folder), model.config)
    fresh = missing_weights(model.dit, stored.dit, changed, run.init)
    copy_weights(model.dit, stored.dit, fresh)
    load_text_tower(run, model, stored)
    if is_first_rank():
        print(describe(run, folder, model.dit, fresh), file=sys.stderr, flush=True)


def changed_fields(stored, config):
    """{field: (its value in the stored FuseDiTConfig, its value in the run's)}, where they differ.

    Fields that do not affect the weights are left out.
    """
    old = asdict(stored)
    new = asdict(config)
    ignored = ("base", "vae", "clip", "guidance")
    return {name: (old[name], new[name]) for name in new
            if old[name] != new[name] and name not in ignored}


def missing_weights(dit, tensors, changed, name):
    """The names of the DiT's weights that cannot be taken from tensors and start fresh.

    tensors: the stored weights, in the form of open_tensors. changed: see changed_fields; if it is
    empty, every weight must be stored. Raises FuseDiTError if a stored weight has no place in the
    DiT, or another shape that does not follow from the number of channels.
    """
    shapes = {key: tuple(weight.shape) for key, weight in dit.state_dict().items()}
    fresh = []
    misfits = [f"{key} has no place" for key in tensors if key not in shapes]
    for key, shape in shapes.items():
        if key not in tensors:
            fresh.append(key)
            continue
        file, stored_name = tensors[key]
        stored_shape = tuple(file.get_slice(stored_name).get_shape())
        if stored_shape == shape:
            continue
        if key.startswith(INPUT_AND_OUTPUT):
            fresh.append(key)
        else:
            misfits.append(f"{key} is {stored_shape}, not {shape}")

    if fresh and not changed:               # a damaged model: says what is wrong with it
        check_tensors(dit, tensors, name)
    if misfits:
        fields = "; ".join(f"{key} is {new!r}, in the model {old!r}"
                           for key, (old, new) in changed.items())
        raise FuseDiTError(f"the weights of --init {name} do not fit this config ({misfits[0]}, "
                           f"{len(misfits)} in all): {fields}. Leave these fields out of --set")
    return fresh


def copy_weights(module, tensors, fresh=()):
    """Copies the stored tensors into a module, except the names in fresh."""
    for name, weight in module.state_dict().items():
        if name not in fresh:
            file, stored_name = tensors[name]
            weight.copy_(file.get_tensor(stored_name))


def load_text_tower(run, model, stored):
    """Copies a Gemma that was trained as well, or checks that the frozen one is that of the model.

    A run stores only what it trains, so a frozen Gemma must be the one that config.base names.
    """
    if stored.trained_llm and run.train_llm:
        check_tensors(model.llm, stored.trained_llm, run.init)
        copy_weights(model.llm, stored.trained_llm)
        return
    trained = bool(stored.trained_llm)
    if stored.gemma is not None:            # a published training checkpoint
        inside = gemma_tensors(stored.gemma)
        for name, weight in model.llm.state_dict().items():
            file, stored_name = inside[name]
            if not torch.equal(weight.bfloat16(), file.get_tensor(stored_name).bfloat16()):
                trained = True
    if trained:
        raise FuseDiTError(f"the Gemma of --init {run.init} was trained as well, and is not that "
                           f"of {model.config.base}. Write a complete model first, with sample.py "
                           f"--model {run.init} --export DIR, and start from DIR")


def describe(run, folder, dit, fresh):
    """A line for the log about the initial weights."""
    kind = "raw weights" if run.init_raw else "EMA weights"
    if not (folder / "train_state").exists():
        kind = "weights"
    text = f"starting from the {kind} of {folder}"
    if fresh:
        state = dit.state_dict()
        count = sum(state[name].numel() for name in fresh)
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in fresh)
        text += f"; {count:,} weights start fresh: {', '.join(names)}"
    return text

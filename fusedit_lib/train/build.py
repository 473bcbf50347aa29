"""Builds the model of a training run, with initial weights or those of a checkpoint."""
import copy

import torch

from fusedit_lib import backend
from fusedit_lib.files import InMemoryTensor, SlicedTensor, say_once, tensors_within
from fusedit_lib.lora import add_adapters
from fusedit_lib.pretrained import attach_clip, build_model, gemma_tensors, load_model
from fusedit_lib.sampling import latent_size
from fusedit_lib.seeds import torch_seed
from fusedit_lib.train.init import (
    InitialWeights,
    load_initial_dit,
    load_initial_weights,
    open_initial_weights,
)
from fusedit_lib.vae import load_vae


def build_models(run, config, device, checkpoint):
    """(FuseDiT, VAE or None) on a device.

    Trained weights are float32. Frozen ones, such as the VAE, have the dtype of the run.
    checkpoint: the Checkpoint to take the trained weights from; if None, they are initialised with
    run.seed, and those that the model of --init has are copied from it. Raises FuseDiTError, for
    example if the VAE does not fit the image size.
    """
    dtype = backend.torch_dtype(run.dtype)
    torch.manual_seed(torch_seed(run.seed))
    if run.lora:                            # the weights of --init remain frozen
        say_once(f"note: the adapters in {run.out} cannot be used without {run.init}: keep that "
                 "model, or start from an export of it (sample.py --export DIR)")
        model = load_model(run.init, device, dtype, **vars(config))
        add_adapters(model.dit, run.lora)
    else:
        model = build_model(config, device, dtype, llm_dtype=llm_dtype(run))
        model.llm.requires_grad_(run.train_llm)
    vae = build_vae(config, device, dtype)

    if run.init and not run.lora and checkpoint is None:
        load_initial_weights(model, open_initial_weights(run, model))
    if checkpoint is not None:
        for name, parameter in trainable(model):
            file, stored_name = checkpoint.state[f"weight.{name}"]
            parameter.data.copy_(file.get_tensor(stored_name))
    return model, vae


def open_models(run, config, checkpoint, local_slices):
    """(FuseDiT, VAE or None, weights): the same as build_models, with the weights still on disk.

    The FuseDiT is on the meta device. weights has its weights by parameter name, in the form of
    files.open_tensors, so that a host of a TPU run can read its own parts. Those that are drawn are
    in memory, and only the parts in local_slices(name, shape), a list of tuples of slices. The VAE
    and CLIP are small, and whole on the CPU.
    """
    dtype = backend.torch_dtype(run.dtype)
    torch.manual_seed(torch_seed(run.seed))
    model = build_model(config, "cpu", dtype, parts=("tokenizer",))
    weights = tensors_within("llm.", gemma_tensors(model.gemma_files))
    if checkpoint is None:
        weights |= initial_weights(run, model, local_slices)

    attach_clip(model, config, "cpu", dtype)
    vae = build_vae(config, "cpu", dtype)
    model.llm.to(llm_dtype(run)).requires_grad_(run.train_llm)
    if checkpoint is not None:
        for name, _ in trainable(model):
            weights[name] = checkpoint.state[f"weight.{name}"]
    return model, vae, weights


def initial_weights(run, model, local_slices):
    """The weights of a new run, as for open_models: the DiT's, and Gemma's if --init has them.

    If the model of --init has adapters, each host reads the whole DiT and merges them.
    """
    initial = InitialWeights({}, {}, ())
    if run.init:
        initial = open_initial_weights(run, model)
    dit = initial.dit
    if initial.adapters:
        whole = copy.deepcopy(model.dit).to_empty(device="cpu")
        load_initial_dit(whole, initial)
        state = whole.state_dict()
        dit = {name: (InMemoryTensor(state[name]), name) for name in dit}

    if dit.keys() != model.dit.state_dict().keys():         # some weights start fresh, or all
        dit = draw_weights(model.dit, local_slices) | dit
    return tensors_within("dit.", dit) | tensors_within("llm.", initial.llm)


def draw_weights(dit, local_slices):
    """This host's parts of fresh weights for a DiT, as {name: (SlicedTensor, name)}.

    Each weight is drawn whole, as DiT.init_weights does it, and only one at a time is in memory.
    """
    drawn = {}
    for name, parameter in dit.named_parameters():
        weight = torch.empty(parameter.shape)
        dit.init_weight(name, weight)
        parts = SlicedTensor(f"dit.{name}", metadata=dict)
        for slices in local_slices(f"dit.{name}", weight.shape):
            if slices not in parts.slices:
                parts.add(slices, InMemoryTensor(weight[slices].clone()), f"dit.{name}")
        drawn[name] = parts, name
    return drawn


def build_vae(config, device, dtype):
    """The VAE of a config, on a device, or None. Raises FuseDiTError if it does not fit."""
    if not config.vae:
        return None
    vae = load_vae(config.vae, device, dtype, config.in_channels)
    latent_size(config, vae)                # model_config may not have known a hub id's VAE
    return vae


def llm_dtype(run):
    """The dtype of Gemma's weights in a run."""
    if run.train_llm:
        return torch.float32
    return backend.torch_dtype(run.dtype)


def trainable(model):
    """The trained parameters, as [(name, parameter)]."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adam_steps(adam):
    """The number of steps that Adam has taken: the steps of the run minus the skipped ones."""
    steps = [int(state["step"]) for state in adam.state.values()]
    return max(steps, default=0)

"""Builds the model of a training run, with initial weights or those of a checkpoint."""
import copy

import torch

from fusedit_lib import backend
from fusedit_lib.files import InMemoryTensor, say_once
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
        model = build_model(config, device, dtype)
    vae = build_vae(config, device, dtype)
    if run.train_llm:
        model.llm.float().requires_grad_(True)

    if run.init and not run.lora and checkpoint is None:
        load_initial_weights(model, open_initial_weights(run, model))
    if checkpoint is not None:
        for name, parameter in trainable(model):
            file, stored_name = checkpoint.state[f"weight.{name}"]
            parameter.data.copy_(file.get_tensor(stored_name))
    return model, vae


def open_models(run, config, checkpoint):
    """(FuseDiT, VAE or None, weights): the same as build_models, but no weight is read yet.

    The FuseDiT is on the meta device. weights has its weights by parameter name, in the form of
    files.open_tensors, so that each host of a TPU run can read its own parts. Only the DiT of a new
    run is in memory, because its weights are drawn in turn. The VAE and CLIP are small; they are on
    the CPU.
    """
    dtype = backend.torch_dtype(run.dtype)
    torch.manual_seed(torch_seed(run.seed))
    model = build_model(config, "cpu", dtype, parts=("tokenizer",))
    weights = {f"llm.{name}": stored for name, stored in gemma_tensors(model.gemma_files).items()}
    if checkpoint is None:
        weights |= initial_weights(run, model)

    attach_clip(model, config, "cpu", dtype)
    vae = build_vae(config, "cpu", dtype)
    model.llm.to(dtype)
    if run.train_llm:
        model.llm.float().requires_grad_(True)
    if checkpoint is not None:
        for name, _ in trainable(model):
            weights[name] = checkpoint.state[f"weight.{name}"]
    return model, vae, weights


def initial_weights(run, model):
    """{parameter name: stored tensor} of a new run: of the DiT, and of Gemma if --init has it.

    model: the FuseDiT of open_models. Weights that are drawn, or into which adapters are merged,
    are in memory.
    """
    initial = InitialWeights({}, {}, ())
    if run.init:
        initial = open_initial_weights(run, model)
    stored = initial.dit
    names = model.dit.state_dict().keys()
    if initial.adapters or stored.keys() != names:
        dit = copy.deepcopy(model.dit).to_empty(device="cpu")
        dit.init_weights()
        if initial.adapters:
            load_initial_dit(dit, initial)
            stored = {}
        drawn = {name: (InMemoryTensor(weight), name) for name, weight in dit.state_dict().items()}
        stored = drawn | stored

    weights = {f"dit.{name}": tensor for name, tensor in stored.items()}
    return weights | {f"llm.{name}": tensor for name, tensor in initial.llm.items()}


def build_vae(config, device, dtype):
    """The VAE of a config, on a device, or None. Raises FuseDiTError if it does not fit."""
    if not config.vae:
        return None
    vae = load_vae(config.vae, device, dtype, config.in_channels)
    latent_size(config, vae)                # model_config may not have known a hub id's VAE
    return vae


def trainable(model):
    """The trained parameters, as [(name, parameter)]."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adam_steps(adam):
    """The number of steps that Adam has taken: the steps of the run minus the skipped ones."""
    steps = [int(state["step"]) for state in adam.state.values()]
    return max(steps, default=0)

"""Builds the model of a training run, with initial weights or those of a checkpoint."""
import copy

import torch

from fusedit import DiT
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
        dit = Drawing(model.dit, local_slices).kept | dit
    return tensors_within("dit.", dit) | tensors_within("llm.", initial.llm)


class Drawing:
    """Takes the place of a DiT in its init_weights, with one whole weight in memory at a time."""

    def __init__(self, dit, local_slices):
        self.dit = dit
        self.width = dit.width
        self.local_slices = local_slices
        self.kept = {}                      # {name: (SlicedTensor, name)}
        DiT.init_weights(self)

    def named_parameters(self):
        for name, parameter in self.dit.named_parameters():
            weight = torch.empty(parameter.shape)
            yield name, weight              # init_weights fills it, then asks for the next one
            self.kept[name] = self.keep(f"dit.{name}", weight), name

    def keep(self, name, weight):
        """A SlicedTensor with copies of this host's parts of a weight."""
        parts = SlicedTensor(name, metadata=dict)
        for slices in self.local_slices(name, weight.shape):
            if slices not in parts.slices:
                parts.add(slices, InMemoryTensor(weight[slices].clone()), name)
        return parts


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

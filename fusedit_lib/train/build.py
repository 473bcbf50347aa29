"""Builds the model of a training run, with initial weights or those of a checkpoint."""
import torch

from fusedit_lib import backend
from fusedit_lib.files import say_once
from fusedit_lib.lora import add_adapters
from fusedit_lib.pretrained import build_model, load_model
from fusedit_lib.sampling import latent_size
from fusedit_lib.seeds import torch_seed
from fusedit_lib.train.init import load_initial_weights
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
    vae = None
    if config.vae:
        vae = load_vae(config.vae, device, dtype, config.in_channels)
        latent_size(config, vae)            # model_config may not have known a hub id's VAE
    if run.train_llm:
        model.llm.float().requires_grad_(True)

    if run.init and not run.lora and checkpoint is None:
        load_initial_weights(run, model)
    if checkpoint is not None:
        for name, parameter in trainable(model):
            file, stored_name = checkpoint.state[f"weight.{name}"]
            parameter.data.copy_(file.get_tensor(stored_name))
    return model, vae


def trainable(model):
    """The trained parameters, as [(name, parameter)]."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adam_steps(adam):
    """The number of steps that Adam has taken: the steps of the run minus the skipped ones."""
    steps = [int(state["step"]) for state in adam.state.values()]
    return max(steps, default=0)

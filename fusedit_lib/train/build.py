"""The model of a training run: built with new weights, or with those of a checkpoint."""
import torch

from fusedit_lib import backend
from fusedit_lib.pretrained import build_model
from fusedit_lib.vae import load_vae


def build_models(run, config, device, checkpoint):
    """(FuseDiT, VAE or None) on a device.

    Trained weights are float32; Gemma, if it is frozen, and the VAE have the dtype of the run.
    checkpoint: the Checkpoint that holds the trained weights; None: they are initialized, as
    run.seed says.
    """
    dtype = backend.torch_dtype(run.dtype)
    torch.manual_seed(run.seed)
    model = build_model(config, device, dtype)
    vae = None
    if config.vae:
        vae = load_vae(config.vae, device, dtype, config.in_channels)
    if run.train_llm:
        model.llm.float().requires_grad_(True)

    if checkpoint is not None:
        for name, parameter in trainable(model):
            file, stored_name = checkpoint.state[f"weight.{name}"]
            parameter.data.copy_(file.get_tensor(stored_name))
    return model, vae


def trainable(model):
    """[(name, parameter)] of the parameters that are trained."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adam_steps(adam):
    """Number of steps that Adam has made: those of the run without the skipped ones."""
    steps = [int(state["step"]) for state in adam.state.values()]
    return max(steps, default=0)

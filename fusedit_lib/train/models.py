"""TODO."""
import torch

from fusedit_lib import backend
from fusedit_lib.pretrained import build_model
from fusedit_lib.vae import load_vae

# ------------------------------------------------------------------------------ build and EMA

def build(run, config, device, saved):
    """(model, VAE or None); the trained weights are new, in float32, or a checkpoint's."""
    dtype = backend.torch_dtype(run.dtype)
    torch.manual_seed(run.seed)
    model = build_model(config, device, dtype)
    vae = load_vae(config.vae, device, dtype, config.in_channels) if config.vae else None
    if run.train_llm:
        model.llm.float().requires_grad_(True)
    for name, p in trained(model) if saved else ():
        file, stored = saved.state[f"weight.{name}"]
        p.data.copy_(file.get_tensor(stored))
    return model, vae


def trained(model):
    """[(name, parameter)] of what a step changes."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adam_steps(adam):
    """How many steps Adam has made: the run's, less those skipped."""
    return max((int(s["step"]) for s in adam.state.values()), default=0)

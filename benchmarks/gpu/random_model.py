"""A Gemma 2 2B and an autoencoder of random weights, and shards of pictures of 512 pixels.

train_gpu.py runs at full size with them, without a download: DIR/gemma, DIR/vae, DIR/shards.
"""
import json
import shutil

import kit  # isort: skip (before torch)
import common
import data
import torch
from kit import DEVICE, SMALL
from safetensors.torch import save_file

import fusedit
from fusedit_lib import pretrained
from fusedit_lib.train import costs
from fusedit_lib.vae import VAE

VAE_CONFIG = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, in_channels=3,
                  latent_channels=16, norm_num_groups=32, scaling_factor=1.5305,
                  shift_factor=0.0609)


def tensors(module):
    """Random weights that neither explode nor vanish; norms and biases as they begin."""
    found = {}
    for name, t in module.state_dict().items():
        if t.dim() > 1:
            scale = 0.02 if t.dim() == 2 else 0.03
            if name == "encoder.conv_out.weight":
                scale = 0.004               # so that the latents are of size 1
            found[name] = scale * torch.randn(t.shape, device=DEVICE)
        elif isinstance(module, VAE) and "norm" in name and name.endswith("weight"):
            found[name] = torch.ones(t.shape)
        else:
            found[name] = torch.zeros(t.shape)             # Gemma's norms multiply by 1 + weight
    return {name: t.to("cpu", torch.bfloat16) for name, t in found.items()}


def make(folder):
    """Write all of it, unless it is there."""
    if (folder / "shards" / "index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("gemma", "vae"):
        (folder / name).mkdir(parents=True)
    shape = dict(costs.GEMMAS["google/gemma-2-2b"], head_dim=256)
    if SMALL:
        shape = common.SMALL | dict(num_hidden_layers=2)
    with torch.device("meta"):
        gemma, vae = fusedit.Gemma(pretrained.gemma_config(shape)), VAE()
    torch.manual_seed(0)
    (folder / "gemma" / "config.json").write_text(json.dumps(shape))
    save_file({f"model.{name}": t for name, t in tensors(gemma).items()},
              folder / "gemma" / "model.safetensors")
    for path in (kit.ROOT / "demo" / "gemma").glob("tokenizer*"):
        shutil.copy(path, folder / "gemma")
    (folder / "vae" / "config.json").write_text(json.dumps(VAE_CONFIG))
    save_file(tensors(vae), folder / "vae" / "diffusion_pytorch_model.safetensors")
    photos = [data.photo(768, 512, seed, 95) for seed in range(4 if SMALL else 16)]
    data.pack(data.folder_of(photos, folder / "photos"), folder / "shards", 0)

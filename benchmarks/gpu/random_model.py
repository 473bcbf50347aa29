"""A Gemma 2 2B and a VAE with random weights, and shards of images for training at 512 pixels.

With these (DIR/gemma, DIR/vae and DIR/shards), train_gpu.py runs at full size without a download.
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
                  shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


def random_weights(module):
    """bfloat16 weights {name: tensor} with which activations neither explode nor vanish.

    Norms and biases have their initial values.
    """
    weights = {}
    for name, t in module.state_dict().items():
        if t.dim() > 1:
            weights[name] = matrix_scale(name, t) * torch.randn(t.shape, device=DEVICE)
        elif isinstance(module, VAE) and "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones(t.shape)
        else:
            weights[name] = torch.zeros(t.shape)           # Gemma's norms multiply by 1 + weight
    return {name: t.to("cpu", torch.bfloat16) for name, t in weights.items()}


def matrix_scale(name, t):
    """Standard deviation of a weight with two or more dimensions."""
    if name == "encoder.conv_out.weight":
        return 0.004                        # so that the latents have a standard deviation of 1
    if t.dim() == 2:
        return 0.02
    return 0.03


def write_tokenizer(folder, vocab_size):
    """Write the demo's tokenizer, with unused tokens up to the size of the model's vocabulary."""
    for path in (kit.ROOT / "demo" / "gemma").glob("tokenizer*"):
        shutil.copy(path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def make(folder):
    """Write everything, unless it exists already."""
    if (folder / "shards" / "index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    gemma_folder = folder / "gemma"
    vae_folder = folder / "vae"
    gemma_folder.mkdir(parents=True)
    vae_folder.mkdir()

    # models
    if SMALL:
        config = common.SMALL | dict(num_hidden_layers=2)
    else:
        config = dict(costs.GEMMAS["google/gemma-2-2b"], head_dim=256)
    with torch.device("meta"):
        gemma = fusedit.Gemma(pretrained.gemma_config(config))
        vae = VAE()
    torch.manual_seed(0)
    (gemma_folder / "config.json").write_text(json.dumps(config))
    weights = {f"model.{name}": t for name, t in random_weights(gemma).items()}
    save_file(weights, gemma_folder / "model.safetensors")
    write_tokenizer(gemma_folder, config["vocab_size"])
    (vae_folder / "config.json").write_text(json.dumps(VAE_CONFIG))
    save_file(random_weights(vae), vae_folder / "diffusion_pytorch_model.safetensors")

    # shards
    count = 16
    if SMALL:
        count = 4
    photos = [data.photo(768, 512, seed, 95) for seed in range(count)]
    data.pack(data.folder_of(photos, folder / "photos"), folder / "shards", 0)

"""The autoencoder of Stable Diffusion 3 in plain torch: images to latents and back.

A diffusion model on pixels would spend most of its capacity on detail that nobody looks at. So a
separate network, trained beforehand and then frozen, compresses every 8 x 8 patch of pixels (192
numbers) into a vector of 16, and the diffusion model works on that small grid:

    encode   pixels [B,3,H,W] in [-1,1]  ->  latents [B,16,H/8,W/8] of about unit variance
    decode   latents                     ->  pixels

It is the KL-regularised autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752, 3.1)
with 16 channels (Esser et al., arXiv 2403.03206, 5.2.1). The encoder predicts a Gaussian rather
than a point (arXiv 1312.6114). Its training pulls that Gaussian slightly towards N(0,1), so that a
nearly correct latent decodes to a nearly correct image. Module names are those of diffusers'
AutoencoderKL.
"""
from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from fusedit import FuseDiTError
from fusedit_lib.files import assign_tensors, check_tensors, open_tensors, read_json
from fusedit_lib.pretrained import resolve_vae


@dataclass(frozen=True)
class VAEConfig:
    """The keys of config.json that matter here; the defaults are those of Stable Diffusion 3."""
    block_out_channels: tuple = (128, 256, 512, 512)  # at 1, 1/2, 1/4, 1/8 of the resolution
    layers_per_block: int = 2             # residual blocks at each resolution; decoder: one more
    in_channels: int = 3
    latent_channels: int = 16
    norm_num_groups: int = 32             # of every GroupNorm
    scaling_factor: float = 1.5305        # latents = (z - shift) * scale; chosen to give them
    shift_factor: float = 0.0609          # mean 0 and variance 1, like the noise added to them
    mid_block_add_attention: bool = True  # the only place where distant pixels interact

    @staticmethod
    def from_dict(d):
        """Read the keys above from config.json. Its other keys do not affect the network."""
        defaults = asdict(VAEConfig())
        values = {}
        for name, default in defaults.items():
            value = d.get(name)
            if type(value) is list:
                value = tuple(value)
            if name == "mid_block_add_attention" and name not in d:    # an older config.json
                value = default
            if type(value) is not type(default):
                raise FuseDiTError(f"VAE config field {name} is {value!r}; SD 3 has {default!r}")
            values[name] = value
        return VAEConfig(**values)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): nearly all of the network consists of these."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                     # [B,c_in,h,w]
        y = self.conv1(F.silu(self.norm1(x)))                 # [B,c_out,h,w]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Attention(nn.Module):
    """Self-attention over all positions, with a single head as wide as the layer."""
    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))          # a Sequential for the name to_out.0

    def forward(self, x):                                     # [B,C,h,w]
        y = self.group_norm(x).flatten(2).mT[:, None]         # [B,1,hw,C]: one head
        # 1024 x 1024 pixels are 16384 positions; SDPA never stores the 16384 x 16384 weights
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y)[:, 0].mT.unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """The blocks at the lowest resolution, where attention is affordable."""
    def __init__(self, c, groups, add_attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, groups) for _ in range(2))
        self.attentions = nn.Sequential()                     # empty: the identity
        if add_attention:
            self.attentions.append(Attention(c, groups))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def named(**modules):
    """Modules applied in sequence, under the names that diffusers gives them."""
    return nn.Sequential(OrderedDict(modules))


def stage(c_in, c, depth, groups, **resample):
    """Residual blocks at one resolution, followed by resampling to the next, if there is one."""
    blocks = [ResnetBlock(c_in, c, groups)]
    for _ in range(depth - 1):
        blocks.append(ResnetBlock(c, c, groups))
    return named(resnets=nn.Sequential(*blocks), **resample)


def encoder(cfg):
    """Pixels [B,3,H,W] to the posterior's mean and log variance [B,2*16,H/8,W/8]."""
    widths = cfg.block_out_channels
    depth = cfg.layers_per_block
    groups = cfg.norm_num_groups
    down = []
    for c_in, c in zip(widths[:1] + widths, widths[:-1]):
        # Beware: the convolution that halves the image pads on the right and the bottom only.
        halve = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))
        down.append(stage(c_in, c, depth, groups, downsamplers=nn.Sequential(halve)))
    down.append(stage(*widths[-2:], depth, groups))
    return named(
        conv_in=nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1),          # [B,128,H,W]
        down_blocks=nn.Sequential(*down),
        mid_block=MidBlock(widths[-1], groups, cfg.mid_block_add_attention),  # [B,512,H/8,W/8]
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1))


def decoder(cfg):
    """Latents [B,16,H/8,W/8] to pixels [B,3,H,W]: mirrors the encoder, with deeper stages."""
    widths = cfg.block_out_channels[::-1]
    depth = cfg.layers_per_block + 1
    groups = cfg.norm_num_groups
    up = []
    for c_in, c in zip(widths[:1] + widths, widths[:-1]):
        # Every pixel becomes four equal pixels, which the convolution then smooths.
        double = named(grow=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1))
        up.append(stage(c_in, c, depth, groups, upsamplers=nn.Sequential(double)))
    up.append(stage(*widths[-2:], depth, groups))
    return named(
        conv_in=nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1),
        mid_block=MidBlock(widths[0], groups, cfg.mid_block_add_attention),   # [B,512,H/8,W/8]
        up_blocks=nn.Sequential(*up),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),             # [B,128,H,W]
        act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], cfg.in_channels, 3, padding=1))


class VAE(nn.Module):
    """encode: pixels [B,3,H,W] in [-1,1] to latents [B,16,H/8,W/8]; decode: back."""
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)               # 8
        self.encoder = encoder(config)
        self.decoder = decoder(config)

    def moments(self, pixels):
        """Mean and log variance of the posterior, each [B,16,H/8,W/8].

        Also accepts what `prepare_data.py encode` stores, where both are already computed.
        """
        if pixels.shape[1] == 2 * self.config.latent_channels:
            return pixels.chunk(2, dim=1)
        assert all(n % self.factor == 0 for n in pixels.shape[2:]), pixels.shape
        mean, logvar = self.encoder(pixels.to(self.encoder.conv_in.weight)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, pixels, noise=None):
        """A sample of the posterior, shifted and scaled, drawn with noise [B,16,H/8,W/8]."""
        mean, logvar = self.moments(pixels)
        if noise is None:
            noise = torch.randn_like(mean)
        z = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents):
        """Latents back to pixels, which may overshoot [-1,1] slightly: clamp before saving."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight))


def load_vae(path_or_id, device="cpu", dtype=torch.float32, channels=None):
    """The frozen VAE of a vae/ folder, its parent, or a hub id.

    channels: the model's in_channels, which must agree. Raises FuseDiTError.
    """
    folder = resolve_vae(path_or_id)
    with torch.device("meta"):                                # shapes, but no memory yet
        vae = VAE(VAEConfig.from_dict(read_json(folder / "config.json")))
    tensors = open_tensors(folder, "diffusion_pytorch_model")
    check_tensors(vae, tensors, folder)
    if channels not in (None, vae.config.latent_channels):
        raise FuseDiTError(f"the VAE {path_or_id} has {vae.config.latent_channels} channels, but "
                           f"the model's config.json has in_channels {channels}")
    assign_tensors(vae, tensors, device, dtype)
    layout = torch.contiguous_format
    if dtype == torch.bfloat16:
        layout = torch.channels_last                          # faster
    return vae.to(memory_format=layout).requires_grad_(False).eval()

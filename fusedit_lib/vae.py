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
AutoencoderKL, which is also the VAE of Stable Diffusion 1 and 2, SDXL and FLUX.1: the shapes below
are Stable Diffusion 3's, and those of another VAE follow from its config.json.
"""
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fusedit import FuseDiTError
from fusedit_lib.files import assign_tensors, check_tensors, open_tensors, read_json
from fusedit_lib.folders import find_local, is_hub_id, repository, resolve_vae

# ---- config.json ---------------------------------------------------------------------------------

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
    latents_mean: tuple | None = None     # one number per channel; these replace the two above:
    latents_std: tuple | None = None      # latents = (z - mean) / std
    use_quant_conv: bool = False          # a 1 x 1 convolution after the encoder and one before
    use_post_quant_conv: bool = False     # the decoder, as before Stable Diffusion 3
    mid_block_add_attention: bool = True  # the only place where distant pixels interact

    @property
    def factor(self):
        """Pixels per latent along each side: every block but the last halves the resolution."""
        return 2 ** (len(self.block_out_channels) - 1)

    @staticmethod
    def from_dict(d, folder):
        """Read the keys above from config.json. An absent key has diffusers' default value.

        Keys that are neither read nor checked do not affect the result: sample_size (only the
        size of tiles) and force_upcast (only float16 needs it). folder: for error messages. Raises
        FuseDiTError if it describes another network or cannot be understood.
        """
        kind = d.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise FuseDiTError(f"the VAE in {folder} is of class {kind}; fusedit reads "
                               f"AutoencoderKL only: {OTHER_VAE}")
        values = {}
        for name, example in EXAMPLES.items():
            value = d.get(name, ABSENT.get(name))
            if value is None and name in NULL:
                values[name] = NULL[name]
                continue
            if not has_type_of(example, value):
                shown = "missing" if value is None else repr(value)
                raise FuseDiTError(f"{name} is {shown} in config.json of the VAE in {folder}; it "
                                   f"should be like {example!r}")
            values[name] = type(example)(value)
        check_network(d, values, folder)
        check_latent_statistics(d, values, folder)
        return VAEConfig(**values)


OTHER_VAE = "use a VAE such as that of stabilityai/stable-diffusion-3-medium-diffusers"

# A value of the right type for each key: Stable Diffusion 3's, if it has one.
EXAMPLES = asdict(VAEConfig()) | dict(latents_mean=(0.5, -0.25), latents_std=(2.5, 1.5))

# What an absent key means in diffusers; every config.json has the keys that are not listed here.
ABSENT = dict(in_channels=3, norm_num_groups=32, scaling_factor=0.18215, use_quant_conv=True,
              use_post_quant_conv=True, mid_block_add_attention=True)
# The keys that can also be null, as they are if absent, and what that means.
NULL = dict(shift_factor=0.0, latents_mean=None, latents_std=None)


def has_type_of(example, value):
    """True if a value of config.json can take the place of the example."""
    if type(example) is tuple:
        return (type(value) is list and len(value) > 0
                and all(has_type_of(example[0], x) for x in value))
    if type(example) is float:
        return type(value) in (int, float) and math.isfinite(value)
    if type(example) is int:
        return type(value) is int and value > 0
    return type(value) is type(example)


def check_network(d, values, folder):
    """Raise FuseDiTError if config.json d describes blocks or images that VAE does not have."""
    stages = len(values["block_out_channels"])
    only = dict(in_channels=3, out_channels=3, act_fn="silu",
                down_block_types=["DownEncoderBlock2D"] * stages,
                up_block_types=["UpDecoderBlock2D"] * stages)
    for name, value in only.items():
        if d.get(name, value) != value:
            raise FuseDiTError(f"the VAE in {folder} has {name} {d[name]!r}; fusedit reads only "
                               f"{value!r}: {OTHER_VAE}")
    for channels in values["block_out_channels"]:
        if channels % values["norm_num_groups"]:
            raise FuseDiTError(f"the VAE in {folder} has {channels} in block_out_channels, which "
                               f"norm_num_groups {values['norm_num_groups']} does not divide")


def check_latent_statistics(d, values, folder):
    """Raise FuseDiTError if the numbers that normalise the latents cannot be used.

    There are two conventions for an AutoencoderKL with latents_mean and latents_std:
        (z - mean) / std            End2End-Diffusion/fuse-dit, the fork of the published code for
                                    REPA-E's VAEs (diffusion/trainers.py:691 at 0b498e7), and
                                    diffusers' GlmImagePipeline.__call__
        (z - mean) * scale / std    diffusers' StableDiffusionXLImg2ImgPipeline.prepare_latents,
                                    added for Playground v2.5, whose scaling_factor is 0.5
    They agree if scaling_factor is 1. The second does not read shift_factor, so a config.json that
    has one follows the first, where mean and std replace shift_factor and scaling_factor. Nothing
    else tells them apart.
    """
    mean = values["latents_mean"]
    std = values["latents_std"]
    scale = values["scaling_factor"]
    if scale == 0:
        raise FuseDiTError(f"the VAE in {folder} has scaling_factor 0, which makes every latent "
                           "zero: correct its config.json")
    if mean is None and std is None:
        return
    channels = values["latent_channels"]
    if mean is None or std is None or not len(mean) == len(std) == channels or min(std) <= 0:
        raise FuseDiTError(f"the VAE in {folder} needs both latents_mean and latents_std, each "
                           f"with latent_channels = {channels} numbers, and positive ones in "
                           "latents_std: correct its config.json")
    if scale != 1 and d.get("shift_factor") is None:
        raise FuseDiTError(
            f"the VAE in {folder} has latents_mean and latents_std beside scaling_factor {scale}, "
            f"which can mean (z - mean) / std or (z - mean) * {scale} / std: in a copy of the "
            f"folder, set scaling_factor to 1 and, for the second, divide latents_std by {scale}")


def vae_config(name):
    """The VAEConfig of a VAE's folder or hub id, without a download. Raises FuseDiTError.

    A hub id that has not been downloaded is assumed to be Stable Diffusion 3's, so that --plan
    works without the network. (After load_vae, it has been downloaded.)
    """
    path = config_on_disk(name)
    if path is None:
        return VAEConfig()
    return VAEConfig.from_dict(read_json(path), path.parent)


def config_on_disk(name):
    """The path of a VAE's config.json, or None for a hub id that has not been downloaded."""
    if find_local(name, (".", repository())) is not None or not is_hub_id(name):
        return resolve_vae(name) / "config.json"
    from huggingface_hub import try_to_load_from_cache
    for file in ("vae/config.json", "config.json"):
        try:
            path = try_to_load_from_cache(str(name), file)
        except ValueError:                  # not a valid hub id: load_vae will say so
            return None
        if isinstance(path, str):           # neither absent nor known to be absent
            return Path(path)
    return None


def latent_side(config):
    """Height and width of a model's x in training: of latents or, without a VAE, of pixels.

    config: a FuseDiTConfig. See vae_config about a VAE that has not been downloaded.
    """
    if not config.vae:
        return config.image_size
    return config.image_size // vae_config(config.vae).factor


# ---- the network ---------------------------------------------------------------------------------

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
    *pairs, last = zip(widths[:1] + widths, widths)           # channels (in, out)
    down = []
    for c_in, c in pairs:
        # Beware: the convolution that halves the image pads on the right and the bottom only.
        halve = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))
        down.append(stage(c_in, c, depth, groups, downsamplers=nn.Sequential(halve)))
    down.append(stage(*last, depth, groups))
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
    *pairs, last = zip(widths[:1] + widths, widths)
    up = []
    for c_in, c in pairs:
        # Every pixel becomes four equal pixels, which the convolution then smooths.
        double = named(grow=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1))
        up.append(stage(c_in, c, depth, groups, upsamplers=nn.Sequential(double)))
    up.append(stage(*last, depth, groups))
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
        self.factor = config.factor                                           # 8
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        C = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(C, C, 1)

    def moments(self, pixels):
        """Mean and log variance of the posterior, each [B,16,H/8,W/8].

        Also accepts what `prepare_data.py encode` stores, where both are already computed.
        """
        if pixels.shape[1] == 2 * self.config.latent_channels:
            return pixels.chunk(2, dim=1)
        assert all(n % self.factor == 0 for n in pixels.shape[2:]), pixels.shape
        pixels = pixels.to(self.encoder.conv_in.weight)
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def shift_and_scale(self, z):
        """shift and scale in latents = (z - shift) * scale: numbers, or tensors [16,1,1].

        Tensors are in float32 even if z is in bfloat16.
        """
        c = self.config
        if c.latents_mean is None:
            return c.shift_factor, c.scaling_factor
        dtype = torch.promote_types(z.dtype, torch.float32)
        mean = torch.tensor(c.latents_mean, dtype=dtype, device=z.device)
        std = torch.tensor(c.latents_std, dtype=dtype, device=z.device)
        return mean[:, None, None], 1 / std[:, None, None]

    def encode(self, pixels, noise=None):
        """A sample of the posterior, shifted and scaled, drawn with noise [B,16,H/8,W/8].

        latents = (z - mean) / std if config.json has latents_mean and latents_std, as in REPA-E's
        code, and (z - shift_factor) * scaling_factor otherwise, as in diffusers' SD 3 pipelines.
        """
        mean, logvar = self.moments(pixels)
        if noise is None:
            noise = torch.randn_like(mean)
        z = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        shift, scale = self.shift_and_scale(z)
        return ((z - shift) * scale).to(z)

    def decode(self, latents):
        """Latents back to pixels, which may overshoot [-1,1] slightly: clamp before saving."""
        shift, scale = self.shift_and_scale(latents)
        z = latents / scale + shift
        return self.decoder(self.post_quant_conv(z.to(self.decoder.conv_in.weight)))


# ---- loading -------------------------------------------------------------------------------------

# Older versions of diffusers had other names in the attention of the middle block, and Stable
# Diffusion 1's weights still have them. diffusers: ModelMixin._fix_state_dict_keys_on_load.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(name):
    """The name that diffusers gives a tensor now."""
    for old, new in OLD_NAMES.items():
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def load_vae(path_or_id, device="cpu", dtype=torch.float32, channels=None):
    """The frozen VAE of a vae/ folder, its parent, or a hub id.

    channels: the model's in_channels, which must agree. Raises FuseDiTError.
    """
    folder = resolve_vae(path_or_id)
    with torch.device("meta"):                                # shapes, but no memory yet
        vae = VAE(VAEConfig.from_dict(read_json(folder / "config.json"), folder))
    stored = open_tensors(folder, "diffusion_pytorch_model")
    tensors = {current_name(name): tensor for name, tensor in stored.items()}
    check_tensors(vae, tensors, folder)
    if channels not in (None, vae.config.latent_channels):
        found = vae.config.latent_channels
        raise FuseDiTError(f"the VAE {path_or_id} has {found} channels, but config field "
                           f"in_channels of the model is {channels}: use the model's own VAE or, "
                           f"to train a model for this one, --set in_channels={found} as well")
    assign_tensors(vae, tensors, device, dtype)
    layout = torch.contiguous_format
    if dtype == torch.bfloat16:
        layout = torch.channels_last                          # faster
    return vae.to(memory_format=layout).requires_grad_(False).eval()

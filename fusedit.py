"""fusedit: text-to-image by deep fusion of a frozen Gemma and a Diffusion Transformer.

Two transformers with the same number and width of attention heads run side by side. Gemma is
frozen and encodes the prompt. The Diffusion Transformer (DiT) is trained from scratch and predicts
the velocity of a noisy image. In layer i, every image token attends to all image tokens and, in the
same softmax, to the keys and values that layer i of Gemma computed for the text. This is the method
of "Exploring the Deep Fusion of Large Language Models and Diffusion Transformers for Text-to-Image
Synthesis" (arXiv 2505.10046), called "the paper" below.

Gemma sees neither the image nor the noise level. It therefore runs only once per prompt, before the
DiT, and its keys and values are reused at every step of the sampler:

         prompt                                    noise
           |                                         |
    [ Gemma layer 0 ] --- keys, values ----> [ DiT block 0 ]
    [ Gemma layer 1 ] --- keys, values ----> [ DiT block 1 ]       once per prompt:
          ...                                       ...              text = model.encode(prompts)
    [Gemma layer L-1] --- keys, values ----> [DiT block L-1]       once per step:
                                                     |               v = model.dit(x_t, sigma, text)
                                                  velocity

Glossary
    B        batch size                           x        a clean image, or its VAE latents
    T        text tokens, padded on the right     eps      Gaussian noise
    N        image tokens, one per P x P patch    sigma    noise level: 0 is clean, 1 is pure noise
    S        length of any token sequence         x_t      noisy image, (1 - sigma) x + sigma eps
    D        width of a token stream; Gemma's     v        velocity d x_t / d sigma = eps - x; in
             and the DiT's may differ                      attention also the values
    L        Gemma's layers                       [B,C,H,W]  an image: C channels, height, width
    H, K     query heads, key/value heads (GQA)   h        width of one head
Some names have two meanings, as in the papers. eps is also RMSNorm's epsilon. shift (of the noise
schedule) and scale (of attention scores) are also names in AdaLN.

Reading order: flow matching (loss and sampler), configuration, building blocks, Gemma, the DiT,
both towers (Gemma is the text tower, the DiT the image tower), presets. A reference such as
models.py:394 is to the published implementation, github.com/tang-bd/fuse-dit at commit 5e6431a,
folder diffusion/. Where this file computes something differently, a comment says so.
"""
import difflib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file


class FuseDiTError(Exception):
    """A problem the user can fix. The message says what is wrong and what to do about it."""


# ------------------------------------------------------------------------------ flow matching
def shift_sigma(sigma, shift):
    """Move noise levels towards 1 (SD3, arXiv 2403.03206, eq. 23). shift = 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_sigmas(shift, device=None):
    """The 1000 discrete noise levels used in training [1000], from 1 down to almost 0."""
    timesteps = torch.arange(1000, 0, -1, device=device)
    return shift_sigma(timesteps / 1000, shift)


def logit_normal_sigma(normal, shift):
    """Noise levels [B] for training, from standard normal draws [B] (trainers.py:231-243).

    sigmoid(normal) is logit-normal: it favours the middle of the list of noise levels (sigma 0.5
    before the shift), where the velocity is hardest to predict (SD3, section 3.1).
    """
    u = normal.sigmoid()                                # near 0: much noise; near 1: little
    index = (u * 1000).long().clamp(max=999)            # in low precision u can round up to 1
    return training_sigmas(shift, normal.device)[index]


def flow_loss(model, x, text, sigma, eps):
    """Rectified-flow loss per sample [B] (arXiv 2209.03003; trainers.py:225-273).

    A straight line joins the image x to the noise eps. Its direction, eps - x, is the same at every
    sigma, and is what the model is asked to predict from a single point x_t on the line. Many lines
    pass through one x_t, so the squared error is smallest for their mean direction, given x_t and
    the text. That mean is the velocity that the sampler follows.

    x, eps: [B,C,H,W]; sigma: [B]. model(x_t, sigma, text) is a DiT, with TextFeatures as text, or a
    FuseDiT, with a tuple of the arguments of its encode_ids. The caller draws eps and sigma:

        eps = torch.randn_like(x)
        sigma = logit_normal_sigma(torch.randn(len(x), device=x.device), shift)
    """
    x = x.float()
    s = sigma[:, None, None, None]
    x_t = (1 - s) * x + s * eps
    v = model(x_t, sigma, text)
    return (v.float() - (eps - x)).square().flatten(1).mean(1)


def sampling_sigmas(steps, shift):
    """The noise levels [steps + 1] of the sampler, from 1 to 0."""
    # Like the published sampler (diffusers' FlowMatchEulerDiscreteScheduler), we space the levels
    # evenly from 1 to the last training level and then shift them all. Since that level is already
    # shifted, the last level before 0 is shifted twice.
    last = float(training_sigmas(shift)[-1])
    sigmas = shift_sigma(torch.linspace(1, last, steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


@torch.no_grad()
def sample(dit, noise, text, uncond, steps, guidance, shift, guidance_span=(0, 1), callback=None):
    """Euler integration of the velocity, from noise [B,C,H,W] at sigma 1 to an image at sigma 0.

    text, uncond: TextFeatures (below) of the B prompts and of B empty (or negative) prompts, padded
    to the same T. Classifier-free guidance (arXiv 2207.12598; pipelines.py:264-280) computes both
    velocities in one batch of 2B and extrapolates away from the empty prompt's:
    v_uncond + guidance * (v - v_uncond). Guidance is off if guidance is 1, and at steps whose sigma
    lies outside guidance_span; the DiT then runs on the prompts alone.
    callback(i, x_t) is called after every step.
    """
    x_t = noise.float()
    sigmas = sampling_sigmas(steps, shift).tolist()
    if guidance != 1:
        text_and_uncond = text.concat(uncond)
    for i in range(steps):
        sigma = sigmas[i]
        next_sigma = sigmas[i + 1]

        if guidance != 1 and guidance_span[0] <= sigma <= guidance_span[1]:
            sigma_batch = x_t.new_full((2 * len(x_t),), sigma)
            v, v_uncond = dit(torch.cat([x_t, x_t]), sigma_batch, text_and_uncond).chunk(2)
            v = v_uncond + guidance * (v - v_uncond)
        else:
            v = dit(x_t, x_t.new_full((len(x_t),), sigma), text)

        x_t = x_t + (next_sigma - sigma) * v
        if callback is not None:
            callback(i, x_t)
    return x_t


# ------------------------------------------------------------------------------ configuration
@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma 1, 2 or 3 text model."""
    model_type: str                    # "gemma", "gemma2" or "gemma3_text"
    vocab_size: int
    hidden_size: int                   # D of the text stream
    intermediate_size: int             # inner width of the MLP, in the DiT as well
    num_hidden_layers: int             # L
    num_attention_heads: int           # H
    num_key_value_heads: int           # K
    head_dim: int                      # h
    rms_norm_eps: float
    query_pre_attn_scalar: float       # attention scores are divided by its square root
    rope_theta: float
    rope_factor: float                 # positions are divided by it: by 8 in Gemma 3 4B and larger
    local_theta: float                 # rope_theta of layers with a sliding window (Gemma 3)
    sliding_window: int                # length of that window in tokens, including the current one
    sliding_layers: tuple              # indices of these layers

    @staticmethod
    def from_dict(d):
        """From the config.json that transformers writes for a Gemma text model.

        Raises FuseDiTError for another kind of model or a missing field.
        """
        model_type = d.get("model_type")
        if model_type not in ("gemma", "gemma2", "gemma3_text"):
            # (For a multimodal model, pretrained.py passes only the part for its text model.)
            raise FuseDiTError(f"model_type is {model_type!r}, but the text tower must be a Gemma: "
                               "gemma, gemma2, gemma3_text or paligemma")
        is_gemma3 = model_type == "gemma3_text"

        # Published configs omit fields that equal the defaults of their transformers class.
        values = {"head_dim": 256, "rms_norm_eps": 1e-6, "sliding_window": 4096}
        if is_gemma3:
            values |= {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
        names = [f.name for f in fields(GemmaConfig)]
        values |= {k: v for k, v in d.items() if k in names and v is not None}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads"):
            if name not in values:
                raise FuseDiTError(f"the config.json of this Gemma has no {name}")
        values.setdefault("query_pre_attn_scalar", values["head_dim"])

        # Rotary embedding. transformers 4 has the keys rope_theta, rope_scaling and (Gemma 3)
        # rope_local_base_freq. transformers 5 has {"rope_theta": ..., "factor": ...} under
        # rope_parameters: for Gemma 3, one under "full_attention", one under "sliding_attention".
        parameters = d.get("rope_parameters") or {}
        full = parameters.get("full_attention", parameters)
        sliding = parameters.get("sliding_attention", parameters)
        scaling = d.get("rope_scaling") or full
        default_theta = 1e6 if is_gemma3 else 1e4
        values["rope_theta"] = full.get("rope_theta") or d.get("rope_theta") or default_theta
        values["rope_factor"] = scaling.get("factor") or 1.0
        values["local_theta"] = values["rope_theta"]
        if is_gemma3:
            local_theta = sliding.get("rope_theta") or d.get("rope_local_base_freq")
            values["local_theta"] = local_theta or 1e4

        values["sliding_layers"] = sliding_layers(d)
        return GemmaConfig(**values)


def sliding_layers(d):
    """Indices of the layers with a sliding window: half of Gemma 2's, five in six of Gemma 3's."""
    layer_types = d.get("layer_types")
    if layer_types is not None:
        return tuple(i for i, name in enumerate(layer_types) if name == "sliding_attention")
    period = 1                                                  # Gemma 1: no layer has one
    if d["model_type"] == "gemma2":
        period = 2
    if d["model_type"] == "gemma3_text":
        period = d.get("sliding_window_pattern") or 6
    return tuple(i for i in range(d["num_hidden_layers"]) if (i + 1) % period != 0)


@dataclass(frozen=True)
class FuseDiTConfig:
    """One point in the paper's design space. The defaults are its baseline."""

    # The text tower, and how the image reads it
    base: str = "google/gemma-2b"           # the frozen Gemma: a hub id or a folder
    fusion: Literal["deep", "shallow"] = "deep"   # deep: block i reads the keys and values of a
                                            # Gemma layer; shallow: all blocks read a hidden state
    attention: Literal["self", "cross"] = "self"  # self: one softmax over text and image; cross: a
                                            # second one for the text
    initial_layers: int = 0                 # DiT block i reads Gemma layer i + initial_layers
    shared_attention_layers: Literal["all"] | tuple = "all"  # the Gemma layers that may be read
    text_hidden_states_index: int = -1      # the hidden state that shallow fusion reads: i is the
                                            # input of layer i, -1 the output of the final norm
    # layer: that hidden state; the others: a mixture of all layers' hidden states, see TextMix
    text_states: Literal["layer", "uniform", "static", "depth", "time", "joint"] = "layer"
    max_text_tokens: int = 256              # longer prompts are truncated
    instruction: str = ""                   # put before every prompt except the empty one
    apply_chat_template: bool = False       # wrap prompts as instruction-tuned Gemmas expect

    # The image tower
    pos_embed: Literal["ape", "1d-rope", "2d-rope", "m-rope"] = "ape"    # see image_rope
    # None (FINAL_MODEL, below) means that the DiT is not told sigma and has to infer it from x_t.
    timestep_conditioning: Literal["adaln-zero", "adaln-single", "addition"] | None = "adaln-zero"
    sandwich_norm: bool = False             # norms before and after each branch, as in Gemma 2
    qk_norm: bool = True                    # RMSNorm on queries, and on keys that the DiT computes
    dit_hidden_size: int | None = None      # D of the image stream; None: as wide as Gemma
    dit_num_hidden_layers: int | None = None  # None: all of Gemma's, from initial_layers on
    clip: str | None = None                 # CLIP text model, or a model with one in text_encoder/;
                                            # its pooled vector is embedded and added to the time
                                            # embedding
    text_modulation_embeds_dim: int | None = None  # length of that vector

    # The image, the noise schedule and the sampler
    in_channels: int = 16                   # C: latent channels, or 3 for pixels
    patch_size: int = 2                     # P
    image_size: int = 512                   # pixels, in training and by default in sampling
    vae: str | None = "stabilityai/stable-diffusion-3-medium-diffusers"  # None: x is the pixels
    shift: float = 3.0                      # > 1: more training and sampling at high noise
    guidance: float = 6.0                   # default guidance scale for sampling

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = allowed_by(field.type)                    # types, and values of a Literal
            if float in allowed and type(value) is int:         # JSON may write 3.0 as 3
                value = float(value)
            if tuple in allowed and type(value) is list:        # JSON has no tuples
                value = tuple(value)
            object.__setattr__(self, field.name, value)         # the way to set a frozen field

            if value not in allowed and type(value) not in allowed:
                names = ", ".join(getattr(option, "__name__", str(option)) for option in allowed)
                raise FuseDiTError(f"config field {field.name} is {value!r}; allowed: {names}")
            if type(value) in (int, float) and value < MINIMUM.get(field.name, 1e-9):
                raise FuseDiTError(f"config field {field.name} is {value}, which is too small: "
                                   "it must be positive (initial_layers: 0 or more)")

        layers = self.shared_attention_layers
        if layers != "all" and not all(type(i) is int for i in layers):
            raise FuseDiTError("config field shared_attention_layers must be 'all' or a list of "
                               "layer numbers")
        if self.text_states != "layer" and self.fusion == "deep":
            raise FuseDiTError(f"config field text_states is {self.text_states!r}, which needs "
                               "fusion shallow: in deep fusion, a block reads its own Gemma layer")
        if self.text_states != "layer" and self.text_hidden_states_index != -1:
            raise FuseDiTError("config field text_hidden_states_index is "
                               f"{self.text_hidden_states_index}, but text_states "
                               f"{self.text_states!r} reads all layers: leave it at -1")
        if self.clip and not self.text_modulation_embeds_dim:
            raise FuseDiTError("config field clip needs text_modulation_embeds_dim (ViT-L: 768)")
        if self.text_modulation_embeds_dim and not self.timestep_conditioning:
            raise FuseDiTError("config field text_modulation_embeds_dim needs a "
                               "timestep_conditioning: its vector is added to the time embedding")

    @staticmethod
    def from_dict(d):
        """From JSON. Unknown keys are errors, so that a typo cannot leave a default in place."""
        for key in d:
            FuseDiTConfig.check_field(key)
        return FuseDiTConfig(**d)

    @staticmethod
    def check_field(name):
        """Raise FuseDiTError unless there is a field of this name."""
        known = [f.name for f in fields(FuseDiTConfig)]
        if name not in known:
            raise FuseDiTError(f"unknown config field {name!r}; {suggest(name, known)}")


MINIMUM = {"initial_layers": 0, "text_hidden_states_index": -math.inf}  # others: above 0


def allowed_by(declared):
    """The types, and the literal values, that a field's declared type allows."""
    if declared is type(None):
        return [None]
    if get_origin(declared) is Literal:
        return list(get_args(declared))
    if get_args(declared):                                      # a union
        return [option for part in get_args(declared) for option in allowed_by(part)]
    return [declared]


def suggest(word, known):
    """The known names that an unknown one resembles, as a hint for an error message."""
    close = [name for name in known if word in name]
    close = close or difflib.get_close_matches(word, known, n=4, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known)


# ------------------------------------------------------------------------------ building blocks
class RMSNorm(nn.Module):
    """Gemma's RMSNorm: x / rms(x) * (1 + weight), computed in float32. The weight starts at 0."""
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)


class MLP(nn.Module):
    """Gemma's gated MLP (GeGLU)."""
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


def modulate(x, shift, scale):
    """AdaLN (DiT, arXiv 2212.09748): shift and scale are computed from the timestep."""
    return x * (1 + scale) + shift


def inverse_frequencies(n, theta=10000.0, device=None):
    """theta^(-i / n) for i = 0 .. n-1 [n]: from fast (1 radian per position) to slow."""
    return torch.exp(-math.log(theta) * torch.arange(n, device=device) / n)


def sinusoidal(positions, width):
    """Sinusoidal embedding [..., width] of positions [...]: sines, then cosines."""
    frequencies = inverse_frequencies(width // 2, device=positions.device)
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def timestep_features(sigma, width=256, scale=1000):
    """Sinusoidal embedding [B,width] of the timestep scale * sigma. Note: cosines come first."""
    sines, cosines = sinusoidal(scale * sigma, width).chunk(2, dim=-1)
    return torch.cat([cosines, sines], dim=-1)


def sincos_2d(rows, cols, width, device, table_size=64):
    """Absolute position embedding "ape" [1,N,D]: the centre of a fixed square table.

    The table is that of diffusers' PatchEmbed (models.py:120-128). Positions are scaled by 16/64,
    so that its 64 x 64 patches span 0 .. 16, the range of the 16 x 16 patches that it was designed
    for. The first half of the width encodes the column, the second half the row.
    """
    if max(rows, cols) > table_size:
        raise FuseDiTError(f"pos_embed ape has {table_size} x {table_size} patches, not "
                           f"{rows} x {cols}: use a smaller image or another pos_embed")
    spacing = 16 / table_size
    row = ((table_size - rows) // 2 + torch.arange(rows, device=device)) * spacing
    col = ((table_size - cols) // 2 + torch.arange(cols, device=device)) * spacing
    by_col = sinusoidal(col, width // 2)[None, :].expand(rows, -1, -1)        # [rows,cols,D/2]
    by_row = sinusoidal(row, width // 2)[:, None].expand(-1, cols, -1)
    return torch.cat([by_col, by_row], dim=-1).reshape(1, rows * cols, width)


def cos_sin(angles):
    """Rotary table for angles [B,S,h/2]: cosines and sines [2,B,1,S,h/2], shared by all heads."""
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def apply_rope(x, rope):
    """Rotary embedding (arXiv 2104.09864) of queries or keys x [B,heads,S,h]; rope None: x itself.

    Channels j and j + h/2 form a pair, which is rotated by its angle. The product of a query and a
    key rotated with the same frequencies depends only on the difference of their positions.
    """
    if rope is None:
        return x
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return rotated.to(x.dtype)


def image_rope(kind, rows, cols, offset, h, device):
    """Rotary table of a rows x cols grid of patches (models.py:627-684); "ape": None, no rotation.

    offset [B]: the position of the first patch, which DiT.rope chooses.

    1d-rope   a patch has one position, its index in reading order, as if the image were more text;
              it determines the rotation of all h/2 channel pairs
    2d-rope   half of the channel pairs encode the row and half the column, each with its own full
              range of h/4 frequencies
    m-rope    the h/2 frequencies are split: the fast half encodes the row, the slow half the column

    The base theta is 10000, whatever Gemma's own is. So only 1d-rope and m-rope rotate the image
    with the frequencies of the text, and only in Gemma 1, Gemma 2 and sliding-window layers of
    Gemma 3. A score between text and image then depends on the difference of their positions alone.
    """
    if kind == "ape":
        return None

    index = torch.arange(rows * cols, device=device)
    all_freqs = inverse_frequencies(h // 2, device=device)
    if kind == "1d-rope":
        return cos_sin((offset[:, None] + index)[..., None] * all_freqs)       # angles [B,N,h/2]

    if kind == "2d-rope":
        row_freqs = inverse_frequencies(h // 4, device=device)
        col_freqs = row_freqs
    else:                                                                      # m-rope
        row_freqs, col_freqs = all_freqs.chunk(2)
    row = offset[:, None] + index // cols                                      # [B,N]
    col = offset[:, None] + index % cols
    angles = torch.cat([row[..., None] * row_freqs, col[..., None] * col_freqs], dim=-1)
    return cos_sin(angles)


def attention(q, k, v, mask=None, scale=None):
    """Grouped-query attention of q [B,H,N,h] to k, v [B,K,S,h]; returns [B,H,N,h].

    mask: boolean or additive, [N,S] for all samples, or [B,1,1,S] for all queries of a sample.
    scale multiplies the scores; None means h^(-1/2).
    """
    # H/K query heads share one key head. Instead of copying keys H/K times (as the published code
    # does, models.py:485), stack the queries of a group as extra rows of one head.
    B, K, _, h = k.shape
    group = q.shape[1] // K
    q_rows = q.reshape(B, K, -1, h)                                            # [B,K,H/K*N,h]
    if mask is not None and mask.dim() == 2:
        mask = mask.repeat(group, 1)                                           # [H/K*N,S]
    out = F.scaled_dot_product_attention(q_rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape)


class Attention(nn.Module):
    """Projections and per-head norms of attention. The caller decides which tokens attend to which.

    The number and width of the heads are always Gemma's, whatever the width of the stream, so that
    the keys of text and image fit into one softmax.
    has_kv: has k_proj and v_proj, for the stream itself. has_text_kv: has text_k_proj and
    text_v_proj, for the text in shallow fusion. The cross-attention of deep fusion has neither,
    since its keys and values are Gemma's.
    """
    def __init__(self, width, gemma: GemmaConfig, qk_norm, has_kv=True, has_text_kv=False):
        super().__init__()
        H = gemma.num_attention_heads
        K = gemma.num_key_value_heads
        h = gemma.head_dim
        self.head_dim = h
        self.q_proj = nn.Linear(width, H * h, bias=False)
        self.o_proj = nn.Linear(H * h, width, bias=False)
        if has_kv:
            self.k_proj = nn.Linear(width, K * h, bias=False)
            self.v_proj = nn.Linear(width, K * h, bias=False)
        if has_text_kv:
            self.text_k_proj = nn.Linear(width, K * h, bias=False)
            self.text_v_proj = nn.Linear(width, K * h, bias=False)
        self.q_norm = RMSNorm(h, gemma.rms_norm_eps) if qk_norm else nn.Identity()
        if has_kv or has_text_kv:
            self.k_norm = RMSNorm(h, gemma.rms_norm_eps) if qk_norm else nn.Identity()

    def split_heads(self, x):                                   # [B,S,heads*h] -> [B,heads,S,h]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def q(self, x, rope=None):
        return apply_rope(self.q_norm(self.split_heads(self.q_proj(x))), rope)

    def kv(self, x, rope=None):
        k = apply_rope(self.k_norm(self.split_heads(self.k_proj(x))), rope)
        v = self.split_heads(self.v_proj(x))
        return k, v

    def text_kv(self, text):
        k = self.k_norm(self.split_heads(self.text_k_proj(text)))
        v = self.split_heads(self.text_v_proj(text))
        return k, v

    def out(self, x):                                           # [B,H,S,h] -> [B,S,D]
        return self.o_proj(x.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """The weights and residual branches that a Gemma layer and a DiT block have in common.

    self_attn and input_layernorm are passed in, since these two differ.
    """
    def __init__(self, width, gemma: GemmaConfig, sandwich_norm, self_attn, input_layernorm):
        super().__init__()
        eps = gemma.rms_norm_eps
        self.sandwich_norm = sandwich_norm
        self.self_attn = self_attn
        self.mlp = MLP(width, gemma.intermediate_size)
        # Beware of the name: with sandwich norms (Gemma 2 and 3) post_attention_layernorm comes
        # after attention. Without them (Gemma 1) it is the norm *before the MLP*.
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = RMSNorm(width, eps)
        if sandwich_norm:
            self.pre_feedforward_layernorm = RMSNorm(width, eps)
            self.post_feedforward_layernorm = RMSNorm(width, eps)

    def add_attention(self, x, attn, gate=1):
        """x plus an attention output, which the caller has computed."""
        if self.sandwich_norm:
            attn = self.post_attention_layernorm(attn)
        return x + gate * attn

    def add_mlp(self, x, shift=0, scale=0, gate=1):
        """x plus the whole MLP branch: norm, modulation, MLP."""
        if self.sandwich_norm:
            y = self.mlp(modulate(self.pre_feedforward_layernorm(x), shift, scale))
            y = self.post_feedforward_layernorm(y)
        else:
            y = self.mlp(modulate(self.post_attention_layernorm(x), shift, scale))
        return x + gate * y


class LayerStack(nn.ModuleList):
    """The layers of a tower, applied in order.

    per_layer holds a tuple of inputs for each layer to apply; the layers beyond its end are not
    applied. common holds the inputs that are the same for all layers. A layer is called with x,
    then the inputs in its tuple, then the common ones. (On a TPU, this class is replaced by a scan,
    which compiles one layer instead of all of them.)
    """
    def forward(self, x, per_layer, common):
        assert len(per_layer) <= len(self), (len(per_layer), len(self))
        outputs = []
        for layer, inputs in zip(self, per_layer):
            x, output = layer(x, *inputs, *common)
            outputs.append(output)
        return x, outputs


# ------------------------------------------------------------------------------ Gemma
class TextFeatures(NamedTuple):
    """Everything the DiT needs to know about its prompts, computed once and used at every step."""
    keys: tuple                         # one per DiT block: [B,K,T,h] of the Gemma layer that it
    values: tuple                       #   reads, or None. Shallow fusion: all are None
    hidden: torch.Tensor | None         # shallow fusion: the hidden state that is read [B,T,D], or
                                        #   all layers' [B,T,L,D], which TextMix mixes
    mask: torch.Tensor                  # [B,T] True at real tokens (at least <bos>), not at padding
    pooled: torch.Tensor | None = None  # [B,text_modulation_embeds_dim] CLIP's pooled vector

    def map(self, f):
        """Apply f to every tensor, as in text.map(lambda t: t[:2])."""
        def f_or_none(t):
            return None if t is None else f(t)

        return TextFeatures(keys=tuple(f_or_none(k) for k in self.keys),
                            values=tuple(f_or_none(v) for v in self.values),
                            hidden=f_or_none(self.hidden),
                            mask=f(self.mask),
                            pooled=f_or_none(self.pooled))

    def concat(self, other):
        """Both batches as one: first the samples of this batch, then those of the other."""
        def cat(a, b):
            return None if a is None else torch.cat([a, b])

        return TextFeatures(keys=tuple(map(cat, self.keys, other.keys)),
                            values=tuple(map(cat, self.values, other.values)),
                            hidden=cat(self.hidden, other.hidden),
                            mask=cat(self.mask, other.mask),
                            pooled=cat(self.pooled, other.pooled))


class LayerStates(NamedTuple):
    """The tensors of a Gemma layer that a DiT block may read."""
    k: torch.Tensor                     # [B,K,T,h] keys
    v: torch.Tensor                     # [B,K,T,h] values
    hidden: torch.Tensor                # [B,T,D] the layer's input


class GemmaLayer(TransformerLayer):
    def forward(self, x, rope, mask, scale, rotate_keys):
        """Returns x [B,T,D] after this layer, and the LayerStates.

        After keep_layers, the deepest layer has no queries and no MLP, and returns x unchanged.
        """
        y = self.input_layernorm(x)
        k, v = self.self_attn.kv(y)                             # [B,K,T,h]
        rotated_k = apply_rope(k, rope)
        if rotate_keys:
            states = LayerStates(rotated_k, v, x)
        else:
            states = LayerStates(k, v, x)
        if self.mlp is None:
            return x, states

        q = self.self_attn.q(y, rope)                           # [B,H,T,h]
        attn = attention(q, rotated_k, v, mask, scale)
        x = self.add_attention(x, self.self_attn.out(attn))
        x = self.add_mlp(x)
        return x, states


class Gemma(nn.Module):
    """Gemma 1, 2 or 3 as a text encoder: returns its layers' keys and values instead of logits.

    Gemma 2 was trained with soft-capping, which squashes large attention scores. We leave it out:
    the published FuseDiT models were trained without it (models.py:488).
    """
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        eps = config.rms_norm_eps
        sandwich_norm = config.model_type != "gemma"
        qk_norm = config.model_type == "gemma3_text"
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = LayerStack()
        for _ in range(config.num_hidden_layers):
            attn = Attention(D, config, qk_norm)
            self.layers.append(GemmaLayer(D, config, sandwich_norm, attn, RMSNorm(D, eps)))
        self.norm = RMSNorm(D, eps)

    def keep_layers(self, last_layer):
        """Drop weights that are not needed to read layers 0 .. last_layer, to save memory.

        Only the keys, values and input of layer last_layer are read, so its query and output
        projections and its MLP are dropped as well. last_layer = L, the output of the final norm,
        needs everything.
        """
        if last_layer < len(self.layers):
            self.norm = None
            self.layers = self.layers[:last_layer + 1]
            last = self.layers[-1]
            last.mlp = None
            last.self_attn.q_proj = None
            last.self_attn.o_proj = None

    def forward(self, ids, last_layer, rotate_keys=True):
        """Run layers 0 .. last_layer on ids [B,T]; last_layer = L also applies the final norm.

        Returns three lists: the keys and values [B,K,T,h] of these layers, and their inputs [B,T,D]
        (hidden[i] is the input of layer i; hidden[L] is the output of the final norm). Attention is
        causal and padding is on the right, so real tokens never see padding, and no padding mask is
        needed.
        rotate_keys=False: keys without RoPE, for deep cross-attention (models.py:505-522).
        """
        c = self.config
        T = ids.shape[1]
        device = ids.device
        x = self.embed_tokens(ids)                              # [B,T,D]
        # Gemma multiplies by sqrt(D) in x's own dtype: in bf16 the factor itself is rounded.
        x = x * torch.full((), c.hidden_size ** 0.5, dtype=x.dtype, device=device)

        # which tokens a token sees: all tokens so far, or those in the window
        position = torch.arange(T, device=device)
        distance = position[:, None] - position                 # [T,T] how far back the key lies
        causal = distance >= 0
        window = causal & (distance < c.sliding_window)

        # rotary tables
        global_freqs = inverse_frequencies(c.head_dim // 2, c.rope_theta, device) / c.rope_factor
        local_freqs = inverse_frequencies(c.head_dim // 2, c.local_theta, device)
        global_rope = cos_sin(position[None, :, None] * global_freqs)
        local_rope = cos_sin(position[None, :, None] * local_freqs)

        per_layer = []
        for i in range(min(last_layer + 1, c.num_hidden_layers)):
            if i in c.sliding_layers:
                per_layer.append((local_rope, window))
            else:
                per_layer.append((global_rope, causal))
        scale = c.query_pre_attn_scalar ** -0.5
        x, states = self.layers(x, per_layer, (scale, rotate_keys))

        states = [LayerStates(*state) for state in states]      # a scan returns plain tuples
        keys = [state.k for state in states]
        values = [state.v for state in states]
        hidden = [state.hidden for state in states]
        if last_layer == c.num_hidden_layers:
            hidden.append(self.norm(x))
        return keys, values, hidden


def load_gemma(folder, device="cpu", dtype=torch.float32):
    """A frozen Gemma from a folder that transformers saved: config.json and *.safetensors.

    Loading is strict: a tensor that is missing, unexpected or of another shape raises a
    FuseDiTError that names it. fusedit_lib/pretrained.py also handles hub ids, PaliGemma and
    folders of the published FuseDiT, and reads only the part of a Gemma that the DiT needs.
    """
    folder = Path(folder)
    tensors = {}
    try:
        config = GemmaConfig.from_dict(json.loads((folder / "config.json").read_text()))
        for path in sorted(folder.glob("*.safetensors")):       # one file, or several shards
            tensors |= load_file(path)
    except (OSError, ValueError, SafetensorError) as e:
        raise FuseDiTError(f"cannot read the Gemma in {folder}: {e}") from None

    with torch.device("meta"):                                  # shapes, but no memory yet
        gemma = Gemma(config)
    state = {}
    for name, tensor in tensors.items():
        if name != "lm_head.weight":                            # we need no logits
            state[name.removeprefix("model.")] = tensor.to(device, dtype)
    try:
        gemma.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise FuseDiTError(f"the weights in {folder} do not fit its config.json: {e}") from None
    return gemma.requires_grad_(False).eval()


# ------------------------------------------------------------------------------ the DiT
class AdaNorm(nn.Module):
    """RMSNorm plus the Linear that computes an AdaLN-Zero modulation, which the caller applies.

    A block's Linear also computes the modulation of its MLP. Released checkpoints store it here.
    """
    def __init__(self, width, chunks, eps):
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.linear = nn.Linear(width, chunks * width)
        self.chunks = chunks

    def forward(self, x):
        return self.norm(x)

    def modulation(self, temb):             # temb [B,D] -> chunks of [B,1,D]
        return self.linear(F.silu(temb))[:, None].chunk(self.chunks, dim=-1)


class DiTBlock(TransformerLayer):
    """A Gemma layer whose tokens are image patches, which also attend to the text.

    config.fusion determines where the text's keys and values come from:
        deep      from a Gemma layer, as Gemma computed them (for cross-attention, before RoPE)
        shallow   projected by this block itself, from one hidden state of Gemma, or a mixture of
                  all of them (after DiT.context_embedder has brought it to the DiT's width)

    config.attention determines how the image attends to them:
        self      in one softmax over text and image
        cross     in a second softmax, over the text alone

    Published: models.py:394-612 (deep), modules.py:218-306 (shallow). There, deep self-attention
    computes text and image together, under one mask in which text does not see the image. For that
    very reason, computing the text first gives the same result.

    In deep fusion, a block whose Gemma layer is not in shared_attention_layers reads no text: the
    image attends to itself alone.
    """
    def __init__(self, c: FuseDiTConfig, gemma: GemmaConfig, width, reads_text):
        eps = gemma.rms_norm_eps
        shallow = c.fusion == "shallow"
        text_in_self_attn = reads_text and c.attention == "self"
        attn = Attention(width, gemma, c.qk_norm, has_text_kv=text_in_self_attn and shallow)
        norm = RMSNorm(width, eps)
        if c.timestep_conditioning == "adaln-zero":
            norm = AdaNorm(width, 6, eps)
        super().__init__(width, gemma, c.sandwich_norm, attn, norm)
        self.conditioning = c.timestep_conditioning
        self.shallow = shallow
        self.text_in_self_attn = text_in_self_attn

        self.cross_attn = None
        if reads_text and c.attention == "cross":
            self.cross_attn = Attention(width, gemma, c.qk_norm, has_kv=False, has_text_kv=shallow)
            if c.sandwich_norm:
                self.post_cross_attention_layernorm = RMSNorm(width, eps)
        if self.conditioning == "adaln-single":     # this block's part of the modulation
            self.scale_shift_table = nn.Parameter(torch.zeros(6 * width))

    def modulation(self, cond):
        """shift, scale, gate of attention, then of the MLP, each [B,1,D]; or neutral numbers.

        adaln-zero     each block has its own Linear; cond is the time embedding [B,D]
        adaln-single   all blocks share one Linear, DiT.t_block, whose output is cond [B,6D]; each
                       adds its own table (shift first, despite the table's published name)
        """
        if self.conditioning == "adaln-zero":
            return self.input_layernorm.modulation(cond)
        if self.conditioning == "adaln-single":
            return (cond + self.scale_shift_table)[:, None].chunk(6, dim=-1)
        return 0, 0, 1, 0, 0, 1

    def forward(self, img, text_k, text_v, text_context, cond, rope, text_mask, joint_mask):
        """Returns img [B,N,D] after this block (and None, since LayerStack expects a pair).

        text_k, text_v   [B,K,T,h] of a Gemma layer (deep fusion), or None
        text_context     [B,T,D], the embedded hidden state (shallow fusion), or None
        cond             see modulation
        rope             [2,B,1,N,h/2], from image_rope, or None
        text_mask        [B,1,1,T], added to the scores: 0 at real tokens, -inf at padding
        joint_mask       [B,1,1,T+N], the same for [text ; image]
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(cond)

        # shallow fusion: this block's own keys and values of the hidden state
        if self.shallow:
            attn = self.self_attn if self.text_in_self_attn else self.cross_attn
            text_k, text_v = attn.text_kv(text_context)         # [B,K,T,h], without positions

        # queries, keys and values of the image
        y = modulate(self.input_layernorm(img), shift_attn, scale_attn)
        q = self.self_attn.q(y, rope)                           # [B,H,N,h]
        k, v = self.self_attn.kv(y, rope)                       # [B,K,N,h]

        # self-attention: one softmax over [text ; image], or over the image alone; scores are
        # scaled by h^(-1/2), even if Gemma scales its own differently
        if self.text_in_self_attn:
            k = torch.cat([text_k, k], dim=2)                   # [B,K,T+N,h]
            v = torch.cat([text_v, v], dim=2)
            z = attention(q, k, v, joint_mask)
        else:
            z = attention(q, k, v)
        img = self.add_attention(img, self.self_attn.out(z), gate_attn)

        # cross-attention: a second softmax, over the text alone, with no norm before and no gate
        if self.cross_attn is not None:
            z = attention(self.cross_attn.q(img), text_k, text_v, text_mask)
            z = self.cross_attn.out(z)
            if self.sandwich_norm:
                z = self.post_cross_attention_layernorm(z)
            img = img + z

        img = self.add_mlp(img, shift_mlp, scale_mlp, gate_mlp)
        return img, None


def states_to_read(text_states, hidden):
    """The part of the hidden states from Gemma.forward that shallow fusion reads.

    layer     the last one [B,T,D]: Gemma has run no further than the state that is read
    uniform   the mean [B,T,D] of the outputs of all L layers, the last one after the final norm
    others    all these outputs [B,T,L,D], for TextMix
    """
    if text_states == "layer":
        return hidden[-1]
    # The outputs differ in magnitude; a LayerNorm without parameters makes them alike.
    states = [F.layer_norm(state, state.shape[-1:]) for state in hidden[1:]]
    states = torch.stack(states, dim=2)                         # [B,T,L,D]
    if text_states == "uniform":
        return states.mean(2)
    return states


class TextMix(nn.Module):
    """Weighted means of what Gemma's L layers computed, for shallow fusion (arXiv 2602.03510).

    config.text_states determines the weights:
        static, depth   learned: one set for all DiT blocks, or one for each
        time, joint     computed from sigma by a small MLP: one for all blocks, or one for each
    They are the softmax of L numbers that start at 0: every mixture is the plain mean at first.
    """
    sigma_features = 128
    mlp_width = 512

    def __init__(self, kind, L, blocks):
        super().__init__()
        if kind in ("static", "time"):
            blocks = 1
        self.depends_on_sigma = kind in ("time", "joint")
        self.logits = nn.Parameter(torch.zeros(blocks, L))      # with sigma: the MLPs' last bias
        if self.depends_on_sigma:
            self.time_embedder = nn.Linear(self.sigma_features, blocks * self.mlp_width)
            self.time_weight = nn.Parameter(torch.zeros(blocks, L, self.mlp_width))

    def forward(self, states, sigma):
        """Mixtures [n,B,T,D] of states [B,T,L,D] at sigma [B], for n blocks (1: for all blocks)."""
        logits = self.logits[None]                                             # [1,n,L]
        if self.depends_on_sigma:
            features = timestep_features(sigma, self.sigma_features, scale=1)  # not 1000 sigma
            y = F.silu(self.time_embedder(features.to(states.dtype)))
            y = y.unflatten(1, (-1, self.mlp_width))                           # [B,n,mlp_width]
            logits = logits + torch.einsum("bni,nli->bnl", y, self.time_weight)
        weights = logits.softmax(-1)[:, None]                                  # [B or 1,1,n,L]
        return (weights @ states).movedim(2, 0)


def embedding_mlp(width_in, width):
    """The layers of a small MLP that embeds a vector of length width_in."""
    return nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width)


class DiT(nn.Module):
    """Predicts the velocity of a noisy image. Module names match the released checkpoints."""
    def __init__(self, c: FuseDiTConfig, gemma: GemmaConfig):
        super().__init__()
        eps = gemma.rms_norm_eps
        D = c.dit_hidden_size or gemma.hidden_size
        P = c.patch_size
        self.config = c
        self.width = D
        self.head_dim = gemma.head_dim
        self.text_layers = layers_to_read(c, gemma.num_hidden_layers)

        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(c.in_channels, D, P, stride=P)})
        self.layers = LayerStack()
        for gemma_layer in self.text_layers:
            reads_text = c.fusion == "shallow" or gemma_layer is not None
            self.layers.append(DiTBlock(c, gemma, D, reads_text))
        if c.timestep_conditioning == "adaln-zero":
            self.norm_out = AdaNorm(D, 2, eps)
        else:
            self.norm_out = RMSNorm(D, eps)
        self.proj_out = nn.Linear(D, P * P * c.in_channels)

        if c.timestep_conditioning:
            self.timestep_embedder = nn.Sequential(*embedding_mlp(256, D))
        if c.timestep_conditioning == "adaln-single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
            self.scale_shift_table = nn.Parameter(torch.zeros(2 * D))
        if c.text_modulation_embeds_dim:
            clip_width = c.text_modulation_embeds_dim
            self.condition_embedder = nn.Sequential(RMSNorm(clip_width, eps),
                                                    *embedding_mlp(clip_width, D))
        if c.fusion == "shallow":
            self.context_embedder = nn.Sequential(RMSNorm(gemma.hidden_size, eps),
                                                  nn.Linear(gemma.hidden_size, D))
        self.text_mix = None
        if c.text_states not in ("layer", "uniform"):
            self.text_mix = TextMix(c.text_states, gemma.num_hidden_layers, len(self.layers))

    def init_weights(self):
        """Fresh weights, for training from scratch (models.py:285-324).

        The first prediction is 0. With adaln-zero the gates are also 0, so every block starts as
        the identity, except for its cross-attention, which has no gate.
        """
        for name, p in self.named_parameters():
            self.init_weight(name, p)

    def init_weight(self, name, p):
        """Fill p, a tensor like the parameter of this name, with fresh values."""
        if "scale_shift_table" in name:
            nn.init.normal_(p, std=self.width ** -0.5)
        elif p.dim() < 2:                                       # biases; RMSNorm uses 1 + weight
            nn.init.zeros_(p)
        elif "proj_out" in name or ".linear." in name:          # output and AdaLN-Zero projections
            nn.init.zeros_(p)
        elif name in ("text_mix.logits", "text_mix.time_weight"):               # a plain mean
            nn.init.zeros_(p)
        elif "embedder" in name or "t_block" in name:
            nn.init.normal_(p, std=0.02)
        else:                                                   # patch embedding, attention, MLP
            nn.init.xavier_uniform_(p.view(len(p), -1))

    def embed_time(self, sigma, pooled, dtype):
        """Time embedding [B,D] of sigma [B], plus that of CLIP's vector if there is one."""
        temb = self.timestep_embedder(timestep_features(sigma).to(dtype))
        if self.config.text_modulation_embeds_dim:
            temb = temb + self.condition_embedder(pooled.to(dtype))
        return temb

    def text_contexts(self, text, sigma, dtype):
        """For each block, the text [B,T,D] that it projects; in deep fusion None.

        (Mixtures without sigma are computed at every step, too: at most 1 % of the DiT's FLOPs.)
        """
        blocks = len(self.text_layers)
        if text.hidden is None:
            return [None] * blocks
        hidden = text.hidden.to(dtype)
        if self.text_mix is None:
            return [self.context_embedder(hidden)] * blocks
        contexts = self.context_embedder(self.text_mix(hidden, sigma))         # [n,B,T,D]
        if len(contexts) == 1:                                  # static, time: one for all blocks
            return [contexts[0]] * blocks
        return list(contexts)

    def final_modulation(self, temb):
        """shift, scale of the last norm, each [B,1,D]; or neutral numbers.

        Beware of the order: adaln-zero stores scale first (modules.py:46), adaln-single shift first
        (models.py:277).
        """
        if self.config.timestep_conditioning == "adaln-zero":
            scale, shift = self.norm_out.modulation(temb)
            return shift, scale
        if self.config.timestep_conditioning == "adaln-single":
            both = self.scale_shift_table + temb.repeat(1, 2)   # [B,2D]
            return both[:, None].chunk(2, dim=-1)
        return 0, 0

    def rope(self, text, rows, cols):
        """Rotary table of the image.

        In deep self-attention the image comes after the text, whose positions are 0, 1, 2, ...; so
        its rows and columns start at the number of real text tokens (without padding). With
        cross-attention or shallow fusion, where the text's keys are not rotated, they start at 0.
        With pos_embed "ape" the image is not rotated at all, though in deep self-attention Gemma's
        keys still are.
        """
        c = self.config
        offset = text.mask.sum(1)                                                    # [B]
        if c.fusion == "shallow" or c.attention == "cross":
            offset = torch.zeros_like(offset)
        return image_rope(c.pos_embed, rows, cols, offset, self.head_dim, text.mask.device)

    def unpatchify(self, x, rows, cols):
        """[B,N,P*P*C] -> [B,C,rows*P,cols*P] (models.py:90-101)"""
        P = self.config.patch_size
        C = self.config.in_channels
        x = x.view(-1, rows, cols, P, P, C).permute(0, 5, 1, 3, 2, 4)          # [B,C,rows,P,cols,P]
        return x.reshape(-1, C, rows * P, cols * P)

    def forward(self, x_t, sigma, text: TextFeatures):
        """Velocity [B,C,H,W] at x_t [B,C,H,W] (H, W: multiples of P) and sigma [B], given text.

        Without timestep_conditioning sigma is not used, except by text_states time and joint.
        """
        c = self.config
        P = c.patch_size
        dtype = self.proj_out.weight.dtype
        rows = x_t.shape[2] // P
        cols = x_t.shape[3] // P
        assert x_t.shape[1:] == (c.in_channels, rows * P, cols * P), x_t.shape
        assert len(x_t) == len(sigma) == len(text.mask), (x_t.shape, sigma.shape, text.mask.shape)

        # image tokens
        img = self.patch_embed["proj"](x_t.to(dtype)).flatten(2).mT.contiguous()     # [B,N,D]
        if c.pos_embed == "ape":
            img = img + sincos_2d(rows, cols, self.width, x_t.device).to(dtype)

        # how the noise level conditions the image tokens
        temb = None
        if c.timestep_conditioning:
            temb = self.embed_time(sigma, text.pooled, dtype)                        # [B,D]
        cond = temb
        if c.timestep_conditioning == "addition":
            img = img + temb[:, None]
        if c.timestep_conditioning == "adaln-single":
            cond = self.t_block(temb)                                                # [B,6D]

        # positions; masks: 0 at real tokens, -inf at padding; the image part is always visible
        rope = self.rope(text, rows, cols)
        text_mask = torch.where(text.mask, 0.0, -math.inf).to(dtype)[:, None, None]  # [B,1,1,T]
        joint_mask = F.pad(text_mask, (0, rows * cols))                              # [B,1,1,T+N]

        # the blocks: img = block(img, k, v, context, cond, rope, text_mask, joint_mask)
        contexts = self.text_contexts(text, sigma, dtype)
        per_block = list(zip(text.keys, text.values, contexts, strict=True))
        img, _ = self.layers(img, per_block, (cond, rope, text_mask, joint_mask))

        shift, scale = self.final_modulation(temb)
        out = self.proj_out(modulate(self.norm_out(img), shift, scale))              # [B,N,P*P*C]
        return self.unpatchify(out, rows, cols).to(x_t.dtype)


def layers_to_read(c: FuseDiTConfig, L):
    """For every DiT block, the index of the Gemma layer whose keys and values it reads, or None.

    DiT block i reads Gemma layer i + initial_layers, if shared_attention_layers allows it
    (models.py:782-800). In shallow fusion only the length of the list matters. L: the number of
    Gemma's layers. Raises FuseDiTError if one that may be read does not exist, or if none is read.
    """
    count = c.dit_num_hidden_layers
    if count is None:
        count = L - c.initial_layers
    counterparts = range(c.initial_layers, c.initial_layers + count)
    allowed = c.shared_attention_layers
    if allowed == "all":
        allowed = counterparts
    layers = [i if i in allowed else None for i in counterparts]

    fits = count > 0
    if c.fusion == "deep":
        all_exist = all(0 <= i < L for i in allowed)
        some_text_is_read = any(i is not None for i in layers)
        fits = all_exist and some_text_is_read
    if not fits:
        raise FuseDiTError(f"config fields initial_layers {c.initial_layers}, "
                           f"dit_num_hidden_layers {count} or shared_attention_layers do not fit "
                           f"a Gemma of {L} layers")
    return layers


# ------------------------------------------------------------------------------ both towers
class FuseDiT(nn.Module):
    """Both towers. pretrained.build_model loads their weights and attaches the tokenizer.

    llm             the text tower, frozen
    dit             the image tower, which is trained
    tokenizer       the text tower's tokenizer
    clip_encoder    for CLIP modulation: prompts or CLIP's token ids -> pooled vectors
    llm_is_trained  True if llm's weights differ from those of config.base (--train-llm)
    gemma_files     the files that llm was loaded from: pretrained.GemmaFiles
    """
    def __init__(self, config: FuseDiTConfig, gemma: GemmaConfig):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.clip_encoder = None
        self.llm_is_trained = False
        self.gemma_files = None
        self.llm = Gemma(gemma).requires_grad_(False)
        self.dit = DiT(config, gemma)

        # The deepest Gemma layer that has to run; L stands for the output of the final norm.
        L = gemma.num_hidden_layers
        index = config.text_hidden_states_index
        if not -(L + 1) <= index <= L:
            raise FuseDiTError(f"config field text_hidden_states_index is {index}; this Gemma "
                               f"has hidden states {-(L + 1)} to {L}")
        if config.fusion == "shallow":
            self.last_layer = index % (L + 1)                   # -1 becomes L
        else:
            self.last_layer = max(i for i in self.dit.text_layers if i is not None)

    def encode_ids(self, ids, mask, pooled=None):
        """TextFeatures of ids [B,T], padded on the right, with mask [B,T] (True: a real token).

        pooled: the output of clip_encoder, for CLIP modulation. Gemma is frozen, so autograd
        records nothing here. If requires_grad is set on its weights, gradients reach them through
        what the DiT reads; nothing else has to change.
        """
        rotate_keys = self.config.attention == "self"           # cross: keys without positions
        keys, values, hidden = self.llm(ids, self.last_layer, rotate_keys)
        layers = self.dit.text_layers
        if self.config.fusion == "shallow":
            no_text = (None,) * len(layers)
            states = states_to_read(self.config.text_states, hidden)
            return TextFeatures(no_text, no_text, states, mask, pooled)
        keys = tuple(None if i is None else keys[i] for i in layers)
        values = tuple(None if i is None else values[i] for i in layers)
        return TextFeatures(keys, values, None, mask, pooled)

    def encode(self, prompts, pad_to=None, instruction=None):
        """TextFeatures of a list of prompts, padded to the longest or to pad_to tokens.

        instruction: text before every prompt except the empty one; None: that of the config. For
        sample(), encode prompts and empty prompts together, or pad both to the same length.
        Negative prompts take the place of the empty ones, so they need instruction="".
        """
        if instruction is None:
            instruction = self.config.instruction
        ids, mask = tokenize(self.tokenizer, prompts, self.config, pad_to, instruction)
        device = self.llm.embed_tokens.weight.device
        pooled = None
        if self.clip_encoder is not None:
            pooled = self.clip_encoder(add_instruction(prompts, instruction))
        return self.encode_ids(ids.to(device), mask.to(device), pooled)

    def forward(self, x_t, sigma, tokens):
        """Both towers in one call, as training needs it; tokens: the arguments of encode_ids."""
        return self.dit(x_t, sigma, self.encode_ids(*tokens))


def add_instruction(prompts, instruction):
    """Put the instruction before every prompt except the empty one (data.py:32-35).

    The empty prompt means "no prompt": some captions are dropped in training, so that guidance has
    something to move away from.
    """
    return [instruction + prompt if prompt else "" for prompt in prompts]


def token_ids(tokenizer, prompts, config, instruction=None):
    """The token ids of each prompt, not truncated, and the length to truncate them to.

    The instruction (None: that of the config) and the chat template go around every prompt except
    the empty one. The limit is max_text_tokens plus the length of the config's instruction and of
    the template, also if another instruction is given (pipelines.py:220-234).
    """
    if instruction is None:
        instruction = config.instruction

    def wrap(text):
        if not config.apply_chat_template:
            return text
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False)
        return text.removeprefix(tokenizer.bos_token)           # the tokenizer adds its own

    texts = [wrap(text) if text else "" for text in add_instruction(prompts, instruction)]
    bos = tokenizer.bos_token_id
    ids = []
    for prompt_ids in tokenizer(texts)["input_ids"]:
        if prompt_ids[:1] != [bos]:         # without <bos> Gemma's outputs are badly off
            prompt_ids = [bos, *prompt_ids]
        ids.append(prompt_ids)

    # Count the tokens of instruction and template. A space at the end of the instruction merges
    # into the prompt's first token, so it is stripped. <bos> is subtracted, because max_text_tokens
    # counts it already. (Truncation removes the end of the whole text, even where that is part of
    # the chat template.)
    overhead = tokenizer(wrap(config.instruction.rstrip()))["input_ids"]
    limit = config.max_text_tokens + len(overhead) - overhead.count(bos)
    return ids, limit


def tokenize(tokenizer, prompts, config, pad_to=None, instruction=None):
    """ids [B,T] and mask [B,T] of prompts: truncated to the model's limit, padded on the right.

    instruction: text before every prompt except the empty one; None: that of the config.
    """
    all_ids, limit = token_ids(tokenizer, prompts, config, instruction)
    all_ids = [ids[:limit] for ids in all_ids]
    lengths = torch.tensor([len(ids) for ids in all_ids])
    T = pad_to or int(lengths.max())
    assert lengths.max() <= T, f"a prompt has {lengths.max()} tokens, more than pad_to = {T}"
    pad_id = tokenizer.pad_token_id or 0
    padded = torch.tensor([ids + [pad_id] * (T - len(ids)) for ids in all_ids])
    return padded, torch.arange(T) < lengths[:, None]


# ------------------------------------------------------------------------------ presets
GEMMA_2 = {"base": "google/gemma-2-2b", "sandwich_norm": True}
FINAL_MODEL = GEMMA_2 | {"pos_embed": "2d-rope", "timestep_conditioning": None}
PRESETS = {  # name -> what differs from the baseline
    "fusedit": FINAL_MODEL,
    # the model in demo/: pixels instead of latents, and a small Gemma of our own
    "demo": {"base": "demo/gemma", "pos_embed": "2d-rope", "timestep_conditioning": "addition",
             "vae": None, "image_size": 32, "patch_size": 4, "in_channels": 3,
             "dit_hidden_size": 256, "shift": 4.0, "guidance": 3.0, "max_text_tokens": 32},
    # the model in demo/emoji: it reads four layers in the middle of a real Gemma, where words with
    # similar meanings are most alike, and draws latents of a small autoencoder (docs/demo.md)
    "emoji": {"base": "google/gemma-3-270m", "sandwich_norm": True, "pos_embed": "2d-rope",
              "timestep_conditioning": None, "vae": "demo/emoji/vae", "image_size": 64,
              "patch_size": 4, "in_channels": 8, "initial_layers": 10, "dit_num_hidden_layers": 4,
              "dit_hidden_size": 320, "guidance": 3.0, "max_text_tokens": 40},
    # the paper's runs, under their own names
    "baselinedit/self-attention": {"fusion": "shallow"},
    "baselinedit/cross-attention": {"fusion": "shallow", "attention": "cross"},
    "fusedit/baseline": {},
    "fusedit/cross-attention": {"attention": "cross"},
    "fusedit/adaln-single": {"timestep_conditioning": "adaln-single"},
    "fusedit/addition": {"timestep_conditioning": "addition"},
    "fusedit/no-temb": {"timestep_conditioning": None},
    "fusedit/1d-rope": {"pos_embed": "1d-rope"},
    "fusedit/2d-rope": {"pos_embed": "2d-rope"},
    "fusedit/m-rope": {"pos_embed": "m-rope"},
    "fusedit/clip-mod": {"clip": "stabilityai/stable-diffusion-3-medium-diffusers",
                         "text_modulation_embeds_dim": 768},
    "fusedit/gemma-2": GEMMA_2,
    "fusedit/gemma-it": {"base": "google/gemma-2b-it"},
    "fusedit/gemma-it-instruction": {"base": "google/gemma-2b-it", "instruction": "Imagine: "},
    "fusedit/paligemma": {"base": "google/paligemma-3b-pt-448"},
    "fusedit/hidden-size-1280": {"dit_hidden_size": 1280},
    "fusedit/hidden-size-1536": {"dit_hidden_size": 1536},
    "fusedit/hidden-size-1792": {"dit_hidden_size": 1792},
    "fusedit/layers-10": {"dit_num_hidden_layers": 10, "initial_layers": 4},
    "fusedit/layers-14": {"dit_num_hidden_layers": 14, "initial_layers": 2},
    "fusedit/large-scale": FINAL_MODEL,
}


def preset(name, **changes):
    """FuseDiTConfig of a named preset with some fields changed."""
    if name not in PRESETS:
        raise FuseDiTError(f"unknown preset {name!r}; {suggest(name, PRESETS)}")
    return FuseDiTConfig.from_dict(PRESETS[name] | changes)

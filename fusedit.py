"""fusedit: text-to-image by deep fusion of a frozen Gemma and a Diffusion Transformer.

Two transformers of the same shape stand side by side. Gemma, frozen, reads the prompt. The
Diffusion Transformer (DiT), trained from scratch, turns noise into a picture. In layer i every
image token looks at all image tokens and, in the same softmax, at the text's keys and values of
Gemma's layer i. That is the method of "Exploring the Deep Fusion of Large Language Models and
Diffusion Transformers for Text-to-Image Synthesis" (arXiv 2505.10046), "the paper" below.

         prompt                                    noise
           |                                         |
    [ Gemma layer 0 ] --- keys, values ----> [ DiT block 0 ]      Text never looks at the image,
    [ Gemma layer 1 ] --- keys, values ----> [ DiT block 1 ]      so Gemma runs once per prompt
          ...                                       ...           and the DiT once per step:
    [ Gemma layer L ] --- keys, values ----> [ DiT block L ]          text = gemma(ids)
                                                     |                v = dit(x_t, sigma, text)
                                                  velocity

Glossary (shapes stand in comments beside the code)
    B       batch                                 x         a picture, or its VAE latents
    T       text tokens, padded on the right      x_t       x with noise: (1 - sigma) x + sigma eps
    N       image tokens, one per P x P patch     sigma     noise level, 0 (clean) to 1 (noise)
    D       width of a stream                     v         velocity d x_t / d sigma = eps - x
    H, K, h query heads, key/value heads, head dim          (Gemma's, in both towers)
    txt, img                                      the two streams

In reading order: configuration, parts, Gemma, DiT, FuseDiT, flow, weights.
"""
import contextlib
import difflib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class FuseDiTError(Exception):
    """A problem the user can mend; its text says what is wrong and what to do."""


# ------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma 1, 2 or 3 text tower, read from its own config.json."""
    model_type: str                    # "gemma", "gemma2" or "gemma3_text"
    vocab_size: int
    hidden_size: int
    intermediate_size: int             # width of the MLP, in the DiT as well
    num_hidden_layers: int
    num_attention_heads: int           # H
    num_key_value_heads: int           # K
    head_dim: int = 256                # h
    rms_norm_eps: float = 1e-6
    query_scale: float = 256.0         # scores are divided by its square root
    rope_theta: float = 10000.0
    rope_factor: float = 1.0           # Gemma 3 4B and up stretch the global positions by 8
    local_rope_theta: float = 10000.0  # of the sliding-window layers
    sliding_window: int = 4096         # tokens such a layer looks back, itself included
    sliding_layers: tuple = ()         # indices of the layers with a window

    @staticmethod
    def from_dict(d):
        """Read a transformers config.json, or the part of it that describes the text tower."""
        d = d.get("base_config") or d.get("text_config") or d  # released FuseDiT / PaliGemma
        kind = {"gemma3": "gemma3_text"}.get(d.get("model_type"), d.get("model_type"))
        if kind not in ("gemma", "gemma2", "gemma3_text"):
            raise FuseDiTError(f"model_type is {kind!r}, but the text tower must be a Gemma: "
                               "gemma, gemma2, gemma3_text or paligemma")
        # Published configs leave out what equals transformers' defaults of their class.
        defaults = {"head_dim": 256, "rms_norm_eps": 1e-6}
        if kind == "gemma3_text":
            defaults |= dict(num_attention_heads=8, num_key_value_heads=4, vocab_size=262208)
        names = [f.name for f in fields(GemmaConfig)]
        got = defaults | {k: v for k, v in d.items() if k in names and v is not None}
        got["model_type"] = kind
        got["query_scale"] = d.get("query_pre_attn_scalar") or got["head_dim"]
        rope = d.get("rope_parameters") or {}  # transformers 5 has it all here, 4 in several keys
        full, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
        scaling = d.get("rope_scaling") or full
        theta = 1e6 if kind == "gemma3_text" else 1e4
        got["rope_theta"] = full.get("rope_theta") or d.get("rope_theta") or theta
        got["rope_factor"] = scaling.get("factor") or 1.0
        got["local_rope_theta"] = (local.get("rope_theta") or
                                   d.get("rope_local_base_freq") or 1e4)
        # Every second layer of Gemma 2 and five of six of Gemma 3 slide; Gemma 1 has no window.
        every = {"gemma": 1, "gemma2": 2}.get(kind, d.get("sliding_window_pattern") or 6)
        layers = range(got.get("num_hidden_layers", 0))
        kinds = d.get("layer_types") or [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
        got["sliding_layers"] = tuple(i for i in layers if kinds[i] == "sliding_attention")
        missing = [f.name for f in fields(GemmaConfig)[:7] if f.name not in got]
        if missing:
            raise FuseDiTError(f"the Gemma config lacks {', '.join(missing)}")
        return GemmaConfig(**got)


@dataclass(frozen=True)
class FuseDiTConfig:
    """One point of the paper's design space. The defaults are its baseline (section 3)."""
    base: str = "google/gemma-2b"           # the frozen Gemma: a hub id or a folder
    fusion: str = "deep"                    # text from each Gemma layer, or one hidden state
    attention: str = "self"                 # text and image in one softmax, or cross attention
    pos_embed: str = "ape"                  # sine table, or rotary 1d-rope, 2d-rope, m-rope
    timestep_conditioning: str | None = "adaln-zero"  # or adaln-single, addition, None
    sandwich_norm: bool = False             # norms before and after each branch (as Gemma 2)
    qk_norm: bool = True                    # RMSNorm on the image's queries and keys
    dit_hidden_size: int | None = None      # D of the image stream; None: as wide as Gemma
    dit_num_hidden_layers: int | None = None  # None: all of Gemma's from initial_layers on
    initial_layers: int = 0                 # DiT layer i reads Gemma layer i + initial_layers
    shared_attention_layers: str | tuple = "all"  # the Gemma layers that are read at all
    text_hidden_states_index: int = -1      # which hidden state shallow fusion reads
    clip: str | None = None                 # CLIP text model whose pooled vector joins the time
    text_modulation_embeds_dim: int | None = None  # length of that vector
    in_channels: int = 16                   # channels of the latents
    patch_size: int = 2                     # P
    image_size: int = 512                   # pixels, in training and by default in sampling
    vae: str | None = "stabilityai/stable-diffusion-3-medium-diffusers"  # None: x is the pixels
    shift: float = 3.0                      # > 1 spends more of training and steps on high noise
    max_text_tokens: int = 256              # longer prompts are cut
    instruction: str = ""                   # put before each prompt; its tokens come on top
    apply_chat_template: bool = False       # wrap prompts as instruction-tuned Gemmas expect

    def __post_init__(self):
        choices = {"fusion": ("deep", "shallow"), "attention": ("self", "cross"),
                   "pos_embed": ("ape", "1d-rope", "2d-rope", "m-rope"),
                   "timestep_conditioning": ("adaln-zero", "adaln-single", "addition", None)}
        for f in fields(self):
            value, kinds = getattr(self, f.name), getattr(f.type, "__args__", (f.type,))
            if float in kinds and type(value) is int:
                object.__setattr__(self, f.name, value := float(value))
            if type(value) is list:  # JSON has no tuples
                object.__setattr__(self, f.name, value := tuple(value))
            if type(value) not in kinds:
                names = " or ".join(k.__name__ for k in kinds)
                raise FuseDiTError(f"config field {f.name} is {value!r}; it must be {names}")
            if f.name in choices and value not in choices[f.name]:
                raise FuseDiTError(f"config field {f.name} is {value!r}; it must be one of "
                                   + ", ".join(map(str, choices[f.name])))
            if type(value) in (int, float) and f.name != "text_hidden_states_index":
                if value < 0 or (value == 0 and f.name != "initial_layers"):
                    raise FuseDiTError(f"config field {f.name} is {value}; it must be positive")
        shared = self.shared_attention_layers
        if shared != "all" and (type(shared) is str or any(type(i) is not int for i in shared)):
            raise FuseDiTError("config field shared_attention_layers must be 'all' or a list of "
                               f"layer numbers, not {shared!r}")
        if self.text_modulation_embeds_dim and not self.timestep_conditioning:
            raise FuseDiTError("CLIP modulation joins the time embedding: with "
                               "text_modulation_embeds_dim, timestep_conditioning cannot be None")
        if self.clip and not self.text_modulation_embeds_dim:
            raise FuseDiTError("config field clip needs text_modulation_embeds_dim (768 for "
                               "openai/clip-vit-large-patch14)")

    @staticmethod
    def from_dict(d):
        """Build from JSON. Unknown keys are errors: a typo must not become a default."""
        known = [f.name for f in fields(FuseDiTConfig)]
        for key in d:
            if key not in known:
                raise FuseDiTError(f"unknown config field {key!r}{_near(key, known)}")
        return FuseDiTConfig(**d)

    def to_dict(self):
        return asdict(self)


_GEMMA2 = dict(base="google/gemma-2-2b", sandwich_norm=True)
_IT = dict(base="google/gemma-2b-it")
_FINAL = _GEMMA2 | dict(pos_embed="2d-rope", timestep_conditioning=None)
PRESETS = {  # name -> what differs from the baseline; the names are those of the paper's runs
    "fusedit": _FINAL,                      # the final model; "fusedit/large-scale" by its run
    "demo": dict(base="demo/gemma", pos_embed="2d-rope", timestep_conditioning=None,
                 sandwich_norm=True, dit_hidden_size=256, in_channels=3, patch_size=4,
                 image_size=64, vae=None, shift=8.0, max_text_tokens=64),
    "baselinedit/self-attention": dict(fusion="shallow"),
    "baselinedit/cross-attention": dict(fusion="shallow", attention="cross"),
    "fusedit/baseline": dict(),
    "fusedit/cross-attention": dict(attention="cross"),
    "fusedit/adaln-single": dict(timestep_conditioning="adaln-single"),
    "fusedit/addition": dict(timestep_conditioning="addition"),
    "fusedit/no-temb": dict(timestep_conditioning=None),
    "fusedit/1d-rope": dict(pos_embed="1d-rope"),
    "fusedit/2d-rope": dict(pos_embed="2d-rope"),
    "fusedit/m-rope": dict(pos_embed="m-rope"),
    "fusedit/clip-mod": dict(clip="openai/clip-vit-large-patch14", text_modulation_embeds_dim=768),
    "fusedit/gemma-2": _GEMMA2,
    "fusedit/gemma-it": _IT,
    "fusedit/gemma-it-instruction": _IT | dict(instruction="Imagine: "),
    "fusedit/paligemma": dict(base="google/paligemma-3b-pt-448"),
    "fusedit/hidden-size-1280": dict(dit_hidden_size=1280),
    "fusedit/hidden-size-1536": dict(dit_hidden_size=1536),
    "fusedit/hidden-size-1792": dict(dit_hidden_size=1792),
    "fusedit/layers-10": dict(initial_layers=4, dit_num_hidden_layers=10,
                              shared_attention_layers=tuple(range(4, 14))),
    "fusedit/layers-14": dict(initial_layers=2, dit_num_hidden_layers=14,
                              shared_attention_layers=tuple(range(2, 16))),
    "fusedit/large-scale": _FINAL,
}


def preset(name, **overrides):
    """FuseDiTConfig of a named preset with some fields changed."""
    if name not in PRESETS:
        raise FuseDiTError(f"unknown preset {name!r}{_near(name, PRESETS)}")
    return FuseDiTConfig.from_dict(PRESETS[name] | overrides)


def _near(word, known):
    close = [k for k in known if word in k] or difflib.get_close_matches(word, known, 4, 0.4)
    return "; did you mean " + " or ".join(close[:4]) + "?" if close else "; known: " + \
        ", ".join(known)


# ------------------------------------------------------------------------------ parts

class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w) in float32: with w = 0, its initial value, it only normalizes."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)


class MLP(nn.Module):
    """Gemma's gated MLP: down(gelu(gate(x)) * up(x))."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def frequencies(dim, theta=10000.0, device=None):
    """The dim/2 rotation speeds of rotary embeddings, theta^(-2j/dim)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotate(x, angles):
    """Turn pair (j, j + h/2) of each head of x [B, heads, T, h] by angles [B or 1, T, h/2].

    angles None leaves x as it is. After it a query-key product depends on the difference of
    the two positions only (RoPE, arXiv 2104.09864).
    """
    if angles is None:
        return x
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]   # [B, 1, T, h/2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def image_angles(kind, rows, cols, n, h, device):
    """Rotation angles [B, N, h/2] of a grid of patches that follows n [B] text tokens.

    2d-rope: half of the h/2 pairs turn with the row, half with the column, each half with its
    own full range of frequencies. m-rope: the same, but the range runs on over both halves.
    1d-rope: patches are numbered like words. ape: no rotation. (Paper, section 4.)
    """
    if kind == "ape":
        return None
    index = torch.arange(rows * cols, device=device)
    row, col = (index, index) if kind == "1d-rope" else (index // cols, index % cols)
    half = frequencies(h // 2, device=device)
    freqs = torch.cat([half, half]) if kind == "2d-rope" else frequencies(h, device=device)
    by_row, by_col = freqs.chunk(2)
    row, col = ((n[:, None] + place)[:, :, None] for place in (row, col))     # [B, N, 1]
    return torch.cat([row * by_row, col * by_col], dim=-1)


def sine(positions, width, cos_first=False):
    """Sinusoidal features [..., width] of positions [...], frequencies 10000^(-2k/width)."""
    half = width // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[..., None] * freqs
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


def sine_table(rows, cols, width, device, size=64):
    """Absolute position embedding [1, N, D]: the middle rows x cols of a size x size table.

    A quarter of an index a step: the scale of the paper's base grid, 16 x 16 patches (256 px).
    """
    if max(rows, cols) > size:
        raise FuseDiTError(f"pos_embed ape has a table of {size} x {size} patches, not {rows} x "
                           f"{cols}: choose a smaller height and width")
    row, col = (((size - n) // 2 + torch.arange(n, device=device)) / 4 for n in (rows, cols))
    by_col = sine(col, width // 2)[None].expand(rows, -1, -1)
    by_row = sine(row, width // 2)[:, None].expand(-1, cols, -1)
    return torch.cat([by_col, by_row], dim=-1).reshape(1, rows * cols, width)


def attend(q, k, v, mask=None, scale=None):
    """Softmax attention of q [B,H,N,h] over k, v [B,K,S,h]; mask [..., N, S] True = may look.

    H/K query heads share each key head. They are repeated here because the fused kernels that
    take a mask do not take grouped heads.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class Attention(nn.Module):
    """Projections and per-head norms of one attention; what looks at what is the caller's.

    The one class of both towers and of cross attention: own_keys=False leaves out k and v of
    the stream itself (cross attention), text_keys=True adds the trained projections of shallow
    fusion. Heads are Gemma's whatever the width, so that text and image keys fit one softmax.
    """

    def __init__(self, width, gemma, qk_norm, own_keys=True, text_keys=False):
        super().__init__()
        self.h, kv = gemma.head_dim, gemma.num_key_value_heads * gemma.head_dim
        self.q_proj = nn.Linear(width, gemma.num_attention_heads * self.h, bias=False)
        self.o_proj = nn.Linear(gemma.num_attention_heads * self.h, width, bias=False)
        self.q_norm = RMSNorm(self.h, gemma.rms_norm_eps) if qk_norm else nn.Identity()
        if own_keys:
            self.k_proj = nn.Linear(width, kv, bias=False)
            self.v_proj = nn.Linear(width, kv, bias=False)
        if text_keys:
            self.text_k_proj = nn.Linear(width, kv, bias=False)
            self.text_v_proj = nn.Linear(width, kv, bias=False)
        if own_keys or text_keys:
            self.k_norm = RMSNorm(self.h, gemma.rms_norm_eps) if qk_norm else nn.Identity()

    def heads(self, x):
        return x.unflatten(-1, (-1, self.h)).transpose(1, 2)      # [B,S,heads*h] -> [B,heads,S,h]

    def q(self, x, angles=None):
        return rotate(self.q_norm(self.heads(self.q_proj(x))), angles)

    def kv(self, x, angles=None):
        k = rotate(self.k_norm(self.heads(self.k_proj(x))), angles)
        return k, self.heads(self.v_proj(x))

    def text_kv(self, hidden):
        return self.k_norm(self.heads(self.text_k_proj(hidden))), \
            self.heads(self.text_v_proj(hidden))

    def out(self, x):
        return self.o_proj(x.transpose(1, 2).flatten(2))          # [B,H,S,h] -> [B,S,D]


class Block(nn.Module):
    """A Gemma layer's weights, in two residual branches; DiTBlock below is built on it."""

    def __init__(self, width, gemma, sandwich, qk_norm):
        super().__init__()
        self.self_attn = Attention(width, gemma, qk_norm)
        self.mlp = MLP(width, gemma.intermediate_size)
        self.input_layernorm = RMSNorm(width, gemma.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, gemma.rms_norm_eps)
        self.sandwich = sandwich
        if sandwich:
            self.pre_feedforward_layernorm = RMSNorm(width, gemma.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(width, gemma.rms_norm_eps)

    def add_attention(self, x, attn, gate=1):
        # A trap of naming: with sandwich norms (Gemma 2, 3) post_attention_layernorm follows
        # attention; without them (Gemma 1) it is the norm in front of the MLP.
        return x + gate * (self.post_attention_layernorm(attn) if self.sandwich else attn)

    def add_mlp(self, x, shift=0, scale=0, gate=1):
        if not self.sandwich:
            return x + gate * self.mlp(modulate(self.post_attention_layernorm(x), shift, scale))
        y = self.mlp(modulate(self.pre_feedforward_layernorm(x), shift, scale))
        return x + gate * self.post_feedforward_layernorm(y)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


# ------------------------------------------------------------------------------ Gemma

class TextFeatures(NamedTuple):
    """What the DiT sees of a batch of prompts; computed once, used at every step."""
    keys: tuple                         # per DiT layer [B, K, T, h], or None: not shared
    values: tuple                       # likewise; both empty in shallow fusion
    hidden: torch.Tensor | None         # [B, T, D] the hidden state shallow fusion reads
    mask: torch.Tensor                  # [B, T] True at real tokens
    pooled: torch.Tensor | None = None  # [B, C] CLIP's vector, for CLIP modulation

    def rows(self, index):
        """The features of some prompts, repeated or reordered: index is a list of rows."""
        def pick(x):
            return None if x is None else x[torch.as_tensor(index, device=x.device)]
        return TextFeatures(tuple(map(pick, self.keys)), tuple(map(pick, self.values)),
                            pick(self.hidden), pick(self.mask), pick(self.pooled))

    def stack(self, other):
        """Both batches one after the other; they must be padded to the same length."""
        def cat(a, b):
            return None if a is None else torch.cat([a, b])
        return TextFeatures(tuple(map(cat, self.keys, other.keys)),
                            tuple(map(cat, self.values, other.values)),
                            *map(cat, self[2:], other[2:]))


class Gemma(nn.Module):
    """Gemma 1, 2 or 3 as a reader: it returns keys and values of its layers, never logits.

    No attention soft-capping, Gemma 2 included: the published training ran without it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config.hidden_size, config, sandwich=config.model_type != "gemma",
                  qk_norm=config.model_type == "gemma3_text")
            for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, upto, rotated=True):
        """Keys [B,K,T,h], values and input hidden state [B,T,D] of layers 0 .. upto.

        Of layer `upto` only keys and values are computed; with upto = L all layers run and the
        last hidden state is the final norm's. rotated=False returns the keys without positions.
        Padding needs no mask: it stands on the right, and causal text never looks to the right.
        """
        c, T = self.config, ids.shape[1]
        x = self.embed_tokens(ids)
        # In x's dtype, as Gemma was trained: in bf16 the factor itself is rounded.
        x = x * torch.tensor(c.hidden_size ** 0.5, dtype=x.dtype, device=x.device)
        place = torch.arange(T, device=ids.device)[None]              # [1, T]
        far = place[..., None] / c.rope_factor * frequencies(c.head_dim, c.rope_theta, ids.device)
        near = place[..., None] * frequencies(c.head_dim, c.local_rope_theta, ids.device)
        back = place[0, :, None] - place                          # [T, T] how far behind
        causal, window = back >= 0, (back >= 0) & (back < c.sliding_window)
        keys, values, hidden = [], [], []
        for i, layer in enumerate(self.layers[:upto + 1]):
            angles, mask = (near, window) if i in c.sliding_layers else (far, causal)
            hidden.append(x)
            y, attn = layer.input_layernorm(x), layer.self_attn
            k, v = attn.kv(y)
            turned = rotate(k, angles)
            keys.append(turned if rotated else k)
            values.append(v)
            if i == upto:
                return keys, values, hidden
            z = attend(attn.q(y, angles), turned, v, mask, scale=c.query_scale ** -0.5)
            x = layer.add_mlp(layer.add_attention(x, attn.out(z)))
        return keys, values, hidden + [self.norm(x)]


# ------------------------------------------------------------------------------ DiT

class AdaNorm(nn.Module):
    """RMSNorm with a Linear that turns the time embedding into its modulation (AdaLN-Zero)."""

    def __init__(self, width, chunks, eps):
        super().__init__()
        self.norm, self.linear = RMSNorm(width, eps), nn.Linear(width, chunks * width)

    def forward(self, x):
        return self.norm(x)


class DiTBlock(Block):
    """A Gemma block whose image tokens also see the text, modulated by the time embedding."""

    def __init__(self, c, gemma, width, reads_text):
        super().__init__(width, gemma, c.sandwich_norm, c.qk_norm)
        own_text = reads_text and c.fusion == "shallow"
        self.joint, self.cross_attn = reads_text and c.attention == "self", None
        if self.joint:
            self.self_attn = Attention(width, gemma, c.qk_norm, text_keys=own_text)
        elif reads_text:
            self.cross_attn = Attention(width, gemma, c.qk_norm, own_keys=False,
                                        text_keys=own_text)
            if c.sandwich_norm:
                self.post_cross_attention_layernorm = RMSNorm(width, gemma.rms_norm_eps)
        self.own_text, self.time = own_text, c.timestep_conditioning
        if self.time == "adaln-zero":
            self.input_layernorm = AdaNorm(width, 6, gemma.rms_norm_eps)
        if self.time == "adaln-single":
            self.scale_shift_table = nn.Parameter(torch.zeros(6 * width))

    def modulation(self, temb):
        """shift, scale, gate of attention, then of the MLP, each [B,1,D]; or neutral values."""
        if self.time == "adaln-zero":
            return self.input_layernorm.linear(F.silu(temb))[:, None].chunk(6, dim=-1)
        if self.time == "adaln-single":                # one shared projection plus a table
            return (temb + self.scale_shift_table)[:, None].chunk(6, dim=-1)
        return 0, 0, 1, 0, 0, 1

    def forward(self, x, temb, angles, text_k, text_v, hidden, text_mask, joint_mask):
        """x [B,N,D]; text_k, text_v [B,K,T,h] of this layer, or hidden [B,T,D] to project."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(temb)
        y, attn = modulate(self.input_layernorm(x), shift_a, scale_a), self.self_attn
        if self.own_text:
            text_k, text_v = (self.cross_attn or attn).text_kv(hidden)
        q, (k, v), mask = attn.q(y, angles), attn.kv(y, angles), None
        if self.joint:                                             # [text ; image] in one softmax
            k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
            mask = joint_mask
        x = self.add_attention(x, attn.out(attend(q, k, v, mask)), gate_a)
        if self.cross_attn is not None:                                 # a second softmax, text alone
            q = self.cross_attn.q(x)
            z = self.cross_attn.out(attend(q, text_k, text_v, text_mask))
            x = x + (self.post_cross_attention_layernorm(z) if self.sandwich else z)
        return self.add_mlp(x, shift_m, scale_m, gate_m)


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)             # [B,C,H,W] -> [B,N,D]


def embedder(inputs, width, norm=False):
    """Linear, SiLU, Linear: of the time sinusoid, or (with a norm first) of CLIP's vector."""
    mlp = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width)]
    return nn.Sequential(*([RMSNorm(inputs)] if norm else []), *mlp)


class DiT(nn.Module):
    """The Diffusion Transformer: predicts the velocity of noisy latents, given the text."""

    def __init__(self, config, gemma):
        super().__init__()
        c = self.config = config
        self.h, self.width = gemma.head_dim, c.dit_hidden_size or gemma.hidden_size
        D, deep = self.width, c.fusion == "deep"
        count = c.dit_num_hidden_layers or gemma.num_hidden_layers - c.initial_layers
        shared = range(10 ** 6) if c.shared_attention_layers == "all" else c.shared_attention_layers
        # Which Gemma layer each block reads; None: that block sees the image only.
        self.reads = [i + c.initial_layers if i + c.initial_layers in shared else None
                      for i in range(count)]
        if deep and any(r is not None and r >= gemma.num_hidden_layers for r in self.reads):
            raise FuseDiTError(
                f"config fields dit_num_hidden_layers ({count}) + initial_layers "
                f"({c.initial_layers}) pass the Gemma's {gemma.num_hidden_layers} layers")
        self.patch_embed = PatchEmbed(c.in_channels, c.patch_size, D)
        self.layers = nn.ModuleList(
            DiTBlock(c, gemma, D, reads_text=not deep or r is not None) for r in self.reads)
        if not deep:
            self.context_embedder = nn.Sequential(RMSNorm(gemma.hidden_size),
                                                  nn.Linear(gemma.hidden_size, D))
        if c.timestep_conditioning:
            self.timestep_embedder = embedder(256, D)
        if c.text_modulation_embeds_dim:
            self.condition_embedder = embedder(c.text_modulation_embeds_dim, D, norm=True)
        if c.timestep_conditioning == "adaln-single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
            self.scale_shift_table = nn.Parameter(torch.zeros(2 * D))
        zero = c.timestep_conditioning == "adaln-zero"
        eps = gemma.rms_norm_eps
        self.norm_out = AdaNorm(D, 2, eps) if zero else RMSNorm(D, eps)
        self.proj_out = nn.Linear(D, c.patch_size ** 2 * c.in_channels)

    def init_weights(self):
        """Random start: every block begins near the identity, and the prediction at zero."""
        for name, p in self.named_parameters():
            if name.startswith(("timestep_embedder", "condition_embedder", "context_embedder",
                                "t_block")) and p.dim() > 1:
                nn.init.normal_(p, std=0.02)
            elif "scale_shift_table" in name:
                nn.init.normal_(p, std=self.width ** -0.5)
            elif p.dim() < 2 or "proj_out" in name or ".linear." in name:
                nn.init.zeros_(p)
            else:
                nn.init.xavier_uniform_(p.view(p.shape[0], -1))

    def time(self, sigma, pooled, dtype):
        """Time embedding [B, D] of sigma [B] (plus CLIP's vector), or 0 in a model without."""
        if not self.config.timestep_conditioning:
            return 0
        temb = self.timestep_embedder(sine(sigma * 1000, 256, cos_first=True).to(dtype))
        if self.config.text_modulation_embeds_dim:
            temb = temb + self.condition_embedder(pooled.to(dtype))
        return temb

    def forward(self, x_t, sigma, text):
        """Velocity [B,C,H,W] of noisy latents x_t [B,C,H,W] at noise level sigma [B].

        text: TextFeatures of the B prompts.
        """
        c, P = self.config, self.config.patch_size
        B, C, rows, cols = x_t.shape[0], c.in_channels, x_t.shape[2] // P, x_t.shape[3] // P
        assert x_t.shape[1:] == (C, rows * P, cols * P), (x_t.shape, C, P)
        assert sigma.shape == (B,) and text.mask.shape[0] == B, (sigma.shape, text.mask.shape)
        dtype, device = self.proj_out.weight.dtype, x_t.device
        x = self.patch_embed(x_t.to(dtype))                        # [B,N,D]
        if c.pos_embed == "ape":
            x = x + sine_table(rows, cols, self.width, device).to(dtype)
        temb = final = self.time(sigma, text.pooled, dtype)        # [B,D]
        if c.timestep_conditioning == "addition":
            x = x + temb[:, None]
        if c.timestep_conditioning == "adaln-single":
            temb = self.t_block(temb)                              # [B,6D]
        # In one sequence the picture comes after the words; apart, it starts at position 0.
        n = text.mask.sum(1) * (c.fusion == "deep" and c.attention == "self")
        angles = image_angles(c.pos_embed, rows, cols, n, self.h, device)
        text_mask = text.mask[:, None, None, :]                    # [B,1,1,T]
        joint_mask = F.pad(text_mask, (0, rows * cols), value=True)  # [B,1,1,T+N]
        hidden = self.context_embedder(text.hidden.to(dtype)) if c.fusion == "shallow" else None
        keys = text.keys or (None,) * len(self.layers)
        values = text.values or keys
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            x = layer(x, temb, angles, k, v, hidden, text_mask, joint_mask)
        x = modulate(self.norm_out(x), *self.final_modulation(final))
        x = self.proj_out(x).view(B, rows, cols, P, P, C)          # each token -> its patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape).to(x_t.dtype)

    def final_modulation(self, temb):
        """shift, scale of the last norm, each [B,1,D]; or neutral values."""
        if self.config.timestep_conditioning == "adaln-zero":
            return self.norm_out.linear(F.silu(temb))[:, None].chunk(2, dim=-1)[::-1]
        if self.config.timestep_conditioning == "adaln-single":
            return (self.scale_shift_table + temb.repeat(1, 2))[:, None].chunk(2, dim=-1)
        return 0, 0


# ------------------------------------------------------------------------------ FuseDiT

class FuseDiT(nn.Module):
    """Both towers, and the tokenizer that feeds the first."""

    def __init__(self, config, gemma):
        super().__init__()
        self.config = config
        self.llm, self.dit = Gemma(gemma).requires_grad_(False), DiT(config, gemma)
        self.tokenizer = None               # set by load_model and build_model
        self.pool = None                    # prompts -> CLIP vectors, where the config has clip
        L, i = gemma.num_hidden_layers, config.text_hidden_states_index
        if not -L - 1 <= i <= L:
            raise FuseDiTError(f"config field text_hidden_states_index is {i}, but a Gemma of {L} "
                               f"layers has hidden states {-L - 1} to {L}")
        shallow = config.fusion == "shallow"
        reads = [r for r in self.dit.reads if r is not None]
        self.upto = i % (L + 1) if shallow else max(reads, default=0)  # the last layer that runs

    def trim(self):
        """Drop the Gemma weights that are never used, before memory is given to them."""
        L = len(self.llm.layers)
        if self.upto < L:
            self.llm.norm = None
            self.llm.layers = self.llm.layers[:self.upto + 1]
            last = self.llm.layers[-1]      # of the last layer only keys and values are computed
            last.mlp = last.self_attn.q_proj = last.self_attn.o_proj = None

    def read(self, ids, mask, pooled=None):
        """Gemma's pass over ids [B,T], right-padded with mask [B,T] (True: a real token).

        Its weights are frozen, so no graph is recorded; a trained Gemma (requires_grad) gets
        its gradient through the keys and values with no other change.
        """
        keys, values, hidden = self.llm(ids, self.upto, rotated=self.config.attention == "self")
        if self.config.fusion == "shallow":
            return TextFeatures((), (), hidden[-1], mask, pooled)
        keys, values = ([None if r is None else x[r] for r in self.dit.reads]
                        for x in (keys, values))
        return TextFeatures(tuple(keys), tuple(values), None, mask, pooled)

    def encode(self, prompts, pad_to=None):
        """TextFeatures of a list of prompts, padded to the longest or to pad_to tokens."""
        ids, mask = tokenize(self.tokenizer, prompts, self.config, pad_to)
        device = self.llm.embed_tokens.weight.device
        pooled = self.pool(prompts) if self.pool else None
        return self.read(ids.to(device), mask.to(device), pooled)


def token_ids(tokenizer, prompts, config):
    """Token ids of each prompt, not cut yet, and how many tokens of a prompt the model takes.

    The instruction and the chat template go around every prompt but the empty one, which means
    "no prompt" in training and guidance. Their tokens come on top of max_text_tokens.
    """
    def wrap(text):
        if not config.apply_chat_template:
            return text
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, tokenize=False).removeprefix(tokenizer.bos_token)

    texts = [wrap(config.instruction + p) if p else "" for p in prompts]
    extra, *rows = tokenizer([wrap(config.instruction.rstrip()), *texts])["input_ids"]
    bos = tokenizer.bos_token_id            # Gemma goes astray without it, so make sure of it
    rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
    return rows, config.max_text_tokens + len([i for i in extra if i != bos])


def tokenize(tokenizer, prompts, config, pad_to=None):
    """ids [B,T] and mask [B,T] of prompts: cut at the model's limit, padded on the right."""
    rows, limit = token_ids(tokenizer, prompts, config)
    rows = [row[:limit] for row in rows]
    T = pad_to or max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    if lengths.max() > T:
        raise FuseDiTError(f"a prompt has {lengths.max()} tokens, more than pad_to = {T}")
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    return ids, torch.arange(T)[None] < lengths[:, None]


# ------------------------------------------------------------------------------ flow

def shift_sigma(sigma, shift):
    """Move noise levels towards 1: shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def train_sigmas(shift):
    """The 1000 noise levels of training, from 1 down to almost 0."""
    return shift_sigma(torch.arange(1000, 0, -1) / 1000, shift)


def draw_sigmas(batch, shift, device=None, generator=None):
    """Noise levels [B] of a training batch: logit-normal, most in the middle (section 3)."""
    u = torch.sigmoid(torch.randn(batch, device=device, generator=generator))
    return train_sigmas(shift).to(device)[(u * 1000).long().clamp(max=999)]


def sample_sigmas(steps, shift):
    """The steps + 1 noise levels of the sampler, from 1 to 0.

    The published sampler shifts twice: its end, the lowest training level, is shifted already.
    """
    low = float(train_sigmas(shift)[-1])
    levels = torch.linspace(1, low, steps, dtype=torch.float64)
    return torch.cat([shift_sigma(levels, shift), levels.new_zeros(1)]).float()


def flow_loss(dit, x, text, shift, generator=None):
    """Rectified-flow loss (section 3): mean squared error of the predicted velocity.

    x [B,C,H,W] clean latents, text the TextFeatures of their captions. The path from x to pure
    noise eps is a straight line, x_t = (1 - sigma) x + sigma eps; its velocity is eps - x.
    """
    x = x.float()
    eps = torch.randn(x.shape, device=x.device, generator=generator)
    sigma = draw_sigmas(len(x), shift, x.device, generator)
    s = sigma[:, None, None, None]
    x_t = (1 - s) * x + s * eps
    return F.mse_loss(dit(x_t, sigma, text).float(), eps - x)


@torch.no_grad()
def sample(dit, noise, text, empty, steps, guidance, shift, callback=None):
    """Euler integration of the velocity from noise [B,C,H,W] at sigma 1 to a picture at 0.

    text and empty: TextFeatures of the B prompts and of what to steer away from, the empty or
    a negative prompt, padded alike. Guidance goes from its prediction towards, and past, the
    prompt's: v = v_0 + g (v_c - v_0); 1 turns it off. callback(step, x_t) after every step.
    """
    x, sigmas = noise.float(), sample_sigmas(steps, shift).to(noise.device)
    both = text.stack(empty) if guidance != 1 else text
    for i in range(steps):
        sigma = sigmas[i].expand(len(both.mask))
        if guidance != 1:
            v, v_0 = dit(torch.cat([x, x]), sigma, both).chunk(2)
            v = v_0 + guidance * (v - v_0)
        else:
            v = dit(x, sigma, both)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
        if callback:
            callback(i, x)
    return x


# ------------------------------------------------------------------------------ weights

@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(p) as tmp`: write tmp; p then appears whole, or not at all."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def resolve(name, near=None, patterns=("*.json", "*.safetensors", "*.model")):
    """The folder of a model: a path (also relative to `near` or to this file), or a hub id."""
    for root in filter(None, (near, Path(), Path(__file__).parent)):
        if (Path(root) / name).exists():
            return (Path(root) / name).resolve()
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FuseDiTError(f"no such model folder: {name}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as e:  # any of a dozen network, login and name errors
        raise FuseDiTError(f"{name} is no folder here, and the hub did not give it "
                           f"({type(e).__name__}). Check the name and the network; Gemma needs its "
                           "licence accepted on the hub and `hf auth login`") from e


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FuseDiTError(f"{path} is missing: is {Path(path).parent} a model folder?") from None
    except ValueError as e:
        raise FuseDiTError(f"{path} is not valid JSON ({e})") from None


def tensor_files(folder, stem="model"):
    """{tensor name: open file} of stem.safetensors, in one file or sharded with an index."""
    index = folder / f"{stem}.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else \
        {f"{stem}.safetensors"}
    tensors = {}
    for name in sorted(names):
        try:
            file = safe_open(folder / name, framework="pt")
            tensors |= dict.fromkeys(file.keys(), file)
        except FileNotFoundError:
            raise FuseDiTError(f"{folder / name} is missing") from None
        except SafetensorError as e:
            raise FuseDiTError(f"{folder / name} is truncated or corrupt ({e}); "
                               "copy or download it again") from None
    return tensors


def gemma_tensors(folder):
    """{"llm.NAME": (file, its name there)} of a Gemma as transformers or FuseDiT save it."""
    tensors = tensor_files(folder)
    prefix = next((p for p in ("llm.", "language_model.model.", "model.language_model.", "model.",
                               "") if p + "embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise FuseDiTError(f"{folder} holds no Gemma: it has no embed_tokens.weight")
    # Beside the language model: PaliGemma's eyes, an untied head, the DiT of a released model.
    others = ("vision_tower", "multi_modal_projector", "model.vision_tower", "lm_head",
              "model.multi_modal_projector", "language_model.lm_head", "dit.")
    return {"llm." + (k.removeprefix(prefix)): (f, k) for k, f in tensors.items()
            if not k.startswith(others)}


def check_tensors(module, found, source):
    """Every tensor of the module is in found {name: (file, stored name)}, and nothing else."""
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    have = {k: tuple(f.get_slice(name).get_shape()) for k, (f, name) in found.items()}
    wrong = [f"missing {k}" for k in want if k not in have]
    wrong += [f"unexpected {k}" for k in have if k not in want]
    wrong += [f"{k} is {have[k]}, the config makes it {want[k]}"
              for k in want if k in have and have[k] != want[k]]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise FuseDiTError(f"{source} does not fit its config: {'; '.join(wrong[:4])}{more}")


def fill(module, found, prefix, device, dtype):
    """Give the tensors of a module on the meta device their values, one at a time."""
    state = {k: found[prefix + k][0].get_tensor(found[prefix + k][1]).to(device, dtype)
             for k in module.state_dict()}
    module.load_state_dict(state, assign=True)


def load_tokenizer(folder):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # its errors for a missing or half tokenizer are of many kinds
        raise FuseDiTError(f"cannot load a tokenizer from {folder}: {e}. It needs tokenizer.json, "
                           "or tokenizer.model and `pip install sentencepiece protobuf`") from e


def load_clip(name, device, dtype):
    """prompts -> [B, C] projected, pooled vectors of a CLIP text model (77 tokens at most)."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer
    folder = resolve(name)
    clip = CLIPTextModelWithProjection.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def pool(prompts):
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77,
                        return_tensors="pt")["input_ids"]
        return clip(ids.to(device)).text_embeds
    return pool


def assemble(config, device, dtype, dit_tensors=None, source=None):
    """A FuseDiT with Gemma's weights from config.base and the DiT's given, or freshly drawn."""
    base = resolve(config.base)
    gemma = GemmaConfig.from_dict(read_json(base / "config.json"))
    with torch.device("meta"):              # shapes only: no memory yet
        model = FuseDiT(config, gemma)
    found = gemma_tensors(base)
    check_tensors(nn.ModuleDict({"llm": model.llm}), found, base)
    model.trim()
    fill(model.llm, found, "llm.", device, dtype)
    if dit_tensors is None:
        model.dit.to_empty(device=device).init_weights()
    else:
        check_tensors(nn.ModuleDict({"dit": model.dit}), dit_tensors, source)
        fill(model.dit, dit_tensors, "dit.", device, dtype)
    words = base if base.name != "transformer" else base.parent / "tokenizer"
    model.tokenizer = load_tokenizer(words)
    if config.clip:
        model.pool = load_clip(config.clip, device, dtype)
    return model


def build_model(config, device="cpu", dtype=torch.float32):
    """A model to train: Gemma in `dtype` from config.base, the DiT freshly drawn in float32."""
    return assemble(config, device, dtype)


def load_model(path, device="cpu", dtype=torch.float32):
    """A trained model from a checkpoint, a run, a released-layout folder or a hub id."""
    folder = resolve(path)
    if (folder / "latest").exists():                               # a run: its last checkpoint
        folder = folder / (folder / "latest").read_text().strip()
    config = load_config(folder)
    home = folder / "transformer" if (folder / "transformer").exists() else folder
    found = {k: (f, k) for k, f in tensor_files(home).items() if k.startswith("dit.")}
    found.pop("dit.patch_embed.pos_embed", None)                   # a constant: sine_table()
    return assemble(config, device, dtype, found, home).eval()


def load_config(folder):
    """FuseDiTConfig of a model folder, ours or of the released layout, with absolute paths."""
    if not (folder / "transformer").exists():
        c = FuseDiTConfig.from_dict(read_json(folder / "config.json"))
        return replace(c, base=str(resolve(c.base, folder)),
                       vae=c.vae and str(resolve(c.vae, folder, ("vae/*",))))
    d = read_json(folder / "transformer" / "config.json")
    known = {f.name for f in fields(FuseDiTConfig)}
    c = FuseDiTConfig.from_dict({k: v for k, v in d.items() if k in known})
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return replace(c, base=str(folder / "transformer"), shift=scheduler["shift"],
                   fusion="shallow" if d["model_type"] == "DiT" else "deep",
                   vae=str(folder / "vae") if (folder / "vae").exists() else None,
                   clip=str(folder / "clip") if c.text_modulation_embeds_dim else None)


def save_model(folder, config, dit):
    """Write a model folder: config.json and model.safetensors with dit's tensors (a dict)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2)
    with atomic_write(folder / "config.json") as tmp:
        tmp.write_text(text + "\n")
    with atomic_write(folder / "model.safetensors") as tmp:
        save_file({f"dit.{k}": v.contiguous() for k, v in dit.items()}, tmp, {"config": text})

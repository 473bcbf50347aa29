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
    [Gemma layer L-1] --- keys, values ----> [DiT block L-1]          text = read(ids, mask)
                                                     |                v = dit(x_t, sigma, text)
                                                  velocity

Glossary (eps: normal noise; L: Gemma's layers; H, W in [B,C,H,W]: height, width; S: a length)
    B        batch                                x        a picture, or its VAE latents
    T        text tokens, padded on the right     x_t      x noised: (1 - sigma) x + sigma eps
    N        image tokens, one per P x P patch    sigma    noise level, 0 (clean) to 1 (only eps)
    D        width of a stream                    v        velocity d x_t / d sigma = eps - x
    H, K, h  query heads, key/value heads, size of a head (Gemma's, in both towers)

New to diffusion? Read "flow", the last 60 lines, first. Files and checkpoints: weights.py.
"""
import difflib
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

for _f in (torch.exp, torch.log, torch.sin, torch.cos, torch.sqrt):
    _f(torch.ones(1))  # MKL bug: a first call made by several threads loses digits (pytorch#188792)


class FuseDiTError(Exception):
    """A problem the user can mend; its text says what is wrong and what to do."""


# ---------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma 1, 2 or 3 text tower, read from its own config.json."""
    model_type: str                    # "gemma", "gemma2" or "gemma3_text"
    vocab_size: int
    hidden_size: int
    intermediate_size: int             # inner width of the MLP, in the DiT as well
    num_hidden_layers: int
    num_attention_heads: int           # H
    num_key_value_heads: int           # K
    head_dim: int                      # h
    rms_norm_eps: float
    query_scale: float                 # attention scores are divided by its square root
    rope_theta: float
    rope_factor: float                 # Gemma 3 4B and up stretch positions by 8
    local_theta: float                 # rope_theta of layers with a sliding window (Gemma 3)
    sliding_window: int                # tokens such a layer looks back, itself included
    sliding_layers: tuple              # indices of these layers


@dataclass(frozen=True)
class FuseDiTConfig:
    """One point of the paper's design space. The defaults are its baseline (section 3)."""
    base: str = "google/gemma-2b"           # the frozen Gemma: a hub id or a folder
    fusion: str = "deep"                    # text from every Gemma layer; shallow: one hidden state
    attention: str = "self"                 # text and image in one softmax; cross: one each
    pos_embed: str = "ape"                  # sine table; or rotary: 1d-rope, 2d-rope, m-rope
    timestep_conditioning: str | None = "adaln-zero"  # adaln-single, addition; None: sigma unseen
    sandwich_norm: bool = False             # norms before and after each branch (as Gemma 2)
    qk_norm: bool = True                    # RMSNorm on the image's queries and keys
    dit_hidden_size: int | None = None      # D of the image stream; None: as wide as Gemma
    dit_num_hidden_layers: int | None = None  # None: all of Gemma's, from initial_layers on
    initial_layers: int = 0                 # DiT layer i reads Gemma layer i + initial_layers
    shared_attention_layers: str | tuple = "all"  # the Gemma layers that may be read
    text_hidden_states_index: int = -1      # the hidden state that shallow fusion reads
    clip: str | None = None                 # CLIP text model whose pooled vector joins the time
    text_modulation_embeds_dim: int | None = None  # length of that vector
    in_channels: int = 16                   # channels of the latents
    patch_size: int = 2                     # P
    image_size: int = 512                   # pixels, in training and by default in sampling
    vae: str | None = "stabilityai/stable-diffusion-3-medium-diffusers"  # None: x is the pixels
    shift: float = 3.0                      # > 1 spends more of training and steps on high noise
    guidance: float = 6.0                   # of sampling (see sample), unless another is asked for
    max_text_tokens: int = 256              # longer prompts are cut
    instruction: str = ""                   # put before each prompt; its tokens come on top
    apply_chat_template: bool = False       # wrap prompts as instruction-tuned Gemmas expect

    def __post_init__(self):
        choices = {"fusion": ("deep", "shallow"), "attention": ("self", "cross"),
                   "pos_embed": ("ape", "1d-rope", "2d-rope", "m-rope"),
                   "timestep_conditioning": ("adaln-zero", "adaln-single", "addition", None)}
        for f in fields(self):
            value, kinds = getattr(self, f.name), getattr(f.type, "__args__", (f.type,))
            value = float(value) if type(value) is int and float in kinds else value  # JSON's 3
            value = tuple(value) if type(value) is list and tuple in kinds else value  # and [...]
            object.__setattr__(self, f.name, value)
            least = {"initial_layers": 0, "text_hidden_states_index": -math.inf}.get(f.name, 1e-9)
            if type(value) not in kinds:
                must = " or ".join(k.__name__ for k in kinds)
            elif value not in choices.get(f.name, (value,)):
                must = "one of " + ", ".join(map(str, choices[f.name]))
            elif type(value) in (int, float) and value < least:
                must = "positive" if least else "at least 0"
            elif f.name == "shared_attention_layers" and value != "all" and (
                    type(value) is str or {type(i) for i in value} - {int}):
                must = "'all' or a list of layer numbers"
            else:
                continue
            raise FuseDiTError(f"config field {f.name} is {value!r}; it must be {must}")
        if self.clip and not self.text_modulation_embeds_dim:
            raise FuseDiTError("config field clip needs text_modulation_embeds_dim (ViT-L: 768)")
        if self.text_modulation_embeds_dim and not self.timestep_conditioning:
            raise FuseDiTError("text_modulation_embeds_dim needs a timestep_conditioning to join")

    @staticmethod
    def from_dict(d):
        """Build from JSON. Unknown keys are errors: a typo must not become a default."""
        known = [f.name for f in fields(FuseDiTConfig)]
        for key in set(d) - set(known):
            raise FuseDiTError(f"unknown config field {key!r}; {_near(key, known)}")
        return FuseDiTConfig(**d)


_GEMMA2 = dict(base="google/gemma-2-2b", sandwich_norm=True)
_FINAL = _GEMMA2 | dict(pos_embed="2d-rope", timestep_conditioning=None)
PRESETS = {  # name -> what differs from the baseline; the names are those of the paper's runs
    "fusedit": _FINAL,                                             # the final model
    "demo": dict(base="demo/gemma", pos_embed="2d-rope", timestep_conditioning="addition",
                 vae=None, image_size=32, patch_size=4, in_channels=3, dit_hidden_size=256,
                 shift=4.0, guidance=3.0, max_text_tokens=32),
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
    "fusedit/gemma-it": dict(base="google/gemma-2b-it"),
    "fusedit/gemma-it-instruction": dict(base="google/gemma-2b-it", instruction="Imagine: "),
    "fusedit/paligemma": dict(base="google/paligemma-3b-pt-448"),
    "fusedit/hidden-size-1280": dict(dit_hidden_size=1280),
    "fusedit/hidden-size-1536": dict(dit_hidden_size=1536),
    "fusedit/hidden-size-1792": dict(dit_hidden_size=1792),
    "fusedit/layers-10": dict(dit_num_hidden_layers=10, initial_layers=4),
    "fusedit/layers-14": dict(dit_num_hidden_layers=14, initial_layers=2),
    "fusedit/large-scale": _FINAL,
}


def preset(name, **overrides):
    """FuseDiTConfig of a named preset with some fields changed."""
    if name not in PRESETS:
        raise FuseDiTError(f"unknown preset {name!r}; {_near(name, PRESETS)}")
    return FuseDiTConfig.from_dict(PRESETS[name] | overrides)


def _near(word, known):
    close = [k for k in known if word in k] or difflib.get_close_matches(word, known, 4, 0.4)
    return "did you mean " + " or ".join(close) + "?" if close else "known: " + ", ".join(known)


# ---------------------------------------------------------------------------- parts of both towers
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


def frequencies(count, theta=10000.0, device=None):
    """theta^(-k / count) for k < count: from one radian a position down to almost 1 / theta."""
    return torch.exp(-math.log(theta) * torch.arange(count, device=device) / count)


def sine(positions, width, cos_first=False):
    """Fixed sinusoidal features [..., width] of positions [...]."""
    angle = positions.float()[..., None] * frequencies(width // 2, device=positions.device)
    return torch.cat([angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()], -1)


def sine_table(rows, cols, width, device, size=64):
    """Position embedding "ape" [1, N, D]: the middle of a table of size x size patches.

    Neighbouring patches are 1/4 apart: a base grid of 16 positions (256 pixels), stretched to 64.
    """
    if max(rows, cols) > size:
        raise FuseDiTError(f"pos_embed ape has {size} x {size} patches, not {rows} x {cols}")
    row, col = (((size - n) // 2 + torch.arange(n, device=device)) / 4 for n in (rows, cols))
    by_col = sine(col, width // 2)[None].expand(rows, -1, -1)
    by_row = sine(row, width // 2)[:, None].expand(-1, cols, -1)
    return torch.cat([by_col, by_row], dim=-1).reshape(1, rows * cols, width)


def turns(angles):  # [B,S,h/2] -> cosines and sines [2,B,1,S,h/2], one table for all layers
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def image_turns(kind, rows, cols, n, h, device):
    """Rotations (see turns) of a grid of patches after n [B] text tokens; ape: None.

    2d-rope: half of each head's pairs (see rotate) turn with the row, half with the column, over
    all frequencies; m-rope: rows the fast, columns the slow half; 1d-rope: counted on like words.
    """
    if kind == "ape":
        return None
    index = torch.arange(rows * cols, device=device)
    row, col = (index, index) if kind == "1d-rope" else (index // cols, index % cols)
    full, half = frequencies(h // 2, device=device), frequencies(h // 4, device=device)
    by_row, by_col = (half, half) if kind == "2d-rope" else full.chunk(2)
    row, col = ((n[:, None] + place)[..., None] for place in (row, col))      # [B, N, 1]
    return turns(torch.cat([row * by_row, col * by_col], dim=-1))


def rotate(x, turn):
    """Rotary embedding: turn pair (j, j + h/2) of each head of x [B,heads,S,h] by its angle.

    Then a product of query and key depends on the difference of their positions alone
    (arXiv 2104.09864). turn: cosines and sines, of turns; None: x as it is.
    """
    if turn is None:
        return x
    (cos, sin), (a, b) = turn, x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q, k, v, mask=None, scale=None):
    """Softmax attention [B,H,N,h] of q over k, v [B,K,S,h]; mask [..,N or 1,S]: bool or added."""
    # H / K query heads share a key head: as more rows of one head, so that no key is copied.
    rows = q.reshape(*k.shape[:2], -1, k.shape[-1])                # [B,K,H/K*N,h]
    mask = mask if mask is None or mask.shape[-2] == 1 else mask.repeat(q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


class Attention(nn.Module):
    """An attention's projections and per-head norms; the caller decides what looks at what.

    Its heads are Gemma's whatever the width, so that text and image keys fit one softmax.
    own: k_proj, v_proj, of the stream itself; text_keys: text_k_proj, text_v_proj (shallow).
    """
    def __init__(self, width, gemma: GemmaConfig, qk_norm, own=True, text_keys=False):
        super().__init__()
        self.h, H, K = gemma.head_dim, gemma.num_attention_heads, gemma.num_key_value_heads
        self.q_proj = nn.Linear(width, H * self.h, bias=False)
        self.o_proj = nn.Linear(H * self.h, width, bias=False)
        for name in ["k_proj", "v_proj"] * own + ["text_k_proj", "text_v_proj"] * text_keys:
            self.add_module(name, nn.Linear(width, K * self.h, bias=False))
        self.q_norm = RMSNorm(self.h, gemma.rms_norm_eps) if qk_norm else nn.Identity()
        if own or text_keys:
            self.k_norm = RMSNorm(self.h, gemma.rms_norm_eps) if qk_norm else nn.Identity()

    def heads(self, x):
        return x.unflatten(-1, (-1, self.h)).transpose(1, 2)       # [B,S,heads*h] -> [B,heads,S,h]

    def q(self, x, turn=None):
        return rotate(self.q_norm(self.heads(self.q_proj(x))), turn)

    def kv(self, x, turn=None):
        return rotate(self.k_norm(self.heads(self.k_proj(x))), turn), self.heads(self.v_proj(x))

    def text_kv(self, x):
        return self.k_norm(self.heads(self.text_k_proj(x))), self.heads(self.text_v_proj(x))

    def out(self, x):
        return self.o_proj(x.transpose(1, 2).flatten(2))           # [B,H,S,h] -> [B,S,D]


class Block(nn.Module):
    """A Gemma layer; a DiT block builds on its weights and its two residual branches."""
    def __init__(self, width, gemma, sandwich, qk_norm):
        super().__init__()
        self.sandwich, norm = sandwich, lambda: RMSNorm(width, gemma.rms_norm_eps)
        self.self_attn = Attention(width, gemma, qk_norm)
        self.mlp = MLP(width, gemma.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        if sandwich:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def add_attention(self, x, attn, gate=1):
        # A trap of naming: with sandwich norms (Gemma 2, 3) post_attention_layernorm follows
        # attention; without them (Gemma 1) it is the norm in front of the MLP.
        return x + gate * (self.post_attention_layernorm(attn) if self.sandwich else attn)

    def add_mlp(self, x, shift=0, scale=0, gate=1):
        norm = self.pre_feedforward_layernorm if self.sandwich else self.post_attention_layernorm
        y = self.mlp(modulate(norm(x), shift, scale))
        return x + gate * (self.post_feedforward_layernorm(y) if self.sandwich else y)

    def forward(self, x, turn, mask, scale, rotated):
        """x [B,T,D] after this layer; and its keys and values [B,K,T,h], and x as it came."""
        y, attn = self.input_layernorm(x), self.self_attn
        k, v = attn.kv(y)
        turned = rotate(k, turn)
        given = turned if rotated else k, v, x
        if self.mlp is None:                # the last one that is read, see weights.trim
            return x, given
        z = attend(attn.q(y, turn), turned, v, mask, scale)
        return self.add_mlp(self.add_attention(x, attn.out(z))), given


class Blocks(nn.ModuleList):
    """A tower's blocks, in turn. (train_tpu.py puts in its place what compiles one for all.)"""
    def forward(self, x, own, shared):      # own: what only one block gets, a tuple for each
        outs = []
        for block, inputs in zip(self, own):
            x, out = block(x, *inputs, *shared)
            outs.append(out)
        return x, outs


def modulate(x, shift, scale):          # AdaLN (arXiv 2212.09748): shift, scale, gate tell sigma
    return x * (1 + scale) + shift


# ---------------------------------------------------------------------------- Gemma, the reader
class TextFeatures(NamedTuple):
    """What the DiT sees of a batch of prompts: computed once, used at every step."""
    keys: tuple                         # per DiT block [B,K,T,h], or None: it reads none
    values: tuple                       # likewise; all None in shallow fusion
    hidden: torch.Tensor | None         # [B,T,D] the hidden state shallow fusion reads
    mask: torch.Tensor                  # [B,T] True at real tokens
    pooled: torch.Tensor | None = None  # [B,C] CLIP's vector, for CLIP modulation

    def apply(self, f, *others):
        """f over every tensor, together with its place in the others; None stays None."""
        def each(*xs):
            nested = isinstance(xs[0], tuple)
            return tuple(map(each, *xs)) if nested else (None if xs[0] is None else f(*xs))
        return TextFeatures(*map(each, self, *others))


class Gemma(nn.Module):
    """Gemma 1, 2 or 3 as a reader: it returns keys and values of its layers, never logits."""
    # No attention soft-capping, Gemma 2 included: the published models were trained without.
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = Blocks(Block(c.hidden_size, c, sandwich=c.model_type != "gemma",
                                   qk_norm=c.model_type == "gemma3_text")
                             for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, upto, rotated=True):
        """For ids [B,T], of layers 0 .. upto: keys and values [B,K,T,h], and their inputs [B,T,D].

        With upto = L the final norm's output comes last. rotated=False: keys without positions, for
        cross-attention. Padding needs no mask: it is on the right, where no causal token looks.
        """
        c, T, device = self.config, ids.shape[1], ids.device
        x = self.embed_tokens(ids)
        # In x's dtype, as Gemma was trained: in bf16 the factor itself is rounded.
        x = x * torch.full((), c.hidden_size ** 0.5, dtype=x.dtype, device=device)
        place = torch.arange(T, device=device)
        far, near = (turns(place[None, :, None] * frequencies(c.head_dim // 2, theta, device) / by)
                     for theta, by in ((c.rope_theta, c.rope_factor), (c.local_theta, 1)))
        back = place[:, None] - place                              # [T,T] how far each one is back
        causal, window = back >= 0, (back >= 0) & (back < c.sliding_window)
        own = [(near, window) if i in c.sliding_layers else (far, causal) for i in range(upto + 1)]
        x, given = self.layers(x, own, (c.query_scale ** -0.5, rotated))
        keys, values, hidden = map(list, zip(*given))
        return keys, values, hidden + [self.norm(x)] if upto == c.num_hidden_layers else hidden


# ---------------------------------------------------------------------------- DiT, the painter
class AdaNorm(nn.Module):
    """RMSNorm, and the Linear that turns the time embedding into its modulation (AdaLN-Zero)."""
    def __init__(self, width, chunks, eps):
        super().__init__()
        self.norm, self.linear = RMSNorm(width, eps), nn.Linear(width, chunks * width)

    def forward(self, x):
        return self.norm(x)

    def modulation(self, temb, chunks):
        return self.linear(F.silu(temb))[:, None].chunk(chunks, dim=-1)       # each [B,1,D]


class DiTBlock(Block):
    """A Gemma block whose image tokens also see the text, modulated by the time embedding."""
    def __init__(self, c, gemma, width, reads_text):
        super().__init__(width, gemma, c.sandwich_norm, c.qk_norm)
        self.conditioning, self.cross_attn = c.timestep_conditioning, None
        self.joint, self.shallow = c.attention == "self" and reads_text, c.fusion == "shallow"
        if self.joint:                         # in place of Block's: with text keys if shallow
            self.self_attn = Attention(width, gemma, c.qk_norm, text_keys=self.shallow)
        elif reads_text:                       # a second softmax, over the text's keys alone
            self.cross_attn = Attention(width, gemma, c.qk_norm, own=False, text_keys=self.shallow)
            if c.sandwich_norm:
                self.post_cross_attention_layernorm = RMSNorm(width, gemma.rms_norm_eps)
        if self.conditioning == "adaln-zero":
            self.input_layernorm = AdaNorm(width, 6, gemma.rms_norm_eps)
        if self.conditioning == "adaln-single":        # mod comes from DiT.t_block, one for all
            self.scale_shift_table = nn.Parameter(torch.zeros(6 * width))

    def modulation(self, mod):
        """shift, scale, gate of attention, then of the MLP, each [B,1,D]; or neutral values."""
        if self.conditioning == "adaln-zero":
            return self.input_layernorm.modulation(mod, 6)
        if self.conditioning == "adaln-single":
            return (mod + self.scale_shift_table)[:, None].chunk(6, dim=-1)
        return 0, 0, 1, 0, 0, 1

    def forward(self, x, text_k, text_v, mod, turn, hidden, text_mask, joint_mask):
        """x [B,N,D] after this block. mod: the time embedding [B,D], or t_block's [B,6D], or 0."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(mod)
        attn, cross = self.self_attn, self.cross_attn
        if self.shallow:
            text_k, text_v = (cross or attn).text_kv(hidden)
        y = modulate(self.input_layernorm(x), shift_a, scale_a)
        q, (k, v), mask = attn.q(y, turn), attn.kv(y, turn), None
        if self.joint:                                             # [text ; image] in one softmax
            k, v, mask = torch.cat([text_k, k], 2), torch.cat([text_v, v], 2), joint_mask
        x = self.add_attention(x, attn.out(attend(q, k, v, mask)), gate_a)
        if cross is not None:                                      # a second softmax: text alone
            z = cross.out(attend(cross.q(x), text_k, text_v, text_mask))
            x = x + (self.post_cross_attention_layernorm(z) if self.sandwich else z)
        return self.add_mlp(x, shift_m, scale_m, gate_m), None


class DiT(nn.Module):
    """Velocity from noisy latents, given the text. Module names are the released checkpoints'."""
    def __init__(self, config, gemma):
        super().__init__()
        c, eps, L = config, gemma.rms_norm_eps, gemma.num_hidden_layers
        deep, adaln_zero = c.fusion == "deep", c.timestep_conditioning == "adaln-zero"
        self.config, self.h, self.width = c, gemma.head_dim, c.dit_hidden_size or gemma.hidden_size
        D, P, layers = self.width, c.patch_size, c.dit_num_hidden_layers or L - c.initial_layers
        sources = range(c.initial_layers, c.initial_layers + layers)
        shared = sources if c.shared_attention_layers == "all" else c.shared_attention_layers
        fit = {*sources} & {*shared} and {*sources, *shared} <= set(range(L))
        if not sources or deep and not fit:
            raise FuseDiTError(f"config fields initial_layers {c.initial_layers}, dit_num_hidden_"
                               f"layers {layers} or shared ones do not fit a Gemma of {L} layers")
        self.reads = [i if i in shared else None for i in sources]  # Gemma's; None: image alone
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(c.in_channels, D, P, stride=P)))
        self.layers = Blocks(DiTBlock(c, gemma, D, not deep or i is not None) for i in self.reads)
        self.norm_out = AdaNorm(D, 2, eps) if adaln_zero else RMSNorm(D, eps)
        self.proj_out = nn.Linear(D, P * P * c.in_channels)
        def mlp(width):
            return nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D)
        if c.timestep_conditioning:
            self.timestep_embedder = nn.Sequential(*mlp(256))
        if c.timestep_conditioning == "adaln-single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
            self.scale_shift_table = nn.Parameter(torch.zeros(2 * D))
        if dim := c.text_modulation_embeds_dim:
            self.condition_embedder = nn.Sequential(RMSNorm(dim, eps), *mlp(dim))
        if not deep:
            self.context_embedder = nn.Sequential(RMSNorm(gemma.hidden_size, eps),
                                                  nn.Linear(gemma.hidden_size, D))

    def init_weights(self):
        """Random start: the prediction is 0; under AdaLN each block is (nearly) the identity."""
        for name, p in self.named_parameters():
            if "scale_shift_table" in name:
                nn.init.normal_(p, std=self.width ** -0.5)
            elif p.dim() < 2 or "proj_out" in name or ".linear." in name:
                nn.init.zeros_(p)
            elif "embedder" in name or "t_block" in name:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p.view(len(p), -1))

    def embed_time(self, sigma, pooled, dtype):
        """Time embedding [B,D] of sigma [B] (plus CLIP's vector); 0: x_t alone tells the noise."""
        if not self.config.timestep_conditioning:
            return 0
        temb = self.timestep_embedder(sine(sigma * 1000, 256, cos_first=True).to(dtype))
        if self.config.text_modulation_embeds_dim:
            temb = temb + self.condition_embedder(pooled.to(dtype))
        return temb

    def final_modulation(self, temb):
        """shift, scale of the last norm, each [B,1,D]; or neutral values."""
        if self.config.timestep_conditioning == "adaln-zero":
            return self.norm_out.modulation(temb, 2)[::-1]         # stored as scale, shift
        if self.config.timestep_conditioning == "adaln-single":
            return (self.scale_shift_table + temb.repeat(1, 2))[:, None].chunk(2, dim=-1)
        return 0, 0

    def forward(self, x_t, sigma, text):
        """Velocity, as x_t [B,C,H,W] (sides multiples of P), at sigma [B], of a TextFeatures."""
        c, P, dtype = self.config, self.config.patch_size, self.proj_out.weight.dtype
        B, C, rows, cols = len(x_t), c.in_channels, x_t.shape[2] // P, x_t.shape[3] // P
        assert x_t.shape == (B, C, rows * P, cols * P), f"{x_t.shape} in patches of {P}"
        assert sigma.shape == (B,) and len(text.mask) == B, (sigma.shape, text.mask.shape)
        x = self.patch_embed["proj"](x_t.to(dtype)).flatten(2).mT.contiguous()    # [B,N,D]
        temb = mod = self.embed_time(sigma, text.pooled, dtype)                   # [B,D]
        if c.pos_embed == "ape":
            x = x + sine_table(rows, cols, self.width, x.device).to(dtype)
        if c.timestep_conditioning == "addition":
            x = x + temb[:, None]
        if c.timestep_conditioning == "adaln-single":
            mod = self.t_block(temb)                                              # [B,6D]
        # Deep joint attention: the words stand at 0 .. n-1, the picture at n; otherwise at 0.
        n = text.mask.sum(1) * (c.fusion == "deep" and c.attention == "self")     # [B]
        turn = image_turns(c.pos_embed, rows, cols, n, self.h, x.device)           # [2,B,1,N,h/2]
        text_mask = torch.where(text.mask, 0.0, -math.inf).to(dtype)[:, None, None]  # [B,1,1,T]
        joint_mask = F.pad(text_mask, (0, rows * cols))                           # [B,1,1,T+N]
        hidden = self.context_embedder(text.hidden.to(dtype)) if c.fusion == "shallow" else None
        own = [*zip(text.keys, text.values, strict=True)]
        x, _ = self.layers(x, own, (mod, turn, hidden, text_mask, joint_mask))
        x = self.proj_out(modulate(self.norm_out(x), *self.final_modulation(temb)))
        x = x.view(B, rows, cols, P, P, C).permute(0, 5, 1, 3, 2, 4)          # [B,C,rows,P,cols,P]
        return x.reshape(x_t.shape).to(x_t.dtype)


# ---------------------------------------------------------------------------- both together
class FuseDiT(nn.Module):
    """Both towers; weights.build_model adds the tokenizer and, for CLIP modulation, pool."""
    def __init__(self, config: FuseDiTConfig, gemma: GemmaConfig):
        super().__init__()
        self.config, self.tokenizer, self.pool, self.own_llm = config, None, None, False
        self.llm, self.dit = Gemma(gemma).requires_grad_(False), DiT(config, gemma)
        n, i = gemma.num_hidden_layers + 1, config.text_hidden_states_index
        if not -n <= i < n:
            raise FuseDiTError(f"text_hidden_states_index {i}: this Gemma has {-n} to {n - 1}")
        deepest = max(filter(None, self.dit.reads), default=0)
        self.upto = i % n if config.fusion == "shallow" else deepest

    def read(self, ids, mask, pooled=None):
        """TextFeatures of ids [B,T], right-padded with mask [B,T] (True: a real token).

        Gemma is frozen, so no graph is recorded; set requires_grad on it, and the gradient
        reaches it through the keys and values with no other change.
        """
        keys, values, hidden = self.llm(ids, self.upto, rotated=self.config.attention == "self")
        shallow = self.config.fusion == "shallow"
        keys, values = (tuple(None if r is None or shallow else x[r] for r in self.dit.reads)
                        for x in (keys, values))
        return TextFeatures(keys, values, hidden[-1] if shallow else None, mask, pooled)

    def forward(self, x_t, sigma, words):
        """Both towers at once, as training needs them: words are read's ids, mask and pooled."""
        return self.dit(x_t, sigma, self.read(*words))

    def encode(self, prompts, pad_to=None):
        """TextFeatures of a list of prompts, padded to the longest or to pad_to tokens."""
        ids, mask = tokenize(self.tokenizer, prompts, self.config, pad_to)
        device = self.llm.embed_tokens.weight.device
        return self.read(ids.to(device), mask.to(device), self.pool and self.pool(prompts))


def token_ids(tokenizer, prompts, config):
    """Token ids of each prompt, not cut yet, and how many of them the model takes.

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
    return rows, config.max_text_tokens + sum(i != bos for i in extra)


def tokenize(tokenizer, prompts, config, pad_to=None):
    """ids [B,T] and mask [B,T] of prompts: cut at the model's limit, padded on the right."""
    rows, limit = token_ids(tokenizer, prompts, config)
    lengths = torch.tensor([min(len(row), limit) for row in rows])
    T, pad = pad_to or int(lengths.max()), tokenizer.pad_token_id or 0
    assert lengths.max() <= T, f"a prompt has {lengths.max()} tokens, more than pad_to = {T}"
    ids = torch.tensor([(row[:limit] + [pad] * T)[:T] for row in rows])
    return ids, torch.arange(T) < lengths[:, None]


# ---------------------------------------------------------------------------- flow
def shift_sigma(sigma, shift):
    """Move noise levels towards 1: shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def train_sigmas(shift, device=None):
    """The 1000 noise levels of training, from 1 down to almost 0."""
    return shift_sigma(torch.arange(1000, 0, -1, device=device) / 1000, shift)


def sample_sigmas(steps, shift):
    """The steps + 1 noise levels of the sampler, from 1 to 0."""
    # Shifted twice, as published: linspace ends at the lowest level of training, shifted already.
    levels = torch.linspace(1, float(train_sigmas(shift)[-1]), steps, dtype=torch.float64)
    return torch.cat([shift_sigma(levels, shift), levels.new_zeros(1)]).float()


def random_sigma(normal, shift):
    """Noise levels of training, of normal numbers [B]: mostly the table's middle, itself noisy."""
    return train_sigmas(shift, normal.device)[(normal.sigmoid() * 1000).long().clamp(max=999)]


def flow_loss(dit, x, text, sigma, eps):
    """Rectified-flow loss [B] (section 3; arXiv 2209.03003): mean squared error of the velocity.

    On the line x_t = (1 - sigma) x + sigma eps, from clean latents x to noise eps, the velocity is
    eps - x. Many lines meet in one x_t: dit learns their mean, given text; sample() follows it.
    """
    x, s = x.float(), sigma[:, None, None, None]
    v = dit((1 - s) * x + s * eps, sigma, text)
    return (v.float() - (eps - x)).square().flatten(1).mean(1)


@torch.no_grad()
def sample(dit, noise, text, empty, steps, guidance, shift, span=(0, 1), after=lambda i, x: None):
    """Euler integration of the velocity from noise [B,C,H,W] at sigma 1 to a picture at 0.

    text, empty: TextFeatures of the B prompts and of what to avoid (the empty or a negative
    prompt), of the same T. At noise levels in span, classifier-free guidance (arXiv 2207.12598)
    goes past the prompt's velocity, v_empty + guidance (v - v_empty); 1: off. after(i, x): a step.
    """
    x, sigmas = noise.float(), sample_sigmas(steps, shift).tolist()
    both = text.apply(lambda a, b: torch.cat([a, b]), empty)
    for i, (sigma, lower) in enumerate(zip(sigmas, sigmas[1:])):
        if guidance != 1 and span[0] <= sigma <= span[1]:
            v, v_empty = dit(torch.cat([x, x]), x.new_full([2 * len(x)], sigma), both).chunk(2)
            v = v_empty + guidance * (v - v_empty)
        else:
            v = dit(x, x.new_full([len(x)], sigma), text)
        x = x + (lower - sigma) * v
        after(i, x)
    return x

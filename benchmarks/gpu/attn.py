"""Speed and exactness of attention at the shapes of the 2B model, with every kernel of this torch.

In the DiT, 1024 image tokens attend to [text ; image], with 8 query heads, 4 key heads and head
size 256; a mask hides the padding of the text. "rows" is fusedit.attention, which stacks the query
heads of a key head as rows of one head; "gqa" is PyTorch's grouped-query attention; "repeat" copies
keys and values. The mask is either added to the scores, boolean, or absent. Gemma's attention is
causal over the text. The VAE's has 4096 positions of width 512. This part of the kit fails if the
error of the kernel that PyTorch chooses by default exceeds the rounding of bfloat16.
"""
import inspect
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kit import CUDA, DEVICE, DTYPE, SMALL, distance, milliseconds, one_line, record
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedit
from fusedit_lib import backend

KERNELS = dict(cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION,
               efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)
SDPA = F.scaled_dot_product_attention


class Sizes(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    image_tokens: int
    head_size: int
    # Lengths of the text; all variants are measured at the first. 64 and 192 are the lengths of
    # pytorch#196678, which training avoids (backend.round_up_to_tile).
    texts: tuple
    vae_positions: int
    vae_width: int


if SMALL:
    SIZES = Sizes(2, 4, 2, 64, 32, (16,), 64, 32)
else:
    SIZES = Sizes(8, 8, 4, 1024, 256, (128, 256, 64, 192), 4096, 512)
B, H, K, N, h = SIZES[:5]
GROUP = H // K                          # query heads of one key head
DEFAULT = "the default"
TOLERANCE = 0.03                        # relative distance; that of bfloat16 is 0.003 to 0.01


# ---------------------------------------------------------------------------- kinds of attention
def chosen_kernel(q, k, v, mask):
    """The name of the kernel that PyTorch chooses by default."""
    try:
        return backend.KERNELS.get(torch._fused_sdp_choice(q, k, v, mask), "none")
    except Exception as e:
        return one_line(e)


def gqa(q, k, v, mask):
    return SDPA(q, k, v, attn_mask=mask, enable_gqa=True)


def repeat(q, k, v, mask):
    k = k.repeat_interleave(GROUP, 1)
    v = v.repeat_interleave(GROUP, 1)
    return SDPA(q, k, v, attn_mask=mask)


def stacked(q, k, v, mask):
    """fusedit.attention for a mask that stores a row for each query instead of a single row."""
    return SDPA(q.reshape(B, K, -1, h), k, v, attn_mask=mask).reshape(q.shape)


def with_kernel(kernel, form, mask, q, k, v):
    with sdpa_kernel(kernel):
        return form(q, k, v, mask)


class BuiltAtFirstCall:
    """An attention function that is built at its first call, where a failure is caught."""

    def __init__(self, build):
        self.build = build
        self.attention = None

    def __call__(self, q, k, v):
        if self.attention is None:
            self.attention = self.build()
        return self.attention(q, k, v)


# ---------------------------------------------------------------------------- the DiT's attention
class Joint:
    """Random inputs of the attention over [text ; image], and its exact results."""

    def __init__(self, text):
        torch.manual_seed(text)
        self.text = text
        self.keys = text + N
        self.q = self.random(H, N)
        self.k = self.random(K, self.keys)
        self.v = self.random(K, self.keys)
        self.grad = torch.randn_like(self.q)
        self.lengths = torch.linspace(text, max(1, text // 8), B, device=DEVICE).long()

        index = torch.arange(self.keys, device=DEVICE)
        self.visible = (index < self.lengths[:, None]) | (index >= text)             # [B,S]
        self.bool_mask = self.visible[:, None, None]                                 # [B,1,1,S]
        self.added_mask = torch.where(self.bool_mask, 0.0, -torch.inf).to(DTYPE)

    @staticmethod
    def random(heads, tokens):
        return torch.randn(B, heads, tokens, h, device=DEVICE, dtype=DTYPE, requires_grad=True)

    def exact(self, visible):
        """Output and gradients of q, k and v in float32, computed sample by sample."""
        results = []
        for b in range(B):
            q, k, v = (x[b].detach().float().requires_grad_() for x in (self.q, self.k, self.v))
            scores = q @ k.repeat_interleave(GROUP, 0).mT * h**-0.5
            scores = scores.masked_fill(~visible[b], -torch.inf)
            out = scores.softmax(-1) @ v.repeat_interleave(GROUP, 0)
            grads = torch.autograd.grad(out, (q, k, v), self.grad[b].float())
            results.append((out.detach(), *grads))
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    def forms(self):
        """{name: function of q, k and v}. Those named "no mask" attend to the padding as well."""
        added = self.added_mask
        found = {}
        found[f"{DEFAULT}: rows, added"] = lambda q, k, v: fusedit.attention(q, k, v, added)
        found[f"{DEFAULT}: rows, no mask"] = lambda q, k, v: fusedit.attention(q, k, v, None)
        variants = {
            "rows, added": (fusedit.attention, added),
            "rows, bool": (fusedit.attention, self.bool_mask),
            "rows, no mask": (fusedit.attention, None),
            "gqa, added": (gqa, added),
            "gqa, no mask": (gqa, None),
            "repeat, added": (repeat, added),
        }
        for name, kernel in KERNELS.items():
            for variant, (form, mask) in variants.items():
                found[f"{name}: {variant}"] = partial(with_kernel, kernel, form, mask)

        full_mask = added.expand(B, 1, GROUP * N, self.keys).contiguous()
        found["cudnn: rows, written out"] = partial(with_kernel, KERNELS["cudnn"], stacked,
                                                    full_mask)
        found["varlen: keys packed"] = BuiltAtFirstCall(self.varlen)
        found["flex: rows"] = BuiltAtFirstCall(lambda: self.flex(grouped=False))
        found["flex: gqa"] = BuiltAtFirstCall(lambda: self.flex(grouped=True))
        return found

    def varlen(self):
        """FlashAttention with padding removed from the keys, which are concatenated over samples.

        It takes tokens before heads, so the model would not have to transpose anything.
        """
        from torch.nn.attention.varlen import varlen_attn
        key_ends = F.pad((self.lengths + N).cumsum(0), (1, 0)).int()
        query_ends = torch.arange(B + 1, device=DEVICE, dtype=torch.int32) * N
        real = self.visible.flatten().nonzero()[:, 0]      # indices into B * S
        options = {}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True

        def run(q, k, v):
            q = q.transpose(1, 2).flatten(0, 1).contiguous()
            k = k.transpose(1, 2).flatten(0, 1)[real]
            v = v.transpose(1, 2).flatten(0, 1)[real]
            out = varlen_attn(q, k, v, query_ends, key_ends, N, self.keys, **options)
            return out.unflatten(0, (B, N)).transpose(1, 2)
        return run

    def flex(self, grouped):
        """FlexAttention, which skips blocks of 128 keys that consist of padding only.

        grouped: use its grouped-query attention instead of stacked query heads.
        """
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b, _, query, key):
            return (key < self.lengths[b]) | (key >= self.text)

        queries = N
        if not grouped:
            queries = GROUP * N
        blocks = create_block_mask(visible, B, None, queries, self.keys, device=DEVICE)
        compiled = torch.compile(flex_attention, dynamic=False)

        def run(q, k, v):
            shape = q.shape
            if not grouped:
                q = q.reshape(B, K, -1, h)
            return compiled(q, k, v, block_mask=blocks, enable_gqa=grouped).reshape(shape)
        return run


def measure_joint(text, *prefixes):
    """Measure the variants with these name prefixes. Returns the names of wrong defaults."""
    case = Joint(text)
    stacked_q = case.q.detach().reshape(B, K, -1, h)
    choice = dict(added=chosen_kernel(stacked_q, case.k, case.v, case.added_mask),
                  none=chosen_kernel(stacked_q, case.k, case.v, None))
    record("choice", text=text, **choice)
    print(f"{text} text tokens, {case.keys} keys: PyTorch chooses {choice}")

    exact_masked = case.exact(case.visible)
    exact_unmasked = case.exact(torch.ones_like(case.visible))
    wrong = []
    for name, attention in case.forms().items():
        if not name.startswith(prefixes):
            continue
        exact = exact_masked
        if "no mask" in name:
            exact = exact_unmasked
        try:
            row = measure(case, attention, exact)
        except Exception as e:
            row = dict(error=one_line(e), off=float("inf"))
        record("attention", text=text, name=name, **row)
        in_training = text % 128 == 0       # training avoids the others: backend.round_up_to_tile
        if name.startswith(DEFAULT) and in_training and not row["off"] < TOLERANCE:
            wrong.append(f"{name}, {text} text tokens")
        print_row(name, row)
    return wrong


def measure(case, attention, exact):
    """Milliseconds of forward, and of forward and backward, with TFLOP/s and distances from exact.
    """
    tensors = (case.q, case.k, case.v)

    @torch.no_grad()
    def forward():
        return attention(*tensors)

    def both():
        out = attention(*tensors)
        return out, *torch.autograd.grad(out, tensors, case.grad)

    errors = [distance(got.detach(), want) for got, want in zip(both(), exact, strict=True)]
    off = float(torch.tensor(errors).max())                # NaN if any is, unlike Python's max()
    ms = milliseconds(forward)
    both_ms = milliseconds(both)
    backward_ms = max(both_ms - ms, 1e-6)
    flops = 4 * B * H * N * case.keys * h
    return dict(ms=ms, both_ms=both_ms, tflops=flops / ms / 1e9, errors=errors, off=off,
                backward_tflops=2.5 * flops / backward_ms / 1e9)


def print_row(name, row):
    if "error" in row:
        print(f"  {name:<28} not available: {row['error']}")
        return
    warning = ""
    if not row["off"] < TOLERANCE:
        warning = "   <-- WRONG"
    print(f"  {name:<28}{row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s, with backward "
          f"{row['both_ms']:9.3f} ms, backward alone {row['backward_tflops']:6.0f} TFLOP/s, off by "
          f"{row['off']:.0e}{warning}", flush=True)


# ---------------------------------------------------------------------------- other attentions
def measure_extremes():
    """pytorch#196678: 64 keys in the last tile, a mask, sums of exponentials below e^-88.7.

    cuDNN's gradient is NaN here. Such sums do not occur in the model, whose scores are normalised.
    """
    S = N + 64
    q, k, v = (0.1 * torch.randn(1, K, tokens, h, device=DEVICE, dtype=DTYPE)
               for tokens in (N, S, S))
    q[..., 0] = 1.0
    k[..., 0] = -120 * h**0.5
    mask = torch.zeros(1, 1, 1, S, device=DEVICE, dtype=DTYPE)
    choices = {DEFAULT: list(KERNELS.values()), "cudnn": KERNELS["cudnn"],
               "efficient": KERNELS["efficient"]}
    for name, kernels in choices.items():
        leaf = q.clone().requires_grad_()
        try:
            out = with_kernel(kernels, SDPA, mask, leaf, k, v)
            grad = torch.autograd.grad(out.sum(), leaf)[0]
            row = dict(bad=int((~torch.isfinite(grad)).sum()))
        except Exception as e:
            row = dict(error=one_line(e))
        record("extremes", name=name, **row)
        print(f"  sums of e^-120, {S} keys, {name}: {row}")


def measure_gemma(text):
    """Measure Gemma's attention, without gradients."""
    q, k, v = (torch.randn(B, heads, text, h, device=DEVICE, dtype=DTYPE) for heads in (H, K, K))
    index = torch.arange(text, device=DEVICE)
    causal = index[:, None] >= index
    measure_forms("Gemma", {
        "rows, bool": lambda: fusedit.attention(q, k, v, causal),
        "gqa, is_causal": lambda: SDPA(q, k, v, is_causal=True, enable_gqa=True),
    })


def measure_vae():
    shape = (B, 1, SIZES.vae_positions, SIZES.vae_width)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(3))
    forms = {DEFAULT: lambda: SDPA(q, k, v)}
    for name, kernel in KERNELS.items():
        forms[name] = partial(with_kernel, kernel, SDPA, None, q, k, v)
    measure_forms("VAE", forms)


@torch.no_grad()
def measure_forms(model, forms):
    """Measure the milliseconds of each variant, and its distance from the first."""
    first = None
    for name, run in forms.items():
        try:
            out = run()
            if first is None:
                first = out
            row = dict(ms=milliseconds(run, 5, 2), off=distance(out, first))
        except Exception as e:
            row = dict(error=one_line(e))
        record(f"attention of the {model}", name=name, **row)
        print(f"  {model}, {name}: {row}")


def main():
    first, *others = SIZES.texts
    wrong = measure_joint(first, DEFAULT, *KERNELS, "varlen")
    for text in others:
        wrong += measure_joint(text, DEFAULT, "cudnn: rows, added", "efficient: rows, added")
    measure_extremes()
    measure_gemma(first)
    measure_vae()
    measure_joint(first, "flex")            # last, since it is slow to compile
    if wrong:
        raise SystemExit(f"wrong: {'; '.join(wrong)}")
    if not CUDA:
        print("no GPU: the times are meaningless")


if __name__ == "__main__":
    main()

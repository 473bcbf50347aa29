"""Speed and accuracy of attention kernels at the DiT's shapes: image tokens over [text ; image].

    python benchmarks/attention.py                                       shape of the small model
    python benchmarks/attention.py --heads 8 --kv-heads 4 --image 1024 --text 128      Gemma 2 2B

Captions differ in length, so a mask hides the padding of the text. It is either boolean or added to
the scores. "rows" is fusedit.attention, which stacks the query heads of a key head as rows of one
head; "repeat" copies the keys for each query head. The head size is 256, as in Gemma. Each of
PyTorch's fused kernels is requested by name. If one is not available, its line gives the reason.
"""
import argparse
import statistics
import warnings
from functools import partial
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch
import torch.nn.functional as F
from common import clock, finish, machine, relative_distance
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedit
from fusedit_lib import backend, cli

KERNELS = dict(math=SDPBackend.MATH, flash=SDPBackend.FLASH_ATTENTION,
               efficient=SDPBackend.EFFICIENT_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)
HEAD_SIZE = 256
WARMUP_ROUNDS = 3


def repeat_attention(q, k, v, mask):
    """Attention with keys and values copied for each query head."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_kernel(kernel, attention, mask, q, k, v):
    """Attention with a given PyTorch kernel."""
    with sdpa_kernel(kernel):
        return attention(q, k, v, mask)


def padding_mask(lengths, text, image):
    """[B,1,1,S], True at image tokens and at the first `lengths` [B] of `text` text tokens."""
    index = torch.arange(text + image, device=lengths.device)
    visible = (index < lengths[:, None]) | (index >= text)
    return visible[:, None, None]


def candidates(visible, dtype):
    """{name: function of q, k and v} for every kernel and variant. visible: mask [B,1,1,S]."""
    added = torch.where(visible, 0.0, -torch.inf).to(dtype)
    found = {}
    for name, kernel in KERNELS.items():
        variants = {
            "repeat, bool mask": (repeat_attention, visible),
            "rows, bool mask": (fusedit.attention, visible),
            "rows, added mask": (fusedit.attention, added),
            "rows, no mask": (fusedit.attention, None),
        }
        for variant, (attention, mask) in variants.items():
            found[f"{name}: {variant}"] = partial(with_kernel, kernel, attention, mask)
    return found


def flex_attention(lengths, text, image):
    """Compiled FlexAttention, which skips blocks of 128 keys that consist of padding only."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, _, query, key):
        return (key < lengths[b]) | (key >= text)

    blocks = create_block_mask(visible, len(lengths), None, image, text + image,
                               device=lengths.device)
    compiled = torch.compile(flex_attention)
    return partial(compiled, block_mask=blocks, enable_gqa=True)


class Inputs:
    """Random queries, keys and values, and the gradient of the output."""

    def __init__(self, args, device, dtype):
        keys = args.text + args.image
        self.q = self.random(args.batch, args.heads, args.image, device, dtype)
        self.k = self.random(args.batch, args.kv_heads, keys, device, dtype)
        self.v = self.random(args.batch, args.kv_heads, keys, device, dtype)
        self.grad = torch.randn_like(self.q)

    @staticmethod
    def random(batch, heads, tokens, device, dtype):
        return torch.randn(batch, heads, tokens, HEAD_SIZE, device=device, dtype=dtype,
                           requires_grad=True)

    def float32(self):
        return [x.detach().float() for x in (self.q, self.k, self.v)]


def measure(attention, inputs, exact, rounds, device):
    """Median seconds of forward, and of forward and backward; relative distance from `exact`."""
    def forward():
        with torch.no_grad():
            return attention(inputs.q, inputs.k, inputs.v)

    def both():
        attention(inputs.q, inputs.k, inputs.v).backward(inputs.grad)

    def median_seconds(work):
        seconds = [clock(work, device) for _ in range(WARMUP_ROUNDS + rounds)]
        return statistics.median(seconds[WARMUP_ROUNDS:])

    return dict(forward=median_seconds(forward), both=median_seconds(both),
                distance=relative_distance(forward(), exact))


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("--batch", type=cli.positive, default=8, help="number of samples per batch")
    p.add_argument("--heads", type=cli.positive, default=2, help="number of query heads")
    p.add_argument("--kv-heads", type=cli.positive, default=1, help="number of key/value heads")
    p.add_argument("--image", type=cli.positive, default=256, help="number of image tokens")
    p.add_argument("--text", type=cli.positive, default=32,
                   help="text tokens of the longest caption; the shortest has half as many")
    p.add_argument("--rounds", type=cli.positive, default=15,
                   help="number of timed runs of each kernel; the median is reported")
    p.add_argument("--dtype", **cli.DTYPE,
                   help="precision; auto is bf16 where the device has it natively, else float32")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--out", type=Path, metavar="FILE.json",
                   help="also write the results to this file")
    return p.parse_args()


def main():
    args = arguments()
    device, dtype = cli.pick_dtype(args)
    backend.configure(device, dtype)
    torch.manual_seed(0)
    inputs = Inputs(args, device, dtype)
    lengths = torch.linspace(args.text, args.text // 2, args.batch, device=device).long()
    visible = padding_mask(lengths, args.text, args.image)
    found = candidates(visible, dtype)
    exact = found["math: rows, bool mask"](*inputs.float32())

    print(f"{machine(device)}, torch {torch.__version__}, {args.dtype}: ms for forward, ms for "
          "forward and backward, distance from float32")
    rows = {}
    for name in [*found, "flex"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")            # long if a kernel does not apply
                if name == "flex":
                    attention = flex_attention(lengths, args.text, args.image)
                else:
                    attention = found[name]
                row = measure(attention, inputs, exact, args.rounds, device)
        except Exception as e:
            reason = str(e).strip() or type(e).__name__
            print(f"{name:<28} not available: {reason.splitlines()[0][:80]}")
            continue
        rows[name] = row
        print(f"{name:<28}{1000 * row['forward']:9.2f}{1000 * row['both']:9.2f}   "
              f"{row['distance']:.1e}")
    finish(args, dict(machine=machine(device), kernels=rows))


if __name__ == "__main__":
    cli.run(main, "--batch")

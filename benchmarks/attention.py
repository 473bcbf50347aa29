"""Which attention kernel is fast where captions differ in length: images over [text ; image].

    python benchmarks/attention.py                                  the small model's shape
    python benchmarks/attention.py --heads 8 --kv-heads 4 --image 1024 --text 128      Gemma 2 2B's

Head size 256, as Gemma's. "rows" is fusedit.attention: query heads of one key head become rows of it;
"repeat" copies keys for each head. The mask hides padding of text: bool, or added to the scores.
PyTorch's fused kernels are asked for one by one; what a machine does not have is named, with why.
"""
import argparse
import statistics
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from common import clock, finish, machine, norm
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedit
from fusedit_lib import backend, cli

KERNELS = dict(math=SDPBackend.MATH, flash=SDPBackend.FLASH_ATTENTION,
               efficient=SDPBackend.EFFICIENT_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)


def repeat(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def candidates(args, lengths, device):
    """{name: attention of (q, k, v)}; flex skips padding by blocks of 128 keys."""
    S = args.text + args.image
    sees = (torch.arange(S, device=device) < lengths[:, None]) | (
        torch.arange(S, device=device) >= args.text)
    sees = sees[:, None, None]                             # [B,1,1,S]
    added = torch.where(sees, 0.0, -torch.inf).to(backend.torch_dtype(args.dtype))
    found = {}
    for kernel, sdpa in KERNELS.items():
        for title, form, mask in (("repeat, bool mask", repeat, sees),
                                  ("rows, bool mask", fusedit.attention, sees),
                                  ("rows, added mask", fusedit.attention, added),
                                  ("rows, no mask", fusedit.attention, None)):
            def run(q, k, v, form=form, mask=mask, sdpa=sdpa):
                with sdpa_kernel(sdpa):
                    return form(q, k, v, mask)
            found[f"{kernel}: {title}"] = run

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        blocks = create_block_mask(lambda b, h, q, kv: (kv < lengths[b]) | (kv >= args.text),
                                   args.batch, None, args.image, S, device=device)
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True)
    return found, flex


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    for name, default in (("batch", 8), ("heads", 2), ("kv-heads", 1), ("image", 256),
                          ("text", 32), ("rounds", 15)):
        p.add_argument(f"--{name}", type=cli.positive, default=default)
    p.add_argument("--dtype", **cli.DTYPE, help="auto: bf16 where the device has it, else float32")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures there")
    args = p.parse_args()
    device, dtype = cli.pick_dtype(args)
    backend.configure(device, dtype)
    torch.manual_seed(0)
    shapes = ((args.heads, args.image), *[(args.kv_heads, args.text + args.image)] * 2)
    q, k, v = (torch.randn(args.batch, n, s, 256, device=device, dtype=dtype, requires_grad=True)
               for n, s in shapes)
    grad = torch.randn_like(q)
    lengths = torch.linspace(args.text, args.text // 2, args.batch, device=device).long()
    found, flex = candidates(args, lengths, device)
    exact = found["math: rows, bool mask"](*(x.detach().float() for x in (q, k, v)))
    rows = {}
    print(f"{machine(device)}, torch {torch.__version__}, {args.dtype}: ms of forward, and of "
          "forward and backward; distance from float32")
    for name, run in [*found.items(), ("flex", None)]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")            # PyTorch says why not, at length
                run = run or flex()

                def forward(run=run):
                    with torch.no_grad():
                        return run(q, k, v)

                def both(run=run):
                    run(q, k, v).backward(grad)
                took = [statistics.median([clock(work, device) for _ in range(3 + args.rounds)][3:])
                        for work in (forward, both)]
                far = norm(forward(), exact)
        except Exception as e:
            why = str(e).strip() or type(e).__name__
            print(f"{name:<28} not here: {why.splitlines()[0][:80]}")
            continue
        rows[name] = dict(forward=took[0], both=took[1], distance=far)
        print(f"{name:<28}{1000 * took[0]:9.2f}{1000 * took[1]:9.2f}   {far:.1e}")
    finish(args, dict(machine=machine(device), kernels=rows))


if __name__ == "__main__":
    cli.run(main, "--batch")

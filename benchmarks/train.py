"""The training step against the matrix rate of the machine, and against the published formulation.

    python benchmarks/train.py                      30 M parameters on a CPU, in 3 minutes
    python benchmarks/train.py --compile            blocks compiled (one minute more)

"two phases" is what train_gpu.py computes: Gemma without a graph on text as long as the longest of
the batch, then the DiT. "joint mask" is written out below as the published code does it: text
padded to its full length runs through Gemma inside every forward, both streams are concatenated in
every layer under one dense additive mask, and keys are repeated for each head. Both take turns in
one process; times are medians.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fusedit
from cli import Help, pick_device, positive, run
from weights import atomic_write, gemma_config

SHAPE = dict(model_type="gemma2", vocab_size=8192, hidden_size=512, intermediate_size=2048,
             num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=256)
PAD = 64                                    # text tokens, of which 16 to 32 are real


def build(device, dtype):
    """FuseDiT of SHAPE with random weights: 256 patches of latents, the paper's final design."""
    config = fusedit.preset("fusedit", vae=None, image_size=32)
    torch.manual_seed(0)
    model = fusedit.FuseDiT(config, gemma_config(SHAPE))
    model.dit.init_weights()
    for p in model.parameters():            # none may be zero, or a fault would not show
        if p.dim() > 1 and float(p.detach().abs().max()) == 0:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device, dtype)


def batches(n, batch, config, device):
    """(x, sigma, eps, ids, mask) with text padded to PAD on the right."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(n):
        lengths = torch.randint(16, 33, (batch,), generator=rng)
        mask = torch.arange(PAD) < lengths[:, None]
        ids = torch.randint(1, SHAPE["vocab_size"], (batch, PAD), generator=rng) * mask
        x, eps = torch.randn(2, batch, config.in_channels, 32, 32, generator=rng)
        sigma = fusedit.random_sigma(torch.randn(batch, generator=rng), config.shift)
        yield tuple(t.to(device) for t in (x, sigma, eps, ids, mask))


def joint(model, x_t, sigma, ids, mask):
    """Velocity by the published formulation: [text ; image] in every layer, one dense mask."""
    llm, dit, c = model.llm, model.dit, model.config
    B, T, side, dtype = *ids.shape, x_t.shape[2] // c.patch_size, dit.proj_out.weight.dtype
    txt = llm.embed_tokens(ids)
    txt = txt * torch.full((), llm.config.hidden_size ** 0.5, dtype=dtype, device=txt.device)
    img = dit.patch_embed["proj"](x_t.to(dtype)).flatten(2).transpose(1, 2)
    N, h, place = img.shape[1], dit.h, torch.arange(T, device=txt.device)
    by_word = fusedit.turns((place[:, None] * fusedit.frequencies(h // 2, device=txt.device))[None])
    by_patch = fusedit.image_turns(c.pos_embed, side, side, mask.sum(1), h, txt.device)
    sees = torch.zeros(B, T + N, T + N, dtype=torch.bool, device=txt.device)
    sees[:, :T, :T] = place[:, None] >= place
    sees[:, T:] = F.pad(mask, (0, N), value=True)[:, None]
    bias = torch.zeros(B, 1, T + N, T + N, dtype=dtype, device=txt.device)
    bias = bias.masked_fill(~sees[:, None], torch.finfo(dtype).min)
    for word, patch in zip(llm.layers, dit.layers, strict=True):
        one, other = word.input_layernorm(txt), patch.input_layernorm(img)
        q = torch.cat([word.self_attn.q(one, by_word), patch.self_attn.q(other, by_patch)], 2)
        k, v = (torch.cat(pair, 2).repeat_interleave(q.shape[1], 1) for pair in zip(
            word.self_attn.kv(one, by_word), patch.self_attn.kv(other, by_patch), strict=True))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        txt = word.add_mlp(word.add_attention(txt, word.self_attn.out(z[:, :, :T])))
        img = patch.add_mlp(patch.add_attention(img, patch.self_attn.out(z[:, :, T:])))
    x, P = dit.proj_out(dit.norm_out(img)), c.patch_size
    x = x.view(B, side, side, P, P, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x_t.shape).to(x_t.dtype)


def two_phases(model, x_t, sigma, ids, mask):
    longest = -(-int(mask.sum(1).max()) // 8) * 8          # few shapes to compile for
    with torch.no_grad():
        text = model.read(ids[:, :longest], mask[:, :longest])
    return model.dit(x_t, sigma, text)


def step(model, forward, adam, batch):
    """One training step; its loss."""
    x, sigma, eps, ids, mask = batch

    def dit(x_t, sigma, words):
        return forward(model, x_t, sigma, *words)
    loss = fusedit.flow_loss(dit, x, (ids, mask), sigma, eps).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.dit.parameters(), 1.0, foreach=True)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.detach()


def matrix_rate(device, dtype, rows):
    """FLOP/s of the MLP's product, [rows, D] x [D, intermediate], many in a row."""
    a = torch.randn(rows, SHAPE["hidden_size"], device=device, dtype=dtype)
    b = torch.randn(SHAPE["intermediate_size"], SHAPE["hidden_size"], device=device, dtype=dtype)

    def work():
        for _ in range(20):
            F.linear(a, b)
    flops = 20 * 2 * rows * b.numel()
    return flops / min(clock(work, device) for _ in range(10))


def clock(work, device):
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--batch", type=positive, default=8, help="images a step")
    p.add_argument("--steps", type=positive, default=12, help="timed steps of each, by turns")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--compile", action="store_true", help="the DiT's blocks of two phases")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures there")
    args = p.parse_args()
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    exact = build(device, torch.float32)
    x, sigma, eps, ids, mask = next(batches(1, 4, exact.config, device))
    with torch.no_grad():
        a, b = (forward(exact, x, sigma, ids, mask) for forward in (two_phases, joint))
    print(f"float32: the two differ by {float((a - b).norm() / b.norm()):.1e} of the norm")
    kinds = {}
    for name, forward in (("two phases", two_phases), ("joint mask", joint)):
        model = build(device, dtype)
        if args.compile and forward is two_phases:
            for block in model.dit.layers:
                block.compile(dynamic=False)
        adam = torch.optim.AdamW(model.dit.parameters(), 1e-4, weight_decay=1e-4, fused=True)
        kinds[name] = model, forward, adam
    times = {name: [] for name in kinds}
    warm = 6
    made = batches(warm + args.steps, args.batch, exact.config, device)
    rates = [matrix_rate(device, dtype, args.batch * 256)]
    for i, batch in enumerate(tqdm(made, total=warm + args.steps, unit="step", disable=None)):
        for name, kind in kinds.items():
            seconds = clock(lambda kind=kind, batch=batch: step(*kind, batch), device)
            times[name] += [seconds] * (i >= warm)
    rates.append(matrix_rate(device, dtype, args.batch * 256))
    with FlopCounterMode(display=False) as count:          # useful: of the least that must be done
        two_phases(exact, x, sigma, ids[:, :24], mask[:, :24]).sum().backward()
    useful = count.get_total_flops() / len(x) * args.batch
    weights = sum(p.numel() for p in exact.dit.parameters())
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {args.dtype}; DiT of {weights / 1e6:.1f} M; matrix rate "
          f"{' and '.join(f'{rate / 1e9:.0f}' for rate in rates)} GFLOP/s before and after")
    result = dict(vars(args), out=None, matrix_rate=rates, torch=torch.__version__)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        result[name] = dict(seconds=middle, images_per_s=args.batch / middle,
                            utilisation=useful / middle / max(rates))
        print(f"{name:<12}{1000 * middle:9.1f} ms a step{args.batch / middle:9.2f} images/s"
              f"{useful / middle / max(rates):8.1%} of the matrix rate, useful FLOPs")
    ratio = result["joint mask"]["seconds"] / result["two phases"]["seconds"]
    print(f"two phases are {ratio:.2f} times as fast")
    if args.out:
        with atomic_write(args.out) as tmp:
            tmp.write_text(json.dumps(result | dict(ratio=ratio), indent=1) + "\n")


if __name__ == "__main__":
    run(main, "--batch")

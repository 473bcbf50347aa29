"""Sampling against the matrix rate of the machine, and against the published formulation.

    python benchmarks/sample.py                                        31.5 M parameters, on a CPU
    python benchmarks/sample.py --preset fusedit/large-scale --batch 8           on a GPU
    python benchmarks/sample.py --no-compile                           sample.py without --compile

"two phases" is what sample.py computes: the prompt is read once, then 25 Euler steps with guidance,
in which prompt and empty prompt are one batch, then each picture is decoded. "joint mask"
(common.py) is the published formulation: text is padded and runs through Gemma again at every step,
beside the image. Same weights, same noise, by turns in one process with a matrix product; medians.
"""
import statistics

import torch
from common import (
    alternate,
    encode_text,
    finish,
    joint_velocity,
    machine,
    parser,
    peak_memory,
    product,
    pytorch_defaults,
    relative_distance,
    shares,
    start,
    table,
    useful_flops,
)

import fusedit
from fusedit_lib import backend, cli


def draw(model, vae, batch, steps, guidance, fast, dtype=None):
    """Pixels or latents of a batch's words and noise, by either formulation."""
    n = len(batch["eps"])
    def with_empty(ids, mask):                             # prompt: one token
        first = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) < 1
        return torch.cat([ids, torch.zeros_like(ids)]), torch.cat([mask, first])
    with torch.no_grad():
        if fast:
            text = model.read(*with_empty(batch["short_ids"], batch["short_mask"]))
            halves = (text.apply(lambda t: t[:n]), text.apply(lambda t: t[n:]))
            x = fusedit.sample(model.dit, batch["eps"], *halves, steps, guidance,
                               model.config.shift)
            return torch.cat([vae.decode(z) for z in x.split(1)]) if vae else x
        ids, mask = with_empty(batch["ids"], batch["mask"])
        halves = [fusedit.TextFeatures((), (), None, m, i) for i, m in zip(
            ids.chunk(2), mask.chunk(2), strict=True)]
        x = fusedit.sample(lambda x, s, text: joint_velocity(model, x, s, text.pooled, text.mask),
                           batch["eps"], *halves, steps, guidance, model.config.shift)
        return vae.decode(x) if vae else x


def main():
    p = parser(__doc__, 8, 5)
    p.add_argument("--steps", type=cli.positive, default=25)
    p.add_argument("--guidance", type=float, default=6.0)
    args = p.parse_args()
    device, dtype, case, model = start(args)
    fast_vae, slow_vae = (case.vae(device, dtype, fast) for fast in (True, False))
    if args.compile:
        backend.compile_model(model, fast_vae)
    batches = [*case.batches(4, args.batch, device)]

    def work(i, fast):
        if not fast:
            pytorch_defaults()
        x = draw(model, fast_vae if fast else slow_vae, batches[i % 4], args.steps, args.guidance,
                 fast)
        backend.settings(device, dtype)
        return x
    exact = case.build(device, torch.float32)
    exact.load_state_dict(model.state_dict())
    few = {k: v[:2] for k, v in batches[0].items()}
    want = draw(exact, None, few, args.steps, args.guidance, True)
    found = {}
    for name, fast in (("two phases", True), ("joint mask", False)):
        x = draw(model, None, few, args.steps, args.guidance, fast)
        found[name] = relative_distance(x, want)
        print(f"{name} against float32, after {args.steps} steps: {found[name]:.1e} of the norm")
    del exact
    tokens = (case.config.image_size // (8 if case.config.vae else 1) // case.config.patch_size)**2
    multiply, flops = product(case, device, dtype, 2 * args.batch * tokens, train=False)
    works = {"two phases": lambda i: work(i, True), "joint mask": lambda i: work(i, False),
             "product": lambda i: [multiply() for _ in range(10)]}
    seconds = alternate(works, device, args.rounds, 1)
    rate = 10 * flops / statistics.median(seconds.pop("product"))
    peak = {name: peak_memory(lambda name=name: works[name](0), device) for name in seconds}
    counted = {k: args.batch * n for k, n in useful_flops(case, args.steps).items()}
    print(f"{machine(device)}, torch {torch.__version__}, {args.dtype}, {tokens} image tokens, "
          f"{args.batch} images, {args.steps} steps; the MLP's product: {rate / 1e9:,.0f} GFLOP/s")
    rows = table(seconds, sum(counted.values()), rate, args.batch, peak)
    ratio = rows["joint mask"]["seconds"] / rows["two phases"]["seconds"]
    print(f"two phases are {ratio:.2f} times as fast")
    batch, sigma = batches[0], torch.full([2 * args.batch], 0.7, device=device)
    double = {k: torch.cat([v, v]) for k, v in batch.items()}
    text = encode_text(model, double)

    @torch.no_grad()
    def dit():
        for _ in range(args.steps):
            model.dit(double["eps"], sigma, text)
    parts = {"Gemma": (lambda: encode_text(model, double), "Gemma"), "DiT": (dit, None)}
    if fast_vae:
        decode = torch.no_grad()(lambda: [fast_vae.decode(z) for z in batch["eps"].split(1)])
        parts["VAE"] = decode, "VAE"
    finish(args, dict(exactness=found) | rows | dict(
        machine=machine(device), ratio=ratio, matrix_rate=rate, useful_flops=counted,
        shares=shares(parts, device)))


if __name__ == "__main__":
    cli.run(main, "--batch")

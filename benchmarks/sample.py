"""Sampling speed, compared with the machine's matrix rate and with the published formulation.

    python benchmarks/sample.py                                        31.5 M parameters, on a CPU
    python benchmarks/sample.py --preset fusedit/large-scale --batch 8           on a GPU
    python benchmarks/sample.py --no-compile                           sample.py without --compile

"two phases" is what sample.py computes: prompts are encoded once, then 25 Euler steps with guidance
follow, each with the prompts and empty prompts in one batch, and then each image is decoded.
"joint mask" (common.py) is the published formulation: text is padded and runs through Gemma again
at every step, together with the image. Both use the same weights and the same noise, and take turns
with a matrix product in one process; medians are reported.
"""
import statistics

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

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

PRODUCTS = 10                               # matrix products that are timed together


# ---- two formulations ----------------------------------------------------------------------------

def with_empty_prompt(ids, mask):
    """ids and mask [2B,T]: the prompts [B,T], then as many empty prompts, which have one token."""
    first = torch.arange(ids.shape[1], device=ids.device) < 1
    empty_mask = first.expand_as(ids)
    return torch.cat([ids, torch.zeros_like(ids)]), torch.cat([mask, empty_mask])


@torch.no_grad()
def draw_in_two_phases(model, vae, batch, steps, guidance):
    """Pixels (latents if vae is None) for a batch's prompts and noise, drawn as by sample.py."""
    B = len(batch["eps"])
    text = model.encode_ids(*with_empty_prompt(batch["short_ids"], batch["short_mask"]))
    prompts = text.map(lambda t: t[:B])
    empty = text.map(lambda t: t[B:])
    x = fusedit.sample(model.dit, batch["eps"], prompts, empty, steps, guidance,
                       model.config.shift)
    if vae is None:
        return x
    return torch.cat([vae.decode(latents) for latents in x.split(1)])


@torch.no_grad()
def draw_with_joint_mask(model, vae, batch, steps, guidance):
    """The same as draw_in_two_phases, by the published formulation."""
    ids, mask = with_empty_prompt(batch["ids"], batch["mask"])
    # The sampler passes text on unchanged, so token ids can take the place of CLIP's vector.
    texts = []
    for half_ids, half_mask in zip(ids.chunk(2), mask.chunk(2), strict=True):
        texts.append(fusedit.TextFeatures((), (), None, half_mask, half_ids))
    prompts, empty = texts

    def velocity(x, sigma, text):
        return joint_velocity(model, x, sigma, text.pooled, text.mask)
    x = fusedit.sample(velocity, batch["eps"], prompts, empty, steps, guidance,
                       model.config.shift)
    if vae is None:
        return x
    return vae.decode(x)


class Bench:
    """The model, its batches, and the two formulations as they are timed."""

    def __init__(self, args):
        self.args = args
        self.device, self.dtype, self.case, self.model = start(args)
        self.fast_vae = self.case.vae(self.device, self.dtype, True)
        self.slow_vae = self.case.vae(self.device, self.dtype, False)
        if args.compile:
            backend.compile_model(self.model, self.fast_vae)
        self.batches = list(self.case.batches(4, args.batch, self.device))

    def two_phases(self, i):
        """Draw the i-th batch with sample.py's PyTorch settings."""
        args = self.args
        return draw_in_two_phases(self.model, self.fast_vae, self.batches[i % 4], args.steps,
                                  args.guidance)

    def joint_mask(self, i):
        """Draw the i-th batch with PyTorch's default settings."""
        args = self.args
        pytorch_defaults()
        x = draw_with_joint_mask(self.model, self.slow_vae, self.batches[i % 4], args.steps,
                                 args.guidance)
        backend.configure(self.device, self.dtype)
        return x


# ---- what is measured ----------------------------------------------------------------------------

def exactness(bench):
    """{formulation: distance from the result in float32, relative to its norm}."""
    args = bench.args
    exact = bench.case.build(bench.device, torch.float32)
    exact.load_state_dict(bench.model.state_dict())
    two = {name: value[:2] for name, value in bench.batches[0].items()}
    expected = draw_in_two_phases(exact, None, two, args.steps, args.guidance)
    errors = {}
    for name, draw in (("two phases", draw_in_two_phases), ("joint mask", draw_with_joint_mask)):
        drawn = draw(bench.model, None, two, args.steps, args.guidance)
        errors[name] = relative_distance(drawn, expected)
        print(f"{name} against float32 after {args.steps} steps: {errors[name]:.1e} of the norm")
    return errors


def time_formulations(bench):
    """{formulation: seconds of each round}, and the matrix rate in FLOP/s."""
    args = bench.args
    rows = 2 * args.batch * bench.case.image_tokens        # with guidance
    multiply, flops = product(bench.case, bench.device, bench.dtype, rows, train=False)

    def products(i):
        for _ in range(PRODUCTS):
            multiply()
    works = {"two phases": bench.two_phases, "joint mask": bench.joint_mask, "product": products}
    seconds = alternate(works, bench.device, args.rounds, 1)
    rate = PRODUCTS * flops / statistics.median(seconds.pop("product"))
    return seconds, rate


def time_shares(bench):
    """The time of the two-phase formulation by kind of kernel: {kind: seconds}."""
    batch = bench.batches[0]
    sigma = torch.full([2 * bench.args.batch], 0.7, device=bench.device)
    double = {name: torch.cat([value, value]) for name, value in batch.items()}
    text = encode_text(bench.model, double)

    def encode():
        encode_text(bench.model, double)

    @torch.no_grad()
    def denoise():
        for _ in range(bench.args.steps):
            bench.model.dit(double["eps"], sigma, text)

    @torch.no_grad()
    def decode():
        for latents in batch["eps"].split(1):
            bench.fast_vae.decode(latents)

    parts = {"Gemma": (encode, "Gemma"), "DiT": (denoise, None)}
    if bench.fast_vae is not None:
        parts["VAE"] = (decode, "VAE")
    return shares(parts, bench.device)


def main():
    p = parser(__doc__, 8, 5)
    p.add_argument("--steps", type=cli.positive, default=25, help="number of Euler steps")
    p.add_argument("--guidance", type=float, default=6.0,
                   help="scale of classifier-free guidance")
    args = p.parse_args()
    bench = Bench(args)

    errors = exactness(bench)
    seconds, rate = time_formulations(bench)
    peak = {"two phases": peak_memory(lambda: bench.two_phases(0), bench.device),
            "joint mask": peak_memory(lambda: bench.joint_mask(0), bench.device)}
    useful = useful_flops(bench.case, args.steps)
    flops = {name: args.batch * count for name, count in useful.items()}

    name = machine(bench.device)
    print(f"{name}, torch {torch.__version__}, {args.dtype}, "
          f"{bench.case.image_tokens} image tokens, {args.batch} images, {args.steps} steps; "
          f"the MLP's matrix product: {rate / 1e9:,.0f} GFLOP/s")
    rows = table(seconds, sum(flops.values()), rate, args.batch, peak)
    ratio = rows["joint mask"]["seconds"] / rows["two phases"]["seconds"]
    print(f"two phases are {ratio:.2f} times as fast")
    figures = dict(machine=name, ratio=ratio, matrix_rate=rate, useful_flops=flops,
                   shares=time_shares(bench))
    finish(args, dict(exactness=errors) | rows | figures)


if __name__ == "__main__":
    cli.run(main, "--batch")

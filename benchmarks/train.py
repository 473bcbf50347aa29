"""The training step against the matrix rate of the machine, and against the published formulation.

    python benchmarks/train.py                                      31.5 M parameters, on a CPU
    python benchmarks/train.py --preset fusedit/large-scale --batch 4       on a GPU of 80 GB

"two phases" is what train_gpu.py computes: Gemma without a graph on text as long as the batch's
longest, then the DiT, with compiled blocks. "joint mask" (common.py) is written out as the
published code does it: text padded to its full length runs through Gemma inside every forward, both
streams are concatenated in every layer under one dense additive mask, keys are repeated for each
head, and nothing is compiled. Both have the same weights and the same AdamW, take turns in one
process with a matrix product, and count with their medians. Useful FLOPs are of unpadded text.
"""
import statistics

import torch
from common import (
    alternate,
    defaults,
    finish,
    joint,
    machine,
    norm,
    parser,
    peak_memory,
    product,
    read,
    shares,
    start,
    table,
    useful,
)

import fusedit
from fusedit_lib import backend, cli


class Adam:
    """AdamW on float32 copies of the weights, after clipping, as DeepSpeed's bf16 has it."""

    def __init__(self, weights):
        self.low = [*weights]
        self.high = [p.detach().float().requires_grad_() for p in self.low]
        self.adam = torch.optim.AdamW(self.high, 1e-4, weight_decay=1e-4, fused=True)

    def step(self):
        for high, low in zip(self.high, self.low, strict=True):
            high.grad, low.grad = low.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.high, 1.0, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.low, self.high)


def loss(model, vae, batch, fast):
    """Of a batch, by either formulation."""
    x, sigma = batch["x"], fusedit.logit_normal_sigma(batch["normal"], model.config.shift)
    if vae:
        with torch.no_grad():
            x = vae.encode(x, torch.zeros_like(batch["eps"]))
    if fast:
        return fusedit.flow_loss(model.dit, x, read(model, batch), sigma, batch["eps"]).mean()

    def dit(x_t, sigma, words):
        return joint(model, x_t, sigma, *words)
    return fusedit.flow_loss(dit, x, (batch["ids"], batch["mask"]), sigma, batch["eps"]).mean()


def exactness(case, model, device, batch):
    """Distances of losses and of the velocity's and gradient's norms from float32, uncompiled.

    Of one image: in float32 it takes 10 GB of the 2B model's activations, 20 by the joint mask.
    """
    batch = {k: v[:1] for k, v in batch.items()}
    torch.set_float32_matmul_precision("highest")          # else a GPU's products are TF32's
    exact = case.build(device, torch.float32)
    exact.load_state_dict(model.state_dict())
    sigma, words = torch.full([len(batch["x"])], 0.7, device=device), (batch["ids"], batch["mask"])
    name = "dit.layers.0.mlp.down_proj.weight"
    found = {}

    def of(model, fast):
        model.dit.zero_grad()
        value = loss(model, None, batch | dict(x=batch["eps"].flip(-1)), fast)
        value.backward()
        with torch.no_grad():
            v = model.dit(batch["eps"], sigma, read(model, batch)) if fast else joint(
                model, batch["eps"], sigma, *words)
        gradient = model.get_parameter(name).grad.clone()
        model.dit.zero_grad()
        return float(value.detach()), v, gradient
    want = of(exact, True)
    for title, m, fast in (("two phases", model, True), ("joint mask", model, False),
                           ("joint mask, float32", exact, False)):
        got = of(m, fast)
        found[title] = dict(loss=abs(got[0] / want[0] - 1), velocity=norm(got[1], want[1]),
                            gradient=norm(got[2], want[2]))
        print(f"{title:<20} against float32: velocity {found[title]['velocity']:.1e}, gradient of "
              f"{name} {found[title]['gradient']:.1e}, loss {found[title]['loss']:.1e}")
    model.dit.zero_grad()
    torch.set_float32_matmul_precision("high")
    return found


def main():
    p = parser(__doc__, 32, 10)
    p.add_argument("--float8", action="store_true", help="linear layers of the fast path in float8")
    p.add_argument("--no-exactness", action="store_true", help="no float32 copy: less memory")
    args = p.parse_args()
    device, dtype, case, model = start(args)
    fast_vae, slow_vae = (case.vae(device, dtype, fast) for fast in (True, False))
    if args.float8:
        backend.use_float8(model.dit)
    if args.compile:
        backend.compile_model(model, fast_vae)
    batches, result = [*case.batches(8, args.batch, device)], {}
    if not args.no_exactness:
        result["exactness"] = exactness(case, model, device, batches[0])
    adam = Adam(model.dit.parameters())

    def step(i, vae, fast):
        if not fast:
            defaults()
        loss(model, vae, batches[i % len(batches)], fast).backward()
        adam.step()
        backend.configure(device, dtype)
    tokens = (case.config.image_size // (8 if case.config.vae else 1) // case.config.patch_size)**2
    work, flops = product(case, device, dtype, args.batch * tokens, train=True)
    works = {"two phases": lambda i: step(i, fast_vae, True),
             "joint mask": lambda i: step(i, slow_vae, False), "product": lambda i: work()}
    seconds = alternate(works, device, args.rounds)
    rate = flops / statistics.median(seconds.pop("product"))
    peak = {name: peak_memory(lambda name=name: works[name](0), device) for name in seconds}
    counted = {k: args.batch * n for k, n in useful(case, "train").items()}
    weights = sum(p.numel() for p in model.dit.parameters())
    print(f"{machine(device)}, torch {torch.__version__}, {args.dtype}; DiT of {weights / 1e6:.1f} "
          f"M, {tokens} image tokens, batch {args.batch}; the MLP's product and both of its "
          f"gradients: {rate / 1e9:,.0f} GFLOP/s")
    rows = table(seconds, sum(counted.values()), rate, args.batch, peak)
    ratio = rows["joint mask"]["seconds"] / rows["two phases"]["seconds"]
    print(f"two phases are {ratio:.2f} times as fast")

    def update():
        for p in model.dit.parameters():
            p.grad = torch.zeros_like(p)
        adam.step()
    batch, sigma = batches[0], torch.full([args.batch], 0.7, device=device)
    text = read(model, batch)
    parts = {"Gemma": (lambda: read(model, batch), "Gemma"),
             "DiT": (lambda: model.dit(batch["eps"], sigma, text).sum().backward(), None),
             "Adam": (update, "clipping and AdamW")}
    if fast_vae:
        parts["VAE"] = lambda: fast_vae.moments(batch["x"]), "VAE"
    finish(args, result | rows | dict(
        machine=machine(device), ratio=ratio, matrix_rate=rate, useful_flops=counted,
        shares=shares(parts, device)))


if __name__ == "__main__":
    cli.run(main, "--batch")

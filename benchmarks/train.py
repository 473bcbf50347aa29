"""Training speed, compared with the machine's matrix rate and with the published formulation.

    python benchmarks/train.py                                      31.5 M parameters, on a CPU
    python benchmarks/train.py --preset fusedit/large-scale --batch 4       on a GPU of 80 GB

"two phases" is what train_gpu.py computes: Gemma, without autograd, on text padded to the longest
in the batch, and then the DiT, with compiled blocks. "joint mask" (common.py) follows the published
code: text padded to its full length runs through Gemma in every forward pass, both streams are
concatenated in every layer under one dense additive mask, keys are repeated for each head, and
nothing is compiled. Both use the same weights and the same AdamW, and take turns with a matrix
product in one process; medians are reported. Useful FLOPs are those of unpadded text.
"""
import statistics
from typing import NamedTuple

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch
from common import (
    Adam,
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

SIGMA = 0.7                                 # noise level, where it is not drawn at random
PARAMETER = "dit.layers.0.mlp.down_proj.weight"            # its gradient is compared


def training_loss(model, vae, batch, fast):
    """The loss of a batch, by two phases (fast) or the joint mask. vae: None if x is latents."""
    x = batch["x"]
    eps = batch["eps"]
    sigma = fusedit.logit_normal_sigma(batch["normal"], model.config.shift)
    if vae:
        with torch.no_grad():
            x = vae.encode(x, torch.zeros_like(eps))
    if fast:
        return fusedit.flow_loss(model.dit, x, encode_text(model, batch), sigma, eps).mean()

    def dit(x_t, sigma, text):
        return joint_velocity(model, x_t, sigma, *text)
    return fusedit.flow_loss(dit, x, (batch["ids"], batch["mask"]), sigma, eps).mean()


# ---------------------------------------------------------------------------- exactness
class Outcome(NamedTuple):
    loss: float
    velocity: torch.Tensor
    gradient: torch.Tensor                  # of PARAMETER


def outcome(model, batch, fast):
    """Loss, velocity and gradient of a batch by two phases (fast) or the joint mask."""
    model.dit.zero_grad()
    latents = batch["eps"].flip(-1)
    loss = training_loss(model, None, batch | dict(x=latents), fast)
    loss.backward()
    x_t = batch["eps"]
    sigma = torch.full([len(x_t)], SIGMA, device=x_t.device)
    with torch.no_grad():
        if fast:
            velocity = model.dit(x_t, sigma, encode_text(model, batch))
        else:
            velocity = joint_velocity(model, x_t, sigma, batch["ids"], batch["mask"])
    gradient = model.get_parameter(PARAMETER).grad.clone()
    model.dit.zero_grad()
    return Outcome(float(loss.detach()), velocity, gradient)


def exactness(case, model, device, batch):
    """Distances of loss, velocity and gradient from those in float32, uncompiled.

    One image is used: in float32 the activations of the 2B model take 10 GB, and 20 GB with the
    joint mask.
    """
    batch = {name: tensor[:1] for name, tensor in batch.items()}
    torch.set_float32_matmul_precision("highest")          # otherwise a GPU multiplies in TF32
    exact = case.build(device, torch.float32)
    exact.load_state_dict(model.state_dict())
    want = outcome(exact, batch, fast=True)

    found = {}
    for name, compared, fast in (("two phases", model, True), ("joint mask", model, False),
                                 ("joint mask, float32", exact, False)):
        got = outcome(compared, batch, fast)
        row = dict(loss=abs(got.loss / want.loss - 1),
                   velocity=relative_distance(got.velocity, want.velocity),
                   gradient=relative_distance(got.gradient, want.gradient))
        found[name] = row
        print(f"{name:<20} against float32: velocity {row['velocity']:.1e}, gradient of "
              f"{PARAMETER} {row['gradient']:.1e}, loss {row['loss']:.1e}")
    torch.set_float32_matmul_precision("high")
    return found


# ---------------------------------------------------------------------------- time
def step_functions(model, adam, batches, fast_vae, slow_vae, restore):
    """{name: function of i}: a training step on batch i, by each formulation."""
    def two_phases(i):
        training_loss(model, fast_vae, batches[i % len(batches)], fast=True).backward()
        adam.step()

    def joint_mask(i):
        pytorch_defaults()
        training_loss(model, slow_vae, batches[i % len(batches)], fast=False).backward()
        adam.step()
        restore()

    return {"two phases": two_phases, "joint mask": joint_mask}


def step_parts(model, vae, adam, batch):
    """The parts of a training step, {name: (work, kind of its kernels)}, for common.shares."""
    eps = batch["eps"]
    sigma = torch.full([len(eps)], SIGMA, device=eps.device)
    text = encode_text(model, batch)

    def gemma():
        encode_text(model, batch)

    def dit():
        model.dit(eps, sigma, text).sum().backward()

    def update():
        for p in model.dit.parameters():
            p.grad = torch.zeros_like(p)
        adam.step()

    parts = {"Gemma": (gemma, "Gemma"), "DiT": (dit, None), "Adam": (update, "clipping and AdamW")}
    if vae:
        parts["VAE"] = (lambda: vae.moments(batch["x"]), "VAE")
    return parts


def main():
    p = parser(__doc__, 32, 10)
    p.add_argument("--float8", action="store_true",
                   help="run the linear layers of the two-phase formulation in float8")
    p.add_argument("--no-exactness", action="store_true",
                   help="skip the comparison with a float32 copy, which takes memory")
    args = p.parse_args()
    device, dtype, case, model = start(args)
    fast_vae = case.vae(device, dtype, True)
    slow_vae = case.vae(device, dtype, False)
    if args.float8:
        backend.use_float8(model.dit)
    if args.compile:
        backend.compile_model(model, fast_vae)
    batches = list(case.batches(8, args.batch, device))
    result = {}
    if not args.no_exactness:
        result["exactness"] = exactness(case, model, device, batches[0])

    # the two formulations and a matrix product take turns
    adam = Adam(model.dit.parameters())
    multiply, flops = product(case, device, dtype, args.batch * case.image_tokens, train=True)
    steps = step_functions(model, adam, batches, fast_vae, slow_vae,
                           lambda: backend.configure(device, dtype))
    seconds = alternate(steps | dict(product=lambda i: multiply()), device, args.rounds)
    rate = flops / statistics.median(seconds.pop("product"))
    peak = {name: peak_memory(lambda step=step: step(0), device) for name, step in steps.items()}

    # results
    flops_per_image = useful_flops(case, "train")
    counted = {name: args.batch * n for name, n in flops_per_image.items()}
    weights = sum(p.numel() for p in model.dit.parameters())
    print(f"{machine(device)}, torch {torch.__version__}, {args.dtype}; DiT of {weights / 1e6:.1f} "
          f"M parameters, {case.image_tokens} image tokens, batch {args.batch}; the MLP's matrix "
          f"product and both of its gradients: {rate / 1e9:,.0f} GFLOP/s")
    rows = table(seconds, sum(counted.values()), rate, args.batch, peak)
    ratio = rows["joint mask"]["seconds"] / rows["two phases"]["seconds"]
    print(f"two phases are {ratio:.2f} times as fast")
    parts = step_parts(model, fast_vae, adam, batches[0])
    result |= rows
    result |= dict(machine=machine(device), ratio=ratio, matrix_rate=rate, useful_flops=counted,
                   shares=shares(parts, device))
    finish(args, result)


if __name__ == "__main__":
    cli.run(main, "--batch")

"""Code shared by the benchmarks: random models, the published formulation, timing and tables.

All models have random weights, so nothing is downloaded. The published formulation of the model is
written out in joint_velocity(), as the baseline of the comparisons.
"""
import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fusedit
from fusedit_lib import backend, cli
from fusedit_lib.data.batches import cut_text_length
from fusedit_lib.files import atomic_write
from fusedit_lib.pretrained import gemma_config
from fusedit_lib.train import costs
from fusedit_lib.vae import VAE, latent_side, vae_config

SMALL = dict(model_type="gemma2", vocab_size=8192, hidden_size=512, intermediate_size=2048,
             num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=256)


# ---------------------------------------------------------------------------- models
@dataclass
class Case:
    """A model of the paper's final design, and the lengths of its captions."""
    config: fusedit.FuseDiTConfig
    gemma: fusedit.GemmaConfig
    padded_length: int                  # text tokens with padding
    caption_lengths: tuple              # min and max real tokens; lengths are uniform in between

    @property
    def mean_length(self):
        """Real text tokens of an average caption."""
        return sum(self.caption_lengths) // 2

    @property
    def latent_size(self):
        """Height and width of the latents, or of the pixels if the model has no VAE."""
        return latent_side(self.config)

    @property
    def image_tokens(self):
        return (self.latent_size // self.config.patch_size) ** 2

    def abstract(self):
        """The model on the meta device, without memory for its weights, to count FLOPs."""
        with torch.device("meta"):
            model = fusedit.FuseDiT(self.config, self.gemma)
        model.llm.keep_layers(model.last_layer)
        return model

    def build(self, device, dtype):
        """The model with random weights. No matrix is zero, since that would hide errors."""
        torch.manual_seed(0)
        with torch.device(device):
            model = fusedit.FuseDiT(self.config, self.gemma)
            model.dit.init_weights()
        for p in model.parameters():
            if p.dim() > 1 and float(p.detach().abs().max()) == 0:
                torch.nn.init.normal_(p, std=0.02)
        return model.to(dtype)

    def batches(self, n, batch, device):
        """Yields n dictionaries of random tensors, each a batch of `batch` samples:

        x: pixels (of the latents' size if there is no VAE) [B,C,H,W]; normal: the normal draw for
        the noise level [B]; eps: noise [B,C,H,W]; ids, mask: text, padded to padded_length [B,T];
        short_ids, short_mask: the same text, padded only as far as train_gpu.py pads it.
        """
        rng = torch.Generator().manual_seed(1)
        c = self.config
        least, most = self.caption_lengths
        noise_shape = (c.in_channels, self.latent_size, self.latent_size)
        image_shape = noise_shape
        if c.vae:
            image_shape = (3, c.image_size, c.image_size)
        for _ in range(n):
            lengths = torch.randint(least, most + 1, (batch, 1), generator=rng)
            mask = torch.arange(self.padded_length) < lengths
            ids = torch.randint(1, self.gemma.vocab_size, mask.shape, generator=rng)
            ids = ids.masked_fill(~mask, 0)
            eps = torch.randn(batch, *noise_shape, generator=rng)
            x = torch.randn(batch, *image_shape, generator=rng)
            normal = torch.randn(batch, generator=rng)
            short = cut_text_length(mask, device)
            tensors = dict(x=x, ids=ids, mask=mask, normal=normal, eps=eps,
                           short_ids=ids[:, :short], short_mask=mask[:, :short])
            yield {name: tensor.to(device) for name, tensor in tensors.items()}

    def vae(self, device, dtype, fast):
        """The model's VAE with random weights, or None if it has none.

        fast: use the memory format of vae.load_vae.
        """
        if not self.config.vae:
            return None
        torch.manual_seed(0)
        with torch.device(device):
            vae = VAE(vae_config(self.config.vae)).requires_grad_(False).to(dtype)
        if fast:
            vae = vae.to(memory_format=torch.channels_last)
        return vae


def case(name, image_size=0):
    """The case "small", or that of a preset whose Gemma is listed in train/costs.py.

    image_size: replaces the default size unless it is 0 or None.
    """
    if name == "small":                     # 31.5 M, 256 image tokens
        config = fusedit.preset("fusedit", vae=None, image_size=image_size or 32)
        return Case(config, gemma_config(SMALL), 64, (16, 32))
    changes = {}
    if image_size:
        changes["image_size"] = image_size
    config = fusedit.preset(name, **changes)
    return Case(config, gemma_config(costs.GEMMAS[config.base]), 256, (40, 120))


# ---------------------------------------------------------------------------- optimizer
class Adam:
    """AdamW on float32 copies of the weights, with gradient clipping, as in DeepSpeed's bf16."""

    def __init__(self, weights, lr=1e-4, **options):
        """options: those of torch.optim.AdamW, such as betas."""
        self.low = list(weights)            # in the dtype of the model
        self.high = [p.detach().float().requires_grad_() for p in self.low]
        options = dict(weight_decay=1e-4, fused=True) | options
        self.adam = torch.optim.AdamW(self.high, lr, **options)

    def step(self):
        for high, low in zip(self.high, self.low, strict=True):
            high.grad = low.grad.float()
            low.grad = None
        torch.nn.utils.clip_grad_norm_(self.high, 1.0, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.low, self.high)


# ---------------------------------------------------------------------------- two formulations
def encode_text(model, batch):
    """The keys and values of a batch's text, padded only as far as train_gpu.py pads it."""
    return model.encode_ids(batch["short_ids"], batch["short_mask"])


def joint_mask(mask, image_tokens, dtype):
    """The additive mask [B,1,T+N,T+N] of the published formulation, for text with mask [B,T].

    Text tokens attend to text up to themselves (causal). Image tokens attend to all real text and
    the whole image.
    """
    B, T = mask.shape
    S = T + image_tokens
    index = torch.arange(T, device=mask.device)
    visible = torch.zeros(B, S, S, dtype=torch.bool, device=mask.device)
    visible[:, :T, :T] = index[:, None] >= index
    visible[:, T:] = F.pad(mask, (0, image_tokens), value=True)[:, None]
    bias = torch.zeros(B, 1, S, S, dtype=dtype, device=mask.device)
    return bias.masked_fill(~visible[:, None], torch.finfo(dtype).min)


def joint_layer(gemma_layer, dit_layer, txt, img, text_rope, image_rope, bias):
    """One layer of both towers, txt [B,T,D] and img [B,N,D], with attention over [text ; image]."""
    T = txt.shape[1]
    txt_normed = gemma_layer.input_layernorm(txt)
    img_normed = dit_layer.input_layernorm(img)

    # queries, keys and values of both streams, [B,heads,T+N,h]
    txt_q = gemma_layer.self_attn.q(txt_normed, text_rope)
    img_q = dit_layer.self_attn.q(img_normed, image_rope)
    txt_k, txt_v = gemma_layer.self_attn.kv(txt_normed, text_rope)
    img_k, img_v = dit_layer.self_attn.kv(img_normed, image_rope)
    q = torch.cat([txt_q, img_q], dim=2)
    k = torch.cat([txt_k, img_k], dim=2)
    v = torch.cat([txt_v, img_v], dim=2)

    # keys and values are repeated for each query head
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    txt = gemma_layer.add_attention(txt, gemma_layer.self_attn.out(out[:, :, :T]))
    txt = gemma_layer.add_mlp(txt)
    img = dit_layer.add_attention(img, dit_layer.self_attn.out(out[:, :, T:]))
    img = dit_layer.add_mlp(img)
    return txt, img


def joint_velocity(model, x_t, sigma, ids, mask):
    """The velocity [B,C,H,W] at x_t, computed by the published formulation.

    Every layer attends over [text ; image] under one dense mask. This is written out for the final
    design: 2d-rope, no time embedding (so sigma is not used), norms before and after each branch.
    ids, mask: [B,T].
    """
    llm = model.llm
    dit = model.dit
    c = model.config
    dtype = dit.proj_out.weight.dtype
    device = ids.device
    B, T = ids.shape
    h = dit.head_dim

    # embeddings
    txt = llm.embed_tokens(ids)
    txt = txt * torch.full((), llm.config.hidden_size ** 0.5, dtype=dtype, device=device)
    img = dit.patch_embed["proj"](x_t.to(dtype)).flatten(2).transpose(1, 2)

    # positions and mask
    side = x_t.shape[2] // c.patch_size
    positions = torch.arange(T, device=device)
    angles = positions[:, None] * fusedit.inverse_frequencies(h // 2, device=device)
    text_rope = fusedit.cos_sin(angles[None])
    image_rope = fusedit.image_rope(c.pos_embed, side, side, mask.sum(1), h, device)
    bias = joint_mask(mask, img.shape[1], dtype)

    for gemma_layer, dit_layer in zip(llm.layers, dit.layers, strict=True):
        txt, img = joint_layer(gemma_layer, dit_layer, txt, img, text_rope, image_rope, bias)

    # patches back to an image
    P = c.patch_size
    patches = dit.proj_out(dit.norm_out(img))                            # [B,N,P*P*C]
    patches = patches.view(B, side, side, P, P, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape).to(x_t.dtype)


def pytorch_defaults():
    """Restore PyTorch's default choice of attention kernels, which the published code uses."""
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


# ---------------------------------------------------------------------------- FLOPs
def count_flops(work):
    """The result of work(), and the number of FLOPs it took."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


@torch.no_grad()
def useful_flops(case, mode):
    """The FLOPs that one image requires, without text padding: {"gemma", "dit", "vae"}.

    mode: "train" for one training step, or a number of sampling steps with guidance.
    """
    model = case.abstract()
    meta = torch.device("meta")
    batch = next(case.batches(1, 1, meta))
    ids = torch.empty(1, case.mean_length, dtype=torch.long, device=meta)
    text, gemma_flops = count_flops(lambda: model.encode_ids(ids, ids > 0))
    _, dit_flops = count_flops(lambda: model.dit(batch["eps"], batch["normal"], text))

    vae = case.vae(meta, torch.float32, False)
    vae_flops = 0
    if vae and mode == "train":
        _, vae_flops = count_flops(lambda: vae.moments(batch["x"]))
    elif vae:
        _, vae_flops = count_flops(lambda: vae.decode(batch["eps"]))

    if mode == "train":                     # the backward pass costs twice the forward pass
        return dict(gemma=gemma_flops, dit=3 * dit_flops, vae=vae_flops)
    # Guidance doubles the calls. The empty prompt has one token, so Gemma is counted only once.
    return dict(gemma=gemma_flops, dit=2 * mode * dit_flops, vae=vae_flops)


# ---------------------------------------------------------------------------- measuring
def wait(device):
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work, device):
    """The time that work() takes, in seconds."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def product(case, device, dtype, rows, train):
    """The MLP's matrix product, with which the speed of the model is compared.

    Returns a function without arguments, and its FLOPs. rows: number of tokens. train: compute the
    gradients of both factors as well.
    """
    width = case.config.dit_hidden_size or case.gemma.hidden_size
    hidden = case.gemma.intermediate_size
    rows = min(rows, 2**16)
    x = torch.randn(rows, width, device=device, dtype=dtype)
    grad = torch.randn(rows, hidden, device=device, dtype=dtype)
    weight = torch.randn(hidden, width, device=device, dtype=dtype)

    # 50 ms on an H100, so that launches and synchronisation are negligible; half a second on two
    # CPU cores
    budget = 2e11
    if device.type == "cuda":
        budget = 4e13
    repeats = max(1, int(budget // (6 * rows * weight.numel())))

    def work():
        for _ in range(repeats):
            F.linear(x, weight)
            if train:
                grad @ weight
                grad.mT @ x

    products = 1
    if train:
        products = 3
    return work, repeats * products * 2 * rows * weight.numel()


def alternate(works, device, rounds, warm=3):
    """Time functions in turn: {name: seconds of each round} for works {name: function of i}.

    i is the index of the round. The first `warm` rounds are not counted.
    """
    seconds = {name: [] for name in works}
    for i in tqdm(range(warm + rounds), unit="round", disable=None):
        for name, work in works.items():
            took = clock(lambda work=work, i=i: work(i), device)
            if i >= warm:
                seconds[name].append(took)
    return seconds


def peak_memory(work, device):
    """The peak memory while work() runs, in bytes; None where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")          # resets the peak that Linux records
    work()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


REST = "the rest: norms, gates, rotations, copies"
KINDS = (                                   # (kind, pattern of kernel names); the first match wins
    # The name of a Triton kernel lists everything that was fused, products included.
    (REST, r"^triton_"),
    ("attention's products", r"bmm|attention|flash|fmha|sdpa|softmax"),
    ("linear layers' products", r"aten::(mm|addmm|linear|mkldnn_convolution|convolution)|gemm|nvjet"
                                r"|cutlass|cudnn|conv"),
    (REST, ""),
)


def kind_of(kernel):
    """The kind of the kernel with this name; see KINDS."""
    for kind, pattern in KINDS:
        if re.search(pattern, kernel):
            return kind


class Kernel(NamedTuple):
    """A GPU kernel, or an operation on a CPU, summed over all rounds of a profile."""
    name: str
    seconds: float
    calls: int


def profile(work, device, rounds):
    """The kernels that run in `rounds` calls of work()."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CPU
    if on_gpu:
        activity = ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(rounds):
            work()
        wait(device)

    kernels = []
    for event in profiler.key_averages():
        if not on_gpu:
            kernels.append(Kernel(event.key, event.self_cpu_time_total / 1e6, event.count))
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            # (an annotation, such as AdamW's step, spans kernels that are counted anyway)
            kernels.append(Kernel(event.key, event.self_device_time_total / 1e6, event.count))
    return kernels


def shares(parts, device, rounds=3):
    """The time of one round by kind of kernel: {kind: seconds}.

    parts: {name: (work, kind)}; if kind is None, kernels are classified by their names.
    """
    found = {}
    for work, kind in parts.values():
        work()
        for kernel in profile(work, device, rounds):
            key = kind or kind_of(kernel.name)
            found[key] = found.get(key, 0) + kernel.seconds / rounds
    return found


def relative_distance(a, b):
    """The norm of a - b, relative to the norm of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


# ---------------------------------------------------------------------------- output
def machine(device):
    """The name of the GPU, or that of the CPU and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", info)[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def table(seconds, flops, rate, images, peak=None):
    """Print a line for each entry of seconds {name: seconds of each round}. Returns the figures.

    flops: useful FLOPs per round. rate: the matrix rate in FLOP/s. images: images per round.
    peak: {name: bytes}, if memory was measured.
    """
    rows = {}
    for name, took in seconds.items():
        median = statistics.median(took)
        peak_bytes = (peak or {}).get(name)
        memory = ""
        if peak_bytes:
            memory = f"{peak_bytes / 1e9:8.2f} GB"
        rows[name] = dict(seconds=median, images_per_s=images / median,
                          utilisation=flops / median / rate, peak_bytes=peak_bytes)
        print(f"{name:<14}{1000 * median:11.1f} ms{images / median:10.2f} images/s"
              f"{flops / median / rate:8.1%} of the matrix rate{memory}")
    return rows


def finish(args, result):
    """Print the arguments and the result as JSON, and write them to args.out if it is given."""
    settings = {}
    for name, value in vars(args).items():
        if isinstance(value, Path):
            value = str(value)
        if name != "out":
            settings[name] = value
    result = dict(settings, torch=torch.__version__, **result)
    print(json.dumps(result))
    if args.out:
        with atomic_write(args.out) as tmp:
            tmp.write_text(json.dumps(result, indent=1) + "\n")


def parser(description, batch, rounds):
    """An argument parser with the flags that the benchmarks share, and their defaults."""
    p = argparse.ArgumentParser(description=description, formatter_class=cli.HelpFormatter)
    p.add_argument("--preset", default="small",
                   help="small (31.5 M parameters, 256 image tokens, for CPUs), or a preset of the "
                        "final design, such as fusedit/large-scale")
    p.add_argument("--image-size", type=cli.positive,
                   help="image size in pixels (for small: in latents), instead of the preset's")
    p.add_argument("--batch", type=cli.positive, default=batch, help="number of images per batch")
    p.add_argument("--rounds", type=cli.positive, default=rounds,
                   help="number of timed runs of each formulation; the median is reported")
    p.add_argument("--dtype", **cli.DTYPE,
                   help="precision; auto is bf16 where the device has it natively, else float32")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                   help="compile the blocks of the two-phase formulation")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--out", type=Path, metavar="FILE.json",
                   help="also write the results to this file")
    return p


def start(args):
    """Set up PyTorch as the launchers do. Returns device, dtype, case and model."""
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    device, dtype = cli.pick_dtype(args)
    torch.set_float32_matmul_precision("high")
    backend.configure(device, dtype)
    chosen = case(args.preset, args.image_size)
    return device, dtype, chosen, chosen.build(device, dtype)

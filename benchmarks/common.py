"""What benchmarks share: models of random weights, the published formulation, clocks, tables."""
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fusedit
from fusedit_lib import backend, cli
from fusedit_lib.data.batches import text_length
from fusedit_lib.files import atomic_write
from fusedit_lib.pretrained import gemma_config
from fusedit_lib.train import costs
from fusedit_lib.vae import VAE

SMALL = dict(model_type="gemma2", vocab_size=8192, hidden_size=512, intermediate_size=2048,
             num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=256)

# ---- models ------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model of the paper's final design, and the captions that it is fed."""
    config: fusedit.FuseDiTConfig
    gemma: fusedit.GemmaConfig
    pad: int                                # tokens, of which so many are real:
    lengths: tuple                          # least and most, evenly spread

    @property
    def mean(self):
        return sum(self.lengths) // 2

    def abstract(self):
        with torch.device("meta"):
            model = fusedit.FuseDiT(self.config, self.gemma)
        model.llm.keep_layers(model.last_layer)
        return model

    def build(self, device, dtype):
        """The model with random weights, none of them zero, or a fault would not show."""
        torch.manual_seed(0)
        with torch.device(device):
            model = fusedit.FuseDiT(self.config, self.gemma)
            model.dit.init_weights()
        for p in model.parameters():
            if p.dim() > 1 and float(p.detach().abs().max()) == 0:
                torch.nn.init.normal_(p, std=0.02)
        return model.to(dtype)

    def batches(self, n, batch, device):
        """n of dict(x: latents or pixels, ids, mask, normal, eps), text padded to `pad`.

        And short_ids, short_mask: the same, as long as train_gpu.py would have them.
        """
        rng, c = torch.Generator().manual_seed(1), self.config
        side = c.image_size // (8 if c.vae else 1)
        for _ in range(n):
            least, most = self.lengths
            mask = torch.arange(self.pad) < torch.randint(least, most + 1, (batch, 1),
                                                          generator=rng)
            ids = torch.randint(1, self.gemma.vocab_size, (batch, self.pad), generator=rng) * mask
            eps = torch.randn(batch, c.in_channels, side, side, generator=rng)
            size = (3, c.image_size, c.image_size) if c.vae else eps.shape[1:]
            x = torch.randn(batch, *size, generator=rng)
            normal = torch.randn(batch, generator=rng)
            short = text_length(mask, device)
            yield {k: v.to(device) for k, v in dict(
                x=x, ids=ids, mask=mask, normal=normal, eps=eps, short_ids=ids[:, :short],
                short_mask=mask[:, :short]).items()}

    def vae(self, device, dtype, fast):
        """SD3's autoencoder with random weights, or None; fast: as vae.load_vae lays it out."""
        if not self.config.vae:
            return None
        torch.manual_seed(0)
        with torch.device(device):
            vae = VAE().requires_grad_(False).to(dtype)
        return vae.to(memory_format=torch.channels_last) if fast else vae


def case(name, image_size=0):
    """The issue's small model, or a preset whose Gemma's shape train/costs.py knows."""
    if name == "small":                     # 31.5 M, 256 image tokens
        config = fusedit.preset("fusedit", vae=None, image_size=image_size or 32)
        return Case(config, gemma_config(SMALL), 64, (16, 32))
    config = fusedit.preset(name, **dict(image_size=image_size) if image_size else {})
    return Case(config, gemma_config(costs.GEMMAS[config.base]), 256, (40, 120))


# ---- two formulations ---------------------------------------------------------------------------


def joint(model, x_t, sigma, ids, mask):
    """Velocity by the published formulation: [text ; image] in every layer under one dense mask.

    Written out for the final design: 2d-rope, no time embedding, norms around each branch.
    """
    llm, dit, c = model.llm, model.dit, model.config
    B, T, side, dtype = *ids.shape, x_t.shape[2] // c.patch_size, dit.proj_out.weight.dtype
    txt = llm.embed_tokens(ids)
    txt = txt * torch.full((), llm.config.hidden_size ** 0.5, dtype=dtype, device=txt.device)
    img = dit.patch_embed["proj"](x_t.to(dtype)).flatten(2).transpose(1, 2)
    N, h, place = img.shape[1], dit.h, torch.arange(T, device=txt.device)
    by_word = fusedit.cos_sin((place[:, None] * fusedit.inverse_frequencies(h // 2, device=txt.device))[None])
    by_patch = fusedit.image_rope(c.pos_embed, side, side, mask.sum(1), h, txt.device)
    sees = torch.zeros(B, T + N, T + N, dtype=torch.bool, device=txt.device)
    sees[:, :T, :T] = place[:, None] >= place
    sees[:, T:] = F.pad(mask, (0, N), value=True)[:, None]
    bias = torch.zeros(B, 1, T + N, T + N, dtype=dtype, device=txt.device)
    bias = bias.masked_fill(~sees[:, None], torch.finfo(dtype).min)
    for word, patch in zip(llm.layers, dit.layers, strict=True):
        one, other = word.input_layernorm(txt), patch.input_layernorm(img)
        q = torch.cat([word.self_attn.q(one, by_word), patch.self_attn.q(other, by_patch)], 2)
        k, v = (torch.cat(pair, 2).repeat_interleave(q.shape[1] // pair[0].shape[1], 1)
                for pair in zip(word.self_attn.kv(one, by_word),
                                patch.self_attn.kv(other, by_patch), strict=True))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        txt = word.add_mlp(word.add_attention(txt, word.self_attn.out(z[:, :, :T])))
        img = patch.add_mlp(patch.add_attention(img, patch.self_attn.out(z[:, :, T:])))
    x, P = dit.proj_out(dit.norm_out(img)), c.patch_size
    x = x.view(B, side, side, P, P, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x_t.shape).to(x_t.dtype)


def read(model, batch):
    """Gemma's keys and values of a batch's words, as long as train_gpu.py would have them."""
    return model.encode_ids(batch["short_ids"], batch["short_mask"])


def defaults():
    """PyTorch's own settings, which the published code runs with."""
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


# ---- measuring ----------------------------------------------------------------------------------


def useful(case, mode):
    """FLOPs that one image cannot do without, of text that is not padded: Gemma, DiT, VAE.

    mode "train": one step; a number: so many sampling steps with guidance.
    """
    model, meta = case.abstract(), torch.device("meta")
    batch = next(case.batches(1, 1, meta))
    ids = torch.empty(1, case.mean, dtype=torch.long, device=meta)
    counts = []

    def count(work):
        with FlopCounterMode(display=False) as counter:
            out = work()
        counts.append(counter.get_total_flops())
        return out
    with torch.no_grad():
        text = count(lambda: model.encode_ids(ids, ids > 0))
        x = batch["eps"]
        count(lambda: model.dit(x, batch["normal"], text))
        vae = case.vae(meta, torch.float32, False)
        count(lambda: vae and (vae.moments(batch["x"]) if mode == "train" else vae.decode(x)))
    words, dit, vae = counts
    if mode == "train":
        return dict(gemma=words, dit=3 * dit, vae=vae)
    return dict(gemma=words, dit=2 * mode * dit, vae=vae)  # the empty prompt has but one token


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work, device):
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def product(case, device, dtype, rows, train):
    """(work, its FLOPs): the MLP's product of so many tokens; train: with both of its gradients."""
    D, wide = case.config.dit_hidden_size or case.gemma.hidden_size, case.gemma.intermediate_size
    rows = min(rows, 2**16)
    x, g = (torch.randn(rows, n, device=device, dtype=dtype) for n in (D, wide))
    w = torch.randn(wide, D, device=device, dtype=dtype)
    # 50 ms of an H100, so that launching and waiting do not count; half a second of two cores.
    times = max(1, int((4e13 if device.type == "cuda" else 2e11) // (6 * rows * w.numel())))

    def work():
        for _ in range(times):
            F.linear(x, w)
            if train:
                g @ w
                g.mT @ x
    return work, times * (6 if train else 2) * rows * w.numel()


def alternate(works, device, rounds, warm=3):
    """{name: seconds of each round} of {name: work}, which take turns; warm: rounds not counted."""
    seconds = {name: [] for name in works}
    for i in tqdm(range(warm + rounds), unit="round", disable=None):
        for name, work in works.items():
            took = clock(lambda work=work, i=i: work(i), device)
            if i >= warm:
                seconds[name].append(took)
    return seconds


def peak_memory(work, device):
    """Bytes, at most, that are held while work runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")          # Linux forgets the peak before
    work()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


REST = "the rest: norms, gates, rotations, copies"
KINDS = (                                   # of a kernel, by its name: the first that is found
    (REST, r"^triton_"),                    # whose names list all that was fused, products too
    ("attention's products", r"bmm|attention|flash|fmha|sdpa|softmax"),
    ("linear layers' products", r"aten::(mm|addmm|linear|mkldnn_convolution|convolution)|gemm|nvjet"
                                r"|cutlass|cudnn|conv"),
    (REST, ""))


def kind_of(kernel):
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel))


def shares(parts, device, rounds=3):
    """{kind: seconds} of a round of {name: (work, kind or None: by its kernels)}."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    gpu, found = device.type == "cuda", {}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    for work, kind in parts.values():
        work()
        with profile(activities=activities) as seen:
            for _ in range(rounds):
                work()
            wait(device)
        for event in seen.key_averages():
            if gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
                continue                    # an annotation, as of AdamW's step, spans its kernels
            name = kind or kind_of(event.key)
            took = event.self_device_time_total if gpu else event.self_cpu_time_total
            found[name] = found.get(name, 0) + took / 1e6 / rounds
    return found


def norm(a, b):
    """How far a is from b, of b's norm."""
    return float((a.float() - b.float()).norm() / b.float().norm())


# ---- what is printed ----------------------------------------------------------------------------


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", info)[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def table(seconds, flops, rate, images, peak=None):
    """Rows {name: figures} of medians, printed: rate is the matrix rate in FLOP/s."""
    rows = {}
    for name, took in seconds.items():
        middle = statistics.median(took)
        rows[name] = dict(seconds=middle, images_per_s=images / middle,
                          utilisation=flops / middle / rate, peak_bytes=(peak or {}).get(name))
        memory = f"{rows[name]['peak_bytes'] / 1e9:8.2f} GB" if rows[name]["peak_bytes"] else ""
        print(f"{name:<14}{1000 * middle:11.1f} ms{images / middle:10.2f} images/s"
              f"{flops / middle / rate:8.1%} of the matrix rate{memory}")
    return rows


def finish(args, result):
    """The JSON, printed and, if asked to, written."""
    said = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    result = dict(said, torch=torch.__version__, **result)
    print(json.dumps(result))
    if args.out:
        with atomic_write(args.out) as tmp:
            tmp.write_text(json.dumps(result, indent=1) + "\n")


def parser(about, batch, rounds):
    """Flags that the benchmarks share."""
    p = argparse.ArgumentParser(description=about, formatter_class=cli.Help)
    p.add_argument("--preset", default="small", help="small: 31.5 M, 256 image tokens, for CPUs; "
                   "or a preset of the final design, as fusedit/large-scale")
    p.add_argument("--image-size", type=cli.positive, help="pixels (small: of its latents)")
    p.add_argument("--batch", type=cli.positive, default=batch, help="images at once")
    p.add_argument("--rounds", type=cli.positive, default=rounds, help="of each; medians count")
    p.add_argument("--dtype", **cli.DTYPE, help="auto: bf16 where the device has it, else float32")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                   help="the blocks, of the fast path alone")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures there")
    return p


def start(args):
    """(device, dtype, case, model), set up as the launchers are."""
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    device, dtype = cli.pick_dtype(args)
    torch.set_float32_matmul_precision("high")
    backend.configure(device, dtype)
    made = case(args.preset, args.image_size)
    return device, dtype, made, made.build(device, dtype)

"""What a run takes, worked out on the meta device: parameters, FLOPs, memory, time. No GPU needed.

    python train_gpu.py --preset fusedit/large-scale --plan 64xH100@0.4

FLOPs and saved activations are counted on the model itself, run without data, and not by
formulas that could drift from it.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fusedit import FuseDiT, FuseDiTError, TextFeatures
from fusedit_lib.files import read_json
from fusedit_lib.pretrained import gemma_config, resolve, trim
from fusedit_lib.train import sharding
from fusedit_lib.train.config import split_batch
from fusedit_lib.vae import VAE

# Dense bf16 FLOP/s and bytes of memory, from the makers' data sheets.
GPUS = {"B200": (2250e12, 180e9), "H200": (989e12, 141e9), "H100 PCIe": (756e12, 80e9),
        "H100 NVL": (835e12, 94e9), "H100": (989e12, 80e9), "A100": (312e12, 80e9),
        "L40S": (362e12, 48e9), "L4": (121e12, 24e9), "A10": (125e12, 24e9), "4090": (165e12, 24e9)}
TPUS = {"v4": (275e12, 32e9), "v5e": (197e12, 16e9), "v5p": (459e12, 95e9), "v6e": (918e12, 32e9)}
BUCKET = 200_000_000                        # gradients, or weights, that ZeRO moves at a time
WHOLE = 100_000                             # weights of a tensor that ZeRO 3 does not cut up
PAPER = 800_000 * 512                       # images, the length of the paper's large run
_2B = dict(model_type="gemma", vocab_size=256000, hidden_size=2048, intermediate_size=16384,
           num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1)
GEMMAS = {                                  # shapes of the paper's Gemmas: they need no download
    "google/gemma-2b": _2B, "google/gemma-2b-it": _2B,
    "google/paligemma-3b-pt-448": _2B | dict(vocab_size=257216),
    "google/gemma-2-2b": dict(model_type="gemma2", vocab_size=256000, hidden_size=2304,
                              intermediate_size=9216, num_hidden_layers=26,
                              num_attention_heads=8, num_key_value_heads=4)}


def abstract(config):
    """The model, of which no tensor takes memory."""
    shape = GEMMAS.get(config.base) or read_json(resolve(config.base) / "config.json")
    with torch.device("meta"):
        model = FuseDiT(config, gemma_config(shape))
    trim(model)
    return model


class FusedAttention(torch.autograd.Function):
    """Stands for a GPU's fused attention, which keeps its inputs, its output and a row of sums."""
    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class Fused(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.attention(*args[:3])
        return function(*args, **(kwargs or {}))

    def attention(self, q, k, v):
        return FusedAttention.apply(q, k, v)


class Unfused(Fused):
    """XLA's attention, which keeps the softmax, [B,H,N,S]."""
    def attention(self, q, k, v):
        return (q @ k.transpose(2, 3)).softmax(-1) @ v


def example(model, config, batch, dtype, tokens=0):
    """Abstract x_t, sigma, ids and mask of a micro-batch; tokens: of a caption, 0: the most."""
    side = config.image_size // (8 if config.vae else 1)
    x = torch.empty(batch, config.in_channels, side, side, device="meta")
    ids = torch.empty(batch, tokens or config.max_text_tokens, dtype=torch.long, device="meta")
    pooled = None
    if config.text_modulation_embeds_dim:
        pooled = torch.empty(batch, config.text_modulation_embeds_dim, dtype=dtype, device="meta")
    return x, torch.empty(batch, device="meta"), ids, ids > 0, pooled


def flops(model, config, tokens=0):
    """Of one image: (Gemma's forward, the DiT's forward, the VAE's encoder).

    tokens: of its caption; 0: as many as the model reads at most.
    """
    x, sigma, ids, mask, pooled = example(model, config, 1, torch.float32, tokens)
    counts = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as count:
            text = model.read(ids, mask, pooled)
        counts.append(count.get_total_flops())
        with FlopCounterMode(display=False) as count:
            model.dit(x, sigma, text)
        counts.append(count.get_total_flops())
        if config.vae:
            with torch.device("meta"):
                vae, pixels = VAE(), torch.empty(1, 3, config.image_size, config.image_size)
            with FlopCounterMode(display=False) as count:
                vae.moments(pixels)
        counts.append(count.get_total_flops() if config.vae else 0)
    return counts


def step_flops(forward, train_llm=False):
    """Of one image in training, from flops(): backward costs twice forward, where there is one."""
    llm, dit, vae = forward
    return (3 if train_llm else 1) * llm + 3 * dit + vae


def activations(model, config, batch, dtype, train_llm=False, attention=Fused, budget=None):
    """Bytes held from a forward pass for its backward pass, without --remat and with it.

    The text's keys and values are among them. With remat a block keeps its input alone, but one
    block at a time has everything again. budget: --memory-budget, where blocks are compiled.
    """
    model.to(dtype)
    x, sigma, ids, mask, pooled = example(model, config, batch, dtype)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    total, seen, blocks, calls, hooks = [0], {}, [], [], []

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = t        # held, so that no other storage takes its place
            total[0] += storage.nbytes()
        return t
    model.llm.requires_grad_(train_llm)
    for layer in model.dit.layers:
        hooks += [
            layer.register_forward_pre_hook(lambda block, args: calls.append((block, args))),
            layer.register_forward_pre_hook(lambda *_: blocks.append(total[0])),
            layer.register_forward_hook(lambda *_: blocks.append(total[0]))]
    with attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        text: TextFeatures = model.read(ids, mask, pooled)
        for t in (*text.keys, *text.values, text.hidden):
            if t is not None:
                keep(t)
        model.dit(x, sigma, text)
    inside = [b - a for a, b in zip(blocks[::2], blocks[1::2], strict=True)]
    if budget is not None:
        total[0], inside = total[0] - sum(inside), []
        for hook in hooks:
            hook.remove()
        sizes = {}                          # all blocks that are called alike save alike
        for block, args in calls:
            like = tuple(t if t is None or isinstance(t, int) else t.shape for t in args)
            sizes[like] = sizes.get(like) or compiled(block, args, budget)
            inside.append(sizes[like])
        total[0] += sum(inside)
    rows = (x.shape[2] // config.patch_size) * (x.shape[3] // config.patch_size)
    entry = batch * rows * model.dit.width * dtype.itemsize
    return total[0], total[0] - sum(inside) + len(inside) * entry + max(inside)


def compiled(block, args, budget):
    """Bytes that torch.compile lets a DiT block save for its backward pass, its input among them.

    Its partitioner is asked, on the block's own graph: it computes again what costs less than
    reading it back, and for a budget below 1 also what costs more.
    """
    import torch._functorch.config as functorch
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    names, weights = zip(*block.named_parameters(), strict=True)
    # Without memory as meta tensors are, but said to be a CPU's: they keep attention in one piece.
    with FakeTensorMode():
        fake = [torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
                if isinstance(t, torch.Tensor) else t for t in (*args, *weights)]
    places = [i for i, t in enumerate(fake) if isinstance(t, torch.Tensor)]
    fixed = [k for k, i in enumerate(places) if i >= len(args)]        # they stay anyway
    sizes = {}

    def run(*tensors):
        given = list(fake)
        for i, t in zip(places, tensors, strict=True):
            given[i] = t
        own = dict(zip(names, given[len(args):], strict=True))
        return torch.func.functional_call(block, own, tuple(given[:len(args)]))[0]

    def partition(joint, inputs, **kwargs):
        kwargs["static_lifetime_input_indices"] = fixed
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def forward(graph, _):
        _, *outputs = graph.graph.find_nodes(op="output")[0].args[0]   # the first: the block's own
        x, *others = graph.graph.find_nodes(op="placeholder")          # others: not its to hold
        for node in outputs:
            if isinstance(t := node.meta["val"], torch.Tensor):
                sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        for node in others:
            sizes.pop(node.meta["val"].untyped_storage()._cdata, None)
        return graph

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), functorch.patch(activation_memory_budget=budget):
        aot_function(run, forward, lambda graph, _: graph, partition, select_decomp_table())(
            *(fake[i] for i in places))
    return sum(sizes.values())


def states(model, train_llm, stage, world, dtype):
    """Bytes of (weights, gradients, Adam's, average, Gemma, buffers) on one GPU.

    What a stage shares out, as measured with DeepSpeed 0.19: 1 Adam's moments and float32 master
    weights, 2 gradients too, 3 weights and Gemma too, but for tensors below WHOLE.
    """
    def size(module, most=math.inf):
        return sum(p.numel() for p in module.parameters() if p.numel() <= most)

    def held(*modules):
        return sum(map(size, modules)) * weights + sum(
            size(m, WHOLE) for m in modules) * (stage == 3)
    low, (adam, grads, weights) = dtype.itemsize, [1 / world if stage >= least else 1
                                                   for least in (1, 2, 3)]
    trained = (model.dit, model.llm) if train_llm else (model.dit,)
    n = sum(map(size, trained))
    wide = {0: low, 1: 4 + low}.get(stage, 4)       # of a gradient, and where it is added up
    copies = 2 if stage == 0 and low == 4 else 3    # plain float32 needs no master weights
    live = min(BUCKET, size(model)) * (stage == 3)  # weights that are whole for the moment
    return (held(*trained) * low, n * wide * grads, n * 4 * copies * adam, n * 4 / world,
            0 if train_llm else held(model.llm) * low,
            (min(BUCKET, n) * (stage > 1) + live) * low)


def parse(text):
    """(devices, their kind, utilisation) of "64xH100@0.4" or "v4-256", which has 128 chips."""
    text, _, used = text.strip().partition("@")
    used = float(used or 0.4) if re.fullmatch(r"[01]?(\.\d+)?", used) else 0
    gpu, tpu = re.fullmatch(r"(\d+) *[xX*] *([\w ]+)", text), re.fullmatch(
        r"([vV]\w+)-(\d+)", text.replace("v5litepod", "v5e"))
    name, n = (gpu[2], int(gpu[1])) if gpu else (tpu[1], int(tpu[2])) if tpu else ("", 0)
    kind = next((k for k in (GPUS if gpu else TPUS) if k.upper() == name.upper()), None)
    if kind in ("v4", "v5p"):               # named by their cores, two on a chip
        n //= 2
    if not kind or n < 1 or not 0 < used <= 1:
        raise FuseDiTError(f"--plan {text}: write a number and a kind of GPU, as 8xH100 or "
                           f"8xH100@0.4, or a TPU, as v4-256; known: {', '.join([*GPUS, *TPUS])}")
    return n, kind, used


def peak(device, world):
    """Peak FLOP/s of all GPUs together; None if this GPU's is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((world * GPUS[k][0] for k in GPUS if re.search(rf"\b{k}\b", name)), None)


def useful_flops(config, latents, train_llm):
    """(FLOPs of training on an image, FLOPs more for each token of its caption).

    What it cannot do without: padding is not counted, nor the VAE where latents are read. (The
    square in a caption's length, of Gemma's attention, is below 1 % and taken as a line.)
    """
    model, most = abstract(config), config.max_text_tokens

    def cost(tokens):
        llm, dit, vae = flops(model, config, tokens)
        return step_flops([llm, dit, 0 if latents else vae], train_llm)
    token = (cost(most) - cost(1)) / (most - 1)
    return cost(1) - token, token


def show(run, config):
    """Print the plan of a run on devices that need not be here."""
    n, kind, used = parse(run.plan)
    micro, times = split_batch(run, n)
    model, (peak, memory) = abstract(config), (GPUS | TPUS)[kind]
    llm, dit = (sum(p.numel() for p in m.parameters()) for m in (model.llm, model.dit))
    with torch.device("meta"):
        vae = sum(p.numel() for p in VAE().parameters()) if config.vae else 0
    cost = flops(model, config)
    each = step_flops(cost, run.train_llm)
    side = config.image_size // (8 if config.vae else 1) // config.patch_size
    print(f"{run.preset} at {config.image_size} pixels, batch {run.batch} = {n} {kind} x {times} x "
          f"{micro}\n")
    print(f"  DiT {dit:,}, {'trained' if run.train_llm else 'frozen'} Gemma {llm:,}, VAE {vae:,} "
          "parameters")
    print(f"  {side * side:,} image tokens, {config.max_text_tokens} text tokens at most")
    print(f"  forward of an image: DiT {cost[1] / 1e12:.3g} TFLOP, Gemma {cost[0] / 1e12:.3g}, VAE "
          f"{cost[2] / 1e12:.3g}; training, an image: {each / 1e12:.3g} TFLOP"
          + f" ({(each - cost[2]) / 1e12:.3g} of latents made beforehand)" * bool(vae) + "\n")
    (tpu_memory if kind in TPUS else gpu_memory)(run, config, n, micro, vae, memory)
    speed = n * peak * used / each
    days = PAPER / speed / 86400
    print(f"\n  at {used:.0%} of {peak / 1e12:,.0f} TFLOP/s each: {speed:,.0f} images/s, "
          f"{speed * side * side:,.0f} image tokens/s; {run.steps:,} steps in "
          f"{run.steps * run.batch / speed / 86400:,.1f} days, the paper's 800,000 x 512 images in "
          f"{math.ceil(days * 10) / 10:,.1f} days")
    return 0


def fits(memory, plain, less):
    """What a device of so much memory can do: with all activations, or with --remat."""
    return "too much" if less > memory else "with --remat" if plain > memory else "fits"


def gpu_memory(run, config, world, micro, vae, memory):
    """Print what a GPU holds, by ZeRO stage."""
    dtype = torch.float32 if run.dtype == "float32" else torch.bfloat16
    model = abstract(config)
    blocks = f"compiled, --memory-budget {run.memory_budget:g}" if run.compile else "not compiled"
    print(f"  GB on each GPU of {memory / 1e9:.0f}, micro-batch {micro}, blocks {blocks}:")
    heads = ("--zero", "weights", "gradients", "Adam", "EMA", "Gemma", "buffers", "VAE",
             "activations", "sum", "--remat", "sum")
    print("  " + "".join(f"{h:>12}" for h in heads))
    act, less = activations(abstract(config), config, micro, dtype, run.train_llm,
                            budget=run.memory_budget if run.compile else None)
    for stage in range(4):
        held = [*states(model, run.train_llm, stage, world, dtype), vae * dtype.itemsize]
        held[3] *= not run.ema_offload
        row = [*held, act, sum(held) + act, less, sum(held) + less]
        print(f"  {stage:>12}" + "".join(f"{n / 1e9:12.2f}" for n in row) + "   "
              + fits(memory, row[8], row[10]) + f"   <- --zero {run.zero}" * (
                     stage == int(run.zero[0])))
    print("  1-, 2-, 3-offload: as 1, 2, 3, but Adam's part is in the machine's memory; --remat "
          "costs a second forward pass of the DiT")


def chip(name, shape, sizes):
    """Numbers of a tensor on one chip of a mesh, sizes: {axis: devices}."""
    cuts = (sizes[axis] for axis in sharding.partition_spec(name, shape, sizes) if axis)
    return math.prod(shape) // math.prod(cuts)


def tpu_memory(run, config, n, micro, vae, memory):
    """Print how the rules cut every kind of tensor on --mesh, and what a chip holds.

    gathered: a block whole, while it is computed, and the next one on its way.
    """
    sizes = dict(zip(sharding.AXES, sharding.mesh_shape(run.mesh, n), strict=True))
    low = 4 if run.dtype == "float32" else 2
    dtype = torch.float32 if low == 4 else torch.bfloat16
    model, kinds = abstract(config), {}     # tensors of a stack of layers under one name
    for name, p in model.named_parameters():
        key = re.sub(r"layers\.\d+", "layers.block", name)
        kinds.setdefault((key, *p.shape), []).append(name)
    print(f"  mesh of {' x '.join(f'{v} {k}' for k, v in sizes.items())}; tensors of over 0.1 % of "
          f"the model, and how they are cut:\n{'layers':>8}{'dimensions':>16}  {'cut along':16}"
          f"{'million':>8}{'a chip':>8}")
    total, held = sum(p.numel() for p in model.parameters()), dict(dit=0, llm=0)
    for (key, *shape), names in kinds.items():
        each, part = math.prod(shape), chip(key.replace(".block", ""), shape, sizes)
        held[key[:3]] += len(names) * part
        if len(names) * each > total / 1000:
            cut = sharding.partition_spec(key.replace(".block", ""), shape, sizes)
            print(f"{len(names):>8}{' x '.join(map(str, shape)):>16}  "
                  f"{', '.join(a or '-' for a in cut):16}{len(names) * each / 1e6:8.1f}"
                  f"{len(names) * part / 1e6:8.2f}  {key.replace('.block', '')}")
    trained = held["dit"] + held["llm"] * run.train_llm
    act, less = (n // sizes["tensor"] for n in activations(
        abstract(config), config, max(1, micro * sizes["tensor"]), dtype, run.train_llm, Unfused))
    block = sum(p.numel() for p in model.dit.layers[0].parameters())
    row = dict(weights=4 * trained, gradients=4 * trained, Adam=8 * trained, EMA=4 * trained,
               cast=low * trained * (low < 4), Gemma=low * held["llm"] * (not run.train_llm),
               gathered=2 * low * block // sizes["tensor"], VAE=vae * low)
    base = sum(row.values())
    row |= {"activations": act, "sum": base + act, "--remat": less, "sum ": base + less}
    print(f"\n  GB on each chip of {memory / 1e9:.0f}, micro-batch {micro}:\n  "
          + "".join(f"{k.strip():>12}" for k in row))
    print("  " + "".join(f"{v / 1e9:12.2f}" for v in row.values()) + "   "
          + fits(memory, base + act, base + less))

"""A training step of the 2B model with random weights: its parts, its kernels, and its variants.

    python benchmarks/gpu/step.py --batch 8 --variants remat:8,nocudnn:8,budget70:12

--batch is the number of images in the step whose parts are measured; 0 measures only variants. A
variant is NAME:BATCH. These run the DiT alone, forward and backward:
    compiled    as train_gpu.py --compile         eager      without --compile
    remat       --compile --remat                 budgetNN   --compile --memory-budget 0.NN
    nocudnn     --compile, without cuDNN's attention
    tuned       --compile, with Inductor's coordinate descent, which tries more kernels
    float8      --compile --float8; it has to come last, since it cannot be undone
The others are:
    vae         the VAE's encoder: memory formats, compiled or not, with or without cuDNN's
                search for the fastest convolution
    graphs      a call of the DiT without gradients, as in sampling one image (batch 2): compiled,
                with CUDA graphs by torch.compile, and captured as one CUDA graph
    demo-graphs the same for the demo's DiT, forward and backward
"""
import argparse
import contextlib
import gc
import importlib.util
import time
import traceback
from functools import partial

import kit  # isort: skip (before torch)
import common
import torch
import torch._functorch.config
import torch._inductor.config
import train
from kit import (
    CUDA,
    DEVICE,
    DTYPE,
    SMALL,
    milliseconds,
    one_line,
    peak,
    record,
    reset_peak,
    wait,
)
from torch.utils.checkpoint import checkpoint as recompute

import fusedit
from fusedit_lib import backend, files, pretrained

STEP_BATCH = 512                            # images per step, in the figures that include AdamW


# ---------------------------------------------------------------------------- models
def small_case():
    """The preset's DiT and VAE with two layers of the small Gemma, at 32 pixels."""
    gemma = pretrained.gemma_config(common.SMALL | dict(num_hidden_layers=2))
    return common.Case(fusedit.preset("fusedit/large-scale", image_size=32), gemma, 64, (16, 32))


def demo_case():
    folder = kit.ROOT / "demo" / "gemma"
    config = fusedit.preset("demo", base=str(folder))
    gemma = pretrained.gemma_config(files.read_json(folder / "config.json"))
    return common.Case(config, gemma, config.max_text_tokens, (6, 20))


def undo_compile(model, vae=None):
    """Undo backend.compile_model and --remat."""
    for module in (*model.dit.layers, model.dit.norm_out, *model.llm.layers):
        module.__dict__.pop("forward", None)
    if vae:
        vae.encoder._compiled_call_impl = None
        vae.decoder._compiled_call_impl = None
    torch.compiler.reset()
    model.dit.zero_grad()
    gc.collect()
    torch._functorch.config.activation_memory_budget = 1.0


class Step:
    """A model, a batch, and the parts of a training step on them."""

    def __init__(self, model, case, batch):
        self.model = model
        self.data = next(case.batches(1, batch, DEVICE))
        self.sigma = torch.full([batch], 0.7, device=DEVICE)
        with torch.no_grad():
            self.text = common.encode_text(model, self.data)

    def encode_text(self):
        common.encode_text(self.model, self.data)

    @torch.no_grad()
    def forward(self):
        """The DiT's forward pass, without gradients."""
        return self.model.dit(self.data["eps"], self.sigma, self.text)

    def forward_and_backward(self):
        """The DiT's forward and backward pass."""
        self.model.dit.zero_grad()
        v = self.model.dit(self.data["eps"], self.sigma, self.text)
        v.float().square().mean().backward()

    def micro_batch(self, vae):
        """A micro-batch as in the training loop. vae: None for training from latents."""
        self.model.dit.zero_grad()
        data = self.data
        if vae is None:
            latents = self.data["eps"].roll(1, 0)
            data = data | dict(x=latents)
        train.training_loss(self.model, vae, data, fast=True).backward()


# ---------------------------------------------------------------------------- parts of a step
def measure_parts(case, model, batch):
    """Measure the milliseconds of each part of a compiled step, and profile the step."""
    begin = time.monotonic()
    vae = case.vae(DEVICE, DTYPE, True)
    step = Step(model, case, batch)
    backend.compile_model(model, vae)
    ms = {}
    if vae:
        with torch.no_grad():
            ms["VAE"] = milliseconds(lambda: vae.moments(step.data["x"]), 3, 2)
    ms["Gemma"] = milliseconds(step.encode_text, 5, 2)
    ms["DiT, forward"] = milliseconds(step.forward, 5, 2)
    step.forward_and_backward()
    before = reset_peak()
    ms["DiT, forward and backward"] = milliseconds(step.forward_and_backward, 5, 2)
    held = peak() - before
    compile_seconds = time.monotonic() - begin
    if vae:
        ms["micro-batch"] = milliseconds(lambda: step.micro_batch(vae), 5, 2)
    ms["micro-batch from latents"] = milliseconds(lambda: step.micro_batch(None), 5, 2)

    adam = train.Adam(model.dit.parameters())

    def update():
        for p in model.dit.parameters():
            p.grad = torch.zeros_like(p)
        adam.step()
    ms["clipping and AdamW"] = milliseconds(update, 3, 1)
    model.dit.zero_grad()
    report_parts(ms, common.useful_flops(case, "train"), batch, held, compile_seconds)

    def whole_step():
        step.micro_batch(vae)
        adam.step()
    report_profile(whole_step, batch)
    undo_compile(model, vae)


def report_parts(ms, useful, batch, held, compile_seconds):
    """Print a line for each part, with its useful TFLOP/s if its useful FLOPs are known.

    ms: {part: milliseconds}. useful: FLOPs per image. held: bytes of activations and gradients.
    """
    flops = {
        "VAE": useful["vae"],
        "Gemma": useful["gemma"],
        "DiT, forward": useful["dit"] / 3,
        "DiT, forward and backward": useful["dit"],
        "micro-batch": sum(useful.values()),
        "micro-batch from latents": useful["dit"] + useful["gemma"],
    }
    tflops = {}
    for name, took in ms.items():
        rate = ""
        if name in flops:
            tflops[name] = batch * flops[name] / took / 1e9
            rate = f"{tflops[name]:7.0f} TFLOP/s useful"
        print(f"  {name:<28}{took:9.2f} ms {took / batch:8.2f} per image {rate}", flush=True)

    images_per_s = {}
    for name in ms:
        if name.startswith("micro-batch"):
            step_ms = STEP_BATCH * ms[name] / batch + ms["clipping and AdamW"]
            images_per_s[name] = 1000 * STEP_BATCH / step_ms
    speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in images_per_s.items())
    print(f"  images per second, with AdamW after {STEP_BATCH}: {speeds}; the DiT's activations "
          f"and gradients {held / 1e9:.1f} GB; compiled and ready after {compile_seconds:.0f} s",
          flush=True)
    record("parts", batch=batch, ms=ms, tflops=tflops, images_per_s=images_per_s,
           held_gb=held / 1e9, compile_s=compile_seconds)


def report_profile(work, batch, rounds=2):
    """Write the kernels of a step to profile.txt, the slowest first, and print their kinds."""
    work()
    wait()
    kernels = common.profile(work, DEVICE, rounds)
    kernels.sort(key=lambda kernel: kernel.seconds, reverse=True)
    to_ms = 1000 / rounds                   # from seconds of all rounds to milliseconds per round
    total = to_ms * sum(kernel.seconds for kernel in kernels) or 1.0
    kinds = {}
    for kernel in kernels:
        kind = common.kind_of(kernel.name)
        kinds[kind] = kinds.get(kind, 0) + to_ms * kernel.seconds

    lines = [f"kernels of a step of {batch} images with AdamW: {total:.1f} ms"]
    for kind, took in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"  {took:9.2f} ms {took / total:6.1%}  {kind}")
    for kernel in kernels[:80]:
        ms = to_ms * kernel.seconds
        lines.append(f"  {ms:9.3f} ms {ms / total:6.1%} {kernel.calls // rounds:6d} x "
                     f"{kernel.name[:140]}")
    (kit.OUT / "profile.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(line[:150] for line in lines[:len(kinds) + 17]), flush=True)
    record("profile", batch=batch, ms=total, kinds=kinds)


# ---------------------------------------------------------------------------- variants of the DiT
@contextlib.contextmanager
def without_cudnn():
    """Context without cuDNN's attention, and without cached graphs, which name their kernel."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._functorch.config.enable_autograd_cache = False
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch._functorch.config.enable_autograd_cache = True


def settings_of(name):
    """The context in which a variant runs."""
    if name == "nocudnn":
        return without_cudnn()
    if name == "tuned":
        return torch._inductor.config.patch(coordinate_descent_tuning=True)
    return contextlib.nullcontext()


def measure_variant(case, model, name, batch):
    """Measure the DiT's forward and backward pass in one of the variants."""
    begin = time.monotonic()
    step = Step(model, case, batch)
    if name == "float8":
        backend.use_float8(model.dit)
    budget = 1.0
    if name.startswith("budget"):
        budget = int(name.removeprefix("budget")) / 100
    with settings_of(name):
        if name != "eager":
            backend.compile_model(model, None, llm=False, budget=budget)
        if name == "remat":
            for layer in model.dit.layers:
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)
        step.forward_and_backward()
        model.dit.zero_grad()
        before = reset_peak()
        both_ms = milliseconds(step.forward_and_backward, 5, 2)
        held = peak() - before
        forward_ms = milliseconds(step.forward, 5, 2)

    flops = batch * common.useful_flops(case, "train")["dit"]
    tflops = flops / both_ms / 1e9
    seconds = time.monotonic() - begin
    record("variant", name=name, batch=batch, ms=both_ms, forward_ms=forward_ms,
           held_gb=held / 1e9, peak_gb=peak() / 1e9, tflops=tflops, seconds=seconds)
    title = f"{name}:{batch}"
    print(f"  {title:<14}{both_ms:9.2f} ms {both_ms / batch:8.2f} per image {tflops:6.0f} TFLOP/s "
          f"useful, forward {forward_ms:8.2f} ms, activations and gradients {held / 1e9:5.1f} GB "
          f"({seconds:.0f} s in total)", flush=True)


# ---------------------------------------------------------------------------- the VAE's encoder
def measure_vae(case, batch):
    """Time the encoder in both memory formats, compiled or not, with or without cuDNN's search."""
    x = next(case.batches(1, batch, DEVICE))["x"]
    for compiled in ("eager", "compiled"):
        for memory_format in ("channels last", "contiguous"):
            vae = case.vae(DEVICE, DTYPE, memory_format == "channels last")
            if compiled == "compiled":
                vae.encoder.compile()
            name = f"{compiled}, {memory_format}"
            measure_encoder(vae, x, batch, name, search=False)
            measure_encoder(vae, x, batch, f"{name}, cudnn.benchmark", search=True)


def measure_encoder(vae, x, batch, name, search):
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=search):
        ms = milliseconds(lambda: vae.moments(x), 3, 3)
    record("VAE", name=name, batch=batch, ms=ms)
    print(f"  VAE, {name:<42}{ms:9.2f} ms {ms / batch:8.2f} per image", flush=True)


# ---------------------------------------------------------------------------- CUDA graphs
def capture(work):
    """Capture all kernels of work() in one CUDA graph. Returns a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure_graphs(case, model, batch, title, backward):
    """Time a call of the DiT, compiled and in CUDA graphs. Small calls are bound by launches."""
    step = Step(model, case, batch)
    work = step.forward
    if backward:
        work = step.forward_and_backward

    def compiled():
        backend.compile_model(model, None, llm=False)
        return milliseconds(work)

    def captured_whole():
        if not CUDA:
            return milliseconds(work)
        return milliseconds(capture(work))

    def reduce_overhead():
        # like backend.compile_model, but each compiled block is one CUDA graph
        undo_compile(model)
        for module in (*model.dit.layers, model.dit.norm_out):
            module.forward = torch.compile(module.forward, mode="reduce-overhead")

        def marked():
            torch.compiler.cudagraph_mark_step_begin()
            work()
        return milliseconds(marked, 10, 6)

    ways = {"compiled": compiled, "compiled, captured whole": captured_whole,
            "reduce-overhead": reduce_overhead}
    for way, measure in ways.items():
        name = f"{title}: {way}"
        try:
            ms = measure()
        except RuntimeError as e:           # something could not be captured
            record("graphs", name=name, batch=batch, error=one_line(e))
            print(f"  {name}: {one_line(e)}", flush=True)
            continue
        record("graphs", name=name, batch=batch, ms=ms)
        print(f"  {name:<56}{ms:9.3f} ms", flush=True)


# ---------------------------------------------------------------------------- the program
def run(case, model, name, batch):
    """Measure the step's parts, or one variant."""
    if name == "parts":
        measure_parts(case, model, batch)
    elif name == "vae":
        measure_vae(case, batch)
    elif name == "graphs":
        measure_graphs(case, model, batch, "sampling, forward", backward=False)
    elif name == "demo-graphs":
        demo = demo_case()
        measure_graphs(demo, demo.build(DEVICE, DTYPE), batch, "demo, forward and backward",
                       backward=True)
    else:
        measure_variant(case, model, name, batch)


def run_all(case, model, items):
    """Run items NAME:BATCH while there is time. Returns those that failed."""
    failed = []
    for item in items:
        name, batch = item.split(":")
        if name == "float8" and not importlib.util.find_spec("torchao"):
            print("  float8: torchao is not installed")
            continue
        if kit.seconds_left() < 35:         # a variant spends most of its time compiling
            print(f"  {item}: no time left")
            continue
        undo_compile(model)
        try:
            run(case, model, name, int(batch))
        except Exception as e:
            print(f"  {item}: {one_line(e)}", flush=True)
            record("variant", name=name, batch=int(batch), error=one_line(e))
            if not isinstance(e, torch.OutOfMemoryError):
                traceback.print_exc()
                failed.append(item)
    return failed


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=8,
                   help="images in the measured step; 0: measure only variants (default: 8)")
    p.add_argument("--variants", default="",
                   help="variants to measure, as NAME:BATCH, separated by commas")
    args = p.parse_args()
    torch.set_float32_matmul_precision("high")
    backend.configure(DEVICE, DTYPE)
    if SMALL:
        case = small_case()
    else:
        case = common.case("fusedit/large-scale")
    model = case.build(DEVICE, DTYPE)
    weights = sum(p.numel() for p in model.dit.parameters())
    print(f"DiT of {weights:,} weights", flush=True)

    items = [item for item in args.variants.split(",") if item]
    if args.batch:
        items.insert(0, f"parts:{args.batch}")
    failed = run_all(case, model, items)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

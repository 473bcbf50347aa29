"""A training step of the 2B model with random weights: its parts, its kernels, and its variants.

    python benchmarks/gpu/step.py --batch 8 --variants remat:8,nocudnn:8,budget70:12

--batch: pictures of the step that is taken apart; 0: only variants. A variant is NAME:BATCH, and
one of, for the DiT alone, forward and backward:
    compiled    as train_gpu.py --compile         eager      without it
    remat       --compile --remat                 budgetNN   --compile --memory-budget 0.NN
    nocudnn     --compile, without cuDNN's attention
    tuned       --compile, with Inductor's coordinate descent, which tries more kernels
    float8      --compile --float8; it comes last, since it cannot be undone
and of others:
    vae         the VAE's encoder: memory formats, compiled or not, cuDNN's search for a convolution
    graphs      a call of the DiT without gradients, as sampling one picture has it (batch 2):
                compiled, with CUDA graphs by torch.compile, and captured whole
    demo-graphs the same of the demo's DiT, forward and backward
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
from kit import CUDA, DEVICE, DTYPE, SMALL, forget_peak, milliseconds, peak, record, wait, why
from torch.utils.checkpoint import checkpoint as recompute

import fusedit
from fusedit_lib import backend, files, pretrained


def small_case():
    """The preset's DiT and VAE on two layers of the small Gemma, at 32 pixels."""
    gemma = pretrained.gemma_config(common.SMALL | dict(num_hidden_layers=2))
    return common.Case(fusedit.preset("fusedit/large-scale", image_size=32), gemma, 64, (16, 32))


def demo_case():
    folder = kit.ROOT / "demo" / "gemma"
    config = fusedit.preset("demo", base=str(folder))
    return common.Case(config, pretrained.gemma_config(files.read_json(folder / "config.json")),
                       config.max_text_tokens, (6, 20))


def plain_again(model, vae=None):
    """Undo backend.compile_model and --remat."""
    for module in (*model.dit.layers, model.dit.norm_out, *model.llm.layers):
        module.__dict__.pop("forward", None)
    for part in (vae.encoder, vae.decoder) if vae else ():
        part._compiled_call_impl = None
    torch.compiler.reset()
    model.dit.zero_grad()
    gc.collect()
    torch._functorch.config.activation_memory_budget = 1.0


class Step:
    """A model, and a batch that it is fed."""

    def __init__(self, model, case, batch):
        self.model, self.case, self.batch = model, case, batch
        self.data = next(case.batches(1, batch, DEVICE))
        self.sigma = torch.full([batch], 0.7, device=DEVICE)
        with torch.no_grad():
            self.text = common.read(model, self.data)

    @torch.no_grad()
    def forward(self):
        return self.model.dit(self.data["eps"], self.sigma, self.text)

    def both(self):
        """The DiT's forward and backward."""
        self.model.dit.zero_grad()
        v = self.model.dit(self.data["eps"], self.sigma, self.text)
        v.float().square().mean().backward()

    def micro(self, vae):
        """A micro-batch as the loop has it; without a VAE from latents."""
        self.model.dit.zero_grad()
        data = self.data if vae else self.data | dict(x=self.data["eps"].roll(1, 0))
        train.loss(self.model, vae, data, True).backward()


# ------------------------------------------------------------------------------ the step's parts


def parts(case, model, batch):
    """Milliseconds of each part of a step, compiled; its profile."""
    begin, vae = time.monotonic(), case.vae(DEVICE, DTYPE, True)
    step, found = Step(model, case, batch), {}
    backend.compile_model(model, vae)
    if vae:
        with torch.no_grad():
            found["VAE"] = milliseconds(lambda: vae.moments(step.data["x"]), 3, 2)
    found["Gemma"] = milliseconds(lambda: common.read(model, step.data), 5, 2)
    found["DiT, forward"] = milliseconds(step.forward, 5, 2)
    step.both()
    before = forget_peak()
    found["DiT, forward and backward"] = milliseconds(step.both, 5, 2)
    held = peak() - before
    compiling = time.monotonic() - begin
    if vae:
        found["micro-batch"] = milliseconds(lambda: step.micro(vae), 5, 2)
    found["micro-batch from latents"] = milliseconds(lambda: step.micro(None), 5, 2)
    adam = train.Adam(model.dit.parameters())

    def update():
        for p in model.dit.parameters():
            p.grad = torch.zeros_like(p)
        adam.step()
    found["clipping and AdamW"] = milliseconds(update, 3, 1)
    model.dit.zero_grad()
    print_parts(found, common.useful(case, "train"), batch, held, compiling)

    def whole():
        step.micro(vae)
        adam.step()
    profile(whole, batch)
    plain_again(model, vae)


def print_parts(found, useful, batch, held, compiling):
    """A line for each part, with the useful TFLOP/s where it is known what is useful."""
    work = {"VAE": useful["vae"], "Gemma": useful["gemma"], "DiT, forward": useful["dit"] / 3,
            "DiT, forward and backward": useful["dit"], "micro-batch": sum(useful.values()),
            "micro-batch from latents": useful["dit"] + useful["gemma"]}
    rates = {name: batch * work[name] / took / 1e9 for name, took in found.items() if name in work}
    for name, took in found.items():
        rate = f"{rates[name]:7.0f} TFLOP/s useful" if name in rates else ""
        print(f"  {name:<28}{took:9.2f} ms {took / batch:8.2f} a picture {rate}", flush=True)
    speeds = {name: 512 / (512 * found[name] / batch + found["clipping and AdamW"]) * 1000
              for name in found if name.startswith("micro-batch")}
    said = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    print(f"  pictures a second, with AdamW after 512: {said}; the DiT's activations and gradients "
          f"{held / 1e9:.1f} GB; compiled and warm after {compiling:.0f} s", flush=True)
    record("parts", batch=batch, ms=found, tflops=rates, images_per_s=speeds, held_gb=held / 1e9,
           compile_s=compiling)


def profile(work, batch, rounds=2):
    """The kernels of a step by time: profile.txt, and the kinds of them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    work()
    wait()
    activity = ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as seen:
        for _ in range(rounds):
            work()
        wait()
    kernels = []
    for event in seen.key_averages():
        if CUDA and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.append((event.self_device_time_total, event.count, event.key))
        elif not CUDA:
            kernels.append((event.self_cpu_time_total, event.count, event.key))
    kernels = [(us / 1000 / rounds, n // rounds, name) for us, n, name in kernels]
    kernels.sort(reverse=True)
    total, kinds = sum(took for took, *_ in kernels) or 1.0, {}
    for took, _, name in kernels:
        kind = common.kind_of(name)
        kinds[kind] = kinds.get(kind, 0) + took
    lines = [f"kernels of a step of {batch} with AdamW: {total:.1f} ms"]
    lines += [f"  {took:9.2f} ms {took / total:6.1%}  {kind}"
              for kind, took in sorted(kinds.items(), key=lambda item: -item[1])]
    lines += [f"  {took:9.3f} ms {took / total:6.1%} {n:6d} x {name[:140]}"
              for took, n, name in kernels[:80]]
    (kit.OUT / "profile.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(line[:150] for line in lines[:len(kinds) + 17]), flush=True)
    record("profile", batch=batch, ms=total, kinds=kinds)


# ------------------------------------------------------------------------------ variants


@contextlib.contextmanager
def without_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._functorch.config.enable_autograd_cache = False  # a stored graph names its kernel
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch._functorch.config.enable_autograd_cache = True


def variant(case, model, name, batch):
    """The DiT's forward and backward in one of the ways."""
    begin, step, extra = time.monotonic(), Step(model, case, batch), contextlib.nullcontext()
    if name == "nocudnn":
        extra = without_cudnn()
    if name == "tuned":
        extra = torch._inductor.config.patch(coordinate_descent_tuning=True)
    if name == "float8":
        backend.use_float8(model.dit)
    budget = int(name[6:]) / 100 if name.startswith("budget") else 1.0
    with extra:
        if name != "eager":
            backend.compile_model(model, None, llm=False, budget=budget)
        if name == "remat":
            for layer in model.dit.layers:
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)
        step.both()
        model.dit.zero_grad()
        before = forget_peak()
        both = milliseconds(step.both, 5, 2)
        held = peak() - before
        forward = milliseconds(step.forward, 5, 2)
    flops = batch * common.useful(case, "train")["dit"]
    row = dict(ms=both, forward_ms=forward, held_gb=held / 1e9, peak_gb=peak() / 1e9,
               tflops=flops / both / 1e9, seconds=time.monotonic() - begin)
    record("variant", name=name, batch=batch, **row)
    print(f"  {name + ':' + str(batch):<14}{both:9.2f} ms {both / batch:8.2f} a picture "
          f"{row['tflops']:6.0f} TFLOP/s useful, forward {forward:8.2f} ms, activations and "
          f"gradients {held / 1e9:5.1f} GB ({row['seconds']:.0f} s in all)", flush=True)


def autoencoder(case, batch):
    """The encoder's time, by memory format, compiled or not, with and without cuDNN's search."""
    x = next(case.batches(1, batch, DEVICE))["x"]
    for compiled in (False, True):
        for fast in (True, False):
            vae = case.vae(DEVICE, DTYPE, fast)
            if compiled:
                vae.encoder.compile()
            for search in (False, True):
                with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=search):
                    took = milliseconds(lambda vae=vae: vae.moments(x), 3, 3)
                name = (f"{'compiled' if compiled else 'eager'}, "
                        f"{'channels last' if fast else 'contiguous'}"
                        f"{', cudnn.benchmark' if search else ''}")
                record("VAE", name=name, batch=batch, ms=took)
                print(f"  VAE, {name:<42}{took:9.2f} ms {took / batch:8.2f} a picture", flush=True)


def compile_with_graphs(model):
    """As backend.compile_model, but each compiled block is one CUDA graph."""
    for module in (*model.dit.layers, model.dit.norm_out):
        module.forward = torch.compile(module.forward, mode="reduce-overhead")


def captured(work):
    """The same work as one CUDA graph of all its kernels."""
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


def graphs(case, model, batch, train):
    """A call of the DiT, bound by launches if it is small: compiled, and in CUDA graphs."""
    step = Step(model, case, batch)
    work = step.both if train else step.forward

    def usual():
        backend.compile_model(model, None, llm=False)
        return milliseconds(work)

    def whole():
        return milliseconds(captured(work)) if CUDA else milliseconds(work)

    def by_block():
        plain_again(model)
        compile_with_graphs(model)

        def marked():
            torch.compiler.cudagraph_mark_step_begin()
            work()
        return milliseconds(marked, 10, 6)
    ways = {"compiled": usual, "compiled, captured whole": whole, "reduce-overhead": by_block}
    for way, measure in ways.items():
        name = f"{'demo, forward and backward' if train else 'sampling, forward'}: {way}"
        try:
            took = measure()
        except RuntimeError as e:           # of what may not be captured; the other ways can go on
            record("graphs", name=name, batch=batch, error=why(e))
            print(f"  {name}: {why(e)}", flush=True)
            continue
        record("graphs", name=name, batch=batch, ms=took)
        print(f"  {name:<56}{took:9.3f} ms", flush=True)


def run(case, model, name, batch):
    """The step's parts, or one variant."""
    if name == "parts":
        return parts(case, model, batch)
    if name == "vae":
        return autoencoder(case, batch)
    if name == "graphs":
        return graphs(case, model, batch, False)
    if name == "demo-graphs":
        demo = demo_case()
        return graphs(demo, demo.build(DEVICE, DTYPE), batch, True)
    return variant(case, model, name, batch)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--variants", default="")
    args = p.parse_args()
    torch.set_float32_matmul_precision("high")
    backend.configure(DEVICE, DTYPE)
    case = small_case() if SMALL else common.case("fusedit/large-scale")
    model, failed = case.build(DEVICE, DTYPE), []
    print(f"DiT of {sum(p.numel() for p in model.dit.parameters()):,} weights", flush=True)
    items = [*filter(None, args.variants.split(","))]
    if args.batch:
        items.insert(0, f"parts:{args.batch}")
    for item in items:
        name, batch = item.split(":")
        if name == "float8" and not importlib.util.find_spec("torchao"):
            print("  float8: torchao is not installed")
            continue
        if kit.seconds_left() < 35:         # most of a variant's time goes into compiling
            print(f"  {item}: no time left")
            continue
        plain_again(model)
        try:
            run(case, model, name, int(batch))
        except Exception as e:
            print(f"  {item}: {why(e)}", flush=True)
            record("variant", name=name, batch=int(batch), error=why(e))
            if not isinstance(e, torch.OutOfMemoryError):
                traceback.print_exc()
                failed.append(item)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

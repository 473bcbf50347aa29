"""The machine and its limits: matrix rate, memory bandwidth, and the cost of a kernel launch.

The matrix products are those of a DiT block of the 2B model for 8 images of 1024 tokens, forward
and both gradients; also with gate and up fused into one product, and q, k and v into another.
"""
import os
import platform
import shutil
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import kit  # isort: skip (before torch)
import torch
from kit import CUDA, DEVICE, DTYPE, SMALL, milliseconds, one_line, record

GPU_QUERY = ("driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,"
             "clocks_event_reasons.active")


class Widths(NamedTuple):
    """Widths of the layers of a DiT block."""
    model: int
    mlp: int
    queries: int
    keys: int


class Sizes(NamedTuple):
    square: int                         # side of a square matrix
    tokens: int
    widths: Widths
    copied_bytes: int


if SMALL:
    SIZES = Sizes(256, 256, Widths(64, 128, 64, 32), 2**20)
else:
    SIZES = Sizes(8192, 8192, Widths(2304, 9216, 2048, 1024), 2**31)


# ---------------------------------------------------------------------------- the machine
def last_line_of(*argv):
    """The last line that a program prints, or the reason why it could not run."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as e:
        return one_line(e)
    lines = done.stdout.strip().splitlines()
    if not lines:
        return ""
    return lines[-1]


def package_version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment():
    row = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
               cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0],
               disk_gb=shutil.disk_usage(kit.ROOT).free / 1e9)
    for name in ("triton", "transformers", "numpy", "deepspeed", "torchao", "safetensors"):
        row[name] = package_version(name)
    if CUDA:
        p = torch.cuda.get_device_properties(0)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        row |= dict(
            gpu=p.name, processors=p.multi_processor_count, memory_gb=p.total_memory / 1e9,
            capability=torch.cuda.get_device_capability(), cudnn=torch.backends.cudnn.version(),
            nccl=nccl, smi=last_line_of("nvidia-smi", f"--query-gpu={GPU_QUERY}",
                                        "--format=csv,noheader"))
    row["gcc"] = last_line_of("gcc", "-dumpfullversion")
    record("environment", **row)
    print(row)


# ---------------------------------------------------------------------------- matrix products
def time_product(name, a, b, rounds=20):
    """Time a @ b, and record its FLOP/s."""
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    ms = milliseconds(lambda: a @ b, rounds)
    record("product", name=name, ms=ms, tflops=flops / ms / 1e9)
    shape = str([*a.shape, b.shape[1]])
    print(f"{name:<32} {shape:<22}{ms:9.3f} ms {flops / ms / 1e9:8.1f} TFLOP/s")


def random(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def products():
    n = SIZES.square
    time_product("square", random(n, n), random(n, n))
    torch.set_float32_matmul_precision("high")
    a = random(n, n, dtype=torch.float32)
    b = random(n, n, dtype=torch.float32)
    time_product("square, tf32", a, b, rounds=5)

    tokens = SIZES.tokens
    w = SIZES.widths
    layers = {                              # widths of input and output
        "gate or up": (w.model, w.mlp),
        "down": (w.mlp, w.model),
        "q": (w.model, w.queries),
        "o": (w.queries, w.model),
        "k or v": (w.model, w.keys),
        "gate + up as one": (w.model, 2 * w.mlp),
        "q + k + v as one": (w.model, w.queries + 2 * w.keys),
    }
    for name, (width_in, width_out) in layers.items():
        x = random(tokens, width_in)
        weight = random(width_out, width_in)
        grad = random(tokens, width_out)
        time_product(f"{name}: forward", x, weight.T)
        time_product(f"{name}: gradient of x", grad, weight)
        time_product(f"{name}: gradient of w", grad.T, x)
    if CUDA:
        float8_products(tokens, w.model, w.mlp)


def float8_products(tokens, width, mlp_width):
    """Time the gate's product in float8, scaled by 1, with fast and with exact accumulation."""
    x = random(tokens, width).to(torch.float8_e4m3fn)
    weight = random(mlp_width, width).to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    flops = 2 * tokens * width * mlp_width
    for sums, fast in (("fast", True), ("exact", False)):
        name = f"float8 gate, {sums} accumulation"
        work = partial(torch._scaled_mm, x, weight.T, one, one, out_dtype=DTYPE,
                       use_fast_accum=fast)
        try:
            ms = milliseconds(work, 20)
        except Exception as e:
            print(f"{name}: {one_line(e)}")
            record("product", name=name, error=one_line(e))
            continue
        record("product", name=name, ms=ms, tflops=flops / ms / 1e9)
        print(f"{name:<55}{ms:9.3f} ms {flops / ms / 1e9:8.1f} TFLOP/s")


# ---------------------------------------------------------------------------- memory and launches
def device_bandwidth():
    size = SIZES.copied_bytes
    a = torch.zeros(size, device=DEVICE, dtype=torch.uint8)
    b = torch.zeros_like(a)
    ms = milliseconds(lambda: b.copy_(a), 20)
    tb_s = 2 * size / ms / 1e9
    record("copy", ms=ms, tb_s=tb_s)
    print(f"copy on the device: {tb_s:.2f} TB/s, reads and writes together")


def transfer_bandwidth():
    """Time copies of 1 GiB between the CPU's memory and the GPU's."""
    on_cpu = torch.zeros(2**28)
    pinned = on_cpu.pin_memory()
    on_gpu = on_cpu.to(DEVICE)
    transfers = {                           # source and target
        "to the device": (on_cpu, on_gpu),
        "to the device, pinned": (pinned, on_gpu),
        "from the device": (on_gpu, on_cpu),
        "from the device, pinned": (on_gpu, pinned),
    }
    for name, (source, target) in transfers.items():
        ms = milliseconds(partial(target.copy_, source, non_blocking=True), 3, 1)
        gb_s = on_cpu.nbytes / ms / 1e6
        record("transfer", name=name, gb_s=gb_s)
        print(f"{name}: {gb_s:.1f} GB/s")


def launches():
    tiny = torch.zeros(8, device=DEVICE)

    def work():
        for _ in range(1000):
            tiny.add_(1)
    us = milliseconds(work, 3, 1)           # the ms of 1000 launches are the us of one
    record("launch", us=us)
    print(f"tiny kernels launched in sequence: {us:.2f} us each")


def main():
    torch.manual_seed(0)
    environment()
    products()
    device_bandwidth()
    if CUDA:
        transfer_bandwidth()
    launches()


if __name__ == "__main__":
    main()

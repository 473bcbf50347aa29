"""What the machine is, and its ceilings: matrix rate, bandwidth, the cost of a launch.

Matrix products are those of a DiT block of the 2B model for 8 images of 1024 tokens, forward and
both gradients, as they are and as one product each of gate + up and of q + k + v.
"""
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import kit  # isort: skip (before torch)
import torch
from kit import CUDA, DEVICE, DTYPE, SMALL, milliseconds, record, why


def said(*argv):
    """The last line that a program prints, or why there is none."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as e:
        return why(e)
    return (done.stdout.strip().splitlines() or [""])[-1]


def package(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment():
    row = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
               cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0],
               disk_gb=shutil.disk_usage(kit.ROOT).free / 1e9)
    for name in ("triton", "transformers", "numpy", "deepspeed", "torchao", "safetensors"):
        row[name] = package(name)
    if CUDA:
        p = torch.cuda.get_device_properties(0)
        row |= dict(
            gpu=p.name, processors=p.multi_processor_count, memory_gb=p.total_memory / 1e9,
            capability=torch.cuda.get_device_capability(), cudnn=torch.backends.cudnn.version(),
            nccl=".".join(map(str, torch.cuda.nccl.version())),
            smi=said("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit,"
                     "temperature.gpu,clocks_event_reasons.active", "--format=csv,noheader"))
    row["gcc"] = said("gcc", "-dumpfullversion")
    record("environment", **row)
    print(row)


def rate(name, a, b, rounds=20):
    """Time a product, and note its FLOP/s."""
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    took = milliseconds(lambda: a @ b, rounds)
    record("product", name=name, ms=took, tflops=flops / took / 1e9)
    print(f"{name:<32} {str([*a.shape, b.shape[1]]):<22}{took:9.3f} ms "
          f"{flops / took / 1e9:8.1f} TFLOP/s")


def random(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def products():
    n, rows = (256, 256) if SMALL else (8192, 8192)
    rate("square", random(n, n), random(n, n))
    torch.set_float32_matmul_precision("high")
    single = torch.float32
    rate("square, tf32", random(n, n, dtype=single), random(n, n, dtype=single), 5)
    D, F, Q, K = (64, 128, 64, 32) if SMALL else (2304, 9216, 2048, 1024)
    layers = {"gate or up": (D, F), "down": (F, D), "q": (D, Q), "o": (Q, D), "k or v": (D, K),
              "gate + up as one": (D, 2 * F), "q + k + v as one": (D, Q + 2 * K)}
    for name, (wide, high) in layers.items():
        x, w, grad = random(rows, wide), random(high, wide), random(rows, high)
        rate(f"{name}: forward", x, w.T)
        rate(f"{name}: gradient of x", grad, w)
        rate(f"{name}: gradient of w", grad.T, x)
    if CUDA:
        float8(rows, D, F)


def float8(rows, D, F):
    """The gate's product in float8, scaled by 1, with quick and with exact sums."""
    x, w = random(rows, D).to(torch.float8_e4m3fn), random(F, D).to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    for quick in (True, False):
        def work(quick=quick):
            torch._scaled_mm(x, w.T, one, one, out_dtype=DTYPE, use_fast_accum=quick)
        name = f"float8 gate, {'quick' if quick else 'exact'} sums"
        try:
            took = milliseconds(work, 20)
        except Exception as e:
            print(f"{name}: {why(e)}")
            record("product", name=name, error=why(e))
            continue
        record("product", name=name, ms=took, tflops=2 * rows * D * F / took / 1e9)
        print(f"{name:<55}{took:9.3f} ms {2 * rows * D * F / took / 1e9:8.1f} TFLOP/s")


def bandwidth():
    size = 2**20 if SMALL else 2**31
    a, b = (torch.zeros(size, device=DEVICE, dtype=torch.uint8) for _ in range(2))
    took = milliseconds(lambda: b.copy_(a), 20)
    record("copy", ms=took, tb_s=2 * size / took / 1e9)
    print(f"copy on the device: {2 * size / took / 1e9:.2f} TB/s, read and written")
    del a, b
    if not CUDA:
        return
    here = torch.zeros(2**28)               # 1 GiB
    there, pinned = here.to(DEVICE), here.pin_memory()
    for name, source, target in (("to the device", here, there),
                                 ("to the device, pinned", pinned, there),
                                 ("from the device", there, here),
                                 ("from the device, pinned", there, pinned)):
        def work(source=source, target=target):
            target.copy_(source, non_blocking=True)
        took = milliseconds(work, 3, 1)
        record("transfer", name=name, gb_s=here.nbytes / took / 1e6)
        print(f"{name}: {here.nbytes / took / 1e6:.1f} GB/s")


def launches():
    tiny = torch.zeros(8, device=DEVICE)

    def work():
        for _ in range(1000):
            tiny.add_(1)
    took = milliseconds(work, 3, 1)         # of 1000, so as many microseconds each
    record("launch", us=took)
    print(f"one tiny kernel after the other: {took:.2f} us each")


def main():
    torch.manual_seed(0)
    environment()
    products()
    bandwidth()
    launches()


if __name__ == "__main__":
    main()

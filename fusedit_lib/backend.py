"""What makes a run faster on the machine at hand. What is computed stays the same, up to rounding;
`float8` alone changes more, and only who asks for it gets it.

Each entry was measured before it was kept: README, "How fast". Attention is one call of PyTorch's
scaled_dot_product_attention (fusedit.attend), which picks a kernel by device, type and shape; here
is only said what it may pick from.
"""
import ctypes
import os
import platform
import sys

import torch

from fusedit import FuseDiTError, attend

# PyTorch's names of its attention kernels, by the number that it gives them.
KERNELS = {0: "products and a softmax", 1: "FlashAttention", 2: "the memory-efficient kernel",
           3: "cuDNN"}


def native_bf16(device):
    """Whether a device computes in bfloat16 itself, not in float32 with roundings in between."""
    kind = os.environ.get("PJRT_DEVICE", "").lower() if device.type == "xla" else device.type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):          # ATEN_CPU_CAPABILITY may forbid AVX-512
        return (torch.backends.cpu.get_cpu_capability().startswith("AVX512")
                and torch.cpu._is_avx512_bf16_supported())
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def dtype_name(flag, device):
    """"bf16" or "float32", of a --dtype flag: auto is bf16 where that is native."""
    return flag if flag != "auto" else "bf16" if native_bf16(device) else "float32"


def dtype_of(name):
    """torch.dtype of "bf16" or "float32"."""
    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


def slow_dtype(name, device):
    """What to say of a dtype that the device emulates; "" of any other."""
    slow = name == "bf16" and not native_bf16(device)
    return f"bf16 is emulated on this {device.type}: float32 would be faster" if slow else ""


def settings(device, dtype):
    """Set this process up for computing in dtype on a device."""
    if device.type != "cpu":
        return
    # In bf16 the CPU's fused attention is 2.5 times slower than two products and a softmax are. (In
    # float32 it is as fast, and without it scores of long sequences would fill the memory.)
    torch.backends.cuda.enable_flash_sdp(dtype != torch.bfloat16)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)          # glibc's
        for key in (-1, -3) if mallopt else ():            # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD:
            mallopt(key, 2**30)                            # keep freed memory, do not map it anew


def compile_model(model, vae, llm=True, budget=1.0):
    """Compile the blocks of both towers and, on a GPU, the VAE: a minute, the first time.

    Block by block: all of a tower share one graph, so that the time does not grow with depth.
    budget: the share of what a block would save for its backward pass that it may save; the
    compiler computes the rest again, what is cheapest first.
    """
    torch._functorch.config.activation_memory_budget = budget
    # Graphs differ by length of text, batch size and with or without gradients: 8 may not do.
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.cpp.use_decompose_tanh = True   # GELU on a CPU: twice as fast
    for module in (*model.dit.layers, model.dit.norm_out, *(model.llm.layers if llm else ())):
        module.forward = torch.compile(module.forward)
    compile_vae(vae)


def compile_vae(vae):
    """Compile an autoencoder, if there is one, on a GPU: on a CPU it becomes slower."""
    if vae and next(vae.parameters()).is_cuda:
        vae.encoder.compile()
        vae.decoder.compile()


def on_tiles(tokens, most, device):
    """How long a text of so many tokens is made: on a GPU a multiple of 128, if `most` has it.

    With keys 64 over such a multiple, and a mask, cuDNN 9.19's gradient can be NaN
    (pytorch#196678); pictures have 256 tokens, 1024, ... And a compiled model compiles anew for
    some lengths.
    """
    return min(most, -(-tokens // 128) * 128) if device.type == "cuda" else tokens


def check_attention(model, dtype):
    """Which kernel the DiT's attention takes on a GPU, in words; "" on other devices.

    It is tried once, forward and backward, with a mask as training has it: cuDNN, PyTorch's first
    choice on an H100, raises where it has no plan for a shape, and some versions return NaN
    (pytorch#196678). Then it is switched off, and PyTorch takes the next one.
    """
    weight = model.dit.proj_out.weight
    if weight.device.type != "cuda":
        return ""
    config, gemma = model.config, model.llm.config
    side = config.image_size // (8 if config.vae else 1) // config.patch_size
    image, text = side * side, min(128, config.max_text_tokens)
    q, k, v = (torch.randn(2, heads, tokens, gemma.head_dim, device=weight.device, dtype=dtype,
                           requires_grad=True)
               for heads, tokens in ((gemma.num_attention_heads, image),
                                     (gemma.num_key_value_heads, image + text),
                                     (gemma.num_key_value_heads, image + text)))
    mask = torch.zeros(2, 1, 1, image + text, device=weight.device, dtype=dtype)
    mask[1, ..., 1:text] = -torch.inf       # a caption of one token

    said = without_what_fails(q, k, v, mask)
    rows = q.reshape(2, gemma.num_key_value_heads, -1, gemma.head_dim)
    return f"attention by {KERNELS.get(torch._fused_sdp_choice(rows, k, v, mask), '?')}{said}"


def without_what_fails(q, k, v, mask):
    """Switch off cuDNN's attention if this one raises or has a gradient that is not finite."""
    def problem():
        try:
            with torch.enable_grad():       # sampling has it off
                grads = torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v))
        except RuntimeError as e:
            return str(e).splitlines()[0]
        return "" if all(g.isfinite().all() for g in grads) else "its gradient is not finite"
    if not (first := problem()):
        return ""
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A stored graph names its kernel, and is found again whatever has been switched off since.
    torch._functorch.config.enable_autograd_cache = False
    if why := problem():
        raise FuseDiTError(f"attention fails on this GPU, with cuDNN's kernel and without: {why}")
    return f"; cuDNN's is switched off ({first})"


def float8(dit):
    """The products of a DiT's blocks in float8 from now on: torchao's recipe of a scale a tensor.

    Weights, gradients and Adam's state keep their types. Where the hardware has no float8 it is
    emulated: slow, but it shows what the rounding does.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    device = dit.proj_out.weight.device
    has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if device.type == "cuda" and not has:
        raise FuseDiTError("--float8 needs a GPU with float8: Ada, Hopper (H100) or newer")
    convert_to_float8_training(dit.layers, config=Float8LinearConfig(emulate=not has))


def pick_device(name):
    """torch.device of a --device flag; "auto" takes a GPU where there is one."""
    if name in ("auto", "cuda") and torch.cuda.is_available():       # torchrun's k takes GPU k
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = "cpu" if name == "auto" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise FuseDiTError(f"--device {name} is not to be had here ({str(e).splitlines()[0]}); "
                           "use --device cpu or auto") from None
    return device


def local_world():
    """How many of a run's processes are on this machine, as torchrun or deepspeed says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def rank_and_world():
    """This process's number, and how many torchrun (or Slurm, so told) has started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

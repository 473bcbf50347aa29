"""Device, dtype, attention kernels and compilation.

Results stay the same up to rounding, except with use_float8, which is off unless it is requested.
Each setting was measured before it was kept: see docs/performance.md. Attention is a single call of
PyTorch's scaled_dot_product_attention (fusedit.attention), which picks a kernel by device, dtype
and shape; this file only restricts what it may pick from.
"""
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys

import torch
import torch.distributed as dist

from fusedit import FuseDiTError, attention

# PyTorch's attention kernels, by their number in torch.nn.attention.SDPBackend.
KERNELS = {0: "matrix products and a softmax", 1: "FlashAttention",
           2: "the memory-efficient kernel", 3: "cuDNN"}
TILE = 128                                  # keys per tile of a GPU kernel

# What torch.compile raises if the compiler that it calls, or Triton, is missing or fails.
COMPILER_ERRORS = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")
INSTALL_COMPILER = ("install one with Python's headers (on Debian and Ubuntu: apt install g++ "
                    "python3-dev; on macOS: xcode-select --install), or leave out --compile")


# ---- processes and devices -----------------------------------------------------------------------

def rank_and_world():
    """The rank of this process and the number of processes, as set by torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def several_ranks():
    """Returns True if this process is connected to others of the same run."""
    return dist.is_initialized() and dist.get_world_size() > 1


def local_world():
    """The number of the run's processes on this machine, as set by torchrun or deepspeed."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def first_line(error):
    """The first line of an error's message, or the name of its class if it has no message."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text):
    """The text with its control characters, such as line breaks, written as escapes: \\n."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda m: m[0].encode("unicode_escape").decode(), text)


def pick_device(name):
    """The torch.device for a value of --device; "auto" is a GPU if there is one."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"            # under torchrun: one per rank
    if name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise FuseDiTError(f"--device {name} is not available here ({first_line(e)}); "
                           "use --device cpu or auto") from None
    return device


def configure(device, dtype):
    """Configure this process to compute in dtype on a device."""
    if device.type != "cpu":
        return
    # In bf16 the CPU's fused attention is 2.5 times slower than two matmuls and a softmax. (In
    # float32 it is as fast, and without it the scores of long sequences would fill the memory.)
    torch.backends.cuda.enable_flash_sdp(dtype != torch.bfloat16)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        keep_freed_memory()


def keep_freed_memory():
    """Tell glibc's malloc to keep freed memory, since mapping it again takes time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)           # None: another C library
    if mallopt is not None:
        M_TRIM_THRESHOLD = -1
        M_MMAP_THRESHOLD = -3
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def release_memory():
    """Return freed memory, which malloc and PyTorch would keep for later, to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)          # None: another C library
    if trim is not None:
        trim(0)


def warm_up_mkl():
    """Call MKL's vector functions once on one thread.

    If several threads make the first call at once, its results lose precision (pytorch#188792).
    """
    for function in (torch.exp, torch.log, torch.sin, torch.cos, torch.sqrt):
        function(torch.ones(1))


# ---- dtypes --------------------------------------------------------------------------------------

def native_bf16(device):
    """Returns True if a device computes in bfloat16 natively, rather than in rounded float32."""
    kind = device.type
    if kind == "xla":
        kind = os.environ.get("PJRT_DEVICE", "").lower()
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):       # ATEN_CPU_CAPABILITY may forbid AVX-512
        may_use_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return may_use_avx512 and torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def dtype_name(flag, device):
    """"bf16" or "float32" for a value of --dtype; "auto" is bf16 if the device has it natively."""
    if flag != "auto":
        return flag
    return "bf16" if native_bf16(device) else "float32"


def torch_dtype(name):
    """The torch.dtype for "bf16" or "float32"."""
    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


def emulation_note(name, device):
    """A note for the user if the device emulates this dtype; otherwise ""."""
    if name == "bf16" and not native_bf16(device):
        return f"bf16 is emulated on this {device.type}: float32 would be faster"
    return ""


def use_float8(dit):
    """Make the linear layers of a DiT's blocks compute in float8, with one scale per tensor.

    This is torchao's recipe. Weights, gradients and Adam's state keep their dtypes. A CPU emulates
    float8, which is slow but shows the effect of the rounding. Raises FuseDiTError on a GPU without
    float8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    device = dit.proj_out.weight.device
    is_gpu = device.type == "cuda"
    native = is_gpu and torch.cuda.get_device_capability(device) >= (8, 9)
    if is_gpu and not native:
        raise FuseDiTError("--float8 needs a GPU with float8: Ada, Hopper (H100) or newer")
    convert_to_float8_training(dit.layers, config=Float8LinearConfig(emulate=not native))


# ---- compilation ---------------------------------------------------------------------------------

def check_compiler(device):
    """Raise FuseDiTError if torch.compile would find no compiler for a device.

    It writes C++ for a CPU. For a GPU it uses Triton, which builds its driver in C.
    """
    if device.type == "cuda":
        choices = os.environ.get("CC", "gcc clang").split()
        if not any(shutil.which(name) for name in choices):
            raise FuseDiTError(f"no C compiler found, which --compile needs: {INSTALL_COMPILER}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    try:
        get_cpp_compiler()
    except RuntimeError:                    # InvalidCxxCompiler, for one
        raise FuseDiTError("no C++ compiler found, which --compile needs: "
                           f"{INSTALL_COMPILER}") from None


def compiler_problem(error):
    """Describes an error of torch.compile if its compiler has failed; "" for any other error."""
    error = getattr(error, "inner_exception", error)       # that of BackendCompilerFailed
    text = str(error)
    known = type(error).__name__ in COMPILER_ERRORS or "C compiler" in text
    if isinstance(error, subprocess.CalledProcessError):   # Triton runs the compiler so
        known = re.search(r"\b(gcc|cc|clang|g\+\+|c\+\+)", str(error.cmd)) is not None
    if not known:
        return ""
    lines = [line for line in text.splitlines() if "error: " in line]
    reason = (lines or [first_line(error)])[0]
    return f"--compile has failed ({reason.strip()}): {INSTALL_COMPILER}"


def compile_model(model, vae, llm=True, budget=1.0):
    """Compile the blocks of both towers and, on a GPU, the VAE; takes about a minute on first use.

    Blocks are compiled one by one, and all blocks of a tower share a graph, so the time does not
    grow with depth. budget: the fraction of a block's activations that may be kept for the backward
    pass; the compiler recomputes the rest, the cheapest first.
    """
    check_compiler(model.dit.proj_out.weight.device)
    # `import torch` does not import the compiler.
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    functorch_config.activation_memory_budget = budget
    # Graphs differ by text length, batch size and whether there are gradients; the default limit
    # of 8 may be too low.
    dynamo_config.recompile_limit = 64
    inductor_config.cpp.use_decompose_tanh = True        # makes GELU on a CPU twice as fast
    modules = [*model.dit.layers, model.dit.norm_out]
    if llm:
        modules += model.llm.layers
    for module in modules:
        module.forward = torch.compile(module.forward)
    compile_vae(vae)


def compile_vae(vae):
    """Compile the VAE, if there is one, on a GPU. On a CPU, compiling makes it slower."""
    if vae is not None and next(vae.parameters()).is_cuda:
        vae.encoder.compile()
        vae.decoder.compile()


# ---- attention kernels ---------------------------------------------------------------------------

def round_up_to_tile(tokens, limit, device):
    """The length to pad a text to: on a GPU the next multiple of 128, but at most limit.

    With a mask and 64 keys in the last tile, cuDNN 9.19's gradient can be NaN (pytorch#196678).
    (Images of 256 or 512 pixels have 256 or 1024 tokens, which are whole tiles.) Padding also keeps
    the number of different lengths small: a compiled model may recompile for each of them.
    """
    if device.type != "cuda":
        return tokens
    return min(limit, -(-tokens // TILE) * TILE)


def check_attention(model, vae, device, dtype):
    """Try the attention kernel that the DiT will use on a GPU. Returns a line for the log.

    The kernel runs once, forward and backward, with a mask as in training. cuDNN, PyTorch's first
    choice on an H100, raises an error for shapes that it does not support, and some versions return
    NaN (pytorch#196678). In either case cuDNN is switched off and PyTorch uses its next choice.
    model, vae: only their shapes matter; vae may be None. Returns "" on other devices.
    """
    if device.type != "cuda":
        return ""
    config = model.config
    gemma = model.llm.config
    side = config.image_size // config.patch_size
    if vae is not None:
        side //= vae.factor
    image = side * side
    text = min(TILE, config.max_text_tokens)

    def random(heads, tokens):
        return torch.randn(2, heads, tokens, gemma.head_dim, device=device, dtype=dtype,
                           requires_grad=True)
    q = random(gemma.num_attention_heads, image)
    k = random(gemma.num_key_value_heads, text + image)
    v = random(gemma.num_key_value_heads, text + image)
    mask = torch.zeros(2, 1, 1, text + image, device=device, dtype=dtype)
    mask[1, ..., 1:text] = -torch.inf       # a caption of one token

    note = avoid_broken_cudnn(q, k, v, mask)
    q_rows = q.reshape(2, gemma.num_key_value_heads, -1, gemma.head_dim)
    kernel = KERNELS.get(torch._fused_sdp_choice(q_rows, k, v, mask), "?")
    return f"attention kernel: {kernel}{note}"


def avoid_broken_cudnn(q, k, v, mask):
    """Switch off cuDNN's attention if it fails on these tensors. Returns a note for the log or "".

    It fails if it raises an error or its gradient is not finite. Raises FuseDiTError if attention
    fails without cuDNN as well.
    """
    def problem():
        try:
            with torch.enable_grad():       # sampling disables it
                grads = torch.autograd.grad(attention(q, k, v, mask).sum(), (q, k, v))
        except RuntimeError as e:
            return first_line(e)
        if all(grad.isfinite().all() for grad in grads):
            return ""
        return "its gradient is not finite"

    first = problem()
    if not first:
        return ""
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A cached graph names its kernel, and would still run cuDNN's after it is switched off.
    from torch._functorch import config as functorch_config
    functorch_config.enable_autograd_cache = False
    second = problem()
    if second:
        raise FuseDiTError("attention fails on this GPU, both with and without cuDNN's kernel: "
                           + second)
    return f"; cuDNN's is switched off ({first})"

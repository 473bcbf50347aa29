"""What the commands share: flags, prompt files, device and model, errors in one line."""
import argparse
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.backend import pick_device
from fusedit_lib.pretrained import last_checkpoint, load_model
from fusedit_lib.vae import load_vae


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, examples left as they are laid out."""
    def _get_help_string(self, action):                    # "(default: None)" tells nothing
        return action.help if action.default is None else super()._get_help_string(action)


# --guidance-span of sample.py and evaluate.py
SPAN = dict(type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0))


def dtype(text):
    """argparse's type of --dtype. bfloat16 is what it was called before."""
    return "bf16" if text == "bfloat16" else text


# --dtype of what does not train
DTYPE = dict(type=dtype, choices=("auto", "bf16", "float32"), default="auto")


def positive(text):
    """argparse's type of a whole number from 1 up."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def uint32(text):
    """argparse's type of a seed: what every random generator takes."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError("must be from 0 to 4294967295")
    return int(text)


def read_prompts(path):
    """The prompts of a text file (a Path), one a line; empty lines are left out."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()   # -sig: what Windows puts in front
    except OSError as e:
        raise FuseDiTError(f"cannot read the prompt file {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise FuseDiTError(f"the prompt file {path} is not UTF-8 (byte {e.start}): save it as "
                           "UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise FuseDiTError(f"the prompt file {path} is empty: write a prompt a line")
    return prompts


def pick_dtype(args):
    """(torch.device, torch.dtype) of --device and --dtype; args.dtype is never auto after it."""
    device = pick_device(args.device)
    args.dtype = backend.dtype_name(args.dtype, device)
    return device, backend.torch_dtype(args.dtype)


def open_model(args):
    """(model, VAE or None, device); args.model and args.guidance then say what draws and how."""
    if args.guidance_span[0] > args.guidance_span[1]:
        raise FuseDiTError("--guidance-span: the lower noise level comes first, as in 0 0.9")
    device, dtype = pick_dtype(args)
    args.model = str(last_checkpoint(args.model))  # a run goes on, but a picture names what drew it
    backend.configure(device, dtype)
    c = (model := load_model(args.model, device, dtype, not args.no_ema)).config
    args.guidance = c.guidance if args.guidance is None else args.guidance
    vae = load_vae(c.vae, device, dtype, c.in_channels) if c.vae else None
    if kernel := backend.check_attention(model, dtype):
        print(kernel, file=sys.stderr)
    if args.compile:
        backend.compile_model(model, vae)
    return model, vae, device


def announce(args, model, prompts):
    """Say on stderr what draws; which words the model cannot read, and where a prompt is cut."""
    device = model.llm.embed_tokens.weight.device
    slow = backend.emulation_note(args.dtype, device)
    print(f"drawing in {args.dtype} on {device}" + (f" ({slow})" if slow else ""), file=sys.stderr)
    tok = model.tokenizer
    rows, limit = fusedit.token_ids(tok, prompts, model.config)
    ids = {w: tok(w, add_special_tokens=False)["input_ids"] for prompt, row in zip(
        prompts, rows, strict=True) if tok.unk_token_id in row
        for w in re.findall(r"\w+|[^\w\s]", prompt)}
    if unknown := [w for w in ids if tok.unk_token_id in ids[w]]:
        print("warning: the model does not know:", ", ".join(unknown), file=sys.stderr)
    for row in [row for row in rows if len(row) > limit]:
        end = tok.decode(row[:limit], skip_special_tokens=True)[-40:]
        print(f"warning: prompt cut to {limit} tokens, after {end!r}", file=sys.stderr)


def run(main, lower):
    """Run a command; what the user can mend is one line on stderr, never a traceback."""
    try:
        sys.exit(main())
    except FuseDiTError as e:
        message, code = str(e), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except ModuleNotFoundError as e:        # an extra
        extras = dict(gpu="deepspeed", tpu="torch_xla", data="duckdb", eval="efficientnet",
                      float8="torchao", watch="matplotlib tensorboard wandb")
        name = (e.name or "").split("_lite")[0]
        found = [extra for extra, names in extras.items() if name in names.split()]
        what = f"-e '.[{found[0]}]'" if found else e.name
        message, code = f"{e.name} is not installed: pip install {what}", 1
    except (OSError, SafetensorError) as e:  # a full disk, a folder that cannot be written
        message = f"{getattr(e, 'strerror', None) or e}: {getattr(e, 'filename', None) or ''}"
        code = 1
    except (RuntimeError, MemoryError) as e:
        if "closed by peer" in str(e):
            message, code = "another process of this run has stopped; its own log says why", 1
        elif isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
                word in str(e) for word in ("allocate", "RESOURCE_EXHAUSTED")):
            message, code = f"out of memory: lower {lower}", 1
        else:
            raise
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        os._exit(code)                      # what is done at exit may wait for the other ranks
    sys.exit(code)

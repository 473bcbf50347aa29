"""Log lines, metrics, counts of skipped steps and samples, validation and image grids."""
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.files import atomic_write
from fusedit_lib.train import costs, distributed, hardware
from fusedit_lib.train.metrics_log import MetricsLog, warn_if_unwritable
from fusedit_lib.train.schedule import sample_grid_is_due, validation_is_due
from fusedit_lib.train.validation import (
    VALIDATION_SIGMAS,
    held_out_batches,
    sample_grid,
    validation_losses,
)

MAX_SKIPPED_IN_A_ROW = 10                   # after this many skipped steps, the run has diverged


class SeparateDevices:
    """One device per rank, which runs each operation at once. xla.MeshDevices is the other kind."""

    as_one = False                          # each rank draws and validates its own share

    def __init__(self, device, world):
        self.count = world                  # of all ranks
        self.peak_flops = hardware.peak_flops(device, world)    # FLOP/s of all; None if not known

    def place(self, batches):
        return batches

    def split_rows(self, tensor):
        return tensor

    def sync(self):
        pass

    def memory_in_use(self):
        return None


class StepResults(NamedTuple):
    """The records of all ranks since the last log line."""
    losses: list                            # mean loss of each step
    grad_norms: list                        # of each step; NaN if not known
    bad: list                               # names of samples that could not be read
    notes: Counter                          # number of images by the kind of their flaw


class Monitor:
    """Records micro-batches and steps; writes the log, validation losses and image grids.

    Every rank has one, because sums and image grids need all ranks. Only rank 0 writes.
    """

    def __init__(self, run, config, model, vae, checkpoint, micro_batch, source,
                 mesh_devices=None):
        """checkpoint: the Checkpoint to resume from, or None.

        micro_batch: images per rank in one forward pass. source: the training data, a Batches.
        mesh_devices: xla.MeshDevices, or None if each rank has its own device.
        """
        self.run = run
        self.config = config
        self.model = model
        self.vae = vae
        self.micro_batch = micro_batch
        self.out = Path(run.out)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device = model.llm.embed_tokens.weight.device

        self.devices = mesh_devices or SeparateDevices(self.device, self.world)
        if source.latents and not self.devices.as_one:
            vae.to("cpu")                   # training does not need it; validate() moves it back
        self.held_out = None                # validation batches, read on first use

        # records since the last log line; tensors stay on the device
        self.losses = []                    # of each micro-batch
        self.grad_norms = []                # of each step
        self.bad = []
        self.notes = Counter()
        self.text_tokens = 0                # without padding
        self.chip_memory = 0                # most bytes in use on a TPU chip at any log line
        self.knows_memory = True            # until it cannot be read

        # counts since the start of the run
        self.step = 0
        self.counts = dict(seen=0, skipped=0, skipped_steps=0)
        self.skipped_in_a_row = 0
        self.printed_notes = set()
        self.has_logged = False
        self.least_samples = max(len(source), 1000)        # for --max-skipped
        if checkpoint is not None:
            self.step = checkpoint.step
            self.counts = {name: getattr(checkpoint, name) for name in self.counts}

        self.peak_flops = self.devices.peak_flops
        if self.peak_flops:                 # the MFU is the useful FLOP/s as a share of it
            self.useful_flops = costs.useful_flops(config, source.latents, run.train_llm,
                                                   run.lora > 0, run.cache_text)
        if self.rank == 0:
            self.open_log()
        self.restart_clock(True)

    def open_log(self):
        """Rank 0: open the log, and print a summary of the run."""
        run = self.run
        self.metrics = MetricsLog(run, self.config, self.step)
        (self.out / "samples").mkdir(exist_ok=True)
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        devices = self.devices.count
        accumulation = run.batch // (self.micro_batch * self.world)
        images = run.batch // (accumulation * devices)
        print(f"{self.out}: {trainable:,} trainable parameters, from step {self.step} to "
              f"{run.steps}; batch {run.batch} = {devices} x {self.device.type} x {accumulation} "
              f"micro-batches of {images} images in {run.dtype}", flush=True)
        self.bar = tqdm(total=run.steps, initial=self.step, unit="step", disable=None, leave=False)

    # ------------------------------------------------------------------------------ recording

    def log_micro_batch(self, loss, loaded):
        """Record a micro-batch: its loss, a scalar on the device, and the dict from Batches."""
        self.losses.append(loss.detach())   # not read yet, which would wait for the device
        self.bad += loaded["bad"]
        self.notes.update(loaded["notes"])
        self.text_tokens += loaded["text_tokens"]

    def log_step(self, grad_norm):
        """Record an optimizer step. grad_norm: the norm before clipping, or None if not known."""
        if grad_norm is None:
            grad_norm = math.nan
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=self.device)
        self.grad_norms.append(norm)
        self.step += 1
        if self.rank == 0:
            self.bar.update()

    def restart_clock(self, paused):
        """Restart the measurement of images/s if training was paused."""
        if paused:
            self.start_clock(time.perf_counter())

    def start_clock(self, now):
        self.clock = now
        self.clock_step = self.step
        self.text_tokens = 0

    def gather(self):
        """StepResults of all ranks since the last call."""
        steps = len(self.grad_norms)
        losses = torch.stack([loss.cpu() for loss in self.losses])
        losses = losses.view(steps, -1).mean(1)            # mean over micro-batches
        grad_norms = torch.stack([norm.cpu() for norm in self.grad_norms]).tolist()
        bad = self.bad
        notes = self.notes
        self.losses = []
        self.grad_norms = []
        self.bad = []
        self.notes = Counter()
        if self.world > 1:
            dist.all_reduce(losses)
            most_bad, most_notes = distributed.largest_of_all_ranks(len(bad), len(notes))
            if most_bad:
                bad = sum(distributed.gather_from_all_ranks(bad), [])
            if most_notes:
                notes = sum(distributed.gather_from_all_ranks(notes), Counter())
        return StepResults((losses / self.world).tolist(), grad_norms, bad, notes)

    # ------------------------------------------------------------------------------ the log

    def log(self, step, lr):
        """Write a log line and a row of metrics.jsonl.

        Raises FuseDiTError, on all ranks, if the run has diverged or too many samples cannot be
        read.
        """
        if self.rank == 0:                  # before gather() waits: while the chips run a step
            self.read_chip_memory()
        results = self.gather()
        self.count_samples(results)
        self.print_new_notes(results)
        self.count_skipped_steps(step, results)
        self.stop_if_hopeless(step, results)
        if self.rank != 0:
            return

        now = time.perf_counter()
        images = (step - self.clock_step) * self.run.batch
        speed = images / max(now - self.clock, 1e-9)
        row = self.metrics_row(step, lr, results, speed)
        extra = {}
        if results.bad:
            extra["bad"] = results.bad
        if results.notes:
            extra["notes"] = dict(results.notes)
        self.metrics.write(row, extra)
        self.print_row(row, results.grad_norms[-1], speed)
        self.start_clock(now)

    def read_chip_memory(self):
        """Update chip_memory. Where it cannot be read once, it is not asked for again."""
        if self.knows_memory:
            used = self.devices.memory_in_use()
            self.knows_memory = used is not None
            self.chip_memory = max(self.chip_memory, used or 0)

    def metrics_row(self, step, lr, results, speed):
        """A row of metrics.jsonl. Its loss is the mean over the steps whose loss is finite.

        speed: images/s since the clock was started.
        """
        finite = [loss for loss in results.losses if math.isfinite(loss)]
        loss = None
        if finite:
            loss = sum(finite) / len(finite)
        grad_norm = results.grad_norms[-1]
        if not math.isfinite(grad_norm):
            grad_norm = None
        row = dict(step=step, loss=loss, lr=lr, grad_norm=grad_norm,
                   images_per_s=round(speed, 1), memory_gb=round(self.peak_memory_gb(), 3))

        # model FLOPs utilization: useful FLOP/s as a share of the devices' peak FLOP/s
        if self.peak_flops:
            per_image, per_token = self.useful_flops
            images = (step - self.clock_step) * self.run.batch // self.world
            tokens = self.text_tokens / max(1, images)     # per image on this rank
            mfu = speed * (per_image + per_token * tokens) / self.peak_flops
            row["mfu"] = round(mfu, 3)
        return row | dict(skipped=self.counts["skipped"],
                          skipped_steps=self.counts["skipped_steps"], time=round(time.time(), 1))

    def peak_memory_gb(self):
        """Peak memory in GB: of the TPU chip, allocated on the GPU, or else of this process."""
        if self.chip_memory:
            return self.chip_memory / 1e9
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1024                         # ru_maxrss is in KiB; on macOS, in bytes
        if sys.platform == "darwin":
            unit = 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def print_row(self, row, grad_norm, speed):
        """Print a row of metrics.jsonl as a log line."""
        images_left = (self.run.steps - row["step"]) * self.run.batch
        seconds = int(images_left / max(speed, 1e-9))
        loss = math.nan
        if row["loss"] is not None:
            loss = row["loss"]
        parts = [f"step {row['step']}/{self.run.steps}", f"loss {loss:.4f}", f"lr {row['lr']:.1e}",
                 f"grad norm {grad_norm:.2f}", f"{speed:,.0f} images/s",
                 f"memory {row['memory_gb']:.1f} GB"]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.0%}")
        if self.has_logged:                 # the first step may include compiling
            parts.append(f"remaining {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}")
        self.has_logged = True
        if row["skipped"]:
            parts.append(f"skipped samples {row['skipped']}")
        if row["skipped_steps"]:
            parts.append(f"skipped steps {row['skipped_steps']}")
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} images/s")
        self.bar.write("  ".join(parts))
        sys.stdout.flush()

    # ------------------------------------------------------------------------------ skipped

    def count_samples(self, results):
        """Count the samples, and print the names of some that could not be read."""
        if self.rank == 0 and self.counts["skipped"] < 30:
            for name in results.bad[:3]:
                print(f"skipped {name}", file=sys.stderr, flush=True)
        self.counts["skipped"] += len(results.bad)
        self.counts["seen"] += len(results.losses) * self.run.batch

    def print_new_notes(self, results):
        """Print each kind of flaw of images once; metrics.jsonl counts them."""
        for note, count in results.notes.items():
            if self.rank == 0 and note not in self.printed_notes:
                print(f"noted {note}: {count} images so far; metrics.jsonl counts them",
                      file=sys.stderr, flush=True)
            self.printed_notes.add(note)

    def count_skipped_steps(self, step, results):
        """Count the steps whose loss or gradient is not finite, and print the first ones."""
        number = step - len(results.losses)
        for loss, norm in zip(results.losses, results.grad_norms, strict=True):
            number += 1
            is_finite = math.isfinite(loss) and (math.isfinite(norm) or math.isnan(norm))
            if is_finite:
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            self.counts["skipped_steps"] += 1
            if self.rank == 0 and self.counts["skipped_steps"] <= 10:
                print(f"skipped step {number}: loss {loss}, gradient norm {norm}",
                      file=sys.stderr, flush=True)

    def stop_if_hopeless(self, step, results):
        """Raise FuseDiTError if too many steps or samples have been skipped."""
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            latest = self.out / "latest"
            last_good = "none"
            if latest.exists():
                last_good = latest.read_text().strip()
            raise FuseDiTError(
                f"the loss or gradient was not finite for {self.skipped_in_a_row} steps in a row, "
                f"up to step {step}: the run has diverged. The last good checkpoint is "
                f"{last_good}. Lower --lr, or start again with --warmup-steps")
        skipped = self.counts["skipped"]
        seen = self.counts["seen"]
        if skipped > self.run.max_skipped * max(seen, self.least_samples):
            last_bad = "none"
            if results.bad:
                last_bad = results.bad[-1]
            raise FuseDiTError(
                f"{skipped} of {seen} samples could not be read, more than --max-skipped "
                f"{self.run.max_skipped:g} allows; the last one is {last_bad}. "
                f"{self.out}/metrics.jsonl lists those of earlier log lines")

    # ------------------------------------------------------------------------------ validation

    def validate(self, step, model):
        """Write the image grid and the validation loss of a model, if they are due."""
        if self.vae is not None:
            vae_device = next(self.vae.parameters()).device
            self.vae.to(self.device)
        if sample_grid_is_due(self.run, step):
            self.write_grid(step, model)
        if validation_is_due(self.run, step):
            self.write_validation(step, model)
        if self.vae is not None:
            self.vae.to(vae_device)

    def write_grid(self, step, model):
        grid = sample_grid(self.run, model, self.vae, self.devices, self.rank, self.world)
        if self.rank == 0:
            info = PngInfo()
            info.add_text("prompts", "\n".join(self.run.prompts))
            path = self.out / "samples" / f"step-{step:07d}.png"
            with warn_if_unwritable(), atomic_write(path) as tmp:
                grid.save(tmp, "PNG", pnginfo=info)

    def write_validation(self, step, model):
        if self.held_out is None:
            self.held_out = held_out_batches(self.run, self.config, model, self.micro_batch,
                                             self.rank, self.world)
        batches = self.devices.place(self.held_out)
        losses = validation_losses(batches, model, self.vae, self.device, self.devices.sync)
        if self.rank == 0:
            mean = sum(losses) / len(losses)
            row = dict(step=step, val_loss=mean)
            for sigma, loss in zip(VALIDATION_SIGMAS, losses, strict=True):
                row[f"val_{sigma:.4f}"] = loss
            self.metrics.write(row)
            by_sigma = " ".join(f"{loss:.3f}" for loss in losses)
            self.bar.write(f"step {step}/{self.run.steps}  validation loss {mean:.4f}; by noise "
                           f"level, low to high: {by_sigma}")

"""Checkpoints: their names, what is wrong with one, reading them, and writing them safely.

A checkpoint such as step-0000500/ is a model folder of the EMA weights (see pretrained.py). Its
subfolder train_state/ has the trained weights, Adam's moments and the step number. Each rank writes
some of the files, but a checkpoint can be resumed with any number of ranks and any ZeRO stage. No
random state is stored, because all randomness in training is a function of the seed and of a
sample's position in the run (see data/batches.py).
"""
import errno
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from fusedit import FuseDiTError
from fusedit_lib.files import atomic_write, fsync, open_tensors, read_json, save_file
from fusedit_lib.folders import gemma_source
from fusedit_lib.lora import write_adapter
from fusedit_lib.train import distributed

# The values of folders.gemma_source, in words.
NAMED = {"package": "the package's", "release": "Google's release", "": "a local folder"}


def list_checkpoints(out):
    """The checkpoint folders of a run, oldest first."""
    return sorted(Path(out).glob("step-" + "[0-9]" * 7))


def checkpoint_name(step):
    return f"step-{step:07d}"


def step_of(folder):
    """The step of a checkpoint folder, a Path."""
    return int(folder.name.removeprefix("step-"))


def run_settings_json(run, config):
    """The text of a run's config.json, with RunConfig as "run" and FuseDiTConfig as "model"."""
    return json.dumps({"run": asdict(run), "model": asdict(config)}, indent=2) + "\n"


def print_warning(message):
    print(message, file=sys.stderr, flush=True)


def is_first_rank():
    """Returns True on rank 0. Works before the process group is initialised."""
    return os.environ.get("RANK", "0") == "0"


# ------------------------------------------------------------------------------ reading

def damage(folder):
    """Describes what is wrong with a checkpoint; returns None if it is undamaged.

    Every file must have the size recorded in state.json, which is written last.
    """
    try:
        sizes = read_json(folder / "train_state" / "state.json")["files"]
    except (FuseDiTError, KeyError, TypeError):
        return "train_state/state.json is missing or broken"
    for name, size in sizes.items():
        path = folder / name
        present = path.stat().st_size if path.exists() else 0
        if present != size:
            return f"{name} has {present:,} of its {size:,} bytes"
    return None


class Checkpoint(NamedTuple):
    """An open checkpoint. Its tensors are still on disk, in the form of files.open_tensors."""
    step: int
    data: str                               # digest of the training shards
    adam_step: int                          # steps that Adam has taken: step minus skipped ones
    seen: int                               # samples so far
    skipped: int                            # samples that could not be read
    skipped_steps: int                      # steps whose loss or gradient was not finite
    state: dict                             # weight.NAME, exp_avg.NAME, exp_avg_sq.NAME
    ema: dict                               # by parameter name
    gemma: str = ""                         # folders.gemma_source; "": unknown, or not asked


def load_checkpoint(folder):
    """Opens the Checkpoint in a folder that open_run returned; returns None for None."""
    if folder is None:
        return None
    stored = read_json(folder / "train_state" / "state.json")
    numbers = {name: value for name, value in stored.items() if name in Checkpoint._fields}
    return Checkpoint(**numbers, state=open_tensors(folder / "train_state", "state"),
                      ema=open_tensors(folder))


# ------------------------------------------------------------------------------ writing

class NoSpace(Exception):
    """A checkpoint would not fit in the free space."""


def is_for_lack_of_space(problem):
    """True if an exception means that the disk is full."""
    if isinstance(problem, SafetensorError):                # it has no errno
        return "No space left" in str(problem)
    return isinstance(problem, NoSpace) or getattr(problem, "errno", None) == errno.ENOSPC


class CheckpointWriter:
    """Writes checkpoints while training continues. Each rank writes its share.

    A checkpoint folder is complete or absent: it is written under a temporary name, fsynced,
    renamed when all ranks have finished, and only then recorded in `latest`. Old checkpoints are
    deleted after that.

    All ranks must create it and call save, poll, wait and close.
    """

    def __init__(self, run, config, checkpoint, data_digest):
        """Lock the run folder and remove what an interrupted run has left there.

        checkpoint: the Checkpoint that the run is resumed from, or None.
        data_digest: digest of the run's shards.
        """
        self.run = run
        self.config = config
        self.out = Path(run.out)
        self.data_digest = data_digest
        self.gemma = gemma_source(config.base)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.thread = None                  # writes this rank's files
        self.state = None                   # content of state.json for the checkpoint in progress
        self.problem = None                 # the exception that ended the thread
        self.last_saved = None              # step of the last complete checkpoint
        self.last_time = time.monotonic()   # when the last save began
        first = 0
        if checkpoint:
            first = checkpoint.step
        self.first = first                  # step at which this process starts
        if first:
            self.last_saved = first

        seen_by_ranks = distributed.gather_from_all_ranks((first, data_digest))
        if len(set(seen_by_ranks)) > 1:
            raise FuseDiTError("the ranks see different checkpoints or different shards: --out "
                               "and --data must be on storage that all machines share")
        if self.rank == 0:
            self.open_folder(first)
            if checkpoint and checkpoint.data != data_digest:
                print_warning(f"WARNING: --data has changed since step {first}: its samples now "
                              "come in a different order, so some are repeated and some delayed")
            if checkpoint and checkpoint.gemma not in ("", self.gemma) and not run.train_llm:
                print_warning(f"WARNING: Gemma was {NAMED[checkpoint.gemma]} until step {first}, "
                              f"and is {NAMED[self.gemma]} now: the weights may differ by rounding")
        dist.barrier()

    def open_folder(self, first):
        """Rank 0: lock the folder, and set aside checkpoints of later steps than `first`."""
        self.lock = FileLock(self.out / ".lock")           # released when the process ends
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise FuseDiTError(f"another run is writing to {self.out}: wait for it to finish, or "
                               "choose another --out") from None
        for unfinished in self.out.glob(".step-*.tmp"):    # left by a killed run
            shutil.rmtree(unfinished)
        for folder in list_checkpoints(self.out):
            if step_of(folder) > first:
                aside = folder.with_name(f"aside-{int(time.time())}-{folder.name}")
                print_warning(f"{folder} is newer than the checkpoint to resume from: renamed to "
                              f"{aside.name}")
                folder.rename(aside)
        if first:
            self.write_latest(first)

    def write_latest(self, step):
        with atomic_write(self.out / "latest") as tmp:
            tmp.write_text(f"{checkpoint_name(step)}\n")
        fsync(self.out)

    def temporary_folder(self, step):
        return self.out / f".{checkpoint_name(step)}.tmp"

    def part_name(self, stem, rank):
        """The name of the file that a rank writes."""
        if self.world == 1:
            return f"{stem}.safetensors"
        return f"{stem}-{rank + 1:05d}-of-{self.world:05d}.safetensors"

    def save(self, step, gather_state, counts):
        """Start writing a checkpoint in a thread.

        gather_state: returns the tensors that this rank writes, ({NAME: EMA}, {"weight.NAME": ...,
            "exp_avg.NAME": ..., "exp_avg_sq.NAME": ...}). They must be in CPU memory and must not
            be modified afterwards. Together, all ranks must return every tensor of a Checkpoint.
            The name of a piece of a tensor includes its location, as in NAME[0:8,0:512].
        counts: the other numbers of a Checkpoint.
        """
        self.wait()                         # limits memory to the copies of one checkpoint
        self.last_time = time.monotonic()
        tmp = self.temporary_folder(step)
        ema, state = gather_state()

        # check that there is room for the files of all ranks
        size = torch.tensor(sum(t.nbytes for t in [*ema.values(), *state.values()]))
        if self.world > 1:                  # one rank has only NCCL, which takes no CPU tensors
            dist.all_reduce(size)
        problem = None
        if self.rank == 0:
            problem = self.prepare(tmp, int(size))
        (failed,) = distributed.largest_of_all_ranks(problem is not None)
        if failed:
            self.warn(step, problem)
            return

        self.state = dict(step=step, data=self.data_digest, gemma=self.gemma) | counts
        self.thread = threading.Thread(target=self.write, args=(tmp, ema, state))
        self.thread.start()

    def prepare(self, tmp, size):
        """Make the folder for a checkpoint of `size` bytes.

        Returns None, or the exception that describes what went wrong.
        """
        try:
            free = shutil.disk_usage(self.out).free
            if free < size * 1.01:
                return NoSpace(f"it needs {size / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are "
                               "free")
            shutil.rmtree(tmp, ignore_errors=True)
            (tmp / "train_state").mkdir(parents=True)
        except OSError as e:
            return e
        return None

    def write(self, tmp, ema, state):
        """Write and fsync this rank's files; rank 0 also writes config.json. Runs in the thread."""
        config = json.dumps(asdict(self.config), indent=2)
        written = []
        try:
            for stem, tensors in (("model", ema), ("train_state/state", state)):
                path = tmp / self.part_name(stem, self.rank)
                save_file(tensors, path, {"config": config})
                written.append(path)
            if self.rank == 0:
                path = tmp / "config.json"
                path.write_text(config + "\n")
                written.append(path)
            for path in written:
                fsync(path)
        except BaseException as e:          # any exception leaves the checkpoint incomplete
            self.problem = e

    def poll(self, signal_number):
        """Publish the checkpoint in progress, if all ranks have written their files.

        signal_number: the number of the signal that this rank has received, or 0.
        Returns (the largest signal number of all ranks, True if --save-minutes have passed).
        """
        is_late = False
        if self.run.save_minutes:
            is_late = time.monotonic() - self.last_time > 60 * self.run.save_minutes
        is_writing = self.thread is not None and self.thread.is_alive()
        stop, is_late, is_writing, failed = distributed.largest_of_all_ranks(
            signal_number, is_late, is_writing, self.problem is not None)
        if self.thread is not None and not is_writing:
            self.finish(failed)
        return stop, bool(is_late)

    def wait(self):
        """Wait until the checkpoint in progress, if there is one, is complete."""
        if self.thread is not None:
            self.thread.join()
            (failed,) = distributed.largest_of_all_ranks(self.problem is not None)
            self.finish(failed)

    def finish(self, failed):
        """Publish the checkpoint that all ranks have written, or remove it if any rank failed."""
        step = self.state["step"]
        problem = self.problem
        self.thread = None
        self.problem = None
        tmp = self.temporary_folder(step)
        if self.rank == 0 and not failed:
            try:
                self.publish(tmp, step)
            except (OSError, SafetensorError) as e:
                failed = True
                problem = e
        if not failed:
            self.last_saved = step
            return
        self.warn(step, problem)
        if self.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)

    def publish(self, tmp, step):
        """Rank 0: complete the folder, rename it, record it in `latest`, delete old checkpoints."""
        for stem in ("model", "train_state/state"):
            self.write_index(tmp, stem)
        if self.run.lora:
            write_adapter(tmp, self.run.lora, self.run.init)
        sizes = {}
        for path in tmp.rglob("*"):
            if path.is_file():
                sizes[str(path.relative_to(tmp))] = path.stat().st_size
        with atomic_write(tmp / "train_state" / "state.json") as state:
            state.write_text(json.dumps(self.state | {"files": sizes}, indent=2) + "\n")
        for path in [*tmp.rglob("*"), tmp]:
            fsync(path)

        folder = self.out / checkpoint_name(step)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
        self.write_latest(step)
        self.delete_old()

    def write_index(self, tmp, stem):
        """Write the index of the files. Raises SafetensorError or OSError if one is missing."""
        weight_map = {}
        for rank in range(self.world):
            path = tmp / self.part_name(stem, rank)
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    weight_map[name] = path.name
        if self.world > 1:
            with atomic_write(tmp / f"{stem}.safetensors.index.json") as index:
                index.write_text(json.dumps({"weight_map": weight_map}) + "\n")

    def delete_old(self):
        """Delete all checkpoints except the --keep newest ones and those of --keep-every."""
        every = self.run.keep_every
        for old in list_checkpoints(self.out)[:-self.run.keep]:
            if every and step_of(old) % every == 0:
                continue
            shutil.rmtree(old, ignore_errors=True)         # a file may be open on a network disk

    def warn(self, step, problem):
        """Warn that a checkpoint failed.

        problem: the exception; None on the ranks where nothing failed.
        """
        if problem is None:
            return
        last = "There is no checkpoint yet"
        if self.last_saved:
            last = f"The last checkpoint is {checkpoint_name(self.last_saved)}"
        advice = ""
        if is_for_lack_of_space(problem):
            advice = f". Free some space in {self.out.resolve()}"
        print_warning(f"\nWARNING: step {step} was NOT saved: {problem}\n{last}; training "
                      f"continues{advice}\n")

    def close(self, step, stopped):
        """Finish writing. Returns the exit code, which is 0 if no step is lost.

        step: the last step of this process.
        stopped: the number of the signal that ended the run, or 0.
        """
        self.wait()
        if self.last_saved != step and step > 0:
            return 1
        if self.rank == 0 and step == 0:
            print(f"stopped by {signal.Signals(stopped).name} before the first step: there is "
                  f"nothing to save. To start again:\n  {resume_command(self.world)}", flush=True)
        elif self.rank == 0 and stopped:
            print(f"stopped by {signal.Signals(stopped).name}; step {step} is saved. To resume:\n"
                  f"  {resume_command(self.world)}", flush=True)
        elif self.rank == 0:
            state = f"is complete ({step} steps)"
            if step == self.first:
                state = f"was complete already ({step} steps): nothing is left to do"
            print(f"{self.out} {state}; to train further, raise --steps. To generate images: "
                  f"python sample.py --model {self.out} --prompt ...", flush=True)
        return 0


def resume_command(world):
    """The command with which the user can resume this run.

    It omits --local_rank, which launchers add, --resume, which would return to the same checkpoint
    again, and --resume-with, whose changes are made.
    """
    if world == 1:
        launcher = "python"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun ..."
    elif "LOCAL_RANK" in os.environ:
        launcher = "deepspeed ..."
    else:
        launcher = "on every host: python"
    words = []
    flag = ""
    for word in sys.argv:
        if word.startswith("--"):
            flag = word
        if not flag.startswith(("--local_rank", "--resume")):
            words.append(word)
    return f"{launcher} {shlex.join(words)}"

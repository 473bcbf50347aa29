"""Run folders and checkpoints: which one to resume from, and how one is written safely.

A checkpoint, step-0000500/, is a model folder of the EMA weights (see pretrained.py), written by
all ranks in parts, and train_state/ with the trained weights, Adam's moments and the step. Nothing
in it depends on the number of ranks or on the ZeRO stage. No random state needs to be stored: all
randomness of training is a function of the seed and of a sample's position in the run (see
data/batches.py).
"""
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.files import atomic_write, fsync, open_tensors, read_json, save_file
from fusedit_lib.train import distributed


def list_checkpoints(out):
    """The checkpoint folders of a run, oldest first."""
    return sorted(Path(out).glob("step-" + "[0-9]" * 7))


def checkpoint_name(step):
    return f"step-{step:07d}"


def step_of(folder):
    """The step of a checkpoint folder, a Path."""
    return int(folder.name.removeprefix("step-"))


def run_settings_json(run, config):
    """The text of a run folder's config.json: RunConfig as "run", FuseDiTConfig as "model"."""
    return json.dumps({"run": asdict(run), "model": asdict(config)}, indent=2) + "\n"


def print_warning(message):
    print(message, file=sys.stderr, flush=True)


def is_first_rank():
    """Whether this is rank 0 of the launcher; also before the process group is there."""
    return os.environ.get("RANK", "0") == "0"


# ------------------------------------------------------------------------------ resuming

def damage(folder):
    """What is wrong with a checkpoint, as text, or None.

    Every file must have as many bytes as state.json, which is written last, says.
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


def is_moved(name, old, new):
    """Whether a setting names a model folder that has moved and kept its own name."""
    if name not in ("base", "vae", "clip") or not old or not new:
        return False
    return Path(old).name == Path(new).name


def changed_settings(stored, run, config):
    """Texts of the settings that differ from the run's config.json and must not.

    stored: that config.json. A setting that it lacks is newer than the run, which had its default.
    """
    current = json.loads(run_settings_json(run, config))
    defaults = json.loads(run_settings_json(type(run)(), type(config)()))
    free = {f"run.{f.name}" for f in fields(run) if f.metadata["free"]}
    free.add("model.guidance")              # of sampling alone

    changed = []
    for part in current:
        for name, new in current[part].items():
            old = stored[part].get(name, defaults[part][name])
            if old == new or f"{part}.{name}" in free or is_moved(name, old, new):
                continue
            changed.append(f"{part}.{name} was {old!r}, is {new!r}")
    return changed


def requested_checkpoints(run, available):
    """Those of the available checkpoints that --resume allows, oldest first."""
    if run.resume == "auto":
        return available
    if run.resume == "none":
        raise FuseDiTError(f"{run.out} has checkpoints up to {available[-1].name}: --resume auto "
                           "resumes from there, another --out starts a new run")
    digits = run.resume.removeprefix("step-")
    requested = []
    if digits.isdigit():
        requested = [folder for folder in available if step_of(folder) == int(digits)]
    if not requested:
        raise FuseDiTError(f"--resume {run.resume} is neither auto, none nor a step of {run.out}, "
                           "which has " + ", ".join(folder.name for folder in available))
    return requested


def open_run(run, config):
    """The checkpoint folder to resume from, or None for a new run.

    Raises FuseDiTError if --out holds another run or a model, if --resume does not fit what is
    there, or if every checkpoint that may be used is damaged.
    """
    out = Path(run.out)
    available = list_checkpoints(out)
    if not available:
        if run.resume not in ("auto", "none"):
            raise FuseDiTError(f"--resume {run.resume}: {out} has no checkpoint")
        if not (out / "config.json").exists():
            return None

    # is it this run's folder?
    stored = read_json(out / "config.json")
    if "run" not in stored:
        raise FuseDiTError(f"{out} holds a model, not a run: give the run another --out")
    if not available:
        return None
    changed = changed_settings(stored, run, config)
    if changed:
        raise FuseDiTError(f"{out} holds another run: {'; '.join(changed)}. Resume it with its "
                           "own settings, or give this one another --out")

    # the newest that is undamaged
    requested = requested_checkpoints(run, available)
    for folder in reversed(requested):
        problem = damage(folder)
        if problem is None:
            return folder
        if is_first_rank():
            print_warning(f"checkpoint {folder} is damaged and not used: {problem}")
    others = [folder.name for folder in available if folder not in requested]
    if others:
        raise FuseDiTError(f"--resume {run.resume} is damaged (see above); {out} has "
                           + ", ".join(others))
    raise FuseDiTError(f"{out}: every checkpoint is damaged (see above). To start again, give the "
                       "run another --out")


def settle_dtype(run, device):
    """The run with `--dtype auto` replaced: by the dtype that a resumed run was started with,
    otherwise by what is fast on this device."""
    started_in = ""
    if run.dtype == "auto" and list_checkpoints(run.out):
        stored = read_json(Path(run.out) / "config.json")
        started_in = stored.get("run", {}).get("dtype", "auto")
    name = backend.dtype_name(started_in or run.dtype, device)

    slow = backend.emulation_note(name, device)
    if slow and is_first_rank():
        if started_in:
            slow = f"{run.out} was started in bf16 and is resumed in it; {slow}"
        print_warning(f"note: {slow}")
    return replace(run, dtype=name)


class Checkpoint(NamedTuple):
    """A checkpoint that is still on disk: its tensors are as files.open_tensors gives them."""
    step: int
    data: str                               # digest of the shards that it was trained on
    adam_step: int                          # steps that Adam has made: less than step if some
                                            # were skipped
    seen: int                               # samples so far
    skipped: int                            # how many of these could not be read
    skipped_steps: int                      # steps whose loss or gradient was not finite
    state: dict                             # weight.NAME, exp_avg.NAME, exp_avg_sq.NAME
    ema: dict                               # NAME


def load_checkpoint(folder):
    """Checkpoint of a folder from open_run; None for None."""
    if folder is None:
        return None
    stored = read_json(folder / "train_state" / "state.json")
    numbers = {name: value for name, value in stored.items() if name in Checkpoint._fields}
    return Checkpoint(**numbers, state=open_tensors(folder / "train_state", "state"),
                      ema=open_tensors(folder))


# ------------------------------------------------------------------------------ writing

class CheckpointWriter:
    """Writes checkpoints while the training continues; each rank writes its share.

    step-0000500/ is a model folder of the EMA weights, with train_state/ to resume from. A
    checkpoint folder is complete or absent: it is written under a temporary name, fsynced, renamed
    when all ranks have written, and only then named in `latest`. Old ones are deleted after that.

    All methods must be called by all ranks.
    """

    def __init__(self, run, config, checkpoint, data_digest):
        """Lock the run folder and tidy up what an interrupted run has left there.

        checkpoint: the Checkpoint that the run is resumed from, or None.
        data_digest: digest of the run's shards.
        """
        self.run = run
        self.config = config
        self.out = Path(run.out)
        self.data_digest = data_digest
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.thread = None                  # writes this rank's files
        self.state = None                   # state.json of the checkpoint that is being written
        self.problem = None                 # the exception that ended the thread
        self.last_saved = None              # the step of the last complete checkpoint
        self.last_time = time.monotonic()   # when saving last began
        first = 0
        if checkpoint:
            first = checkpoint.step
        if first:
            self.last_saved = first

        seen_by_ranks = distributed.gather_from_all_ranks((first, data_digest))
        if len(set(seen_by_ranks)) > 1:
            raise FuseDiTError("the ranks see different checkpoints or different shards: --out "
                               "and --data must be on a disk that all machines share")
        if self.rank == 0:
            self.open_folder(first)
            if checkpoint and checkpoint.data != data_digest:
                print_warning(f"WARNING: --data has changed since step {first}: its samples come "
                              "in another order, some again and some later")
        dist.barrier()

    def open_folder(self, first):
        """Rank 0: lock the folder, which later steps than `first` must not be in."""
        self.lock = FileLock(self.out / ".lock")           # released when the process ends
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise FuseDiTError(f"another run is writing to {self.out}: wait for it, or give this "
                               "one another --out") from None
        for unfinished in self.out.glob(".step-*.tmp"):    # of a run that was killed
            shutil.rmtree(unfinished)
        for folder in list_checkpoints(self.out):
            if step_of(folder) > first:
                aside = folder.with_name(f"aside-{int(time.time())}-{folder.name}")
                print_warning(f"{folder} is later than the step to resume from: it is renamed to "
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
        """Begin to write a checkpoint, in a thread.

        gather_state: returns what this rank writes, ({NAME: EMA}, {"weight.NAME": ...,
            "exp_avg.NAME": ..., "exp_avg_sq.NAME": ...}), as tensors in CPU memory that nobody
            else changes. All ranks together must give the tensors of a Checkpoint. A tensor that
            is cut in pieces has names that say where they belong, as in NAME[0:8,0:512].
        counts: the other numbers of a Checkpoint.
        """
        self.wait()                         # memory for the copies of one checkpoint at a time
        self.last_time = time.monotonic()
        tmp = self.temporary_folder(step)
        ema, state = gather_state()

        # is there room for what all ranks will write?
        size = torch.tensor(sum(t.nbytes for t in [*ema.values(), *state.values()]))
        if self.world > 1:                  # a single rank has only NCCL, without CPU tensors
            dist.all_reduce(size)
        problem = None
        if self.rank == 0:
            problem = self.prepare(tmp, int(size))
        (failed,) = distributed.largest_of_all_ranks(problem is not None)
        if failed:
            self.warn(step, problem)
            return

        self.state = dict(step=step, data=self.data_digest) | counts
        self.thread = threading.Thread(target=self.write, args=(tmp, ema, state))
        self.thread.start()

    def prepare(self, tmp, size):
        """Make the folder for a checkpoint of `size` bytes; returns what is wrong, or None."""
        try:
            free = shutil.disk_usage(self.out).free
            if free < size * 1.01:
                return f"it takes {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free"
            shutil.rmtree(tmp, ignore_errors=True)
            (tmp / "train_state").mkdir(parents=True)
        except OSError as e:
            return str(e)
        return None

    def write(self, tmp, ema, state):
        """In the thread: write and fsync this rank's files; rank 0 also writes config.json."""
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
        except BaseException as e:          # of any kind: the checkpoint is not complete
            self.problem = e

    def poll(self, signal_number):
        """Publish the checkpoint that is being written, if all ranks have written it.

        signal_number: of the signal that this rank has received, or 0.
        Returns (the signal number of all ranks, whether a checkpoint is due by the clock).
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
        """Wait until the checkpoint that is being written is complete, if there is one."""
        if self.thread is not None:
            self.thread.join()
            (failed,) = distributed.largest_of_all_ranks(self.problem is not None)
            self.finish(failed)

    def finish(self, failed):
        """Publish a checkpoint that all ranks have written, or remove one that failed on any."""
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
        """Rank 0: complete the folder, rename it, name it in `latest`, delete old ones."""
        for stem in ("model", "train_state/state"):
            self.write_index(tmp, stem)
        sizes = {}
        for path in tmp.rglob("*"):
            if path.is_file():
                sizes[str(path.relative_to(tmp))] = path.stat().st_size
        with atomic_write(tmp / "train_state" / "state.json") as state:
            state.write_text(json.dumps(self.state | {"files": sizes}, indent=2) + "\n")
        fsync(tmp / "train_state")
        fsync(tmp)

        folder = self.out / checkpoint_name(step)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
        self.write_latest(step)
        self.delete_old()

    def write_index(self, tmp, stem):
        """The index of the ranks' files; raises SafetensorError or OSError if one is missing."""
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
        """Delete all checkpoints but --keep newest ones and those that --keep-every protects."""
        every = self.run.keep_every
        for old in list_checkpoints(self.out)[:-self.run.keep]:
            if every and step_of(old) % every == 0:
                continue
            shutil.rmtree(old, ignore_errors=True)         # may be open on a network disk

    def warn(self, step, problem):
        """Say that a checkpoint failed; problem: None on the ranks where it did not."""
        if problem is None:
            return
        last = "There is no checkpoint yet"
        if self.last_saved:
            last = f"The last checkpoint is {checkpoint_name(self.last_saved)}"
        print_warning(f"\nWARNING: step {step} is NOT saved: {problem}\n{last}; training "
                      f"continues. Make room in {self.out.resolve()}\n")

    def close(self, step, stopped):
        """Finish writing; returns the exit code, 0 if the last step is saved.

        step: the last one of this process. stopped: number of the signal that ended it, or 0.
        """
        self.wait()
        if self.last_saved != step:
            return 1
        if self.rank == 0 and stopped:
            print(f"stopped by {signal.Signals(stopped).name}; step {step} is saved. To resume:\n"
                  f"  {resume_command(self.world)}", flush=True)
        elif self.rank == 0:
            print(f"{self.out} has all of its {step} steps; a larger --steps continues it. To "
                  f"generate images: python sample.py --model {self.out} --prompt ...", flush=True)
        return 0


def resume_command(world):
    """The command line of this process, as the user should give it to resume the run.

    Without --local_rank, which launchers add, and --resume, which would go back to the same
    checkpoint again.
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
    before = None
    for word in sys.argv:
        left_out = word.startswith(("--local_rank", "--resume")) or before == "--resume"
        if not left_out:
            words.append(word)
        before = word
    return f"{launcher} {shlex.join(words)}"

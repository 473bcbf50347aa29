"""Run folders: which checkpoint to go on from, and how one is written so that none is lost.

A checkpoint, step-0000500/, is a model folder of the averaged weights (see pretrained.py), written
by all ranks in parts, and train_state/: weights, Adam's moments, the step. Nothing in it depends
on the number of ranks or on the ZeRO stage, and nothing else needs keeping: what is random in
training is a function of the seed and of a sample's place (see data/batches.py).
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


def damage(folder):
    """What is wrong with a checkpoint, or None: every file must have the bytes it was left with."""
    try:
        files = read_json(folder / "train_state" / "state.json")["files"]
    except (FuseDiTError, KeyError, TypeError):
        return "train_state/state.json is missing or broken"
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            return f"{name} has {found:,} of its {size:,} bytes"
    return None


def open_run(run, config):
    """The checkpoint to go on from, or None. Refuses the folder of another run."""
    out, found = Path(run.out), checkpoints(run.out)
    if not found and run.resume not in ("auto", "none"):
        raise FuseDiTError(f"--resume {run.resume}: {out} has no checkpoint")
    if not found and not (out / "config.json").exists():
        return None
    then, now = read_json(out / "config.json"), json.loads(settings(run, config))
    if "run" not in then:
        raise FuseDiTError(f"{out} holds a model, not a run: give the run another --out")
    usual = json.loads(settings(type(run)(), type(config)()))   # of flags that it did not know yet
    free = {"run." + f.name for f in fields(run) if f.metadata["free"]} | {"model.guidance"}
    differ = [f"{name} was {old!r}, is {v!r}" for part in now for k, v in now[part].items()
              if (old := then[part].get(k, usual[part][k])) != v
              and (name := f"{part}.{k}") not in free
              and not (k in ("base", "vae", "clip") and old and v  # moved, and still its namesake
                       and Path(old).name == Path(v).name)]
    if found and differ:
        raise FuseDiTError(f"{out} holds another run: {'; '.join(differ)}. Resume it with its own "
                           "settings, or give this one another --out")
    if found and run.resume == "none":
        raise FuseDiTError(f"{out} has checkpoints up to {found[-1].name}: --resume auto goes on "
                           "from there, another --out begins anew")
    wanted = found
    if run.resume not in ("auto", "none"):
        digits = run.resume.removeprefix("step-")
        wanted = [p for p in found if digits.isdigit() and int(p.name[5:]) == int(digits)]
        if not wanted:
            raise FuseDiTError(f"--resume {run.resume} is neither auto, none nor a step of {out}, "
                               "which has " + ", ".join(p.name for p in found))
    for folder in reversed(wanted):
        if (why := damage(folder)) is None:
            return folder
        if os.environ.get("RANK", "0") == "0":
            print(f"passed over {folder}, which is damaged: {why}", file=sys.stderr, flush=True)
    if wanted != found:
        raise FuseDiTError(f"--resume {run.resume} is damaged (see above); {out} has "
                           + ", ".join(p.name for p in found if p not in wanted))
    if wanted:
        raise FuseDiTError(f"{out}: no checkpoint is whole (see above). To begin anew, give the "
                           "run another --out")
    return None


def settle_dtype(run, device):
    """The run with `--dtype auto` decided: as it began, if it goes on, else what is fast here."""
    begun = run.dtype == "auto" and bool(checkpoints(run.out))
    if begun:
        begun = read_json(Path(run.out) / "config.json").get("run", {}).get("dtype", "auto")
    name = backend.dtype_name(begun or run.dtype, device)
    slow = backend.emulation_note(name, device)
    if slow and os.environ.get("RANK", "0") == "0":
        why = f"{run.out} was begun in bf16 and goes on in it; " if begun else ""
        print(f"note: {why}{slow}", file=sys.stderr, flush=True)
    return replace(run, dtype=name)


def checkpoints(out):
    """The checkpoint folders of a run, oldest first."""
    return sorted(Path(out).glob("step-" + "[0-9]" * 7))


def settings(run, config):
    return json.dumps({"run": asdict(run), "model": asdict(config)}, indent=2) + "\n"


class Saved(NamedTuple):
    """A checkpoint, its tensors as weights.open_tensors gives them: still on disk."""
    step: int
    data: str                               # digest of its shards
    adam_step: int                          # less than step, where steps were skipped
    seen: int                               # samples so far; of them
    skipped: int                            # could not be read
    skipped_steps: int
    state: dict                             # weight.NAME, exp_avg.NAME, exp_avg_sq.NAME
    ema: dict                               # NAME


def load_checkpoint(folder):
    """Saved, of a folder from open_run; of None, None."""
    if folder is None:
        return None
    state = read_json(folder / "train_state" / "state.json")
    state = {k: v for k, v in state.items() if k in Saved._fields}
    return Saved(**state, state=open_tensors(folder / "train_state", "state"),
                 ema=open_tensors(folder))


class Saver:
    """Checkpoints, each rank writing its share, beside the training.

    step-0000500/ is a model folder of the averaged weights, with train_state/ to resume from.
    It appears whole or not at all: written under another name, fsynced, renamed when all ranks
    have written, and only then named in `latest`. Older ones go when the new one stands.
    """

    def __init__(self, run, config, saved, data):
        """data: digest of the run's shards."""
        self.run, self.config, self.out = run, config, Path(run.out)
        self.data, first = data, saved.step if saved else 0
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.thread = self.state = self.problem = None
        self.last, self.clock = first if first else None, time.monotonic()
        if self.world > 1:
            dist.all_gather_object(box := [None] * self.world, (first, data))
            if len(set(box)) > 1:
                raise FuseDiTError("the ranks see other checkpoints or other shards: --out and "
                                   "--data must be on a disk that all machines share")
        if self.rank == 0:
            self.lock = FileLock(self.out / ".lock")       # goes with the process
            self.out.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                raise FuseDiTError(f"another run is writing to {self.out}: wait for it, or give "
                                   "this one another --out") from None
            for old in self.out.glob(".step-*.tmp"):       # what a killed run left behind
                shutil.rmtree(old)
            for later in (p for p in checkpoints(self.out) if int(p.name[5:]) > first):
                aside = later.with_name(f"aside-{int(time.time())}-{later.name}")
                print(f"{later} is set aside, as {aside.name}", file=sys.stderr, flush=True)
                later.rename(aside)
            if first:
                self.name_latest(first)
            if saved and saved.data != data:
                print(f"WARNING: --data is not what it was at step {first}: its samples come in "
                      "another order, some again and some later", file=sys.stderr, flush=True)
        dist.barrier()

    def name_latest(self, step):
        with atomic_write(self.out / "latest") as latest:
            latest.write_text(f"step-{step:07d}\n")
        fsync(self.out)

    def part(self, stem, rank):
        """The file that a rank writes: one alone has no number."""
        return f"{stem}.safetensors" if self.world == 1 else \
            f"{stem}-{rank + 1:05d}-of-{self.world:05d}.safetensors"

    def save(self, step, share, counts):
        """Begin to write share(): this rank's {NAME: average}, and {"weight.NAME": ...}.

        Of all ranks together they are the tensors of load_checkpoint, in the CPU's memory and for
        nobody else to change; one in pieces has names as NAME[0:8,0:512], its places.
        """
        self.wait()                         # one checkpoint's copies at a time
        self.clock, tmp = time.monotonic(), self.out / f".step-{step:07d}.tmp"
        average, state = share()
        size = torch.tensor(sum(t.nbytes for part in (average, state) for t in part.values()))
        if self.world > 1:                  # one rank has NCCL alone, which knows no CPU tensors
            dist.all_reduce(size)
        problem = self.prepare(tmp, int(size)) if self.rank == 0 else None
        if distributed.agree(problem is not None)[0]:
            self.warn(step, problem)
            return
        self.state = dict(step=step, data=self.data) | counts
        self.thread = threading.Thread(target=self.write, args=(tmp, average, state))
        self.thread.start()

    def prepare(self, tmp, size):
        """Make room for a checkpoint of `size` bytes; what is wrong, if it cannot be."""
        try:
            if (free := shutil.disk_usage(self.out).free) < size * 1.01:
                return f"it takes {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free"
            shutil.rmtree(tmp, ignore_errors=True)
            (tmp / "train_state").mkdir(parents=True)
        except OSError as e:
            return str(e)

    def write(self, tmp, average, state):
        """In a thread: this rank's files; and the model's configuration, once."""
        config, parts = json.dumps(asdict(self.config), indent=2), []
        try:
            for stem, tensors in (("model", average), ("train_state/state", state)):
                parts.append(tmp / self.part(stem, self.rank))
                save_file(tensors, parts[-1], {"config": config})
            if self.rank == 0:
                parts.append(tmp / "config.json")
                parts[-1].write_text(config + "\n")
            for path in parts:
                fsync(path)
        except BaseException as e:          # of whatever kind: this checkpoint is not whole
            self.problem = e

    def poll(self, signal_number):
        """(the signal any rank had, whether it is time to save), and finish what is written."""
        minutes = self.run.save_minutes
        late = minutes and time.monotonic() - self.clock > 60 * minutes
        busy = self.thread is not None and self.thread.is_alive()
        stop, late, busy, failed = distributed.agree(signal_number, late, busy,
                                                  self.problem is not None)
        if self.thread and not busy:
            self.finish(failed)
        return stop, bool(late)

    def wait(self):
        if self.thread:
            self.thread.join()
            self.finish(distributed.agree(self.problem is not None)[0])

    def finish(self, failed):
        """All ranks have written, or one could not."""
        step, problem, self.thread, self.problem = self.state["step"], self.problem, None, None
        name = f"step-{step:07d}"
        tmp = self.out / f".{name}.tmp"
        if self.rank == 0 and not failed:
            try:
                self.publish(tmp, name)
            except (OSError, SafetensorError) as e:
                failed, problem = True, e
        if failed:
            self.warn(step, problem)
            if self.rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
        else:
            self.last = step

    def publish(self, tmp, name):
        """Rank 0 gives the folder its name, and `latest` this name; older ones go."""
        for stem in ("model", "train_state/state"):
            where = {}
            for path in (tmp / self.part(stem, rank) for rank in range(self.world)):
                with safe_open(path, "pt") as file:        # raises if this disk lacks it
                    where |= dict.fromkeys(file.keys(), path.name)
            if self.world > 1:
                with atomic_write(tmp / f"{stem}.safetensors.index.json") as index:
                    index.write_text(json.dumps({"weight_map": where}) + "\n")
        files = {str(p.relative_to(tmp)): p.stat().st_size for p in tmp.rglob("*")
                 if p.is_file()}
        with atomic_write(tmp / "train_state" / "state.json") as text:
            text.write_text(json.dumps(self.state | {"files": files}, indent=2) + "\n")
        for path in (tmp / "train_state", tmp):
            fsync(path)
        shutil.rmtree(self.out / name, ignore_errors=True)
        os.replace(tmp, self.out / name)
        self.name_latest(self.state["step"])
        every = self.run.keep_every
        for old in checkpoints(self.out)[:-self.run.keep]:
            if not every or int(old.name[5:]) % every:
                shutil.rmtree(old, ignore_errors=True)     # in use on a network disk, perhaps

    def warn(self, step, problem):
        if problem is not None:             # the rank that has it
            print(f"\nWARNING: step {step} is NOT saved: {problem}\nThe last checkpoint is "
                  f"{self.last and f'step-{self.last:07d}'}; training goes on. Make room in "
                  f"{self.out.resolve()}\n", file=sys.stderr, flush=True)

    def close(self, step, stopped):
        """Finish writing. The exit code: 0, also after a signal, if the last step is saved."""
        self.wait()
        if self.rank == 0 and stopped and self.last == step:
            launcher = ("python" if self.world == 1 else "torchrun ..." if "TORCHELASTIC_RUN_ID"
                        in os.environ else "deepspeed ..." if "LOCAL_RANK" in os.environ else
                        "on every host: python")
            before = [None, *sys.argv]      # an old --resume would go back again
            argv = shlex.join(a for a, b in zip(sys.argv, before, strict=False) if not (
                a.startswith(("--local_rank", "--resume")) or b == "--resume"))
            print(f"stopped by {signal.Signals(stopped).name}; step {step} is saved. To go on:\n"
                  f"  {launcher} {argv}", flush=True)
        elif self.rank == 0 and self.last == step:
            print(f"{self.out} has all of its {step} steps; more --steps go on. To draw with it: "
                  f"python sample.py --model {self.out} --prompt ...", flush=True)
        return 0 if self.last == step else 1

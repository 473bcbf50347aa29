"""Resuming a run: the checkpoint to resume from, and the settings that the run keeps."""
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from fusedit import FuseDiTError
from fusedit_lib import backend, seeds
from fusedit_lib.files import read_json
from fusedit_lib.folders import find_local, repository
from fusedit_lib.train import checkpoints, distributed
from fusedit_lib.train.changes import settings_at, settle_changes
from fusedit_lib.train.config import CHANGEABLE, MODEL_PARTS
from fusedit_lib.train.metrics_log import settle_boards

# ------------------------------------------------------------------------------ settings

class Difference(NamedTuple):
    """A setting that differs from the run's config.json."""
    part: str                               # "run" or "model"
    name: str
    old: object
    new: object

    def __str__(self):
        return f"{self.part}.{self.name} was {self.old!r}, is now {self.new!r}"


def is_moved(name, old, new):
    """Returns True if a setting names a model folder that has moved but kept its name."""
    if name == "init" and find_local(old, (".", repository())):        # two runs may share names
        return False
    if name not in (*MODEL_PARTS, "init") or not old or not new:
        return False
    return Path(old).name == Path(new).name


def changed_settings(stored, run, config):
    """The settings that differ from the run's config.json although they must not, as Differences.

    stored: the content of that config.json. If a setting is missing there, it was introduced after
    the run was started, so the run used its default; but it had one stream.
    """
    current = json.loads(checkpoints.run_settings_json(run, config))
    defaults = json.loads(checkpoints.run_settings_json(type(run)(), type(config)()))
    defaults["run"]["streams"] = 1
    free = {f"run.{f.name}" for f in fields(run) if f.metadata["free"]}
    free |= {f"run.{name}" for name in run.resume_with}
    free.add("model.guidance")              # only used for sampling
    free |= {"run.set", "run.base"}         # model has their values; its folders may have moved
    if "caption_pick" not in stored["run"]:                # such runs had no choice to make
        free.add("run.caption_pick")

    changed = []
    for part in current:
        for name, new in current[part].items():
            old = stored[part].get(name, defaults[part][name])
            if old == new or f"{part}.{name}" in free or is_moved(name, old, new):
                continue
            changed.append(Difference(part, name, old, new))
    return changed


def refuse_changed(stored, step, run, config):
    """Raise FuseDiTError if a setting differs from the run's config.json although it must not.

    stored: the content of that config.json. step: that of the checkpoint to resume from. The
    settings may also be those before a change at this step, with which nothing has been trained.
    """
    changed = changed_settings(settings_at(stored, step), run, config)
    if not changed or not changed_settings(settings_at(stored, step - 1), run, config):
        return
    remedy = "Resume it with its original settings"
    names = [setting.name for setting in changed]
    if set(names) <= set(CHANGEABLE):
        remedy += f", continue it with these by adding --resume-with {','.join(names)}"
    described = "; ".join(map(str, changed))
    raise FuseDiTError(f"{run.out} holds another run: {described}. {remedy}, or choose another "
                       "--out for this run")


# ------------------------------------------------------------------------------ the checkpoint

def resume(run, config):
    """(the run, the Checkpoint to resume from); the Checkpoint is None for a new run.

    The run is returned with the changes of --resume-with, and without boards that cannot be used.
    Call it on all ranks, before the model is loaded and anything is written to the run folder.
    Raises FuseDiTError, as open_run, settle_changes and settle_boards do.
    """
    # The ranks may have found different last checkpoints in the folder of a run in progress.
    run = replace(run, init=distributed.gather_from_all_ranks(run.init)[0])
    checkpoint = checkpoints.load_checkpoint(open_run(run, config))
    run = settle_changes(run, checkpoint)
    return settle_boards(run, checkpoint), checkpoint


def requested_checkpoints(run, available):
    """The available checkpoints that --resume allows, oldest first."""
    if run.resume == "auto":
        return available
    if run.resume == "none":
        raise FuseDiTError(f"{run.out} has checkpoints up to {available[-1].name}: use --resume "
                           "auto to resume from the newest, or another --out to start a new run")
    digits = run.resume.removeprefix("step-")
    requested = []
    if digits.isdigit():
        requested = [folder for folder in available if checkpoints.step_of(folder) == int(digits)]
    if not requested:
        raise FuseDiTError(f"--resume {run.resume} is not auto, none or a checkpoint of {run.out}, "
                           "which has " + ", ".join(folder.name for folder in available))
    return requested


def open_run(run, config):
    """The checkpoint folder to resume from, or None for a new run.

    Raises FuseDiTError if --out holds another run or a model, if no checkpoint matches --resume, or
    if every checkpoint that matches is damaged.
    """
    out = Path(run.out)
    available = checkpoints.list_checkpoints(out)
    if not available:
        if run.resume not in ("auto", "none"):
            raise FuseDiTError(f"--resume {run.resume}: {out} has no checkpoint")
        if not (out / "config.json").exists():
            return None

    # the folder must belong to this run
    stored = read_json(out / "config.json")
    if "run" not in stored:
        raise FuseDiTError(f"{out} holds a model, not a run: choose another --out")
    if not available:
        return None
    folder = undamaged_checkpoint(run, available)
    refuse_changed(stored, checkpoints.step_of(folder), run, config)
    return folder


def undamaged_checkpoint(run, available):
    """The newest undamaged checkpoint that --resume allows. Raises FuseDiTError if none is."""
    requested = requested_checkpoints(run, available)
    for folder in reversed(requested):
        problem = checkpoints.damage(folder)
        if problem is None:
            return folder
        if checkpoints.is_first_rank():
            checkpoints.print_warning(f"checkpoint {folder} is damaged and is not used: {problem}")
    others = [folder.name for folder in available if folder not in requested]
    if others:
        raise FuseDiTError(f"the checkpoint selected by --resume {run.resume} is damaged (see "
                           f"above); {run.out} also has " + ", ".join(others))
    raise FuseDiTError(f"every checkpoint in {run.out} is damaged (see above). To start a new run, "
                       "choose another --out")


def settle_dtype(run, device):
    """The run with `--dtype auto` resolved.

    A resumed run keeps the dtype that it was started with. A new run gets the dtype that is fast on
    this device.
    """
    started_in = ""
    if run.dtype == "auto" and checkpoints.list_checkpoints(run.out):
        stored = read_json(Path(run.out) / "config.json")
        started_in = stored.get("run", {}).get("dtype", "auto")
    name = backend.dtype_name(started_in or run.dtype, device)

    slow = backend.emulation_note(name, device)
    if slow and checkpoints.is_first_rank():
        if started_in:
            slow = f"{run.out} was started in bf16 and continues in bf16; {slow}"
        checkpoints.print_warning(f"note: {slow}")
    return replace(run, dtype=name)


def settle_seed(run):
    """The run with --seed -1 replaced, on all ranks, by the seed that rank 0 settles on.

    A run that has been started keeps its seed. Call it after the ranks have been connected.
    """
    if run.seed != seeds.RANDOM:
        return run
    seed = None
    if dist.get_rank() == 0:
        path = Path(run.out) / "config.json"
        stored = None
        if path.exists():
            stored = read_json(path).get("run", {}).get("seed")
        seed = seeds.settle(run.seed, stored)
    return replace(run, seed=distributed.gather_from_all_ranks(seed)[0])

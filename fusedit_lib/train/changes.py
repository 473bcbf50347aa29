"""Changes of a run's settings in mid-run: --resume-with.

The config.json of a run has the settings of its newest steps. Its `changes` are the settings that
--resume-with has changed: one entry for each resumption that changed any, such as

    {"step": 200, "seen": 6400, "batch": [32, 48], "lr": [0.0001, 0.0003]}

with the step and the number of samples before it, and the old and the new value of each setting.
"""
import json
from dataclasses import replace
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib.files import read_json
from fusedit_lib.train import checkpoints
from fusedit_lib.train.config import CHANGEABLE, SCHEDULE, RunConfig


def settings_at(stored, step):
    """The content of a config.json as it was at a step: later changes are undone."""
    settings = dict(stored["run"])
    changes = settings.get("changes", [])
    for change in reversed(changes):
        if change["step"] > step:
            for name in change.keys() & set(CHANGEABLE):
                settings[name] = change[name][0]
    settings["changes"] = [change for change in changes if change["step"] <= step]
    return stored | {"run": settings}


def settle_changes(run, checkpoint):
    """The run with its `changes`: those up to the checkpoint, and that of --resume-with.

    Rank 0 prints what changes. Call it on all ranks, after open_run has accepted the settings and
    before anything is written to the run folder. checkpoint: the one to resume from, or None.
    Raises FuseDiTError if --resume-with is given but there is nothing to resume.
    """
    if checkpoint is None:
        if run.resume_with:
            raise FuseDiTError(f"--resume-with: {run.out} has no checkpoint to resume from. Leave "
                               "out this flag to start a new run")
        return run
    newest = read_json(Path(run.out) / "config.json")
    stored = settings_at(newest, checkpoint.step)["run"]
    if is_undone(run, stored, checkpoint.step):
        if checkpoints.is_first_rank():
            print(f"{run.out}: the change at step {checkpoint.step} is undone, as these are the "
                  "settings before it", flush=True)
        stored = settings_at(newest, checkpoint.step - 1)["run"]
    changes = stored["changes"]
    none_undone = changes == newest["run"].get("changes", [])
    if none_undone and is_repeated(run, stored):
        if checkpoints.is_first_rank():
            checkpoints.print_warning(
                f"note: --resume-with: the schedule has started anew at step "
                f"{changes[-1]['step']}, with the same settings, and continues. To start it once "
                "more, also change --steps or one of these settings")
        return replace(run, changes=tuple(changes))

    # a change at the same step, made earlier, becomes part of this one
    earlier = {}
    if changes and changes[-1]["step"] == checkpoint.step:
        *changes, earlier = changes
    change = new_change(run, stored, earlier)
    if change:
        if checkpoints.is_first_rank():
            print_change(run, stored, checkpoint.step, change)
        changes = [*changes, dict(step=checkpoint.step, seen=checkpoint.seen) | change]
    return replace(run, changes=tuple(changes))


def new_change(run, stored, earlier):
    """The settings that --resume-with changes, as {name: [old, new]}.

    stored: the run's settings so far. earlier: the change that has been made at the same step, or
    {}; its old values are kept.
    """
    change = {}
    for name in CHANGEABLE:
        new = plain(getattr(run, name))
        old = new
        if name in earlier:
            old = earlier[name][0]
        elif name in run.resume_with:
            old = stored_value(stored, name)
        restarts = name in SCHEDULE and (name in earlier or name in run.resume_with)
        if old != new or restarts:
            change[name] = [old, new]
    return change


def plain(value):
    """A setting's value as config.json has it, where a tuple is a list."""
    return json.loads(json.dumps(value))


def stored_value(stored, name):
    """A setting of config.json's "run", or the default if it was introduced later."""
    return stored.get(name, plain(getattr(RunConfig(), name)))


def is_undone(run, stored, step):
    """True if the settings are those before a change at this step, as after running out of memory.

    Nothing has been trained with that change.
    """
    changes = stored["changes"]
    if not changes or changes[-1]["step"] != step:
        return False
    for name in changes[-1].keys() & set(CHANGEABLE):
        if name not in run.resume_with and plain(getattr(run, name)) != stored[name]:
            return True
    return False


def is_repeated(run, stored):
    """True if --resume-with is that of the newest change, as when a scheduler repeats a command.

    The schedule is not started again then.
    """
    named = [name for name in SCHEDULE if name in run.resume_with]
    if not stored["changes"] or not named:
        return False
    last = stored["changes"][-1]
    if not last.keys() >= set(named):
        return False
    for name in ("steps", *run.resume_with):
        if plain(getattr(run, name)) != stored_value(stored, name):
            return False
    return True


def changed_at(run, step):
    """The settings that the run has changed at a step, as {name: [old, new]}."""
    if not run.changes or run.changes[-1]["step"] != step:
        return {}
    change = run.changes[-1]
    return {name: change[name] for name in CHANGEABLE if name in change}


def describe_change(change):
    """The settings of a change as text, such as "batch 32 -> 48, warmup_steps 100"."""
    parts = []
    for name in CHANGEABLE:
        if name in change:
            old, new = change[name]
            if old == new:                  # named to start the schedule anew
                parts.append(f"{name} {new}")
            else:
                parts.append(f"{name} {old} -> {new}")
    return ", ".join(parts)


def print_change(run, stored, step, change):
    """Print what changes at this step, and warn if the samples come in another order."""
    schedule = ""
    if change.keys() & set(SCHEDULE):
        schedule = "; the learning rate schedule starts anew"
    print(f"{run.out}: from step {step} on, {describe_change(change)}{schedule}", flush=True)
    old, new = change.get("data_weights", ([], []))
    if len(old) != len(new) and plain(run.data) == stored["data"]:
        checkpoints.print_warning(
            f"WARNING: --data-weights was added or left out at step {step}: the samples now come "
            "in a different order, so some are repeated and some delayed")

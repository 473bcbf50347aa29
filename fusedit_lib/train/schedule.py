"""Functions of the step number: learning rate, EMA decay, and the actions due after a step."""
import math
from typing import NamedTuple

from fusedit_lib.train.config import SCHEDULE


def schedule_start(run):
    """The step at which the learning rate schedule starts.

    It is 0, or the step of the last change that named the schedule or its warmup (--resume-with).
    """
    start = 0
    for change in run.changes:
        if change.keys() & set(SCHEDULE):
            start = change["step"]
    return start


def learning_rate(run, step):
    """Learning rate of a step, counted from 0: linear warmup, then constant or a cosine decay.

    The cosine ends at run.steps. A change of run.lr alone scales the rest of the schedule.
    """
    start = schedule_start(run)
    step -= start                           # now counted from the start of the schedule
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    if run.lr_schedule == "constant":
        return run.lr
    progress = (step - run.warmup_steps) / max(run.steps - start - run.warmup_steps, 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(run, step):
    """EMA decay after `step` steps. It is 1 between updates, which leaves the EMA unchanged.

    The n-th update has decay n / (9 + n), which rises from 0.1 to run.ema_decay. With a constant
    decay of 0.99 and an update every 100 steps, the EMA would still contain 0.99^20 = 82 % of the
    random initial weights after 2,000 steps. With --no-ema-warmup, the decay is run.ema_decay from
    the first update on, as in the published code (trainers.py:285-293).
    """
    if step % run.ema_every:
        return 1.0
    if not run.ema_warmup:
        return run.ema_decay
    n = step // run.ema_every
    return min(run.ema_decay, n / (9 + n))


def is_due(run, step, every):
    """Returns True if `step` is a multiple of `every` or the last step; False if `every` is 0."""
    if not every:
        return False
    return step == run.steps or step % every == 0


def sample_grid_is_due(run, step):
    return is_due(run, step, run.sample_every)


def validation_is_due(run, step):
    """Returns True if the validation loss is due; always False without --val-data."""
    return bool(run.val_data) and is_due(run, step, run.val_every)


class Due(NamedTuple):
    """The actions due after a step."""
    log: bool                               # a log line; also checks the losses
    validate: bool                          # image grid, validation loss, or both
    save: bool                              # checkpoint


def due_after(run, step, first, stop, save_now):
    """The actions due after `step` steps.

    The losses are logged, and thereby checked, before every checkpoint.

    first: the step at which the run started or resumed.
    stop: number of the signal that ends the run after this step, or 0.
    save_now: True if a checkpoint is due by --save-minutes.
    """
    validate = sample_grid_is_due(run, step) or validation_is_due(run, step)
    save = is_due(run, step, run.save_every) or bool(stop) or save_now
    log = save or validate or step % run.log_every == 0 or step == first + 1
    return Due(log, validate and not stop, save)

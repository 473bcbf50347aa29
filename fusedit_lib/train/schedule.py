"""Functions of the step number: learning rate, EMA decay, and what is due after a step."""
import math
from typing import NamedTuple


def learning_rate(run, step):
    """Learning rate of a step, counted from 0: a linear warmup, then constant or half a cosine."""
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    if run.lr_schedule == "constant":
        return run.lr
    progress = (step - run.warmup_steps) / max(run.steps - run.warmup_steps, 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(run, step):
    """EMA decay after `step` steps; 1 between two updates, which leaves the EMA as it is.

    The n-th update has decay n / (9 + n), from 0.1 up to run.ema_decay. With 0.99 from the start,
    the EMA of a run of 2,000 steps, updated every 100, would consist of its random initial
    weights to 0.99^20 = 82 %.
    """
    if step % run.ema_every:
        return 1.0
    n = step // run.ema_every
    return min(run.ema_decay, n / (9 + n))


def is_due(run, step, every):
    """Whether `step` is a multiple of `every` or the last step; never if `every` is 0."""
    if not every:
        return False
    return step == run.steps or step % every == 0


def sample_grid_is_due(run, step):
    return is_due(run, step, run.sample_every)


def validation_is_due(run, step):
    """Whether the validation loss is due; never without --val-data."""
    return bool(run.val_data) and is_due(run, step, run.val_every)


class Due(NamedTuple):
    """What is to be done after a step."""
    log: bool                               # a line of the log, which checks the losses
    validate: bool                          # sample grid, validation loss, or both
    save: bool                              # a checkpoint


def due_after(run, step, first, stop, save_now):
    """Due after `step` steps.

    Before a checkpoint is saved the losses are logged, and so checked.

    first: the step that the run began or was resumed at.
    stop: number of the signal that ends the run after this step, or 0.
    save_now: whether a checkpoint is due by the clock.
    """
    validate = sample_grid_is_due(run, step) or validation_is_due(run, step)
    save = is_due(run, step, run.save_every) or bool(stop) or save_now
    log = save or validate or step % run.log_every == 0 or step == first + 1
    return Due(log, validate and not stop, save)

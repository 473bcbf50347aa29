"""TODO."""
import math


def learning_rate(run, step):
    """Of the step with this number, counted from 0: a line up, then flat or half a cosine."""
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    if run.lr_schedule == "constant":
        return run.lr
    done = (step - run.warmup_steps) / max(run.steps - run.warmup_steps, 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(run, step):
    """Of the average of the weights after `step` steps; 1, which leaves it, between updates.

    It grows from 0.1 as (1 + n) / (10 + n), n updates done, until it is run.ema_decay: 0.99 from
    the start would leave a run of 2,000 steps, updated every 100, with 0.99^20 = 82 % of its
    random first weights.
    """
    n, rest = divmod(step, run.ema_every)
    return 1.0 if rest else min(run.ema_decay, n / (9 + n))


def on(run, step, every):
    """Is it time for what is done at the end and every so many steps? 0: never."""
    return bool(every) and (step == run.steps or step % every == 0)


def due(run, step, first, stop, now):
    """Whether to (log, look, save) after `step` steps; what is saved has a checked loss."""
    look = on(run, step, run.sample_every) or on(run, step, run.val_data and run.val_every)
    save = on(run, step, run.save_every) or bool(stop) or now
    return save or look or step % run.log_every == 0 or step == first + 1, look and not stop, save

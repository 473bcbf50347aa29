"""Functions of the step number: learning rate, EMA decay and actions that are due."""
import math

import pytest

from fusedit_lib.train.config import RunConfig
from fusedit_lib.train.schedule import due_after, ema_decay, learning_rate


def test_learning_rate():
    run = RunConfig(lr=1.0, warmup_steps=4, steps=12, lr_schedule="cosine")
    rates = [learning_rate(run, step) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05


def test_learning_rate_is_constant_after_the_warmup():
    run = RunConfig(lr=1.0, warmup_steps=2)
    rates = [learning_rate(run, step) for step in (0, 1, 9, 10**6)]
    assert rates == [0.5, 1, 1, 1]


def test_ema_decay():
    run = RunConfig(ema_decay=0.2, ema_every=5)
    between = [ema_decay(run, step) for step in (1, 4, 6, 9, 11)]
    updates = [ema_decay(run, step) for step in (5, 10, 15)]
    assert between == [1.0] * 5
    assert updates == [1 / 10, 2 / 11, 0.2]


def test_without_a_warmup_the_ema_is_the_published_one():
    """trainers.py:285-293: ema <- decay ema + (1 - decay) weight at every ema_every-th step."""
    run = RunConfig(ema_decay=0.99, ema_every=100, ema_warmup=False)
    weight = 3.0                            # the initial weight, with which the EMA begins
    ema = published = weight
    for step in range(1, 1001):
        weight = math.sin(step)
        ema += (1 - ema_decay(run, step)) * (weight - ema)
        if step % 100 == 0:
            published = 0.99 * published + (1 - 0.99) * weight
        assert ema == pytest.approx(published, rel=1e-12)
    assert ema > 0.9 * 3                    # mostly the initial weight, after 10 updates


# log, validate, save
NOTHING = (False, False, False)
LOG = (True, False, False)
LOG_AND_VALIDATE = (True, True, False)
LOG_AND_SAVE = (True, False, True)
EVERYTHING = (True, True, True)


@pytest.mark.parametrize("step, due", [
    (7, NOTHING),
    (1, LOG),                               # the first step
    (20, LOG),
    (30, LOG_AND_VALIDATE),
    (50, LOG_AND_SAVE),
    (100, EVERYTHING)])                     # the last step
def test_actions_that_are_due(step, due):
    run = RunConfig(steps=100, log_every=20, sample_every=30, save_every=50)
    assert due_after(run, step, 0, stop=0, save_now=False) == due


def test_the_log_is_due_with_a_checkpoint_by_the_clock_or_a_signal():
    """After a signal there is no time for validation."""
    run = RunConfig(steps=100, log_every=20, sample_every=30, save_every=50)
    assert due_after(run, 7, 0, stop=0, save_now=True) == LOG_AND_SAVE
    assert due_after(run, 30, 0, stop=15, save_now=False) == LOG_AND_SAVE


def test_validation_is_only_due_with_held_out_data():
    run = RunConfig(steps=100, sample_every=0, val_every=7)
    assert due_after(run, 7, 0, stop=0, save_now=False) == NOTHING
    run.val_data = ("shards",)
    assert due_after(run, 7, 0, stop=0, save_now=False) == LOG_AND_VALIDATE

"""TODO."""
import signal
import time

import torch
import torch.distributed as dist

# ------------------------------------------------------------------------------ steps

def catch_signals():
    """A list that Ctrl-C or SIGTERM is added to; a second Ctrl-C ends the process at once.

    But not within 3 seconds: launchers pass on what a terminal has sent to all already.
    """
    caught, begin = [], []

    def catch(number, _):
        caught.append(number)
        begin.append(time.monotonic())
        if number == signal.SIGINT and begin[-1] - begin[0] > 3:
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def agree(*numbers):
    """The largest of all ranks' numbers: so they stop, if one must, at the same step."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(box := torch.tensor([int(n) for n in numbers]), dist.ReduceOp.MAX)
        return box.tolist()
    return [int(n) for n in numbers]

"""What the ranks of a run agree on, and the signals that end it."""
import signal
import time

import torch
import torch.distributed as dist


def catch_signals():
    """Handle Ctrl-C and SIGTERM from now on; returns the list that their numbers are added to.

    A second Ctrl-C ends the process at once, unless it comes within 3 seconds of the first
    signal: a terminal sends Ctrl-C to all processes, and launchers pass it on to them again.
    """
    caught = []
    received = []                           # when

    def catch(number, _):
        caught.append(number)
        received.append(time.monotonic())
        if number == signal.SIGINT and received[-1] - received[0] > 3:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def several_ranks():
    return dist.is_initialized() and dist.get_world_size() > 1


def largest_of_all_ranks(*numbers):
    """For each of the numbers, as int, the largest that any rank has: a list.

    With it all ranks decide alike: if one has to stop, all stop after the same step.
    """
    numbers = [int(number) for number in numbers]
    if not several_ranks():
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather_from_all_ranks(value):
    """The list of every rank's value, in the order of ranks; any picklable object."""
    if not several_ranks():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

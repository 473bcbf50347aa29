"""Communication between the ranks of a run, and the signals that stop it."""
import signal
import time

import torch
import torch.distributed as dist


def catch_sigterm():
    """Handle SIGTERM from now on. Returns a list to which signal numbers are appended."""
    caught = []
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    return caught


def catch_ctrl_c(caught):
    """Append Ctrl-C to the list of catch_sigterm from now on.

    A second Ctrl-C ends the process at once, unless it comes within 3 seconds of the first one: a
    terminal sends Ctrl-C to every process, and launchers then forward it to the same processes.
    """
    received = []                           # times

    def catch(number, _):
        caught.append(number)
        received.append(time.monotonic())
        if received[-1] - received[0] > 3:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, catch)


def rank_and_world():
    """(the rank of this process, the number of processes). Call it after they are connected."""
    return dist.get_rank(), dist.get_world_size()


def several_ranks():
    return dist.is_initialized() and dist.get_world_size() > 1


def largest_of_all_ranks(*numbers):
    """The maximum of each number over all ranks, as a list of int.

    Ranks use it to make the same decision: if one has to stop, all stop after the same step.
    """
    numbers = [int(number) for number in numbers]
    if not several_ranks():
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather_from_all_ranks(value):
    """The values of all ranks, as a list in rank order. value: any picklable object."""
    if not several_ranks():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

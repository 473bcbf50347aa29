"""Communication between the ranks of a run, and the signals that stop it."""
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fusedit_lib import cli
from fusedit_lib.backend import several_ranks


def catch_sigterm():
    """Handle SIGTERM from now on. Returns a list to which signal numbers are appended.

    A second SIGTERM ends the process, as loading a model or connecting may hang. See `catch`.
    """
    caught = []
    catch(signal.SIGTERM, caught)
    return caught


def catch_while_training(caught):
    """Append Ctrl-C to the list of catch_sigterm from now on.

    A second Ctrl-C ends the process. A second SIGTERM no longer does: there may be steps to save.
    """
    catch(signal.SIGINT, caught)
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))


def catch(number, caught):
    """Append the number of a signal to a list whenever the signal is received.

    The second signal raises KeyboardInterrupt, unless it comes within 3 seconds of the first one: a
    terminal sends Ctrl-C to every process, and launchers then forward it to the same processes.
    """
    received = []                           # times

    def handle(number, _):
        caught.append(number)
        received.append(time.monotonic())
        if received[-1] - received[0] > 3:
            raise KeyboardInterrupt
    signal.signal(number, handle)


def rank_and_world():
    """(the rank of this process, the number of processes). Call it after they are connected."""
    return dist.get_rank(), dist.get_world_size()


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


# ------------------------------------------------------------------------------ ranks that fail

class NextRank:
    """Watches the next rank, and ends this process if that one ends before it has called close().

    The hosts of a TPU slice need this. No launcher watches them, and the others would wait for the
    chips of a failed one forever. Each host ends after the next one, so all end.
    """

    def __init__(self):
        rank, world = rank_and_world()
        self.previous = (rank - 1) % world
        self.next = (rank + 1) % world
        self.group = dist.new_group(timeout=timedelta(days=1000))
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        """Waits for the next rank's close(). If the connection breaks, that rank has ended."""
        try:
            dist.recv(torch.zeros(1), self.next, self.group)
        except RuntimeError:
            time.sleep(5)                   # this rank may be about to report the same error
            print(f"{Path(sys.argv[0]).name}: error: {cli.ANOTHER_HAS_STOPPED}", file=sys.stderr,
                  flush=True)
            cli.exit_at_once(1)             # the main thread may be waiting for a device

    def close(self):
        """Tells the previous rank that this one has finished, and waits for the next rank's word.

        All ranks must call it.
        """
        dist.send(torch.zeros(1), self.previous, self.group)
        self.thread.join()


next_rank = None                            # a NextRank, after watch_next_rank


def watch_next_rank():
    """Ends this process, from now on, if the next rank ends. Call it on all ranks."""
    global next_rank
    if several_ranks():
        next_rank = NextRank()


def disconnect():
    """Ends the connections between the ranks, when all have finished."""
    if next_rank:
        next_rank.close()                   # waits, however long the next rank saves
    else:
        dist.barrier()                      # exiting early would break the others' connections
    dist.destroy_process_group()

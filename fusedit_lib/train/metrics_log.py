"""Writes the metrics of a run to metrics.jsonl, TensorBoard and Weights & Biases."""
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib import cli
from fusedit_lib.backend import first_line
from fusedit_lib.files import atomic_write, read_jsonl
from fusedit_lib.train import checkpoints, distributed
from fusedit_lib.train.changes import changed_at


@contextlib.contextmanager
def warn_if_unwritable():
    """A context in which an OSError is only a warning: a failed log must not end a run."""
    try:
        yield
    except OSError as e:
        print(f"WARNING: cannot write a log or sample file: {e}", file=sys.stderr, flush=True)


class Board(NamedTuple):
    """A service or file other than metrics.jsonl that shows a run's metrics."""
    log: Callable                           # logs a row, {name: number}
    close: Callable                         # completes the log; takes the process's exit code


class MetricsLog:
    """The metrics that rank 0 writes: one row per log line, validation and change of settings."""

    def __init__(self, run, config, first):
        """first: the step at which the run starts or resumes."""
        self.out = Path(run.out)
        self.path = self.out / "metrics.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        settings = checkpoints.run_settings_json(run, config)
        with atomic_write(self.out / "config.json") as tmp:
            tmp.write_text(settings)
        self.set_aside_after(first)
        changed = changed_at(run, first)
        if changed:
            self.append(json_lines([dict(step=first, changed=changed)]).encode())

        self.boards = {}                    # {name: Board}
        if run.tensorboard:
            with self.drop_if_it_fails("TensorBoard"):
                self.boards["TensorBoard"] = open_tensorboard(self.out, first)
        if run.wandb:
            with self.drop_if_it_fails("Weights & Biases"):
                board = open_wandb(run, self.out, json.loads(settings))
                self.boards["Weights & Biases"] = board
        cli.closers.append(self.close_boards)

    @contextlib.contextmanager
    def drop_if_it_fails(self, name):
        """A context in which an error of a board ends its use, with a line, but not the run."""
        try:
            yield
        except Exception as e:              # boards raise errors of many types
            self.boards.pop(name, None)
            print(f"WARNING: {name} has failed ({first_line(e)}). The run continues without it; "
                  f"{self.path} has all numbers", file=sys.stderr, flush=True)

    def set_aside_after(self, first):
        """Move the rows after step `first`, which the run will write again, to another file."""
        stored = []
        if self.path.exists():
            stored = read_jsonl(self.path)
        last = first or -1                  # a run that starts anew also repeats its step 0
        kept = [row for row in stored if row["step"] <= last]
        later = [row for row in stored if row["step"] > last]
        # changes at this very step are written again as well, perhaps with others
        kept = [row for row in kept if "changed" not in row or row["step"] < first]
        with atomic_write(self.path) as tmp:
            tmp.write_text(json_lines(kept))
        if later:
            aside = self.out / "metrics-aside.jsonl"
            earlier = ""
            if aside.exists():
                earlier = aside.read_text()
            with atomic_write(aside) as tmp:
                tmp.write_text(earlier + json_lines(later))

    def write(self, row, extra=None):
        """Append a row whose values are numbers or None. extra: values of other types."""
        line = json.dumps(row | (extra or {})) + "\n"
        with warn_if_unwritable():
            self.append(line.encode())
        numbers = {name: value for name, value in row.items() if value is not None}
        for name, board in list(self.boards.items()):
            with self.drop_if_it_fails(name):
                board.log(numbers)

    def close_boards(self, code):
        """Closes the boards of a process that ends abruptly; otherwise they close themselves."""
        for name, board in list(self.boards.items()):
            with self.drop_if_it_fails(name):
                board.close(code)

    def append(self, line):
        """Append a line of bytes to metrics.jsonl, completely or not at all."""
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):               # the disk is full
                file.truncate(end)
                raise OSError(errno.ENOSPC, f"no space left for {file.name}")


def json_lines(table):
    return "".join(json.dumps(row) + "\n" for row in table)


# ------------------------------------------------------------------------------ boards

def settle_boards(run, checkpoint):
    """The run, if its boards can be used. Call it on all ranks, before the model is loaded.

    Otherwise raises FuseDiTError on all ranks. But a run that is resumed from a checkpoint, perhaps
    by a scheduler at night, is returned without the board, and rank 0 prints a line.
    """
    problems = {}
    if checkpoints.is_first_rank():
        problems = board_problems(run)
    problems = distributed.gather_from_all_ranks(problems)[0]
    for setting, problem in problems.items():
        if checkpoint is None:
            raise FuseDiTError(problem)
        if checkpoints.is_first_rank():
            print(f"WARNING: {problem}. The run is resumed without it", file=sys.stderr, flush=True)
        off = type(getattr(run, setting))()                # False or ""
        run = replace(run, **{setting: off})
    return run


def board_problems(run):
    """{setting: the reason why its board cannot be used}. Logs in to Weights & Biases."""
    problems = {}
    if run.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
            (Path(run.out) / "tensorboard").mkdir(parents=True, exist_ok=True)
        except (ImportError, OSError) as e:                # ImportError: it is too old for torch
            problems["tensorboard"] = f"--tensorboard: {cli.explain(e, '') or first_line(e)}"
    if run.wandb:
        # Otherwise a finished run waits for a lost network until somebody kills it.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")          # seconds
        try:
            import wandb
            wandb.login(verify=True)        # asks for a key only if there is a terminal
        except ModuleNotFoundError as e:
            problems["wandb"] = f"--wandb: {cli.explain(e, '')}"
        except Exception as e:              # wandb's types of errors differ between versions
            reason = first_line(e).rstrip(".")
            problems["wandb"] = (f"--wandb: cannot log in: {reason}. Run `wandb login`, check the "
                                 "network, set WANDB_MODE=offline to log to the run folder, or "
                                 "leave out --wandb")
    return problems


def open_tensorboard(out, first):
    """Returns the Board of TensorBoard, where rows after step `first` are hidden."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(out / "tensorboard", purge_step=first + 1)

    def log(row):
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
    return Board(log, lambda code: writer.close())


def open_wandb(run, out, settings):
    """Returns the Board of Weights & Biases. A resumed run adds to its job."""
    import wandb
    job = wandb.init(project=run.wandb, dir=out, name=out.name,
                     id=f"{out.resolve().name}-{run.seed}", resume="allow", config=settings)

    def log(row):
        job.log(row, step=row["step"])
    return Board(log, job.finish)

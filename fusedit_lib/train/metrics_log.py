"""Writes the metrics of a run to metrics.jsonl, TensorBoard and Weights & Biases."""
import contextlib
import errno
import json
import sys
from pathlib import Path

from fusedit_lib.files import atomic_write, read_jsonl
from fusedit_lib.train import checkpoints


@contextlib.contextmanager
def warn_if_unwritable():
    """A context in which an OSError is only a warning: a failed log must not end a run."""
    try:
        yield
    except OSError as e:
        print(f"WARNING: cannot write a log or sample file: {e}", file=sys.stderr, flush=True)


class MetricsLog:
    """The metrics that rank 0 writes: one row per log line and per validation."""

    def __init__(self, run, config, first):
        """first: the step at which the run starts or resumes."""
        self.out = Path(run.out)
        self.path = self.out / "metrics.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        settings = checkpoints.run_settings_json(run, config)
        with atomic_write(self.out / "config.json") as tmp:
            tmp.write_text(settings)
        self.set_aside_after(first)

        self.boards = []                    # functions that log a row of numbers
        if run.tensorboard:
            self.boards.append(open_tensorboard(self.out, first))
        if run.wandb:
            self.boards.append(open_wandb(run, self.out, json.loads(settings)))

    def set_aside_after(self, first):
        """Move the rows after step `first`, which the run will write again, to another file."""
        stored = []
        if self.path.exists():
            stored = read_jsonl(self.path)
        kept = [row for row in stored if row["step"] <= first]
        later = [row for row in stored if row["step"] > first]
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
        for board in self.boards:
            with warn_if_unwritable():
                board(numbers)

    def append(self, line):
        """Append a line of bytes to metrics.jsonl, completely or not at all."""
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):               # the disk is full
                file.truncate(end)
                raise OSError(errno.ENOSPC, f"no space left for {file.name}")


def json_lines(table):
    return "".join(json.dumps(row) + "\n" for row in table)


def open_tensorboard(out, first):
    """Returns a function that logs a row to TensorBoard, where rows after `first` are hidden."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(out / "tensorboard", purge_step=first + 1)

    def log(row):
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
    return log


def open_wandb(run, out, settings):
    """Returns a function that logs a row to Weights & Biases. A resumed run adds to its job."""
    import wandb
    job = wandb.init(project=run.wandb, dir=out, name=out.name,
                     id=f"{out.resolve().name}-{run.seed}", resume="allow", config=settings)

    def log(row):
        job.log(row, step=row["step"])
    return log

"""A checkpoint is complete or absent, even if the run is killed or the disk is full."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from launching import ENV, flags, launch_all, losses
from tiny_shards import SHAPE

from fusedit import FuseDiTError
from fusedit_lib import pretrained
from fusedit_lib.train import checkpoints, resuming
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    """A process group of this process only, as a launcher creates."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path, gemma):
    """(run, config) of a run folder without checkpoints."""
    out = tmp_path / "run"
    run = parse_run(["--out", str(out), "--base", str(gemma), "--set", *SHAPE, "--keep", "2"], "")
    config = model_config(run)
    out.mkdir()
    (out / "config.json").write_text(checkpoints.run_settings_json(run, config))
    return run, config


def tensors(value=1.0):
    """The tensors that a rank writes: (EMA, trained weights and moments)."""
    ema = {"dit.w": torch.full((3,), value)}
    state = {f"{key}.dit.w": torch.full((3,), value) for key in ("weight", "exp_avg", "exp_avg_sq")}
    return ema, state


def open_writer(run, config, first=0, data="some"):
    """A CheckpointWriter for a run resumed from step `first`."""
    checkpoint = None
    if first:
        checkpoint = checkpoints.Checkpoint(step=first, data="some", adam_step=first, seen=0,
                                            skipped=0, skipped_steps=0, state={}, ema={})
    return checkpoints.CheckpointWriter(run, config, checkpoint, data)


def save(run, config, *steps, value=1.0):
    """Save at these steps, as one process. Returns the exit code."""
    writer = open_writer(run, config, max(steps_of(run), default=0))
    for step in steps:
        counts = dict(adam_step=step, seen=0, skipped=0, skipped_steps=0)
        writer.save(step, lambda: tensors(value), counts)
    code = writer.close(steps[-1], 0)
    writer.lock.release()
    return code


def resume(run, config, first, data="some"):
    """Open the folder like a run that is resumed from step `first`, and release it."""
    open_writer(run, config, first, data).lock.release()


def steps_of(run):
    return [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(run.out)]


# ------------------------------------------------------------------------------ complete or absent

def no_space(*_):
    raise OSError(28, "No space left on device")


class Disk:
    """Stands in for the result of shutil.disk_usage."""
    free = 40


@pytest.mark.parametrize("broken", ["save_file", "shutil.disk_usage"])
def test_a_checkpoint_that_cannot_be_written_is_absent(folder, monkeypatch, capsys, broken):
    run, config = folder
    out = Path(run.out)
    assert resuming.open_run(run, config) is None
    assert save(run, config, 1, 2, 3) == 0
    assert steps_of(run) == [2, 3]
    assert resuming.open_run(run, config) == out / "step-0000003"

    with monkeypatch.context() as patch:
        patch.setattr(f"fusedit_lib.train.checkpoints.{broken}", no_space)
        assert save(run, config, 4) == 1    # the last step is not saved, so the run has failed
    err = capsys.readouterr().err
    assert "WARNING: step 4 was NOT saved" in err
    assert "No space" in err
    assert f"training continues. Free some space in {out.resolve()}" in err
    assert "The last checkpoint is step-0000003" in err
    assert steps_of(run) == [2, 3]
    assert not list(out.glob(".step*"))
    assert save(run, config, 4) == 0        # there is room again
    assert steps_of(run) == [3, 4]


def test_free_space_is_checked_before_writing(folder, monkeypatch, capsys):
    run, config = folder
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: Disk)
    assert save(run, config, 4) == 1
    err = capsys.readouterr().err
    assert "it needs 4.8e-08 GB, but only 4e-08 GB are free" in err
    assert "There is no checkpoint yet; training continues. Free some space in " in err


def test_other_problems_are_not_blamed_on_the_space(folder, monkeypatch, capsys):
    def fail(*_):
        raise PermissionError(13, "Permission denied")
    run, config = folder
    monkeypatch.setattr(checkpoints, "save_file", fail)
    assert save(run, config, 4) == 1
    err = capsys.readouterr().err
    assert "WARNING: step 4 was NOT saved: [Errno 13] Permission denied" in err
    assert "training continues\n" in err
    assert "space" not in err


def test_a_checkpoint_contains_what_was_saved(folder):
    run, config = folder
    out = Path(run.out)
    save(run, config, 1, 2, 3)
    assert save(run, config, 4, value=0.0) == 0
    assert not list(out.glob(".step*")) and not list(out.rglob("*.tmp"))
    checkpoint = checkpoints.load_checkpoint(resuming.open_run(run, config))
    for file, name in (checkpoint.ema["dit.w"], checkpoint.state["exp_avg.dit.w"]):
        assert (file.get_tensor(name) == 0).all()
    assert checkpoint.step == checkpoint.adam_step == 4


def test_an_unfinished_checkpoint_of_a_killed_run_is_removed(folder):
    run, config = folder
    save(run, config, 4)
    (Path(run.out) / ".step-0000005.tmp" / "train_state").mkdir(parents=True)
    resume(run, config, 4)
    assert not list(Path(run.out).glob(".step*"))


# Another process saves step 3 and dies at the point given by the second argument.
DIES = """
import os, sys, torch
import test_checkpoints
from fusedit_lib.train import checkpoints
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run
store, point, *argv = sys.argv[1:]
run = parse_run(argv, "")
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
real_replace = os.replace

def die(*args, **kwargs):
    os._exit(9)

def half_a_file(tensors, path, metadata):
    path.write_bytes(b"{")
    die()

def before_the_rename(old, new):
    if new.name == "step-0000003":
        die()
    real_replace(old, new)

def after_the_rename(old, new):
    real_replace(old, new)
    if new.name == "step-0000003":
        die()

def deleting(path, **kwargs):
    if path.name == "step-0000001":
        die()

if point == "half a file":
    checkpoints.save_file = half_a_file
elif point == "after the rename":
    checkpoints.os.replace = after_the_rename
elif point == "before the rename":
    checkpoints.os.replace = before_the_rename
elif point == "deleting old ones":
    checkpoints.shutil.rmtree = deleting
elif point == "write":
    checkpoints.CheckpointWriter.write = die
else:
    checkpoints.CheckpointWriter.publish = die
test_checkpoints.save(run, model_config(run), 3, value=3.0)
"""


@pytest.mark.parametrize("point, left", [
    ("write", 2), ("half a file", 2), ("publish", 2), ("before the rename", 2),
    ("after the rename", 3), ("deleting old ones", 3)])
def test_a_kill_at_any_point_of_saving_leaves_a_complete_checkpoint(folder, gemma, point, left):
    run, config = folder
    out = Path(run.out)
    save(run, config, 1, 2)
    done = warm.run(["-c", DIES, f"{run.out}-store", point, "--out", run.out, "--base", gemma,
                     "--keep", "2", "--set", *SHAPE], ENV)
    assert done.returncode == 9, done.stderr[-2000:]

    found = resuming.open_run(run, config)
    assert found.name == f"step-000000{left}"
    latest = (out / "latest").read_text().strip()
    assert checkpoints.damage(out / latest) is None
    file, name = checkpoints.load_checkpoint(found).ema["dit.w"]
    value = {2: 1.0, 3: 3.0}[left]
    assert (file.get_tensor(name) == value).all()

    assert save(run, config, 4) == 0
    assert not list(out.glob(".step*"))
    assert steps_of(run)[-1] == 4


def test_two_runs_do_not_share_a_folder(folder):
    run, config = folder
    first = open_writer(run, config)
    with pytest.raises(FuseDiTError, match="another run is writing"):
        open_writer(run, config)
    first.lock.release()
    resume(run, config, 0)


def test_a_run_with_nothing_left_to_do_says_so(folder, capsys):
    run, config = folder
    save(run, config, 1, 2)
    assert "run is complete (2 steps); to train further, raise --steps" in capsys.readouterr().out
    writer = open_writer(run, config, first=2)
    assert writer.close(2, 0) == 0
    writer.lock.release()
    assert ("run was complete already (2 steps): nothing is left to do; to train further, raise "
            "--steps") in capsys.readouterr().out


def test_keep_every_protects_checkpoints(folder):
    run, config = folder
    run.keep = 1
    run.keep_every = 4
    save(run, config, *range(1, 11))
    assert steps_of(run) == [4, 8, 10]


# ------------------------------------------------------------------------------ resuming

@pytest.mark.parametrize("file, how", [
    ("model.safetensors", "cut"), ("train_state/state.safetensors", "cut"),
    ("train_state/state.json", "cut"), ("config.json", "gone")])
def test_a_damaged_checkpoint_is_named_and_not_used(folder, capsys, file, how):
    run, config = folder
    out = Path(run.out)
    save(run, config, 1, 2)
    path = out / "step-0000002" / file
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 3)
    assert resuming.open_run(run, config).name == "step-0000001"
    err = capsys.readouterr().err
    assert "step-0000002 is damaged and is not used" in err
    assert Path(file).name in err

    # resuming sets it aside and rewrites `latest`
    resume(run, config, 1)
    assert steps_of(run) == [1]
    assert list(out.glob("aside-*-step-0000002"))
    assert (out / "latest").read_text() == "step-0000001\n"


def test_it_is_an_error_if_every_checkpoint_is_damaged(folder):
    run, config = folder
    out = Path(run.out)
    save(run, config, 1, 3)
    run.resume = "1"
    (out / "step-0000001" / "train_state" / "state.json").unlink()
    with pytest.raises(FuseDiTError, match="--resume 1 is damaged .* has step-0000003"):
        resuming.open_run(run, config)
    run.resume = "auto"
    (out / "step-0000003" / "train_state" / "state.json").unlink()
    with pytest.raises(FuseDiTError, match="every checkpoint in .* is damaged"):
        resuming.open_run(run, config)


def test_which_checkpoint_to_resume(folder):
    run, config = folder
    run.keep = 9
    save(run, config, 1, 2, 13)
    assert resuming.open_run(run, config).name == "step-0000013"
    for wanted in ("2", "step-2", "step-0000002"):
        run.resume = wanted
        assert resuming.open_run(run, config).name == "step-0000002"

    # later checkpoints are kept under another name
    resume(run, config, 2)
    assert steps_of(run) == [1, 2]
    assert list(Path(run.out).glob("aside-*-step-0000013"))
    run.resume = "5"
    with pytest.raises(FuseDiTError, match="--resume 5 is not .* has step-0000001"):
        resuming.open_run(run, config)
    run.resume = "none"
    with pytest.raises(FuseDiTError, match="use --resume auto to resume"):
        resuming.open_run(run, config)


def test_a_step_of_a_new_run_cannot_be_resumed(folder):
    run, config = folder
    run.resume = "5"
    with pytest.raises(FuseDiTError, match="--resume 5: .* has no checkpoint"):
        resuming.open_run(run, config)


def test_changed_data_gives_a_warning(folder, capsys):
    run, config = folder
    save(run, config, 1)
    resume(run, config, 1)
    assert not capsys.readouterr().err
    resume(run, config, 1, data="more")
    assert "--data has changed since step 1" in capsys.readouterr().err


def test_another_source_of_gemma_gives_a_warning(folder, capsys, monkeypatch):
    run, config = folder

    def resume_from(source):
        """Resume from the checkpoint with a source of Gemma; returns what is printed."""
        monkeypatch.setattr(checkpoints, "gemma_source", lambda base: source)
        checkpoint = checkpoints.load_checkpoint(Path(run.out) / "step-0000001")
        writer = checkpoints.CheckpointWriter(run, config, checkpoint, "some")
        writer.lock.release()
        return capsys.readouterr().err

    monkeypatch.setattr(checkpoints, "gemma_source", lambda base: "package")
    save(run, config, 1)
    assert resume_from("package") == ""
    warning = "Gemma was the package's until step 1, and is Google's release now"
    assert warning in resume_from("release")
    assert "and is a local folder now" in resume_from("")
    run.train_llm = True                    # Gemma's weights are those of the checkpoint
    assert resume_from("release") == ""

    state = Path(run.out) / "step-0000001/train_state/state.json"
    stored = json.loads(state.read_text())
    del stored["gemma"]                     # as in a run of an earlier version
    state.write_text(json.dumps(stored))
    run.train_llm = False
    assert resume_from("package") == ""


def test_a_model_folder_is_not_a_run(folder):
    run, config = folder
    pretrained.save_model(run.out, config, {})
    with pytest.raises(FuseDiTError, match="holds a model, not a run"):
        resuming.open_run(run, config)


def test_the_folder_of_another_run_is_refused(folder):
    run, config = folder
    save(run, config, 5)
    run.lr = 0.5
    run.steps = 7                           # steps and workers may change
    run.workers = 1
    with pytest.raises(FuseDiTError) as error:
        resuming.open_run(run, replace(config, pos_embed="ape"))
    message = str(error.value)
    assert "run.lr was 0.0001, is now 0.5" in message
    assert "model.pos_embed was '2d-rope', is now 'ape'" in message
    assert "steps" not in message and "workers" not in message
    run.lr = 1e-4
    resuming.open_run(run, replace(config, guidance=2.0))       # only used for sampling


def test_a_model_folder_may_move(folder, tmp_path):
    """A Gemma folder that has moved but kept its name is accepted; a renamed one is not."""
    run, config = folder
    save(run, config, 1)
    moved = str(tmp_path / "elsewhere" / Path(config.base).name)
    run.base = moved
    assert resuming.open_run(run, replace(config, base=moved)).name == "step-0000001"
    with pytest.raises(FuseDiTError, match="model.base was"):
        resuming.open_run(run, replace(config, base=moved + "-2"))


# ------------------------------------------------------------------------------ in a real run

# From step 5 on, files cannot grow beyond MOST bytes, as on a full disk.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
poll = checkpoints.CheckpointWriter.poll
def poll_on_a_full_disk(self, *args):
    if self.last_saved is None:
        self.wait()                         # for step 4, which a busy machine writes slowly
    if self.last_saved == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, 1_000_000))
    return poll(self, *args)
checkpoints.CheckpointWriter.poll = poll_on_a_full_disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
"""


def test_a_full_disk_does_not_end_the_run(gemma, data, tmp_path):
    """One run has no room for checkpoints, the other not even for log lines."""
    sizes = {"run": "40_000", "log": "os.path.getsize(self.out / 'metrics.jsonl') + 20"}
    jobs = []
    for name, size in sizes.items():
        argv = flags(gemma, data, tmp_path / name, "--steps", "10", "--save-every", "4",
                     "--sample-every", "99")
        jobs.append((argv, FULL_DISK.replace("MOST", size)))
    ends = launch_all(jobs, check=False)
    assert len(losses(tmp_path / "run")) == 10
    assert 4 <= len(losses(tmp_path / "log")) < 7          # complete lines only
    assert "WARNING: cannot write a log or sample file: " in ends[1].stderr

    for name, done in zip(sizes, ends, strict=True):
        assert done.returncode == 1
        assert "WARNING: step 8 was NOT saved" in done.stderr
        assert "WARNING: step 10 was NOT saved" in done.stderr
        assert "The last checkpoint is step-0000004" in done.stderr
        left = [path.name for path in checkpoints.list_checkpoints(tmp_path / name)]
        assert left == ["step-0000004"]
        assert checkpoints.damage(tmp_path / name / "step-0000004") is None
        assert not list((tmp_path / name).glob(".step*"))


# A clock that advances by 3 s on each reading, so that 20 steps take 60 s.
CLOCK = """
import itertools, types
seconds = itertools.count(0, 3)
checkpoints.time = types.SimpleNamespace(monotonic=lambda: next(seconds), time=time.time)
"""


def test_save_minutes(gemma, data, tmp_path):
    more = ("--steps", "20", "--keep", "99", "--sample-every", "99")
    launch_all([
        (flags(gemma, data, tmp_path / "often", *more, "--save-minutes", "0.2"), CLOCK),
        (flags(gemma, data, tmp_path / "never", *more), CLOCK)])
    steps = [checkpoints.step_of(path)
             for path in checkpoints.list_checkpoints(tmp_path / "often")]
    assert steps[-1] == 20
    assert 3 <= len(steps) <= 5             # every 12 s
    never = checkpoints.list_checkpoints(tmp_path / "never")
    assert [path.name for path in never] == ["step-0000020"]

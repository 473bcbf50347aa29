"""Changes of a run's settings in mid-run: --resume-with."""
import json
from dataclasses import replace

import pytest
from launching import WATCHED, flags, keys_by_position, launch, launch_all, metrics, state
from tiny_shards import ORIGINAL_CAPTIONS, batch_keys, numbered, sample_names, tiny_batches

from fusedit import FuseDiTError
from fusedit_lib.train import changes, checkpoints, plot, resuming
from fusedit_lib.train.config import RunConfig, model_config
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.schedule import learning_rate


@pytest.fixture
def resume(tmp_path, gemma):
    """A function that resumes a run from a step, with more flags, and returns it.

    It writes the run's config.json, as a launcher does. The run has been started.
    """
    argv = f"--out {tmp_path} --base {gemma} --lr 1e-4 --batch 32 --steps 1000".split()

    def resume_from(step, more=""):
        run = parse_run([*argv, *more.split()], "")
        config = model_config(run)
        path = tmp_path / "config.json"
        if step:
            content = json.loads(path.read_text())
            resuming.refuse_changed(content, step, run, config)
            run = changes.settle_changes(run, checkpoint_at(step, seen=32 * step))
        path.write_text(checkpoints.run_settings_json(run, config))
        return run

    resume_from(0)
    return resume_from


def checkpoint_at(step, seen):
    return checkpoints.Checkpoint(step=step, data="", adam_step=step, seen=seen, skipped=0,
                                  skipped_steps=0, state={}, ema={})


# ------------------------------------------------------------------------------ settings

def test_a_change_must_be_named(resume):
    with pytest.raises(FuseDiTError, match="run.batch was 32, is now 48; run.lr was 0.0001, is now "
                       "0.5. Resume it .*adding --resume-with batch,lr, or choose another --out"):
        resume(200, "--lr 0.5 --batch 48")
    with pytest.raises(FuseDiTError, match="run.batch was 32.*--resume-with batch,"):
        resume(200, "--lr 0.5 --batch 48 --resume-with lr")
    with pytest.raises(FuseDiTError) as error:             # the seed cannot be changed
        resume(200, "--lr 0.5 --seed 1")
    assert "--resume-with" not in str(error.value)
    assert resume(200).changes == ()

    run = resume(200, "--lr 0.5 --batch 48 --resume-with batch,lr")
    assert run.changes == (dict(step=200, seen=6400, batch=[32, 48], lr=[1e-4, 0.5]),)


def test_the_new_settings_are_those_of_the_run_from_then_on(resume):
    new = "--lr 0.5 --ema-decay 0.5 "
    first = resume(200, new + "--resume-with lr ema-decay")
    assert resume(300, new).changes == first.changes
    with pytest.raises(FuseDiTError, match="run.lr was 0.5, is now 0.0001"):
        resume(300)
    again = resume(300, new + "--resume-with lr,ema_decay,batch")          # nothing is new
    assert again.changes == first.changes

    second = resume(400, new + "--weight-decay 0 --resume-with weight_decay")
    change = dict(step=400, seen=12800, weight_decay=[1e-4, 0])
    assert second.changes == (*first.changes, change)


def test_resuming_before_a_change_undoes_it(resume):
    resume(200, "--lr 0.5 --resume-with lr")
    resume(300, "--lr 0.7 --batch 8 --resume-with lr,batch")
    with pytest.raises(FuseDiTError, match="run.batch was 32, is now 8; run.lr was 0.5, is now"):
        resume(250, "--lr 0.7 --batch 8")
    run = resume(250, "--lr 0.5")
    assert [change["step"] for change in run.changes] == [200]
    assert resume(199).changes == ()


def test_changes_at_the_same_step_are_one(resume, capsys):
    """As when a run with a new batch size ran out of memory before its next checkpoint."""
    resume(200, "--lr 0.5 --batch 96 --resume-with lr,batch")
    run = resume(200, "--lr 0.5 --batch 48 --resume-with batch")
    assert run.changes == (dict(step=200, seen=6400, batch=[32, 48], lr=[1e-4, 0.5]),)
    assert "from step 200 on, batch 32 -> 48, lr 0.0001 -> 0.5\n" in capsys.readouterr().out
    run = resume(200, "--lr 0.5 --resume-with batch")
    assert run.changes == (dict(step=200, seen=6400, lr=[1e-4, 0.5]),)
    assert resume(200, "--resume-with lr").changes == ()


def test_the_settings_before_a_change_undo_it_at_the_same_step(resume, capsys):
    """As when it ran out of memory: nothing has been trained with the change."""
    first = resume(100, "--weight-decay 0 --resume-with weight_decay").changes
    old = "--weight-decay 0 "
    new = old + "--batch 96 --lr 0.5 --warmup-steps 10 --resume-with lr,batch,warmup_steps"
    resume(200, new)
    with pytest.raises(FuseDiTError, match="run.lr was 0.5, is now 0.0001"):       # half of it
        resume(200, old + "--batch 96 --warmup-steps 10")
    assert len(resume(200, old + "--batch 96 --lr 0.5 --warmup-steps 10").changes) == 2
    capsys.readouterr()
    assert resume(200, old).changes == first
    assert "the change at step 200 is undone" in capsys.readouterr().out
    assert resume(300, old).changes == first               # nor is it in config.json

    # undone and replaced by another one
    resume(300, new)
    run = resume(300, old + "--ema-decay 0 --resume-with ema-decay")
    assert run.changes == (*first, dict(step=300, seen=9600, ema_decay=[0.99, 0]))
    resume(400, new + " --ema-decay 0")
    with pytest.raises(FuseDiTError, match="run.batch was 96, is now 32"):  # trained with
        resume(401, old + "--ema-decay 0")


def usage_error(capsys, words):
    """The message with which parse_run refuses a command line."""
    with pytest.raises(SystemExit):
        parse_run(words.split(), "")
    return capsys.readouterr().err


def test_only_some_settings_may_change(capsys):
    """And their new values must be given, which a default would not be."""
    new = "--lr 1 --batch 8 --ema-decay 0 --resume-with "
    run = parse_run([*new.split(), "lr, batch", "ema-decay"], "")
    assert run.resume_with == ["lr", "batch", "ema_decay"]
    message = usage_error(capsys, "--seed 1 " + new + "lr,seed")
    assert "--resume-with seed: only batch, lr, lr_schedule" in message
    message = usage_error(capsys, new + "warmup-steps")
    assert "warmup_steps: give its new value as well, with --warmup-steps" in message
    message = usage_error(capsys, "--data a b --resume-with data-weights")
    assert "data_weights: give its new value as well, with --data-weights" in message


def test_data_weights_are_left_out_by_name(resume):
    resume(0, "--data s t --data-weights 3 1")
    run = resume(200, "--data s t --data-weights none --resume-with data_weights")
    assert run.data_weights == []
    assert run.changes == (dict(step=200, seen=6400, data_weights=[[3, 1], []]),)
    assert resume(300, "--data s t").changes == run.changes


def test_a_new_run_has_nothing_to_change(tmp_path):
    run = RunConfig(out=str(tmp_path), resume_with=["lr"])
    with pytest.raises(FuseDiTError, match="--resume-with: .* has no checkpoint to resume from"):
        changes.settle_changes(run, None)


def test_the_command_to_resume_with_repeats_no_change(monkeypatch):
    words = "train_gpu.py --resume 200 --resume-with lr batch --lr 0.5"
    monkeypatch.setattr("sys.argv", words.split())
    assert checkpoints.resume_command(1) == "python train_gpu.py --lr 0.5"


# ------------------------------------------------------------------------------ learning rate

def test_the_schedule_starts_anew_if_it_is_named():
    start = dict(step=10, seen=0, warmup_steps=[4, 4])
    run = RunConfig(lr=1.0, warmup_steps=4, steps=26, lr_schedule="cosine")
    changed = replace(run, changes=(start, dict(step=15, seen=0, lr=[2.0, 1.0])))
    whole = replace(run, steps=16)
    for step in range(16):
        assert learning_rate(changed, 10 + step) == learning_rate(whole, step)

    # a new learning rate alone scales the schedule
    scaled = replace(run, lr=3.0, changes=(dict(step=10, seen=0, lr=[1.0, 3.0]),))
    for step in range(10, 26):
        assert learning_rate(scaled, step) == pytest.approx(3 * learning_rate(run, step))


def test_a_repeated_command_does_not_start_the_schedule_again(resume, capsys):
    """A scheduler may run the command with --resume-with again and again."""
    named = "--warmup-steps 50 --lr 0.5 --resume-with lr,warmup_steps "
    first = resume(200, named)
    change = dict(step=200, seen=6400, lr=[1e-4, 0.5], warmup_steps=[0, 50])
    assert first.changes == (change,)
    assert "the learning rate schedule starts anew" in capsys.readouterr().out
    assert resume(300, named).changes == first.changes
    assert "has started anew at step 200" in capsys.readouterr().err

    # but it starts anew with other settings, as after more steps, and where that was undone
    again = dict(warmup_steps=[50, 50])
    run = resume(400, named + "--steps 2000")
    assert run.changes == (change, dict(step=400, seen=12800) | again)
    run = resume(300, named + "--steps 2000")
    assert run.changes == (change, dict(step=300, seen=9600) | again)


# ------------------------------------------------------------------------------ data

def test_batches_start_at_any_position(gemma, data):
    """Micro-batches are counted from there, whatever the batch size was before."""
    whole = tiny_batches(gemma, data, *ORIGINAL_CAPTIONS, micro_batch=30)[0]
    for rank in range(2):
        batches = tiny_batches(gemma, data, *ORIGINAL_CAPTIONS, micro_batch=2, accumulation=3,
                               rank=rank, world=2, start=5)
        for m, first in enumerate((5, 9, 13, 17)):
            first += rank
            batch = batches[m]
            assert list(batches.positions(m)) == [first, first + 2]
            assert batch_keys(batch) == batch_keys(whole)[first:first + 3:2]
            assert batch["noise"].equal(whole["noise"][first:first + 3:2])


@pytest.mark.parametrize("streams", [1, 4])
def test_other_weights_keep_the_place_in_each_data_set(gemma, tmp_path, streams):
    """Each set gives each of its samples once per epoch, in the order of a run with no change.

    With several streams, this holds for each of them.
    """
    folders = [numbered(tmp_path / name, shards=1, samples=count)
               for name, count in (("a", 40), ("b", 25))]
    first, second, third = [3.0, 1.0], [1.0, 1.0], [1.0, 4.0]
    history = (dict(step=1, seen=70, data_weights=[first, second]),
               dict(step=2, seen=90, batch=[1, 2]),
               dict(step=3, seen=1237, data_weights=[second, third]))

    def order(weights, changed=()):
        argv = ["--streams", str(streams), "--data-weights", *map(str, weights)]
        return tiny_batches(gemma, folders, *argv, changes=changed).order

    spans = [(order(first), 0, 70), (order(second, history[:2]), 70, 1237),
             (order(third, history), 1237, 2000)]
    samples = [mixture[position] for mixture, begin, end in spans
               for position in range(begin, end)]
    unchanged = order(first)
    expected = [unchanged[position] for position in range(8000)]
    for stream in range(streams):
        for shard in range(2):
            got = [i for s, i in samples[stream::streams] if s == shard]
            want = [i for s, i in expected[stream::streams] if s == shard]
            assert got == want[:len(got)]

    # and the weights hold
    counts = [sum(s == 0 for s, _ in samples[begin:end])
              for begin, end in ((0, 70), (70, 1070), (1237, 2000))]
    assert counts[0] == pytest.approx(52, abs=12)
    assert counts[1] == pytest.approx(500, abs=0 if streams == 1 else 12)
    assert counts[2] == pytest.approx(153, abs=30)


@pytest.mark.parametrize("data, warns", [("s", True), ("s t", False)])
def test_weights_for_data_that_was_one_set_give_a_warning(resume, capsys, data, warns):
    """If --data has changed as well, CheckpointWriter warns of that."""
    resume(0, "--data s")
    resume(200, f"--data {data} --data-weights 1 --resume-with data_weights")
    said = "--data-weights was added or left out at step 200" in capsys.readouterr().err
    assert said == warns


# ------------------------------------------------------------------------------ whole runs

def test_each_epoch_has_every_sample_once_at_any_batch_size(gemma, tmp_path):
    """From 32 to 48 on two ranks, to 16 on one: 208 samples, a little over two epochs."""
    data = numbered(tmp_path / "data", shards=4, samples=25)
    out = tmp_path / "run"

    def job(more):
        return flags(gemma, data, out, *ORIGINAL_CAPTIONS, "--sample-every", "0", *more.split())
    keys = {}
    for ranks, words in [
            (2, "--batch 32 --steps 2"),
            (2, "--batch 48 --steps 4 --micro-batch 12 --resume-with batch"),
            (1, "--batch 16 --steps 6 --resume-with batch"),
            (1, "--batch 16 --steps 7")]:
        done = launch(job(words), WATCHED, n=ranks)
        found = keys_by_position(done.stdout)
        assert found and not keys.keys() & found.keys()
        keys |= found
    assert sorted(keys) == list(range(2 * 32 + 2 * 48 + 3 * 16))
    together = [keys[position] for position in sorted(keys)]
    for first in (0, 100):
        assert sorted(together[first:first + 100]) == sample_names(0, 100)
    assert not set(together[200:]) - set(sample_names(0, 100))

    changed = [row for row in metrics(out) if "changed" in row]
    assert changed == [dict(step=2, changed=dict(batch=[32, 48])),
                       dict(step=4, changed=dict(batch=[48, 16]))]
    refused = launch(job("--batch 32 --steps 8"), check=False)
    assert refused.returncode == 1
    assert "run.batch was 16, is now 32" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("zero", ["1", *(pytest.param(zero, marks=pytest.mark.slow)
                                         for zero in ("0", "2", "3", "2-offload"))])
def test_adam_and_the_log_have_the_new_settings(gemma, data, tmp_path, zero):
    """With a tiny learning rate and a large weight decay, the weights shrink by known factors."""
    out = tmp_path / "run"

    def job(more):
        return flags(gemma, data, out, "--sample-every", "0", "--zero", zero, *more.split())
    launch_all([job("--lr 1e-3 --steps 2"),
                job("--lr 1e-5 --steps 4 --weight-decay 1e4 --warmup-steps 2 "
                    "--resume-with lr,weight_decay warmup-steps")])
    rates = [row["lr"] for row in metrics(out) if "lr" in row]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-6, 1e-5])

    before = state(out, 2)
    after = state(out, 4)
    for name, weight in before.items():
        if "/weight." in name:
            assert (after[name] - 0.95 * 0.9 * weight).abs().max() < 3e-5, name


def test_the_plot_shows_changes(tmp_path):
    import matplotlib.pyplot as plt
    rows = [dict(step=step, loss=1.0, images_per_s=1.0) for step in range(1, 9)]
    changed = dict(batch=[32, 48], warmup_steps=[100, 100])
    rows.insert(4, dict(step=4, changed=changed))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot(tmp_path)
    axes = plt.gcf().axes
    assert len(axes) == 3
    for axis in axes:
        (line,) = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert list(line.get_xdata()) == [4, 4]
    assert "batch 32 -> 48, warmup_steps 100" in [text.get_text() for text in axes[0].texts]
    plt.close("all")

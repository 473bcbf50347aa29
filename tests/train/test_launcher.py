"""train_gpu.py as a process: a complete run and its files, errors, and the process group."""
import numpy as np
import pytest
import torch
from launching import assert_equal, flags, launch, losses, metrics, state
from PIL import Image
from safetensors.torch import load_file

from fusedit_lib import pretrained
from fusedit_lib.train import plot, validation
from fusedit_lib.train.build import build_models, trainable
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

EXTRAS = ("--save-every", "20", "--sample-every", "20", "--ema-every", "5", "--workers", "1",
          "--val-every", "20", "--val-samples", "20", "--tensorboard")


def test_a_run_learns_saves_and_resumes(gemma, data, tmp_path):
    out = tmp_path / "run"
    more = (*EXTRAS, "--val-data", str(data))
    first = launch(flags(gemma, data, out, "--steps", "40", *more))
    assert "step 40/40" in first.stdout
    assert not first.stderr
    check_metrics(out)
    check_files(out)
    check_weights(out)
    assert pretrained.load_model(out).config.base == str(gemma)

    # add rows of steps after the last checkpoint
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "loss": 9.0}\n{"step": 42, "lo')
    second = launch(flags(gemma, data, out, "--steps", "44", *more))
    assert "from step 40 to 44" in second.stdout
    assert (out / "metrics-aside.jsonl").read_text() == '{"step": 41, "loss": 9.0}\n'
    assert [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, 45))

    # another run in the same folder
    other = launch(flags(gemma, data, out, "--steps", "50", "--seed", "1", *more), check=False)
    assert other.returncode == 1
    assert "run.seed was 42, is now 1" in other.stderr
    assert other.stderr.count("\n") == 1
    check_tensorboard(out)
    with Image.open(plot.plot(out)) as image:
        assert image.size[0] > 500
        assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_the_ema_begins_with_the_initial_weights(gemma, data, tmp_path):
    """And follows the published recurrence, without a warmup of its decay."""
    argv = flags(gemma, data, tmp_path, "--steps", "4", "--sample-every", "0", "--save-every", "1",
                 "--keep", "9", "--ema-every", "2", "--ema-decay", "0.9", "--no-ema-warmup")
    launch(argv)
    run = parse_run(argv, "")
    model, _ = build_models(run, model_config(run), "cpu", None)
    ema = {name: weight.detach().double() for name, weight in trainable(model)}
    for step in range(1, 5):
        tensors = state(tmp_path, step)
        for name in ema:
            weight = tensors[f"train_state/weight.{name}"].double()
            if step % 2 == 0:
                ema[name] = 0.9 * ema[name] + (1 - 0.9) * weight
        stored = {name: tensors[f"step-{step:07d}/{name}"].double() for name in ema}
        assert_equal(stored, ema, atol=1e-7)


def check_metrics(out):
    """Check metrics.jsonl of 40 steps, with validation at 20 and 40."""
    table = [row for row in metrics(out) if "loss" in row]
    assert [row["step"] for row in table] == list(range(1, 41))
    assert np.mean(losses(out)[-5:]) < 0.8 * np.mean(losses(out)[:5])
    assert all(row["grad_norm"] > 0 and row["memory_gb"] > 0 for row in table)

    held_out = [row for row in metrics(out) if "val_loss" in row]
    assert [row["step"] for row in held_out] == [20, 40]
    assert held_out[1]["val_loss"] < held_out[0]["val_loss"]
    levels = [held_out[1][f"val_{sigma:.4f}"] for sigma in validation.VALIDATION_SIGMAS]
    assert held_out[1]["val_loss"] == pytest.approx(np.mean(levels))
    assert len(set(levels)) == 8


def check_files(out):
    """Check the files of a run of 40 steps."""
    assert (out / "latest").read_text() == "step-0000040\n"
    with Image.open(out / "samples" / "step-0000040.png") as grid:
        assert grid.size[0] > 32
        assert grid.info["prompts"].splitlines()[1] == "a star"
    files = [path for path in (out / "step-0000040").rglob("*.*") if path.is_file()]
    modes = {path.stat().st_mode & 0o777 for path in files}
    assert len(modes) == 1                  # tensors, too, have the permissions given by the umask


def check_weights(out):
    """A run folder is a model folder of the EMA, and its trained weights can also be loaded."""
    ema = pretrained.load_model(out)
    raw = pretrained.load_model(out, ema=False)
    name = "layers.0.mlp.up_proj.weight"
    stored = load_file(out / "step-0000040" / "train_state" / "state.safetensors")
    assert torch.equal(raw.dit.state_dict()[name], stored[f"weight.dit.{name}"])
    assert not torch.equal(ema.dit.state_dict()[name], raw.dit.state_dict()[name])


def check_tensorboard(out):
    """Check TensorBoard's events of 44 steps, with validation at 20 and 40."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 45))
    assert [event.step for event in board.Scalars("val_loss")][:2] == [20, 40]


def test_an_error_is_one_line(gemma, data, tmp_path):
    (tmp_path / "bad.json").write_text("{oops")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    cases = [
        (["--data", str(tmp_path / "none-*.tar")], "no file matches"),
        (["--deepspeed-config", str(tmp_path / "no.json")], "No such file"),
        (["--deepspeed-config", str(tmp_path / "bad.json")], "not JSON"),
        (["--out", str(tmp_path / "bad.json")], "is a file"),
        (["--deepspeed-config", str(tmp_path / "ds.json")],
         "zero_optimization.stage is 2, but the flags set it to 1"),
        (["--plan", "8xH999"], "known: B200"),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], "--device cuda"))
    for argv, message in cases:
        done = launch([*flags(gemma, data, tmp_path / "b"), *argv], check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.glob("b/step-*"))


# ------------------------------------------------------------------------------ process group

# On one GPU the process group has NCCL only. This simulates it: our collectives on CPU tensors, as
# opposed to DeepSpeed's, raise the error that they would raise there.
ONE_GPU = """
class OneGpu:
    def __getattr__(self, name):
        return getattr(dist, name)
    def refuse(self, *args, **kwargs):
        raise RuntimeError("No backend type associated with device type cpu")
    all_reduce = all_gather = broadcast = all_gather_object = broadcast_object_list = refuse
for module in (checkpoints, distributed, monitor, validation):
    module.dist = OneGpu()
"""


def test_one_gpu_needs_no_collectives_on_cpu_tensors(gemma, data, tmp_path):
    """Covers checkpoints, log, image grids, validation and a resumed run."""
    def argv(steps):
        return flags(gemma, data, tmp_path / "run", "--steps", str(steps), "--save-every", "1",
                     "--sample-every", "2", "--val-data", str(data), "--val-every", "2",
                     "--val-samples", "8")
    launch(argv(2), ONE_GPU)
    launch(argv(4), ONE_GPU)
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-0000004"
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.parametrize("world, backend", [("1", "nccl"), ("2", "cpu:gloo,cuda:nccl")])
def test_a_process_group_is_bound_to_its_gpu(monkeypatch, tmp_path, world, backend):
    """The GPU is simulated."""
    import train_gpu
    seen = {}

    def set_device(device):
        seen["device"] = device

    def init_process_group(backend, **options):
        seen.update(backend=backend, **options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(train_gpu.backend, "pick_device", torch.device)
    monkeypatch.setattr(train_gpu.backend, "native_bf16", lambda device: True)
    monkeypatch.setattr(train_gpu.dist, "init_process_group", init_process_group)
    env = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE=world, DS_ACCELERATOR="cuda")
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    run = parse_run(["--dtype", "bf16", "--out", str(tmp_path)], "")
    _, device = train_gpu.start(run)
    assert device == torch.device("cuda:1")
    assert seen["device_id"] == seen["device"] == device
    assert seen["backend"] == backend

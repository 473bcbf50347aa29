"""train_tpu.py on virtual devices of a CPU, with PyTorch/XLA's real sharding."""
import importlib.util
import json
import os
import random
import re
import shutil
import signal

import launching
import numpy as np
import pytest
import torch
import warm
from conftest import REFERENCE, ROOT, tiny_clip, tiny_gemma
from launching import ENV, assert_equal, command, flags, launch, launch_all, losses, metrics, state
from PIL import Image
from starting import STARTS, first_losses, own_losses, start_flags, write_models
from tiny_shards import numbered

from fusedit_lib.train import checkpoints, costs
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

pytestmark = [
    pytest.mark.timeout(3000),              # each process compiles for half a minute on two cores
    pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                       reason="needs PyTorch/XLA: pip install -e '.[tpu,test]'")]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Lets the processes of these tests share compiled programs."""
    launching.ENV["XLA_PERSISTENT_CACHE_PATH"] = str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=3)
    return folder


def virtual(devices):
    """An environment in which a CPU has several devices.

    It turns off LLVM's optimisations, which take half of a test's time and do not pay off for a
    program that runs for a second.
    """
    return ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices),
                  "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def on_devices(devices, jobs):
    """Runs jobs of train_tpu.py on virtual devices. jobs: as for launch_all."""
    return launch_all(jobs, engine="tpu", env=virtual(devices))


def grad_norms(out):
    return [row["grad_norm"] for row in metrics(out)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


VARIANTS = {
    "mixed": ["--set", "timestep_conditioning=adaln-zero", "pos_embed=1d-rope",
              "sandwich_norm=false", "--weight-decay", "0.1", "--remat", "--no-ema-warmup"],
    "single": ["--set", "timestep_conditioning=adaln-single", "pos_embed=m-rope",
               "shared_attention_layers=[0,2]"],
    "cross": ["--set", "attention=cross", "timestep_conditioning=addition", "pos_embed=ape"],
    "shallow": ["--set", "fusion=shallow", "timestep_conditioning=adaln-zero"],
    "shallow-cross": ["--set", "fusion=shallow", "attention=cross", "initial_layers=1",
                      "text_hidden_states_index=1", "dit_num_hidden_layers=2"],
    "static": ["--set", "fusion=shallow", "text_states=static", "attention=cross"],
    "depth": ["--set", "fusion=shallow", "text_states=depth"],
    "time": ["--set", "fusion=shallow", "text_states=time", "timestep_conditioning=addition"],
    "joint": ["--set", "fusion=shallow", "text_states=joint"],
    "llm": ["--train-llm"],
    # With a VAE and CLIP's pooled vector.
    "latents": ["--set", f"vae={REFERENCE}/released_layout/pipeline/vae", "in_channels=16",
                "image_size=32", "patch_size=2", "timestep_conditioning=adaln-zero",
                "text_modulation_embeds_dim=24", "clip=CLIP"]}


def comparable(gemma, data, out, steps, *more):
    """Flags of a run for both launchers."""
    return flags(gemma, data, out, "--steps", str(steps), "--caption-drop", "0.3",
                 "--ema-every", "3", "--warmup-steps", "5", "--lr-schedule", "cosine",
                 "--sample-every", "0", *more)


@pytest.fixture(scope="module")
def gpu_run(gemma, data, tmp_path_factory):
    """A run of train_gpu.py with one process."""
    out = tmp_path_factory.mktemp("gpu")
    launch(comparable(gemma, data, out, 30, "--zero", "0"))
    assert len(losses(out)) == 30 and losses(out)[-1] < losses(out)[0]
    return out


@pytest.mark.parametrize("devices, mesh, micro_batch", [
    (1, "1,1", 0), (2, "2,1", 0), (4, "4,1", 0), (4, "4,1", 1), (8, "8,1", 0), (8, "4,2", 0),
    (8, "2,4", 0)])
def test_every_mesh_matches_one_process_of_train_gpu(gemma, data, gpu_run, tmp_path, devices, mesh,
                                                     micro_batch):
    """30 steps with the same initial weights, data and noise. One case accumulates gradients."""
    job = comparable(gemma, data, tmp_path, 30, "--mesh", mesh, "--micro-batch", str(micro_batch))
    on_devices(devices, [job])
    assert losses(tmp_path) == pytest.approx(losses(gpu_run), rel=1e-4)
    assert grad_norms(tmp_path) == pytest.approx(grad_norms(gpu_run), rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_matches_train_gpu(gemma, data, tmp_path, name):
    """8 steps on a 2 x 2 mesh."""
    clip = str(tiny_clip(tmp_path / "clip"))
    more = [word.replace("CLIP", clip) for word in VARIANTS[name]]
    launch(comparable(gemma, data, tmp_path / "gpu", 8, *more, "--zero", "0"))
    on_devices(4, [comparable(gemma, data, tmp_path / "tpu", 8, *more, "--mesh", "2,2")])
    assert losses(tmp_path / "tpu") == pytest.approx(losses(tmp_path / "gpu"), rel=1e-4)
    assert_nearly_equal(state(tmp_path / "tpu", 8), state(tmp_path / "gpu", 8))


def assert_nearly_equal(a, b):
    """Assert that two {name: tensor} differ by rounding only.

    Adam's first steps have the length of the learning rate, however small the gradient. Where a
    gradient is itself rounding, a single weight may therefore differ by much more than the others.
    """
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).abs()
        assert difference.mean() < 5e-6, name
        assert difference.max() < 1e-3, name
        if "exp_avg" in name:
            assert difference.max() <= 5e-4 * b[name].abs().max() + 1e-9, name


# Prints the bytes on each device: those of gradients after the first of two micro-batches, and
# those of each field of ParameterState when a checkpoint is gathered, held and to be written.
# Checks that the shards are where sharding.py says, from which follows what a host reads.
BYTES = """
import torch_xla
import torch_xla.distributed.spmd as xs

def shards(tensor):
    return xs.XLAShardedTensor(tensor).local_shards

def check_place(mesh, name, tensor, shard):
    places = dict(zip(xla.local_devices(), xla.local_slices(mesh, name, tensor.shape)))
    want = places[shard.shard_device]
    if shard.indices is ...:
        assert [s.stop - s.start for s in want] == list(tensor.shape), name
    else:
        got = [(s.start, s.stop) for s in shard.indices]
        assert got == [(s.start, s.stop) for s in want], name

class Engine(xla.Engine):
    def step(self):
        super().step()
        if self.micro_batches != 1:
            return
        torch_xla.sync(wait=True)
        held = {}
        for state in self.state.values():
            for shard in shards(state.weight.grad):
                device = shard.shard_device
                held[device] = held.get(device, 0) + shard.data.nbytes
        print("GRADIENTS", max(held.values()))

    def gather_state(self):
        gathered = super().gather_state()
        held, written = {}, {}
        for name, state in self.state.items():
            for field, tensor in enumerate(state):
                for shard in shards(tensor):
                    check_place(self.mesh, name, tensor, shard)
                    device = shard.shard_device
                    held.setdefault(device, [0] * 4)[field] += shard.data.nbytes
                    if shard.replica_id == 0:
                        written.setdefault(device, [0] * 4)[field] += shard.data.nbytes
        print("HELD", json.dumps([held, written]))
        return gathered

xla.Engine = Engine
"""


def after(word, lines):
    """The rest of each line that starts with a word."""
    return [line.removeprefix(word) for line in lines if line.startswith(word)]


@pytest.fixture(scope="module")
def wide_gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tiny_gemma(folder, num_hidden_layers=2, head_dim=64, intermediate_size=512)
    return folder


def test_a_device_holds_its_share(wide_gemma, data, tmp_path):
    """EMA, weights and both of Adam's moments. The sizes are read from the shards.

    Of a checkpoint, it writes its share as well, and all devices together write everything once.
    """
    total = None                            # bytes of each field on one device
    for devices, meshes in ((1, ["1,1"]), (2, ["2,1"]), (4, ["2,2"]), (8, ["8,1", "2,4"])):
        jobs = []
        for mesh in meshes:
            argv = flags(wide_gemma, data, tmp_path / mesh, "--steps", "2", "--mesh", mesh,
                         "--set", "dit_hidden_size=256", "--sample-every", "0", "--batch", "16",
                         "--micro-batch", str(8 // devices))
            jobs.append((argv, BYTES))
        lines = "".join(done.stdout for done in on_devices(devices, jobs)).splitlines()
        found = [json.loads(text) for text in after("HELD ", lines)]
        gradients = [int(text) for text in after("GRADIENTS ", lines)]
        assert len(found) == len(meshes) == len(gradients)

        if total is None:
            total = found[0][0]["CPU:0"]
        assert sum(total) == 4 * total[0] > 4 * 4_000_000
        share = [size / devices for size in total]
        for held, written in found:
            assert len(held) == len(written) == devices
            for device in (*held.values(), *written.values()):
                assert device == pytest.approx(share, rel=0.1)
            assert [sum(sizes) for sizes in zip(*written.values(), strict=True)] == total
        assert gradients == pytest.approx([share[0]] * len(meshes), rel=0.1)


COMPILES = """
import os
os.environ["XLA_PERSISTENT_CACHE_PATH"] = CACHE         # not shared with other tests
import torch_xla.debug.metrics as met

class Engine(xla.Engine):
    def update_ema(self, decay):
        super().update_ema(decay)
        print("COMPILED", self.micro_batches, met.counter_value("UncachedCompile"))

xla.Engine = Engine
"""


def test_nothing_compiles_after_the_second_step(gemma, data, tmp_path):
    """In 100 steps with changing learning rates, EMA updates, log lines and checkpoints."""
    job = flags(gemma, data, tmp_path / "run", "--steps", "100", "--warmup-steps", "30",
                "--lr-schedule", "cosine", "--ema-every", "10", "--save-every", "20", "--log-every",
                "7", "--sample-every", "0", "--mesh", "2,2")
    code = f"CACHE = {str(tmp_path / 'cache')!r}\n" + COMPILES
    (done,) = on_devices(4, [(job, code)])
    counts = {}                             # {step: graphs compiled so far}
    for step, count in re.findall(r"COMPILED (\d+) (\d+)", done.stdout):
        counts[int(step)] = int(count)
    assert len(counts) == 100
    assert 0 < counts[2] == counts[100] <= 3


# Prints the size of the graph of the second step before it runs.
GROWTH = """
import torch_xla
run_graph = xla.sync

def count_operations(engine):
    results = [engine.norm]
    for state in engine.state.values():
        results += state
    text = torch_xla._XLAC._get_xla_tensors_hlo(results)
    print("GRAPH", text.count(" = "))

class Engine(xla.Engine):
    def update_ema(self, decay):
        if self.micro_batches != 2:
            return super().update_ema(decay)
        xla.sync = lambda: count_operations(self)
        super().update_ema(decay)
        xla.sync = run_graph
        run_graph()

xla.Engine = Engine
"""


def test_the_graph_does_not_grow_with_depth(data, tmp_path):
    sizes = {}
    for layers in (2, 26):
        tiny_gemma(tmp_path / str(layers), num_hidden_layers=layers)
        job = flags(tmp_path / str(layers), data, tmp_path / f"run{layers}", "--steps", "2",
                    "--sample-every", "0", "--mesh", "2,2")
        (done,) = on_devices(4, [(job, GROWTH)])
        sizes[layers] = int(re.search(r"GRAPH (\d+)", done.stdout)[1])
    assert 1000 < sizes[2] < sizes[26] < 1.1 * sizes[2], sizes


def test_remat_takes_the_planned_memory(data, tmp_path, monkeypatch):
    """Compares XLA's intermediate tensors with the plan, without and with --remat."""
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=12)
    monkeypatch.setitem(launching.ENV, "PT_XLA_DEBUG_LEVEL", "1")
    taken = {}                              # GB; the key is True with --remat
    planned = {}
    for remat in (False, True):
        argv = flags(tmp_path / "gemma", data, tmp_path / str(remat), "--steps", "1", "--set",
                     "image_size=64", "dit_hidden_size=128", "--sample-every", "0")
        if remat:
            argv.append("--remat")
        (done,) = on_devices(2, [argv])
        sizes = re.findall(r"Intermediate tensor size: ([\d.]+) GB", done.stdout + done.stderr)
        taken[remat] = max(map(float, sizes))
        config = model_config(parse_run(argv, "", "tpu"))
        numbers = costs.tpu_activations(costs.abstract_model(config), config, 4, torch.float32)
        planned[remat] = numbers[remat] / 1e9
    assert taken == pytest.approx(planned, rel=0.2)
    assert 1.5 * taken[True] < taken[False]


@pytest.mark.skipif(importlib.util.find_spec("jax"), reason="tests the behaviour without JAX")
def test_the_replaced_function_of_scan_is_still_needed():
    """When this fails, xla.make_scan no longer needs to replace _backward_shard_alike."""
    from torch_xla.experimental import scan
    weight = torch.ones(2)
    with pytest.raises(ModuleNotFoundError, match="jax"):
        scan._backward_shard_alike(weight, weight, lambda carry, x: (carry, x), weight, weight)


# ------------------------------------------------------------------------------ checkpoints

# Kills the process group a moment after the AFTER-th batch; about 6 batches are loaded ahead.
DIES = """
import random, signal, threading
left = int(os.environ.get("AFTER", 10**9))
load_batches = launcher.load_batches

def count(batches):
    global left
    for batch in batches:
        left -= 1
        if left == 0:
            threading.Timer(random.random() * 0.1, os.killpg, (0, signal.SIGKILL)).start()
        yield batch

def load_and_count(*args):
    return count(load_batches(*args))       # its workers start immediately

launcher.load_batches = load_and_count
"""


def test_killed_again_and_again_equals_never_killed(gemma, data, tmp_path):
    def run(name, **more):
        argv = flags(gemma, data, tmp_path / name, "--steps", "112", "--save-every", "3",
                     "--ema-every", "1", "--sample-every", "0", "--workers", "1")
        return launch(argv, DIES, engine="tpu", env=virtual(2) | more, check=False)

    assert run("whole").returncode == 0
    rng = random.Random(1)
    first_steps = [0]
    for _ in range(6):
        done = run("killed", AFTER=str(rng.randrange(14, 19)))
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        first_steps.append(int(re.search(r"from step (\d+) ", done.stdout)[1]))
    assert run("killed").returncode == 0
    assert first_steps == sorted(first_steps) and first_steps[-1] > 10
    assert_equal(state(tmp_path / "killed", 112), state(tmp_path / "whole", 112))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def sample(model, out):
    """The pixels of the image that sample.py generates with a run."""
    done = warm.run([ROOT / "sample.py", "--model", model, "--prompt", "a red square", "--steps",
                     "4", "--out", out, "--dtype", "float32"])
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.png")
    return pixels(path)


def test_other_meshes_and_gpus_resume_a_run(gemma, data, tmp_path):
    """From 8 x 1 to 4 x 2, to 2 x 1, and to train_gpu.py and back. sample.py gives equal images."""
    def job(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--save-every", "6", "--sample-every", "0", *more)

    launch_all([job("whole", 12), job("gpu-tpu", 6, "--zero", "2")])
    on_devices(8, [job("8x1", 6, "--mesh", "8,1")])
    for name in ("4x2", "2x1", "tpu-gpu"):
        shutil.copytree(tmp_path / "8x1", tmp_path / name)
    on_devices(8, [job("8x1", 12, "--mesh", "8,1"), job("4x2", 12, "--mesh", "4,2")])
    on_devices(2, [job("2x1", 12), job("gpu-tpu", 12)])
    launch_all([job("tpu-gpu", 9, "--zero", "2")])
    on_devices(2, [job("tpu-gpu", 12)])

    for name, near in (("4x2", 1e-5), ("2x1", 1e-5), ("gpu-tpu", 1e-4), ("tpu-gpu", 1e-4)):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "8x1"), rel=near), name
        assert_equal(state(tmp_path / name, 12), state(tmp_path / "8x1", 12), atol=1e-4)

    image = sample(tmp_path / "8x1", tmp_path / "out" / "8x1")
    assert np.ptp(image) > 20
    for name in ("tpu-gpu", "whole"):
        other = sample(tmp_path / name, tmp_path / "out" / name)
        assert np.abs(other - image).max() <= 1


SLOW = """
decode = batches.decode

def slow_decode(*args):
    time.sleep(0.05)
    return decode(*args)

batches.decode = slow_decode
"""


def test_a_signal_ends_the_step_and_saves(gemma, data, tmp_path):
    """Even while the threads that feed the mesh wait for data."""
    argv = flags(gemma, data, tmp_path / "run", "--steps", "100000", "--log-every", "5",
                 "--workers", "1")
    process = warm.start(command(argv, SLOW, "tpu"), virtual(2), merge=True)
    assert any(line.startswith("step 5/") for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate()
    last = (tmp_path / "run" / "latest").read_text().strip()
    assert process.returncode == 0 and "Traceback" not in out and "Exception" not in out, out
    assert f"stopped by SIGTERM; step {int(last[5:])} is saved" in out
    assert checkpoints.damage(tmp_path / "run" / last) is None


# ------------------------------------------------------------------------------ other cases

POISON = """
real = fusedit.logit_normal_sigma
count = -1

def poisoned(normal, shift):
    global count
    count += 1
    sigma = real(normal, shift)
    if count == 2:
        sigma = sigma * float("nan")
    return sigma

fusedit.logit_normal_sigma = poisoned
"""


def test_a_step_that_is_not_finite_is_skipped_and_counted(gemma, data, tmp_path):
    def job(name, steps):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--sample-every", "0", "--save-every", "3")

    on_devices(2, [(job("a", 6), POISON), (job("b", 3), POISON), job("b", 6)])
    rows = metrics(tmp_path / "a")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None
    path = tmp_path / "a" / "step-0000006" / "train_state" / "state.json"
    assert json.loads(path.read_text())["adam_step"] == 5
    assert_equal(state(tmp_path / "a", 6), state(tmp_path / "b", 6))
    for tensor in state(tmp_path / "a", 6).values():
        assert tensor.isfinite().all()


def validations(out):
    """The rows of metrics.jsonl with a validation loss."""
    return [row for row in metrics(out) if "val_loss" in row]


def test_changed_settings_match_train_gpu(gemma, data, tmp_path):
    """Batch size, learning rate, its schedule and weight decay, changed by --resume-with."""
    def jobs(name):
        new = ["--batch", "4", "--lr", "1e-2", "--warmup-steps", "2", "--weight-decay", "20",
               "--resume-with", "batch,lr,warmup_steps,weight_decay"]
        return [comparable(gemma, data, tmp_path / name, 2),
                comparable(gemma, data, tmp_path / name, 6, *new)]
    launch_all(jobs("gpu"))
    on_devices(2, jobs("tpu"))
    assert losses(tmp_path / "tpu") == pytest.approx(losses(tmp_path / "gpu"), rel=1e-4)
    rates = [[row["lr"] for row in metrics(tmp_path / name) if "lr" in row]
             for name in ("gpu", "tpu")]
    assert rates[0] == rates[1]
    assert rates[0][2:4] == [5e-3, 1e-2]


def test_validation_matches_train_gpu(gemma, data, tmp_path):
    """Validation loss and image grids of the EMA weights, in float32 and in bf16."""
    def job(name, *more):
        return flags(gemma, data, tmp_path / name, "--steps", "6", "--ema-every", "1",
                     "--sample-every", "3", "--val-data", str(data), "--val-every", "3",
                     "--val-samples", "21", *more)

    launch_all([job("gpu"), job("gpu16", "--dtype", "bf16")])
    on_devices(4, [job("tpu", "--mesh", "2,2"), job("tpu16", "--dtype", "bf16")])
    for suffix, near, levels in (("", 1e-4, 1), ("16", 3e-2, 40)):
        gpu = tmp_path / f"gpu{suffix}"
        tpu = tmp_path / f"tpu{suffix}"
        assert [row["step"] for row in validations(tpu)] == [3, 6]
        for want, got in zip(validations(gpu), validations(tpu), strict=True):
            assert list(got.values()) == pytest.approx(list(want.values()), rel=near)
        assert losses(tpu) == pytest.approx(losses(gpu), rel=near)
        grids = [pixels(out / "samples" / "step-0000006.png") for out in (gpu, tpu)]
        assert np.abs(grids[0] - grids[1]).max() <= levels


def test_each_device_draws_its_share_of_the_image_grid(gemma, data, tmp_path):
    """3 images on 8 devices: each draws one, with guidance. All are decoded by one program.

    The shapes are those of the compiled programs. Without the repetitions, which make the batch
    divisible, every device would compute the attention of all 3 images.
    """
    argv = flags(gemma, data, tmp_path / "run", "--steps", "1", "--sample-every", "1")
    env = virtual(8)
    env["XLA_FLAGS"] += f" --xla_dump_to={tmp_path}/dump --xla_dump_hlo_as_text"
    launch(argv, engine="tpu", env=env)
    programs = [path.read_text() for path in tmp_path.glob("dump/*cpu_after_optimizations.txt")]
    config = model_config(parse_run(argv, "", "tpu"))
    tokens = (config.image_size // config.patch_size)**2
    batches = set()                         # sizes of batches times key heads in image attention
    for program in programs:
        for first, rows, keys in re.findall(r" = f32\[(\d+),(\d+),(\d+)\]\S* dot\(", program):
            if int(rows) % tokens == 0 and int(keys) > tokens:
                batches.add(int(first))
    key_heads = 2
    assert batches == {key_heads, 2 * key_heads}            # one image in training, two in a grid
    assert sum(bool(re.search(r"->.*u8\[", program)) for program in programs) == 1


# Two chips with a peak of 1e6 FLOP/s each. The memory in use rises while the run goes on.
FIGURES = """
from fusedit_lib.train import hardware
hardware.TPUS["small"] = hardware.Hardware(1e6, 1e9)
xla.tpu_kind = lambda: "small"
used = [2e9, 5e9, 3e9]
xla.tpu_memory = lambda: used.pop(0)
"""


def test_the_log_has_the_mfu_and_the_memory_of_the_chips(gemma, data, tmp_path):
    argv = flags(gemma, data, tmp_path / "run", "--steps", "3", "--sample-every", "0")
    on_devices(2, [(argv, FIGURES)])
    config = model_config(parse_run(argv, "", "tpu"))
    useful = costs.useful_flops(config, latents=False, train_llm=False)
    rows = metrics(tmp_path / "run")
    assert [row["memory_gb"] for row in rows] == [2, 5, 5]
    for row in rows[1:]:
        tokens = (row["mfu"] * 2e6 / row["images_per_s"] - useful.per_image) / useful.per_token
        assert 1 < tokens < config.max_text_tokens          # of a caption, without padding


@pytest.mark.parametrize("devices, mesh", [(2, "2,1"), (4, "2,2")])
def test_a_run_starts_with_the_losses_of_its_model(gemma, data, tmp_path, devices, mesh):
    """A run of train_gpu.py, a checkpoint's EMA and raw weights, and the released layout."""
    write_models(tmp_path, gemma, data)
    for name, (folder, more) in STARTS.items():
        out = tmp_path / name / "out"
        argv = start_flags(tmp_path / folder, data, out, *more)
        own = own_losses(argv)
        on_devices(devices, [[*argv, "--mesh", mesh]])
        assert first_losses(out) == pytest.approx(own, rel=1e-5), name


def fails(argv, env):
    """The stderr of a run that must fail."""
    done = launch(argv, engine="tpu", env=env, check=False)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize("more, says", [
    (["--mesh", "3,1"], "--mesh 3,1 does not match 2 devices"),
    (["--batch", "9"], "--batch 9 is not divisible by 2 devices; use --batch 8 or 10"),
    (["--data", "none-*.tar"], "no file matches")])
def test_an_error_is_one_line(gemma, data, tmp_path, more, says):
    stderr = fails([*flags(gemma, data, tmp_path / "run"), *more], virtual(2))
    assert says in stderr and stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/step-*"))


def test_data_that_cannot_be_read_is_an_error_in_one_line(gemma, tmp_path):
    """A thread's exception is raised where the batches are used."""
    broken = numbered(tmp_path)
    for tar in broken.glob("*.tar"):
        tar.write_bytes(b"")
    stderr = fails(flags(gemma, broken, tmp_path / "run", "--workers", "1"), virtual(2))
    assert "100 samples in a row cannot be read" in stderr and stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/step-*"))


def test_a_missing_tpu_is_named(gemma, data, tmp_path):
    env = virtual(2)
    del env["PJRT_DEVICE"]
    assert "no TPU found" in fails(flags(gemma, data, tmp_path / "run"), env)

"""train_tpu.py on a CPU's virtual devices, where PyTorch/XLA's sharding is real."""
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
from tiny_shards import numbered

from fusedit_lib.train import checkpoints, costs
from fusedit_lib.train.config import model_config, parse_run

pytestmark = [
    pytest.mark.timeout(3000),              # each process compiles, half a minute on two cores
    pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                       reason="needs PyTorch/XLA: pip install -e '.[tpu,test]'")]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs that these tests' processes compile, for each other."""
    launching.ENV["XLA_PERSISTENT_CACHE_PATH"] = str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("data"))


def virtual(devices):
    """The environment in which a CPU has several devices.

    LLVM need not optimise the code of a program that runs for a second: half of a test's time.
    """
    return ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices),
                  "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def on_devices(n, jobs):
    """Jobs of train_tpu.py, as launch_all takes them, on n virtual devices."""
    return launch_all(jobs, engine="tpu", env=virtual(n))


VARIANTS = {                                # the last one with a VAE and CLIP's vector
    "mixed": ["--set", "timestep_conditioning=adaln-zero", "pos_embed=1d-rope",
              "sandwich_norm=false", "--weight-decay", "0.1", "--remat"],
    "single": ["--set", "timestep_conditioning=adaln-single", "pos_embed=m-rope",
               "shared_attention_layers=[0,2]"],
    "cross": ["--set", "attention=cross", "timestep_conditioning=addition", "pos_embed=ape"],
    "shallow": ["--set", "fusion=shallow", "timestep_conditioning=adaln-zero"],
    "shallow-cross": ["--set", "fusion=shallow", "attention=cross", "initial_layers=1",
                      "text_hidden_states_index=1", "dit_num_hidden_layers=2"],
    "llm": ["--train-llm"],
    "latents": ["--set", f"vae={REFERENCE}/released_layout/pipeline/vae", "in_channels=16",
                "image_size=32", "patch_size=2", "timestep_conditioning=adaln-zero",
                "text_modulation_embeds_dim=24", "clip=CLIP"]}


def as_one_process(gemma, data, out, steps, *more):
    return flags(gemma, data, out, "--steps", str(steps), "--caption-drop", "0.3",
                 "--ema-every", "3", "--warmup-steps", "5", "--lr-schedule", "cosine",
                 "--sample-every", "0", *more)


@pytest.fixture(scope="module")
def plain(gemma, data, tmp_path_factory):
    """The run of one process of train_gpu.py."""
    out = tmp_path_factory.mktemp("plain")
    launch(as_one_process(gemma, data, out, 30, "--zero", "0"))
    assert len(losses(out)) == 30 and losses(out)[-1] < losses(out)[0]
    return out


@pytest.mark.parametrize("devices, mesh, micro", [
    (1, "1,1", 0), (2, "2,1", 0), (4, "4,1", 0), (4, "4,1", 1), (8, "8,1", 0), (8, "4,2", 0),
    (8, "2,4", 0)])
def test_every_mesh_trains_as_one_process_of_train_gpu(gemma, data, plain, tmp_path, devices, mesh,
                                                       micro):
    """30 steps of the same weights, data and noise; micro-batches of 1 are accumulated."""
    on_devices(devices, [as_one_process(gemma, data, tmp_path, 30, "--mesh", mesh, "--micro-batch",
                                        str(micro))])
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-4)
    assert [r["grad_norm"] for r in metrics(tmp_path)] == pytest.approx(
        [r["grad_norm"] for r in metrics(plain)], rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_trains_as_with_train_gpu(gemma, data, tmp_path, name):
    """8 steps on 2 x 2."""
    clip = str(tiny_clip(tmp_path / "clip"))
    more = [m.replace("CLIP", clip) for m in VARIANTS[name]]
    launch(as_one_process(gemma, data, tmp_path / "gpu", 8, *more, "--zero", "0"))
    on_devices(4, [as_one_process(gemma, data, tmp_path / "tpu", 8, *more, "--mesh", "2,2")])
    assert losses(tmp_path / "tpu") == pytest.approx(losses(tmp_path / "gpu"), rel=1e-4)
    assert_equal(state(tmp_path / "tpu", 8), state(tmp_path / "gpu", 8), atol=1e-4)


BYTES = """
import torch_xla.distributed.spmd as xs
class Engine(launcher.Engine):
    def step(self, *args):
        super().step(*args)
        if self.micro == 1:                 # of two micro-batches: the gradients so far
            launcher.torch_xla.sync(wait=True)
            grads = [xs.XLAShardedTensor(s[1].grad).local_shards for s in self.state.values()]
            print("GRADS", max(sum(g[d].data.nbytes for g in grads) for d in range(len(grads[0]))))
    def shares(self):
        found = super().shares()
        held = {}
        for tensors in self.state.values():
            for which, t in enumerate(tensors):
                for s in xs.XLAShardedTensor(t).local_shards:
                    held[s.shard_device] = held.get(s.shard_device, [0] * 4)
                    held[s.shard_device][which] += s.data.nbytes
        print("HELD", json.dumps(held))
        return found
launcher.Engine = Engine
"""


def test_a_device_holds_its_share(data, tmp_path):
    """Averages, weights and both of Adam's moments, read from the shards themselves."""
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=2, head_dim=64, intermediate_size=512)
    total = None
    for devices, meshes in ((1, ["1,1"]), (2, ["2,1"]), (4, ["2,2"]), (8, ["8,1", "2,4"])):
        jobs = [(flags(tmp_path / "gemma", data, tmp_path / mesh, "--steps", "2", "--mesh", mesh,
                       "--set", "dit_hidden_size=256", "--sample-every", "0", "--batch", "16",
                       "--micro-batch", str(8 // devices)), BYTES) for mesh in meshes]
        out = "".join(done.stdout for done in on_devices(devices, jobs))
        found = [json.loads(line[5:]) for line in out.splitlines() if line.startswith("HELD")]
        grads = [int(line[6:]) for line in out.splitlines() if line.startswith("GRADS")]
        assert len(found) == len(meshes) == len(grads)
        for held in found:
            total = total or held["CPU:0"]
            assert len(held) == devices and sum(total) == 4 * total[0] > 4 * 4_000_000
            for device in held.values():
                assert device == pytest.approx([n / devices for n in total], rel=0.1)
        assert grads == pytest.approx([total[0] / devices] * len(meshes), rel=0.1)


COMPILES = """
import os
os.environ["XLA_PERSISTENT_CACHE_PATH"] = CACHE         # not what others have compiled
import torch_xla.debug.metrics as met
class Engine(launcher.Engine):
    def step(self, *args):
        super().step(*args)
        print("COMPILED", self.micro, met.counter_value("UncachedCompile"))
launcher.Engine = Engine
"""


def test_nothing_compiles_after_the_second_step(gemma, data, tmp_path):
    """Learning rates, updates of the average, log lines, checkpoints: 100 steps."""
    job = flags(gemma, data, tmp_path / "run", "--steps", "100", "--warmup-steps", "30",
                "--lr-schedule", "cosine", "--ema-every", "10", "--save-every", "20", "--log-every",
                "7", "--sample-every", "0", "--mesh", "2,2")
    code = f"CACHE = {str(tmp_path / 'cache')!r}\n" + COMPILES
    out = on_devices(4, [(job, code)])[0].stdout
    counts = dict(map(int, m) for m in re.findall(r"COMPILED (\d+) (\d+)", out))
    assert len(counts) == 100 and 0 < counts[2] == counts[100] <= 3


GROWTH = """
import torch_xla
import torch_xla.debug.metrics as met
class Engine(launcher.Engine):
    def step(self, *args):
        if self.micro == 1:
            last = [self.norm, *(t for s in self.state.values() for t in s)]
            sync, launcher.torch_xla.sync = torch_xla.sync, lambda: None  # the graph is still whole
            super().step(*args)
            launcher.torch_xla.sync = sync
            last = [self.norm, *(t for s in self.state.values() for t in s)]
            print("GRAPH", torch_xla._XLAC._get_xla_tensors_hlo(last).count(" = "))
            sync()
            return
        super().step(*args)
launcher.Engine = Engine
"""


def test_the_graph_does_not_grow_with_depth(data, tmp_path):
    sizes = {}
    for layers in (2, 26):
        tiny_gemma(tmp_path / str(layers), num_hidden_layers=layers)
        job = flags(tmp_path / str(layers), data, tmp_path / f"run{layers}", "--steps", "2",
                    "--sample-every", "0", "--mesh", "2,2")
        out = on_devices(4, [(job, GROWTH)])[0].stdout
        sizes[layers] = int(re.search(r"GRAPH (\d+)", out)[1])
    assert 1000 < sizes[2] < sizes[26] < 1.1 * sizes[2], sizes


def test_remat_takes_the_memory_that_the_plan_says(data, tmp_path, monkeypatch):
    """Of what XLA says it needs between a step's inputs and outputs; and without, at most."""
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=12)
    monkeypatch.setitem(launching.ENV, "PT_XLA_DEBUG_LEVEL", "1")
    found = {}
    for remat in (False, True):
        argv = flags(tmp_path / "gemma", data, tmp_path / str(remat), "--steps", "1", "--set",
                     "image_size=64", "dit_hidden_size=128", "--sample-every", "0",
                     *["--remat"] * remat)
        done = on_devices(2, [argv])[0]
        sizes = re.findall(r"Intermediate tensor size: ([\d.]+) GB", done.stdout + done.stderr)
        config = model_config(parse_run(argv, "", "tpu"))
        planned = costs.activations(costs.abstract_model(config), config, 4, torch.float32, False,
                                    costs.UnfusedAttention)
        found[remat] = max(map(float, sizes)), planned[remat] / 1e9
    assert found[True][0] == pytest.approx(found[True][1], rel=0.3)
    assert 3 * found[True][0] < found[False][0] < found[False][1]


# ------------------------------------------------------------------------------ checkpoints

# The process kills its group a moment after its AFTER-th batch from now; some 6 are made ahead.
DIES = """
import random, signal, threading
left, load = int(os.environ.get("AFTER", 10**9)), launcher.load_batches
def count(batches):
    global left
    for batch in batches:
        left -= 1
        if not left:
            threading.Timer(random.random() * 0.1, os.killpg, (0, signal.SIGKILL)).start()
        yield batch
launcher.load_batches = lambda *args: count(load(*args))     # whose workers start at once
"""


def test_killed_again_and_again_equals_never_killed(gemma, data, tmp_path):
    def run(name, **more):
        argv = flags(gemma, data, tmp_path / name, "--steps", "112", "--save-every", "3",
                     "--ema-every", "1", "--sample-every", "0", "--workers", "1")
        return launch(argv, DIES, engine="tpu", env=virtual(2) | more, check=False)
    assert run("whole").returncode == 0
    rng, begun = random.Random(1), [0]
    for _ in range(6):
        done = run("killed", AFTER=str(rng.randrange(14, 19)))
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        begun.append(int(re.search(r"from step (\d+) ", done.stdout)[1]))
    assert run("killed").returncode == 0 and begun == sorted(begun) and begun[-1] > 10
    assert_equal(state(tmp_path / "killed", 112), state(tmp_path / "whole", 112))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_other_meshes_and_gpus_go_on_with_a_run(gemma, data, tmp_path):
    """8 x 1 to 4 x 2 and to 2 x 1, to train_gpu.py and back; the same pictures from sample.py."""
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
    pictures = []
    for name in ("8x1", "tpu-gpu", "whole"):
        done = warm.run([ROOT / "sample.py", "--model", tmp_path / name, "--prompt", "a red square",
                         "--steps", "4", "--out", tmp_path / "out" / name, "--dtype", "float32"])
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / "out" / name).glob("*.png")
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
    assert np.ptp(pictures[0]) > 20
    assert all(np.abs(p - pictures[0]).max() <= 1 for p in pictures)


SLOW = """
decode = batches.decode
batches.decode = lambda *args: (time.sleep(0.05), decode(*args))[1]
"""


def test_a_signal_ends_the_step_and_saves(gemma, data, tmp_path):
    """Also while the threads that feed the mesh wait for data."""
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


# ------------------------------------------------------------------------------ what else

POISON = """
real, count = fusedit.logit_normal_sigma, -1
def poisoned(normal, shift):
    global count
    count += 1
    return real(normal, shift) * (float("nan") if count == 2 else 1)
fusedit.logit_normal_sigma = poisoned
"""


def test_a_step_that_is_not_finite_is_skipped_and_counted(gemma, data, tmp_path):
    def job(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1",
                     "--sample-every", "0", "--save-every", "3", *more)
    on_devices(2, [(job("a", 6), POISON), (job("b", 3), POISON), job("b", 6)])
    rows = metrics(tmp_path / "a")
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None
    assert json.loads((tmp_path / "a" / "step-0000006" / "train_state" / "state.json").read_text()
                      )["adam_step"] == 5
    assert_equal(state(tmp_path / "a", 6), state(tmp_path / "b", 6))
    assert all(v.isfinite().all() for v in state(tmp_path / "a", 6).values())


def test_looks_are_those_of_train_gpu(gemma, data, tmp_path):
    """Validation loss and sample grids, of the averaged weights; and the compute type, bf16."""
    def job(name, *more):
        return flags(gemma, data, tmp_path / name, "--steps", "6", "--ema-every", "1",
                     "--sample-every", "3", "--val-data", str(data), "--val-every", "3",
                     "--val-samples", "21", *more)
    launch_all([job("gpu"), job("gpu16", "--dtype", "bf16")])
    on_devices(4, [job("tpu", "--mesh", "2,2"), job("tpu16", "--dtype", "bf16")])
    for suffix, near in (("", 1e-4), ("16", 3e-2)):
        want, got = ([r for r in metrics(tmp_path / (name + suffix)) if "val_loss" in r]
                     for name in ("gpu", "tpu"))
        assert [r["step"] for r in got] == [3, 6]
        for a, b in zip(want, got, strict=True):
            assert list(b.values()) == pytest.approx(list(a.values()), rel=near)
        assert losses(tmp_path / f"tpu{suffix}") == pytest.approx(losses(tmp_path / f"gpu{suffix}"),
                                                                  rel=near)
        with Image.open(tmp_path / f"gpu{suffix}" / "samples" / "step-0000006.png") as a, \
                Image.open(tmp_path / f"tpu{suffix}" / "samples" / "step-0000006.png") as b:
            off = np.abs(np.asarray(a.convert("RGB")).astype(int) - np.asarray(b.convert("RGB")))
            assert off.max() <= (1 if not suffix else 40)


def test_what_goes_wrong_is_one_line(gemma, data, tmp_path):
    (tmp_path / "bad").mkdir()
    broken = numbered(tmp_path / "bad" / "data")
    for tar in broken.glob("*.tar"):
        tar.write_bytes(b"")
    for argv, says in [
            (["--workers", "1", broken], "100 samples in a row cannot be read"),
            (["--mesh", "3,1"], "--mesh 3,1 does not make up 2 devices"),
            (["--batch", "9"], "--batch 9 does not divide into 2 devices; --batch 8 or 10 would"),
            (["--data", str(tmp_path / "none-*.tar")], "no file matches")]:
        where = argv.pop() if argv[-1] == broken else data
        done = launch([*flags(gemma, where, tmp_path / "run"), *argv], engine="tpu", env=virtual(2),
                      check=False)
        assert done.returncode == 1 and says in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("run/step-*"))
    alone = {k: v for k, v in virtual(2).items() if k != "PJRT_DEVICE"}
    done = launch(flags(gemma, data, tmp_path / "run"), engine="tpu", env=alone, check=False)
    assert done.returncode == 1 and "no TPU is here" in done.stderr

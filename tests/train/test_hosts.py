"""train_tpu.py on two processes that stand for two hosts of a TPU slice; see hosts.py."""
import importlib.util
import shutil
from collections import Counter

import launching
import numpy as np
import pytest
import torch
import warm
from hosts import run_hosts, virtual_devices
from launching import flags, launch, losses, metrics
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from fusedit_lib.files import SlicedTensor, open_tensors, read_tensor
from fusedit_lib.train import checkpoints

pytestmark = [
    pytest.mark.timeout(3000),              # each process compiles for half a minute on two cores
    pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                       reason="needs PyTorch/XLA: pip install -e '.[tpu,test]'")]
STOPPED = 4                                 # the step after which a run is stopped


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Lets the processes of these tests share compiled programs."""
    launching.ENV["XLA_PERSISTENT_CACHE_PATH"] = str(tmp_path_factory.mktemp("xla"))


def settings(gemma, data, out, *more):
    return flags(gemma, data, out, "--steps", "6", "--batch", "16", "--ema-every", "1",
                 "--save-every", "2", "--keep", "9", "--sample-every", "3", "--val-data", str(data),
                 "--val-every", "3", "--val-samples", "21", *more)


# Host 1 receives a signal during a step.
SIGNAL = f"""
import signal

class Monitor(monitor.Monitor):
    def log_step(self, grad_norm):
        super().log_step(grad_norm)
        if self.step == {STOPPED}:
            os.kill(os.getpid(), signal.SIGTERM)

launcher.Monitor = Monitor
"""


@pytest.fixture(scope="module")
def runs(gemma, data, tmp_path_factory):
    """A folder with whole/, a run of 6 steps on two hosts, and stopped/, stopped after STOPPED."""
    folder = tmp_path_factory.mktemp("hosts")
    run_hosts(settings(gemma, data, folder / "whole"))
    ends = run_hosts(settings(gemma, data, folder / "stopped"), ["", SIGNAL])
    assert f"stopped by SIGTERM; step {STOPPED} is saved" in ends[0].stdout
    assert "step" not in ends[1].stdout     # only the first host logs
    return folder


def stored(out, step):
    """{stem: the tensors of a checkpoint, in the form of files.open_tensors}."""
    folder = out / checkpoints.checkpoint_name(step)
    assert checkpoints.damage(folder) is None
    return {"model": open_tensors(folder), "state": open_tensors(folder / "train_state", "state")}


def assert_near(out, other, near):
    """Asserts that two runs have nearly the same rows of metrics and the same state at the end."""
    vary = ("time", "images_per_s", "memory_gb", "mfu")
    for row, want in zip(metrics(out), metrics(other), strict=True):
        kept = {name: value for name, value in want.items() if name not in vary}
        assert {name: row[name] for name in kept} == pytest.approx(kept, rel=near)
    got = stored(out, 6)
    for stem, tensors in stored(other, 6).items():
        assert got[stem].keys() == tensors.keys()
        for name in tensors:
            tensor = read_tensor(got[stem], name)
            assert_close(tensor, read_tensor(tensors, name), rtol=0, atol=10 * near)


def grid(out):
    with Image.open(out / "samples" / "step-0000006.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_two_hosts_train_as_one_with_all_their_devices(gemma, data, runs, tmp_path):
    """Losses, validation losses, image grids, weights, moments and EMA."""
    launch(settings(gemma, data, tmp_path / "one"), engine="tpu", env=virtual_devices(8))
    assert_near(runs / "whole", tmp_path / "one", 1e-5)
    assert np.abs(grid(runs / "whole") - grid(tmp_path / "one")).max() <= 1


def test_each_host_writes_the_slices_of_its_own_devices(runs):
    """Both write as many bytes, and nothing is written twice."""
    names = [name for path in (runs / "whole" / "step-0000006").rglob("*-of-00002.safetensors")
             for name in load_file(path)]
    moments = [name for name in names if name.startswith("exp_avg.")]
    assert len(names) == len(set(names)) and 4 * len(moments) == len(names) > 100
    for stem, tensors in stored(runs / "whole", 6).items():
        sizes = Counter()                   # bytes of slices in the file of each host
        for name, (file, _) in tensors.items():
            if not isinstance(file, SlicedTensor):
                continue
            times = torch.zeros(file.get_shape())
            for where, (part, part_name) in zip(file.slices, file.sources, strict=True):
                times[where] += 1
                sizes[str(part)] += part.get_tensor(part_name).nbytes
            assert (times == 1).all(), name
        assert len(sizes) == 2 and min(sizes.values()) == max(sizes.values()) > 10_000, stem


def test_a_stopped_run_resumes_on_two_hosts(gemma, data, runs, tmp_path):
    """It equals the run that was never stopped, to the bit."""
    shutil.copytree(runs / "stopped", tmp_path / "run")
    run_hosts(settings(gemma, data, tmp_path / "run"))
    assert_near(tmp_path / "run", runs / "whole", 0)


def test_other_meshes_and_gpus_resume_the_run_of_two_hosts(gemma, data, runs, tmp_path):
    """On a mesh of 2 x 4, the devices that share the heads belong to both hosts."""
    for name in ("mesh", "gpu"):
        shutil.copytree(runs / "stopped", tmp_path / name)
    (tmp_path / "mesh" / "step-0000005").mkdir()           # damaged
    ends = run_hosts(settings(gemma, data, tmp_path / "mesh", "--mesh", "2,4"))
    assert "step-0000005 is damaged" in ends[0].stderr
    assert "damaged" not in ends[1].stderr  # only the first host says what all hosts find
    assert_near(tmp_path / "mesh", runs / "whole", 1e-5)

    launch(settings(gemma, data, tmp_path / "gpu"))
    assert losses(tmp_path / "gpu") == pytest.approx(losses(runs / "whole"), rel=1e-4)


# ------------------------------------------------------------------------------ failures

# Host 1 fails in its second step, with exit handlers that never end.
FAILS = """
import atexit

class Monitor(monitor.Monitor):
    def log_step(self, grad_norm):
        super().log_step(grad_norm)
        if self.step == 2:
            atexit.register(time.sleep, 10000)
            raise RuntimeError("a chip is broken")

launcher.Monitor = Monitor
"""


def test_a_host_that_fails_ends_the_other(gemma, data, tmp_path):
    ends = run_hosts(settings(gemma, data, tmp_path), ["", FAILS], check=False)
    assert [end.returncode for end in ends] == [1, 1]
    assert "Traceback" in ends[1].stderr and "a chip is broken" in ends[1].stderr
    assert "another process of this run has stopped" in ends[0].stderr.splitlines()[-1]


def test_hosts_that_see_different_checkpoints_are_refused(gemma, data, runs, tmp_path):
    """Each host has a disk of its own, for example."""
    argv = [settings(gemma, data, out) for out in (runs / "stopped", tmp_path)]
    for end in run_hosts(argv, check=False):
        assert end.returncode == 1
        assert "--out and --data must be on storage that all machines share" in end.stderr


CONNECTS = """
import os, sys, time
from fusedit_lib.train import distributed, xla
from fusedit_lib.train.flags import parse_run
xla.set_environment_defaults()
xla.start(parse_run(["--data", "none"], "", "tpu"))
print("ranks", *distributed.rank_and_world(), os.environ["RANK"], flush=True)
"""


def test_two_runs_share_a_cpu():
    """Each connects over xla://, to itself, on a port of its own."""
    first = warm.start(["-c", CONNECTS + "time.sleep(10000)"], virtual_devices(2))
    launching.read_until(first, "ranks 0 1 0")
    second = warm.run(["-c", CONNECTS], virtual_devices(2))
    first.kill()
    assert second.returncode == 0 and "ranks 0 1 0" in second.stdout, second.stderr

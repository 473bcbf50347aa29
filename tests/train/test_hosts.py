"""train_tpu.py on two processes that stand for two hosts of a TPU slice; see hosts.py."""
import importlib.util
import json
import re
import shutil
from collections import defaultdict

import launching
import numpy as np
import pytest
from hosts import DEVICES, run_hosts, virtual_devices
from launching import flags, launch, losses, metrics
from PIL import Image

from fusedit_lib.files import open_tensors, read_tensor
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
    return flags(gemma, data, out, "--steps", "6", "--batch", "16", "--micro-batch", "1",
                 "--ema-every", "1", "--save-every", "2", "--keep", "9", "--sample-every", "3",
                 "--val-data", str(data), "--val-every", "3", "--val-samples", "21", *more)


# Host 1 receives SIGTERM during a step; nothing else reaches host 0 before it has to stop as well.
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
    for end in ends:
        assert end.stderr == ""
    assert "step" not in ends[1].stdout     # only the first host logs
    return folder


def tensors(out, step):
    """{file or folder and name: tensor} of a checkpoint, with slices put together."""
    folder = out / checkpoints.checkpoint_name(step)
    assert checkpoints.damage(folder) is None
    found = {}
    for path, stem in ((folder, "model"), (folder / "train_state", "state")):
        opened = open_tensors(path, stem)
        found |= {f"{stem}/{name}": read_tensor(opened, name) for name in opened}
    return found


def rows(out):
    """The rows of metrics.jsonl without what depends on time and memory."""
    vary = ("time", "images_per_s", "memory_gb", "hbm_gb", "mfu")
    return [{k: v for k, v in row.items() if k not in vary} for row in metrics(out)]


def assert_near(out, other, near):
    """Asserts that two runs have the same losses, norms and validation losses, and state."""
    for row, want in zip(rows(out), rows(other), strict=True):
        assert row == pytest.approx(want, rel=near)
    got = tensors(out, 6)
    for name, want in tensors(other, 6).items():
        assert np.allclose(got[name], want, atol=10 * near), name
        assert got[name].shape == want.shape


def grid(out):
    with Image.open(out / "samples" / "step-0000006.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_two_hosts_train_as_one_with_all_their_devices(gemma, data, runs, tmp_path):
    """Losses, validation losses, image grids, weights, moments and EMA."""
    launch(settings(gemma, data, tmp_path / "one"), engine="tpu", env=virtual_devices(8))
    assert_near(runs / "whole", tmp_path / "one", 1e-5)
    assert np.abs(grid(runs / "whole") - grid(tmp_path / "one")).max() <= 1

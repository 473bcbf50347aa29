"""train_tpu.py on two processes that stand for two hosts of a TPU slice; see hosts.py."""
import importlib.util

import launching
import pytest
from conftest import tiny_gemma
from hosts import start_hosts
from launching import assert_equal, finish, flags, launch, losses, metrics, state

pytestmark = [
    pytest.mark.timeout(3000),              # each process compiles for half a minute on two cores
    pytest.mark.skipif(not importlib.util.find_spec("torch_xla"),
                       reason="needs PyTorch/XLA: pip install -e '.[tpu,test]'")]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Lets the processes of these tests share compiled programs."""
    launching.ENV["XLA_PERSISTENT_CACHE_PATH"] = str(tmp_path_factory.mktemp("xla"))


def one_host(argv):
    env = launching.ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8",
                  "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return launch(argv, engine="tpu", env=env)


def test_two_hosts(gemma, data, tmp_path):
    def argv(name, steps, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--ema-every", "1", "--batch", "16",
                     "--save-every", "3", "--sample-every", "3", "--val-data", str(data), "--val-every", "3",
                     "--val-samples", "21", *more)
    import time
    t = time.time()
    done = finish(start_hosts(argv("two", 6), env=launching.ENV))
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    print(time.time() - t)
    t = time.time()
    one_host(argv("one", 6))
    print(time.time() - t)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    print(losses(tmp_path / "two"), losses(tmp_path / "one"))
    print(sorted(map(str, (tmp_path / "two").rglob("*"))))
    print(list(state(tmp_path / "two", 6))[:30])
    assert 0

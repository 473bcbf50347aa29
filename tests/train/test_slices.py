"""Each host of a TPU run reads the slices that its own chips hold, and no others.

The hosts are pretended. Each has some of a mesh's devices, and the engine's own code reads what
they need; only the last step, onto a device, is left out. tests/train/test_tpu.py runs all of it.
"""
import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gemma
from tiny_shards import SHAPE

from fusedit_lib import files
from fusedit_lib.pretrained import save_model
from fusedit_lib.train import build, checkpoints, scan, sharding, xla
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

STEP = dict(step=3, data="", adam_step=3, seen=24, skipped=0, skipped_steps=0, files={})


OTHER_MESH = dict(zip(sharding.AXES, (8, 2), strict=True))     # of the run that is resumed


def hosts_of(n):
    """The devices of each of n hosts, 16 in all. Those of 4 hosts are as on a v5e: 2 x 2 chips."""
    if n == 4:
        return [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
    return [list(range(host * 16 // n, (host + 1) * 16 // n)) for host in range(n)]


class Host(SimpleNamespace):
    """Takes the place of xla.Engine. It keeps what would be put on the devices, as Shards.

    shards: {parameter name: a list of Shards for the weight, or for each field of ParameterState}
    """

    def to_mesh(self, name, parameter, shards):
        self.shards.setdefault(name, []).append(shards)
        return parameter


class CountedFile:
    """An open safetensors file that counts the bytes which are read, by the name of the tensor."""

    def __init__(self, path, framework):
        self.file = files.safetensors.safe_open(path, framework)
        self.metadata = self.file.metadata
        self.keys = self.file.keys

    def get_tensor(self, name):
        return count(name, self.file.get_tensor(name))

    def get_slice(self, name):
        return CountedSlice(self.file, name)


class CountedSlice:
    def __init__(self, file, name):
        self.name = name
        self.slice = file.get_slice(name)
        self.get_shape = self.slice.get_shape

    def __getitem__(self, slices):
        return count(self.name, self.slice[slices])


READ = Counter()                            # bytes, by the name of the tensor


def count(name, tensor):
    READ[name] += tensor.nbytes
    return tensor


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(files, "safe_open", CountedFile)


# ------------------------------------------------------------------------------ a run on disk

@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """As in a real model, nearly all weights are in large matrices."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, hidden_size=128, intermediate_size=512, num_hidden_layers=3, head_dim=32)
    return folder


def settings(gemma, *more):
    """(RunConfig, FuseDiTConfig) of a bf16 run."""
    run = parse_run(["--base", str(gemma), "--data", "none", "--out", "none", "--dtype", "bf16",
                     "--set", *SHAPE, "dit_hidden_size=128", *more], "", "tpu")
    return run, model_config(run)


def write_model(folder, run, config):
    model, _ = build.build_models(run, config, "cpu", None)
    save_model(folder, config, model.dit.state_dict())


def random_state(run, config):
    """Random weights, EMA and moments of a run, {name in a checkpoint: tensor}."""
    model, _ = build.build_models(run, config, "cpu", None)
    torch.manual_seed(1)
    state = {}
    for name, parameter in build.trainable(model):
        for prefix in ("", "weight.", "exp_avg.", "exp_avg_sq."):
            state[prefix + name] = torch.randn(parameter.shape)
    return state


def write_checkpoint(folder, state, hosts, sizes):
    """Writes a checkpoint as the hosts of a mesh do; each of them has every tensor's own parts.

    One host writes whole tensors, as train_gpu.py does.
    """
    (folder / "train_state").mkdir(parents=True)
    (folder / "train_state" / "state.json").write_text(json.dumps(STEP))
    for stem, is_ema in (("model", True), ("train_state/state", False)):
        index = {}
        for i, devices in enumerate(hosts):
            stored = {}
            for name, tensor in state.items():
                if name.startswith(("dit.", "llm.")) == is_ema:
                    stored |= host_part(name, tensor, devices, hosts, sizes)
            path = folder / f"{stem}-{i}.safetensors"
            files.save_file(stored, path, {})
            index |= dict.fromkeys(stored, path.name)
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def host_part(name, tensor, devices, hosts, sizes):
    """The part of a tensor that a host writes: that of its devices, unless an earlier one has it.
    """
    parts = {}
    for device in sorted(sum(hosts, [])):
        slices = sharding.device_slices(name, tensor.shape, sizes, device)
        parts.setdefault(sharding.location(slices, tensor.shape), (device, slices))
    shards = [(slices, tensor[slices]) for device, slices in parts.values() if device in devices]
    return sharding.slices_to_store("", name, shards, tensor.shape)


# ------------------------------------------------------------------------------ reading it

def scanned(model):
    """A model with the stacked weights of the engine."""
    model.dit.layers = scan.ScannedStack(model.dit.layers, None, None)
    model.llm.layers = scan.ScannedStack(model.llm.layers, None, None)
    return model


def start(monkeypatch, run, config, folder, sizes, devices):
    """Starts a run on a host with these devices. Returns (Host, bytes that it has read by name)."""
    monkeypatch.setattr(xla, "local_devices", lambda: {f"TPU:{i}": i for i in devices})
    mesh = SimpleNamespace(shape=lambda: sizes)
    READ.clear()
    checkpoint = checkpoints.load_checkpoint(folder)
    model, _, weights = build.open_models(run, config, checkpoint, partial(xla.local_slices, mesh))
    host = Host(model=scanned(model), mesh=mesh, weights=weights, shards={})
    xla.Engine.load_parameters(host, weights, checkpoint)
    return host, READ.copy()


def bytes_of(model, times):
    """The bytes of all float32 tensors. times: how often those of Gemma and of the DiT count."""
    total = 0
    for tower, count in zip((model.llm, model.dit), times, strict=True):
        total += sum(4 * count * parameter.numel() for parameter in tower.parameters())
    return total


def drawn(host):
    """The bytes of the parts that a host has drawn."""
    total = 0
    for tensor, _ in host.weights.values():
        if isinstance(tensor, files.SlicedTensor):
            total += sum(part.tensor.nbytes for part, _ in tensor.sources
                         if isinstance(part, files.InMemoryTensor))
    return total


def check_values(whole, run, config, folder, state):
    """Checks the Shards of one host with one device against build_models and a random_state."""
    model, _ = build.build_models(run, config, "cpu", checkpoints.load_checkpoint(folder))
    model = scanned(model)
    assert whole.shards.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        tensors = [shards[0].values for shards in whole.shards[name]]
        if not parameter.requires_grad:
            assert torch.equal(tensors[0], parameter) and len(tensors) == 1
            continue
        want = [parameter, parameter, torch.zeros_like(parameter), torch.zeros_like(parameter)]
        if folder:
            names = sharding.stored_names(name, parameter)
            want = [torch.stack([state[prefix + name] for name in names]).view(parameter.shape)
                    for prefix in ("", "weight.", "exp_avg.", "exp_avg_sq.")]
            assert torch.equal(want[1], parameter)
        for got, tensor in zip(tensors, want, strict=True):
            assert torch.equal(got, tensor), name


def check_shards(host, whole, sizes, devices):
    """Checks the Shards of a host's devices against those of a host with one device."""
    assert host.shards.keys() == whole.shards.keys()
    for name, fields in host.shards.items():
        for shards, (tensor,) in zip(fields, whole.shards[name], strict=True):
            assert len(shards) == len(devices)
            for device, shard in zip(devices, shards, strict=True):
                slices = sharding.device_slices(name, tensor.values.shape, sizes, device)
                assert shard.slices == slices
                assert torch.equal(shard.values, tensor.values[slices]), name
                assert shard.values.dtype == tensor.values.dtype


# Flags of a run that starts in each way, and how often it reads the weights of Gemma and the DiT.
KINDS = {
    "new": ([], 1, 0),
    "from a model": (["--init", "MODEL"], 1, 1),
    "from a model of another patch size": (["--init", "MODEL", "--set", "patch_size=2"], 1, 1),
    "resumed": ([], 1, 4),
    "resumed from one process": ([], 1, 4),
    "resumed, Gemma is trained": (["--train-llm"], 4, 4)}


@pytest.mark.parametrize("shape", [
    (8, 2), pytest.param((16, 1), marks=pytest.mark.slow),
    pytest.param((4, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_host_reads_its_own_share(gemma, tmp_path, monkeypatch, kind, shape):
    """On 1, 2, 4 and 8 hosts, within 10 % of 1/n of the bytes of all tensors."""
    more, *times = KINDS[kind]
    if "MODEL" in more:
        write_model(tmp_path / "model", *settings(gemma))
    more = [word.replace("MODEL", str(tmp_path / "model")) for word in more]
    run, config = settings(gemma, *more)
    folder = state = None
    if kind.startswith("resumed"):
        state = random_state(run, config)
        hosts = hosts_of(1 if "one process" in kind else 4)
        folder = write_checkpoint(tmp_path / "step", state, hosts, OTHER_MESH)

    # one host with one device reads every tensor once
    single = dict.fromkeys(sharding.AXES, 1)
    whole, needed = start(monkeypatch, run, config, folder, single, [0])
    assert needed.total() == bytes_of(whole.model, times) - drawn(whole) * times[1]
    check_values(whole, run, config, folder, state)
    assert (drawn(whole) > 0) == (kind in ("new", "from a model of another patch size"))

    sizes = dict(zip(sharding.AXES, shape, strict=True))
    for n in (1, 2, 4, 8):
        for devices in (hosts_of(n)[0], hosts_of(n)[-1]):
            host, read = start(monkeypatch, run, config, folder, sizes, devices)
            check_shards(host, whole, sizes, devices)
            assert read.total() == pytest.approx(needed.total() / n, rel=0.1)
            if n == 1:                      # also what all of its devices hold is read once
                assert read == needed
            if kind == "new":
                assert drawn(host) == pytest.approx(drawn(whole) / n, rel=0.1)


def test_a_host_of_a_slice_16_chips_wide_reads_its_own_share(gemma, tmp_path, monkeypatch):
    """The numbers of its 2 x 2 chips are 0, 1, 16 and 17, as in a v5e-256; here, 2 rows of 16."""
    run, config = settings(gemma)
    hosts = [[corner, corner + 1, corner + 16, corner + 17] for corner in range(0, 16, 2)]
    sizes = dict(zip(sharding.AXES, (32, 1), strict=True))
    state = random_state(run, config)
    folder = write_checkpoint(tmp_path / "step", state, hosts, sizes)

    single = dict.fromkeys(sharding.AXES, 1)
    whole, needed = start(monkeypatch, run, config, folder, single, [0])
    for devices in (hosts[0], hosts[-1]):
        host, read = start(monkeypatch, run, config, folder, sizes, devices)
        check_shards(host, whole, sizes, devices)
        assert read.total() == pytest.approx(needed.total() / 8, rel=0.1)

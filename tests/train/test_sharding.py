"""The plain PyTorch parts of the XLA engine: rules, scanned layers, optimizer step, shards."""
import json

import pytest
import torch
from conftest import assert_near, tiny_gemma
from launching import finish, ranks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fusedit import FuseDiTConfig, FuseDiTError, LayerStack, preset
from fusedit_lib import files, pretrained
from fusedit_lib.train import checkpoints, costs, memory, scan, sharding, xla
from fusedit_lib.train.sharding import ParameterState

SIZES = {"fsdp": 4, "tensor": 2}


# ------------------------------------------------------------------------------ mesh and rules

@pytest.mark.parametrize("text, devices, shape", [
    ("-1,1", 8, (8, 1)), ("4,2", 8, (4, 2)), ("4,-1", 8, (4, 2)), ("2x4", 8, (2, 4)),
    ("1", 1, (1, 1)), ("-1", 8, (8, 1))])
def test_mesh_shapes(text, devices, shape):
    assert sharding.mesh_shape(text, devices) == shape


@pytest.mark.parametrize("text", ["3,1", "3,-1", "-1,-1", "a", "0,8", ""])
def test_a_mesh_that_does_not_fit_is_refused(text):
    with pytest.raises(FuseDiTError, match="does not match 8 devices"):
        sharding.mesh_shape(text, 8)


@pytest.mark.parametrize("name, shape, spec", [
    ("dit.layers.block.self_attn.q_proj.weight", (3, 8, 8), (None, "tensor", "fsdp")),
    ("dit.layers.3.self_attn.text_k_proj.weight", (8, 8), ("tensor", "fsdp")),
    ("dit.layers.block.self_attn.o_proj.weight", (3, 8, 8), (None, "fsdp", "tensor")),
    ("llm.layers.block.mlp.down_proj.weight", (3, 8, 8), (None, "fsdp", "tensor")),
    ("llm.layers.block.input_layernorm.weight", (4, 8), (None, None)),
    ("llm.layers.block.mlp.up_proj.weight", (3, 7, 8), (None, None, "fsdp")),
    ("llm.layers.block.mlp.up_proj.weight", (3, 8, 6), (None, "tensor", None)),
    ("dit.patch_embed.proj.weight", (8, 16, 2, 2), ("fsdp", None, None, None)),
    ("dit.proj_out.bias", (64,), (None,)),
    ("dit.proj_out.weight", (64, 8), ("fsdp", "tensor")),
    ("dit.text_mix.logits", (4, 8), (None, None)),
    ("dit.text_mix.time_weight", (4, 8, 512), (None, None, None)),
    ("llm.embed_tokens.weight", (256, 8), ("fsdp", "tensor")),
    ("tokens", (8, 5, 8), ("fsdp", None, None)),
    ("mlp.down_proj.input", (8, 5, 8), ("fsdp", None, "tensor"))])
def test_heads_and_mlp_are_sharded_along_tensor(name, shape, spec):
    assert sharding.partition_spec(name, shape, SIZES) == spec


@pytest.mark.parametrize("name, shape, spec", [
    ("dit.layers.block.self_attn.q_proj.weight", (3, 8, 8), (None, "fsdp", None)),
    ("dit.layers.3.self_attn.text_k_proj.weight", (8, 8), ("fsdp", None)),
    ("dit.layers.block.self_attn.o_proj.weight", (3, 8, 8), (None, None, "fsdp")),
    ("llm.layers.block.mlp.down_proj.weight", (3, 8, 8), (None, None, "fsdp")),
    ("llm.layers.block.mlp.up_proj.weight", (3, 7, 8), (None, None, None)),
    ("llm.embed_tokens.weight", (256, 8), (None, "fsdp")),
    ("dit.proj_out.weight", (64, 8), ("fsdp", "tensor"))])
def test_without_a_tensor_axis_fsdp_shards_heads_and_mlp(name, shape, spec):
    assert sharding.partition_spec(name, shape, {"fsdp": 4, "tensor": 1}) == spec


@pytest.mark.parametrize("name", ["fusedit", "fusedit/baseline", "fusedit/adaln-single",
                                  "baselinedit/cross-attention", "fusedit/paligemma"])
@pytest.mark.parametrize("sizes", [{"fsdp": 64, "tensor": 4}, {"fsdp": 256, "tensor": 1}], ids=str)
def test_only_small_tensors_are_replicated(name, sizes):
    """On 256 chips, each holds 1/256 of every tensor, except norms, biases and the like."""
    whole = 0
    total = 0
    for key, parameter in costs.abstract_model(preset(name)).named_parameters():
        total += parameter.numel()
        if memory.chip(key, parameter.shape, sizes) * 256 != parameter.numel():
            whole += parameter.numel()
            small = parameter.dim() == 1 or "patch_embed" in key or "proj_out" in key
            assert small, key
    assert whole < 0.001 * total


@pytest.mark.parametrize("name", ["dit.layers.block.mlp.up_proj.weight", "dit.proj_out.weight",
                                  "dit.layers.block.self_attn.o_proj.weight", "llm.norm.weight"])
def test_the_slices_of_each_device(name):
    """The mesh is numbered like an array, as torch_xla does it."""
    tensor = torch.arange(3 * 8 * 12).view(3, 8, 12)
    if ".block." not in name:
        tensor = tensor[0]
    for fsdp, row in enumerate(torch.arange(8).view(4, 2).tolist()):
        for column, device in enumerate(row):
            want = tensor
            spec = sharding.partition_spec(name, tensor.shape, SIZES)
            for dim, axis in enumerate(spec):
                if axis is not None:
                    part = {"fsdp": fsdp, "tensor": column}[axis]
                    want = want.chunk(SIZES[axis], dim)[part]
            slices = sharding.device_slices(name, tensor.shape, SIZES, device)
            assert torch.equal(tensor[slices], want)


# ------------------------------------------------------------------------------ scan over layers

def plain_scan(step, carry, rows):
    """Computes the same as torch_xla's scan, in plain PyTorch."""
    weights, _ = rows
    layers = len(next(iter(weights.values())))
    outputs = []
    for i in range(layers):
        row = tree_map(lambda tensor, i=i: tensor[i], rows)
        carry, output = step(carry, row)
        outputs.append(output)
    if outputs[0] is None:
        return carry, None
    return carry, tuple(torch.stack(column) for column in zip(*outputs, strict=True))


def gradients(model):
    """{name in checkpoints: gradient} of every weight with a gradient."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        layers = [parameter.grad]
        if ".block." in name:
            layers = parameter.grad
        found |= zip(sharding.stored_names(name, parameter), layers, strict=True)
    return found


class CalledFunctions(TorchFunctionMode):
    """A context that records the names of PyTorch's functions that are called in it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


POINTS = [
    {},
    {"timestep_conditioning": "adaln-single", "pos_embed": "m-rope"},
    {"attention": "cross", "timestep_conditioning": "addition", "pos_embed": "ape"},
    {"fusion": "shallow", "timestep_conditioning": "adaln-zero", "sandwich_norm": False},
    {"fusion": "shallow", "text_states": "uniform"},
    {"fusion": "shallow", "text_states": "static", "attention": "cross"},
    {"fusion": "shallow", "text_states": "depth"},
    {"fusion": "shallow", "text_states": "time", "timestep_conditioning": "addition"},
    {"fusion": "shallow", "text_states": "joint", "attention": "cross"},
    {"shared_attention_layers": [0, 1, 3]},
    {"shared_attention_layers": [3]}]


@pytest.mark.parametrize("changes", POINTS, ids=str)
@pytest.mark.parametrize("train_llm", [False, True])
def test_a_scanned_stack_computes_the_same_as_its_layers(gemma_folder, changes, train_llm, float64):
    """Outputs and gradients of every weight are equal, by their names in checkpoints."""
    base = {"base": str(gemma_folder), "pos_embed": "2d-rope", "sandwich_norm": True,
            "in_channels": 3, "vae": None, "timestep_conditioning": None}
    config = FuseDiTConfig.from_dict(base | changes)
    model = pretrained.build_model(config, dtype=torch.float64)
    for parameter in model.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.llm.requires_grad_(train_llm)
    ids = torch.randint(4, 20, (2, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    x_t = torch.randn(2, 3, 8, 8)
    sigma = torch.tensor([0.3, 0.9])

    def forward_and_backward():
        model.zero_grad()
        v = model(x_t, sigma, (ids, mask))
        v.square().sum().backward()
        return v, gradients(model)

    want, want_gradients = forward_and_backward()
    marked = []

    def mark(tensor, name):
        marked.append(name)
        return tensor

    model.dit.layers = scan.ScannedStack(model.dit.layers, plain_scan, mark)
    model.llm.layers = scan.ScannedStack(model.llm.layers, plain_scan, mark)
    with CalledFunctions() as called:
        got, got_gradients = forward_and_backward()
    assert "matmul" in called.names and "scaled_dot_product_attention" not in called.names
    assert want.abs().max() > 0.1
    assert_near(got, want, 1e-9)
    assert {"tokens", "mlp.up_proj.weight", "mlp.down_proj.input"} <= set(marked)
    assert not any(isinstance(module, LayerStack) for module in model.modules())
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-9)
    for name in got_gradients.keys() - want_gradients.keys():
        assert not got_gradients[name].any()

    # scan keeps one graph per function: one with gradients, one without
    with torch.no_grad():
        assert torch.equal(model(x_t, sigma, (ids, mask)), got)
    assert len(model.dit.layers.steps) == 2
    again, _ = forward_and_backward()
    assert torch.equal(again, got)


@pytest.mark.parametrize("text_states, is_shared", [
    ("layer", True), ("static", True), ("time", True), ("depth", False), ("joint", False)])
def test_a_text_that_all_blocks_share_is_carried(gemma_folder, text_states, is_shared):
    """Only texts that differ from block to block are stacked."""
    config = FuseDiTConfig(base=str(gemma_folder), fusion="shallow", text_states=text_states,
                           in_channels=3, vae=None, timestep_conditioning=None)
    model = pretrained.build_model(config)
    ids = torch.full((2, 5), 7)
    text = (2, 5, 32)
    carried = []
    stacked = []

    def recording_scan(step, carry, rows):
        carried.extend(tensor.shape for tensor in carry[1].values())
        stacked.extend(tensor.shape for tensor in rows[1].values())
        return plain_scan(step, carry, rows)

    model.dit.layers = scan.ScannedStack(model.dit.layers, recording_scan, lambda tensor, _: tensor)
    model(torch.zeros(2, 3, 8, 8), torch.tensor([0.3, 0.9]), (ids, ids > 0))
    assert (text in carried) == is_shared
    assert ((4, *text) in stacked) != is_shared


def test_only_layers_of_one_kind_are_scanned():
    """The layers at the beginning are scanned; the others keep their numbers."""
    def layer(width, flag=False):
        module = torch.nn.Linear(2, width)
        module.flag = flag
        return module

    def names(*layers):
        stack = scan.ScannedStack(torch.nn.ModuleList(layers), None, None)
        return list(stack), len(stack["block"].weight)

    assert names(layer(3), layer(3)) == (["block"], 2)
    assert names(layer(3), layer(3), layer(4), layer(3)) == (["block", "2", "3"], 2)
    assert names(layer(3), layer(3, flag=True)) == (["block", "1"], 1)


# ------------------------------------------------------------------------------ step and EMA

def three_parameters():
    return [torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in (5, 7, 2)]


def state_of(adam, parameter):
    """ParameterState of a parameter before Adam's first step. The EMA is a copy of the weight."""
    adam.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                             "exp_avg_sq": torch.zeros_like(parameter)}
    moments = adam.state[parameter]
    return ParameterState(parameter.detach().clone(), parameter, moments["exp_avg"],
                          moments["exp_avg_sq"])


def set_gradients(parameters, gradients):
    """Sets gradients of the first two of three parameters; the last one has none."""
    for parameter, gradient in zip(parameters[:2], gradients[:2], strict=True):
        parameter.grad = gradient.clone()


@pytest.mark.parametrize("max_norm, bad", [(0.0, float("nan")), (0.5, float("inf"))])
def test_the_step_equals_torchs_adamw(max_norm, bad, float64):
    """Includes clipping. A step with a gradient that is not finite changes nothing."""
    torch.manual_seed(0)
    ours = three_parameters()
    theirs = three_parameters()
    settings = {"betas": (0.8, 0.99), "weight_decay": 0.1}
    adam = torch.optim.AdamW(ours, **settings)
    adam.defaults["capturable"] = False     # capturable needs a GPU or TPU
    reference = torch.optim.AdamW(theirs, **settings)
    states = [state_of(adam, parameter) for parameter in ours]
    reference_ema = [parameter.detach().clone() for parameter in theirs]

    for step in range(6):
        gradients = [torch.randn(len(parameter)) for parameter in ours]
        if step == 3:
            gradients[1][4] = bad
        set_gradients(ours, gradients)
        set_gradients(theirs, gradients)
        lr = torch.tensor(0.1 / (1 + step))
        rate = torch.tensor(step % 2 * 0.3)
        before = [tensor.clone() for state in states for tensor in state[1:]]

        norm = xla.adam_step(adam, states, lr, max_norm)
        if step == 3:
            assert not norm.isfinite()
            after = [tensor for state in states for tensor in state[1:]]
            for old, new in zip(before, after, strict=True):
                assert old.equal(new)
        else:
            want = torch.cat([parameter.grad for parameter in theirs[:2]]).norm()
            assert norm == pytest.approx(want.item(), rel=1e-5)
            if max_norm:
                torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            reference.param_groups[0]["lr"] = float(lr)
            reference.step()

        xla.update_ema(states, rate)
        for ema, parameter in zip(reference_ema, theirs, strict=True):
            ema.lerp_(parameter.detach(), float(rate))

    for state, parameter, ema in zip(states, theirs, reference_ema, strict=True):
        assert_near(state.weight, parameter, 1e-9)
        assert_near(state.ema, ema, 1e-9)
    assert [int(adam.state[parameter]["step"]) for parameter in ours] == [5, 5, 0]


def test_weights_are_restored_after_use():
    model = torch.nn.Linear(3, 2)
    own = model.weight.detach().clone()
    with xla.use_weights(model, {"weight": torch.zeros(2, 3)}):
        assert not model.weight.any()
    assert torch.equal(model.weight, own)


# ------------------------------------------------------------------------------ checkpoints

def shards_of(tensor, cuts):
    """The shards of a tensor on a mesh, in the order of devices, as [(slices, values)].

    cuts: the number of parts of each dimension.
    """
    places = [()]
    for size, parts in zip(tensor.shape, cuts, strict=True):
        step = -(-size // parts)            # rounded up
        cut = [slice(i * step, min((i + 1) * step, size)) for i in range(parts)]
        places = [(*place, part) for place in places for part in cut]
    return [(place, tensor[place].clone()) for place in places]


HOSTS = {                                   # devices of each host, on a 2 x 4 mesh
    "one": [range(8)],
    "rows": [range(4), range(4, 8)],
    "columns": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "scattered": [[0, 3, 5], [1, 2, 4, 6, 7]],
    "one each": [[device] for device in range(8)]}


def part_name(stem, host, hosts):
    """The name of the file that a host writes."""
    if hosts == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{host + 1:05d}-of-{hosts:05d}.safetensors"


@pytest.mark.parametrize("layout", HOSTS)
def test_shards_of_all_hosts_are_read_as_whole_tensors(tmp_path, layout):
    """Slices of stacked and of single tensors, in one file per host."""
    stacked = torch.randn(3, 6, 8)
    single = torch.randn(4, 8)
    small = torch.randn(5)
    padded = torch.cat([small, torch.zeros(3)])
    cut_tensors = [("a.block.w", stacked, (1, 2, 4)), ("b", single, (2, 4)),
                   ("one.block.w", single[None], (1, 2, 4))]
    hosts = HOSTS[layout]
    names = [part_name("model", host, len(hosts)) for host in range(len(hosts))]

    for host, devices in enumerate(hosts):
        stored = {}
        for name, tensor, cuts in cut_tensors:
            shards = shards_of(tensor, cuts)
            mine = [shards[device] for device in devices]
            stored |= sharding.slices_to_store("", name, mine, tensor.shape)
        if host == 0:
            stored |= sharding.slices_to_store("", "c", [([slice(0, 5)], padded)], (5,))
        else:
            assert sharding.slices_to_store("", "c", [], (5,)) == {}
        files.save_file(stored, tmp_path / names[host], {"config": "{}"})
        boxes = 3 if layout == "scattered" else 1          # neighbouring shards are joined
        assert len(stored) == 5 * boxes + (host == 0)

    if len(hosts) > 1:
        index = {"weight_map": {f"x{i}": name for i, name in enumerate(names)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = files.open_tensors(tmp_path)
    want = {"a.0.w": stacked[0], "a.1.w": stacked[1], "a.2.w": stacked[2], "b": single, "c": small,
            "one.0.w": single}
    assert read.keys() == want.keys()
    for key, tensor in want.items():
        file, stored = read[key]
        assert torch.equal(file.get_tensor(stored), tensor)
        box = tuple(slice(size // 3, size - 1) for size in tensor.shape)
        assert torch.equal(file.get_slice(stored)[box], tensor[box])
        assert tuple(file.get_slice(stored).get_shape()) == tuple(tensor.shape)
        assert file.metadata() == {"config": "{}"}


def test_a_missing_piece_is_named(tmp_path):
    shards = shards_of(torch.randn(4, 8), (2, 4))
    del shards[2]
    stored = sharding.slices_to_store("", "b", shards, (4, 8))
    files.save_file(stored, tmp_path / "model.safetensors", {})
    file, key = files.open_tensors(tmp_path)["b"]
    with pytest.raises(FuseDiTError, match="b lacks some of its slices"):
        file.get_tensor(key)
    with pytest.raises(FuseDiTError, match="b lacks some of its slices"):
        file.get_slice(key)[0:2, 3:5]       # shard 2 has columns 4 and 5
    assert file.get_slice(key)[0:2, 0:4].shape == (2, 4)


# One of two hosts that together have 2 x 2 devices. Each saves its half of every tensor.
TWO_HOSTS = """
import sys, torch, torch.distributed as dist
from fusedit_lib.train import checkpoints, sharding
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run
from test_sharding import shards_of

dist.init_process_group("gloo")
rank = dist.get_rank()
run = parse_run(sys.argv[1:], "", "tpu")
whole = torch.arange(4 * 6 * 8.).view(4, 6, 8)

def gather_state():
    name = "dit.layers.block.w"
    mine = shards_of(whole, (1, 2, 2))[2 * rank:2 * rank + 2]
    state = {}
    for key in ("weight.", "exp_avg.", "exp_avg_sq."):
        state |= sharding.slices_to_store(key, name, mine, whole.shape)
    return sharding.slices_to_store("", name, mine, whole.shape), state

writer = checkpoints.CheckpointWriter(run, model_config(run), None, "data")
writer.save(3, gather_state, dict(adam_step=3, seen=0, skipped=0, skipped_steps=0))
assert writer.close(3, 0) == 0
dist.barrier()
dist.destroy_process_group()
"""


def test_two_hosts_save_together(tmp_path):
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=2)
    argv = ["-c", TWO_HOSTS, "--out", tmp_path / "run", "--base", tmp_path / "gemma"]
    done = finish(ranks(argv, 2))
    assert done.returncode == 0, done.stderr[-3000:]

    folder = tmp_path / "run" / "step-0000003"
    assert checkpoints.damage(folder) is None
    checkpoint = checkpoints.load_checkpoint(folder)
    whole = torch.arange(4 * 6 * 8.).view(4, 6, 8)
    weights = {f"dit.layers.{i}.w": checkpoint.state[f"weight.dit.layers.{i}.w"] for i in range(4)}
    place = (slice(0, 4), slice(1, 4), slice(2, 7))         # of both hosts' halves
    for (shard,) in sharding.initial_state(weights, checkpoint, "dit.layers.block.w", whole,
                                           [place]):
        assert shard.slices == place and torch.equal(shard.values, whole[place])
    assert sorted(path.name for path in folder.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json"]

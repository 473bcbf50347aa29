"""The engine of train_tpu.py: model, optimizer and EMA in shards on a mesh of XLA devices.

SPMD, as PyTorch/XLA has it: every host runs the same program as if all chips of all hosts were one
device, and the compiler divides the work by the marks on the tensors (sharding.py has the rules).
Operations on XLA tensors are recorded, not run. `sync` compiles what has been recorded since the
last one, if it has not seen the same graph before, and runs it.

This is the only file of the library that imports torch_xla, and it does so inside functions:
--help, --plan and everything here that is plain PyTorch work without it.
"""
import atexit
import contextlib
import copy
import os
from collections import deque
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch.func import functional_call

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.train import sharding
from fusedit_lib.train.sharding import ParameterState

# ------------------------------------------------------------------------------ start

def set_environment_defaults():
    """Sets the variables that PyTorch/XLA reads, where the user has not. Call it before start."""
    os.environ.setdefault("PJRT_DEVICE", "TPU")
    os.environ.setdefault("PJRT_NPROC", "64")   # threads; waiting virtual devices block some
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = os.path.expanduser("~/.cache/fusedit/xla")
    os.environ.setdefault("XLA_PERSISTENT_CACHE_PATH", cache)


def start(run):
    """Starts SPMD on this host's devices, connects the hosts, and returns the mesh of all devices.

    run: its dtype is settled. Raises FuseDiTError if there is no device, or if --mesh does not fit
    their number.
    """
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr
    from torch_xla._internal import tpu
    from torch_xla.backends import set_mat_mul_precision

    kind = os.environ["PJRT_DEVICE"]
    try:
        if kind == "TPU" and not tpu.num_available_chips():
            raise OSError("no chip on the PCI bus")     # libtpu would search for minutes
        xr.use_spmd()
        devices = xr.global_runtime_device_count()
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FuseDiTError(f"no {kind} is here ({reason}); on a CPU, PJRT_DEVICE=CPU "
                           "CPU_NUM_DEVICES=4 makes devices") from None

    if kind == "CPU":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", init_method="xla://", timeout=timedelta(minutes=30))
        if run.dtype == "float32":
            set_mat_mul_precision("highest")    # by default a TPU multiplies in bf16

    shape = sharding.mesh_shape(run.mesh, devices)
    return xs.Mesh(np.arange(devices), shape, sharding.AXES)


def sync():
    """Compiles and runs what has been recorded."""
    import torch_xla
    torch_xla.sync()


# ------------------------------------------------------------------------------ scan over layers

def make_scan(remat):
    """torch_xla's scan, set up for ScannedStack. remat: recompute activations in backward."""
    from torch_xla.experimental import scan

    # The replaced function makes gradients lie on the mesh as weights do, through JAX, which we do
    # not install; ScannedStack marks them itself. See https://github.com/pytorch/xla/issues/8883.
    # This can go when scan's backward runs without JAX (a test in tests/train/test_tpu.py fails
    # then); no later release than 2.9 is planned.
    scan._backward_shard_alike = backward_without_constraints
    # The share of a layer's activations that the partitioner may keep for backward.
    torch._functorch.config.activation_memory_budget = 0 if remat else 1
    return partial(scan.scan, partition_fn=min_cut_rematerialization_partition, is_fn_pure=True)


def backward_without_constraints(carry, x, backward, init, xs):
    return backward(carry, x)


def mark_with_gradient(mesh, tensor, name=""):
    """Marks how a layer's weight, or the tokens x [B,S,D] if no name is given, lie on the mesh.

    Its gradient is marked as well. Without that the partitioner may cut D of x, as it does with the
    weights', instead of B, and keep gradients whole on every device.
    """
    import torch_xla.distributed.spmd as xs
    spec = ("fsdp", None, None)
    if name:
        spec = sharding.partition_spec(name, tensor.shape, mesh.shape())
    return xs.mark_sharding_with_gradients(tensor, mesh, spec)


class ScannedStack(nn.ModuleDict):
    """Replaces fusedit.LayerStack: one layer, compiled once and applied in a scan over the weights.

    The weights of all layers are stacked, with the layer as their first dimension, in one layer
    called "block". Layers of another kind at the end, such as the last one of Gemma, which computes
    keys and values only, keep their numbers as names and run after the scan.

    scan(step, carry, rows) -> (carry, outputs) is torch_xla's (and JAX's): step(carry, row) returns
    (carry, output), for each row of rows.
    mark(tensor, name="") marks how a tensor and its gradient lie on the mesh, and returns it.
    """

    def __init__(self, layers, scan, mark):
        super().__init__()
        self.scan = scan
        self.mark = mark
        self.steps = {}                     # functions for scan, which keeps its graphs by function
        self.count = count_alike(layers)    # layers in the scan
        self["block"] = stack_layers(layers[:self.count])
        for i in range(self.count, len(layers)):
            self[str(i)] = layers[i]

    def forward(self, x, per_layer, common):
        """As fusedit.LayerStack.forward: (x, output of each layer).

        What has a gradient is carried from layer to layer, since a scan gives gradients to what it
        carries and to its rows. The other tensors are rows, one for each layer.
        """
        inputs = stack_inputs(per_layer[:self.count]) + list(common)
        rows, carried, constants = {}, {}, {}
        for i, value in enumerate(inputs):
            if not torch.is_tensor(value):
                constants[i] = value
            elif i < len(per_layer[0]):
                rows[i] = value
            elif value.requires_grad:
                carried[i] = value
            else:
                rows[i] = value.expand(self.count, *value.shape)

        weights = dict(self["block"].named_parameters())
        step = self.step_function(weights, carried, constants)
        (x, _), outputs = self.scan(step, (x, carried), (weights, rows))
        outputs = unstack_outputs(outputs, self.count)

        for i in range(self.count, min(len(per_layer), self.count + len(self) - 1)):
            x, output = self[str(i)](x, *per_layer[i], *common)
            outputs.append(output)
        return x, outputs

    def step_function(self, weights, carried, constants):
        """The function that scan applies: the same object for every call of the same kind."""
        trains = torch.is_grad_enabled() and any(w.requires_grad for w in weights.values())
        key = (tuple(constants.items()), tuple(carried), trains)
        if key not in self.steps:
            self.steps[key] = partial(self.step, constants)
        return self.steps[key]

    def step(self, constants, carry, row):
        """One layer: ((x, carried), (weights, row of each input)) -> ((x, carried), output)."""
        x, carried = carry
        weights, rows = row
        weights = {name: self.mark(weight, name) for name, weight in weights.items()}
        inputs = constants | carried | rows
        args = [inputs[i] for i in sorted(inputs)]
        x, output = functional_call(self["block"], weights, (self.mark(x), *args))
        return (self.mark(x), carried), output


def count_alike(layers):
    """The number of layers at the beginning that are of one kind."""
    kinds = [layer_kind(layer) for layer in layers]
    count = 1
    while count < len(kinds) and kinds[count] == kinds[0]:
        count += 1
    return count


def layer_kind(layer):
    """What layers in one scan have in common: names and shapes of weights, flags and choices."""
    shapes = [(name, weight.shape) for name, weight in layer.named_parameters()]
    choices = [(key, value) for key, value in vars(layer).items() if isinstance(value, bool | str)]
    return shapes + choices


def stack_layers(layers):
    """One layer whose weights have a first dimension of layers."""
    stacked = copy.deepcopy(layers[0])
    for name, weight in list(stacked.named_parameters()):
        rows = [layer.get_parameter(name).detach() for layer in layers]
        set_parameter(stacked, name, nn.Parameter(torch.stack(rows), weight.requires_grad))
    return stacked


def stack_inputs(per_layer):
    """The inputs of each layer, a list of tuples, as one list of stacked tensors, or Nones."""
    stacked = []
    for values in zip(*per_layer, strict=True):
        if values[0] is None:
            stacked.append(None)
        else:
            stacked.append(torch.stack(values))
    return stacked


def unstack_outputs(outputs, count):
    """scan's stacked outputs as a list with a tuple, or None, for each of `count` layers."""
    if outputs is None:
        return [None] * count
    return list(zip(*(output.unbind() for output in outputs), strict=True))


def set_parameter(model, name, parameter):
    """Gives a module a parameter of this dotted name, in place of the one it has."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)


# ------------------------------------------------------------------------------ step and EMA

@torch.no_grad()
def adam_step(adam, states, learning_rate, max_norm):
    """Clips the gradients, makes Adam's step and clears them. Returns their norm before clipping.

    states: a ParameterState for each of adam's parameters, which are one group. learning_rate and
    the norm: 0-d tensors. max_norm 0 does not clip. If the norm is not finite nothing changes; that
    is decided on the device, so that no host waits for it.
    """
    weights = [state.weight for state in states if state.weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in weights], foreach=False)
    if max_norm:
        nn.utils.clip_grads_with_norm_(weights, max_norm, norm, foreach=False)

    changed = [adam.state[weight]["step"] for weight in weights]
    for state in states:
        changed += [state.weight, state.exp_avg, state.exp_avg_sq]
    before = [tensor.clone() for tensor in changed]

    adam.param_groups[0]["lr"] = learning_rate
    adam.step()

    finite = norm.isfinite()
    for new, old in zip(changed, before, strict=True):
        new.copy_(torch.where(finite, new, old))
    adam.zero_grad()
    return norm


@torch.no_grad()
def update_ema(states, rate):
    """Moves every EMA towards its weight by a rate, a 0-d tensor: 1 - decay, or 0 to keep it."""
    for state in states:
        state.ema.lerp_(state.weight, rate)


@contextlib.contextmanager
def use_weights(model, weights):
    """Within it the model has these weights, {name: tensor}; afterwards its own again."""
    own = {name: model.get_parameter(name).data for name in weights}
    for name, value in weights.items():
        model.get_parameter(name).data = value
    yield model
    for name, value in own.items():
        model.get_parameter(name).data = value


# ------------------------------------------------------------------------------ the engine

class Engine:
    """Model, AdamW and EMA on the mesh, with the methods that zero.Engine has for DeepSpeed.

    A micro-batch is one graph. The graph of the last one of a step also holds Adam's step, which
    `step` records, and the update of the EMA: `update_ema` must follow, and runs it.
    """

    def __init__(self, run, model, vae, checkpoint, accumulation, mesh):
        import torch_xla
        self.model = model
        self.mesh = mesh
        self.device = torch_xla.device()
        self.dtype = backend.torch_dtype(run.dtype)
        self.accumulation = accumulation
        self.max_grad_norm = run.max_grad_norm
        self.learning_rate = run.lr
        self.micro_batches = 0              # how many this process has had
        self.norm = None                    # of the last step's gradient

        scan = make_scan(run.remat)
        mark = partial(mark_with_gradient, mesh)
        model.dit.layers = ScannedStack(model.dit.layers, scan, mark)
        model.llm.layers = ScannedStack(model.llm.layers, scan, mark)
        # The VAE and CLIP are small: every device has all of them.
        if vae:
            vae.to(self.device)
        if model.clip_encoder:
            model.clip_encoder.model.to(self.device)

        self.state = self.shard_parameters(checkpoint)      # {name: ParameterState}
        self.adam = self.build_adam(run, checkpoint)

    def shard_parameters(self, checkpoint):
        """Moves the model's parameters to the mesh; returns the state of those that are trained."""
        states = {}
        for name, parameter in list(self.model.named_parameters()):
            weight = self.to_mesh(name, parameter.detach())
            weight = nn.Parameter(weight, parameter.requires_grad)
            set_parameter(self.model, name, weight)
            if parameter.requires_grad:
                initial = sharding.initial_state(checkpoint, name, parameter)
                states[name] = ParameterState(ema=self.to_mesh(name, initial.ema), weight=weight,
                                              exp_avg=self.to_mesh(name, initial.exp_avg),
                                              exp_avg_sq=self.to_mesh(name, initial.exp_avg_sq))
        return states

    def build_adam(self, run, checkpoint):
        adam = torch.optim.AdamW([state.weight for state in self.state.values()],
                                 betas=(run.beta1, run.beta2), weight_decay=run.weight_decay,
                                 capturable=True, foreach=False)
        steps = 0.0
        if checkpoint is not None:
            steps = float(checkpoint.adam_step)
        for state in self.state.values():
            adam.state[state.weight] = {"step": torch.full((), steps, device=self.device),
                                        "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        return adam

    def to_mesh(self, name, tensor):
        """The tensor on the device, cut as a parameter of this name is."""
        import torch_xla.distributed.spmd as xs
        tensor = tensor.to(self.device)
        spec = sharding.partition_spec(name, tensor.shape, self.mesh.shape())
        xs.mark_sharding(tensor, self.mesh, spec)
        return tensor

    def to_scalar(self, number):
        """A number as an input of the graph, a 0-d tensor; as a constant it would recompile.

        It travels as a vector: torch_xla makes constants of the scalars 0 and 1, and one input of
        equal ones.
        """
        return torch.tensor([number]).to(self.device)[0]

    # The training step

    def set_learning_rate(self, learning_rate):
        self.learning_rate = learning_rate

    def __call__(self, *args):
        """FuseDiT's forward, with weights cast to the type that is computed in."""
        weights = {name: state.weight.to(self.dtype) for name, state in self.state.items()}
        return functional_call(self.model, weights, args)

    def backward(self, loss):
        """Adds the gradients of a micro-batch up; they are cut as the weights are."""
        (loss / self.accumulation).backward()
        for name, state in self.state.items():
            if state.weight.grad is not None:
                self.to_mesh(name, state.weight.grad)       # else XLA might keep it whole

    def step(self):
        """Ends a micro-batch; after the last one of a step, records Adam's step."""
        self.micro_batches += 1
        if self.micro_batches % self.accumulation:
            sync()
            return
        learning_rate = self.to_scalar(self.learning_rate)
        self.norm = adam_step(self.adam, list(self.state.values()), learning_rate,
                              self.max_grad_norm)

    def update_ema(self, decay):
        """Updates the EMA and runs the step. decay 1 leaves the EMA, with no other graph."""
        update_ema(self.state.values(), self.to_scalar(1 - decay))
        sync()

    def grad_norm(self):
        """Norm of the last step's gradient before clipping; not finite if the step was skipped."""
        return self.norm

    # Validation and checkpoints

    @contextlib.contextmanager
    def use_ema(self):
        """Within it the model has the EMA weights; yields the model."""
        weights = {name: state.ema.to(self.dtype) for name, state in self.state.items()}
        with use_weights(self.model, weights):
            yield self.model

    def gather_state(self):
        """This host's part of a checkpoint: (EMA, state), each {name: tensor on the CPU}.

        Each shard is written by one host. state has weight.NAME, exp_avg.NAME and exp_avg_sq.NAME.
        """
        import torch_xla
        torch_xla.sync(wait=True)
        ema = {}
        for name, parameter in self.state.items():
            ema |= local_shards("", name, parameter.ema)
        state = {}
        for field in ("weight", "exp_avg", "exp_avg_sq"):
            for name, parameter in self.state.items():
                state |= local_shards(f"{field}.", name, getattr(parameter, field))
        return ema, state


def local_shards(prefix, name, tensor):
    """What this host stores of a tensor on the mesh: as sharding.slices_to_store returns it."""
    import torch_xla.distributed.spmd as xs
    shards = xs.XLAShardedTensor(tensor).local_shards
    first = [(shard.indices, shard.data) for shard in shards if shard.replica_id == 0]
    return sharding.slices_to_store(prefix, name, first, tensor.shape)


# ------------------------------------------------------------------------------ data

# Dimensions of a batch's tensors (data/batches.py). The first is the batch: all devices share it.
DIMENSIONS = {"pixels": 4, "ids": 2, "mask": 2, "clip": 2, "normal": 1, "noise": 5, "counts": 1}


def place_batches(batches, mesh):
    """The batches with their tensors on the mesh, ahead of time, by threads.

    Each host brings its part of a batch. What is not a tensor stays as it is.
    """
    import torch_xla
    import torch_xla.distributed.spmd as xs
    from torch_xla.distributed.parallel_loader import ParallelLoader

    specs = {}
    for name, dimensions in DIMENSIONS.items():
        spec = (sharding.AXES, *[None] * (dimensions - 1))
        specs[name] = xs.ShardingSpec(mesh, spec, minibatch=True)

    # This is what an MpDeviceLoader has inside, but it can be closed before the data workers are.
    device = torch_xla.device()
    others, errors = deque(), []
    tensors = split_batches(batches, others, errors)
    loader = ParallelLoader(tensors, [device], input_sharding=specs, loader_prefetch_size=2,
                            device_prefetch_size=2)
    atexit.register(loader.close)
    for placed in loader.per_device_loader(device):
        yield placed | others.popleft()
    atexit.unregister(loader.close)
    if errors:
        raise errors[0]


def split_batches(batches, others, errors):
    """Yields the tensors of each batch, and appends its other values, a dict, to `others`.

    A thread reads this, in which an error would be lost: it is appended to `errors`.
    """
    try:
        for batch in batches:
            tensors = {key: v for key, v in batch.items() if isinstance(v, torch.Tensor)}
            others.append({key: v for key, v in batch.items() if key not in tensors})
            yield tensors
    except Exception as error:
        errors.append(error)

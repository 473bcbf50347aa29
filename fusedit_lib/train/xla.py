"""The engine of train_tpu.py: model, optimizer and EMA, sharded on a mesh of XLA devices.

It uses PyTorch/XLA's SPMD: every host runs the same program as if all chips of all hosts were one
device, and the compiler divides the work according to the sharding annotations of the tensors (see
the rules in sharding.py). Operations on XLA tensors are recorded, not run. `sync` runs the
operations recorded since the last call, and compiles their graph first if it is new.

This is the only file of the library that imports torch_xla, and it does so inside functions, so
that --help and --plan work without it. The scanned layers, in plain PyTorch, are in scan.py.
"""
import atexit
import contextlib
import os
import sys
from collections import deque
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.train import distributed, hardware, sharding
from fusedit_lib.train.scan import ScannedStack, partition_scanned, set_parameter
from fusedit_lib.train.sharding import ParameterState

# ------------------------------------------------------------------------------ start

def set_environment_defaults():
    """Sets environment variables of PyTorch/XLA that the user has not set. Call it before start."""
    os.environ.setdefault("PJRT_DEVICE", "TPU")
    os.environ.setdefault("PJRT_NPROC", "64")   # threads; waiting virtual devices block some
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # torch_xla turns these on for v5 only. Without the first, a v4 gathers weights as sums, which
    # takes twice the traffic (docs/tpu.md).
    os.environ.setdefault("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=true "
                          "--xla_enable_async_collective_permute=true")
    if os.environ["PJRT_DEVICE"] == "CPU":
        os.environ.setdefault("MASTER_PORT", "0")   # any: several runs may share a CPU
        # A TPU cannot load the programs it has stored: https://github.com/pytorch/xla/issues/9094.
        cache = os.path.expanduser("~/.cache/fusedit/xla")
        os.environ.setdefault("XLA_PERSISTENT_CACHE_PATH", cache)


def start(run):
    """Starts SPMD on this host's devices, connects the hosts, and returns the mesh of all devices.

    run: its dtype must be resolved. Raises FuseDiTError if there is no device, or if --mesh does
    not match the number of devices.
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
        reason = backend.first_line(error)
        raise FuseDiTError(f"no {kind} found ({reason}); to train on a CPU, set PJRT_DEVICE=CPU "
                           "CPU_NUM_DEVICES=4") from None

    # The longest time that a host may be behind the others, for example in downloading a model.
    dist.init_process_group("gloo", init_method="xla://", timeout=timedelta(minutes=30))
    os.environ["RANK"] = str(dist.get_rank())       # no launcher sets it
    distributed.watch_next_rank()
    if kind == "TPU" and run.dtype == "float32":
        set_mat_mul_precision("highest")            # by default a TPU multiplies in bf16

    shape = sharding.mesh_shape(run.mesh, devices)
    return xs.Mesh(np.arange(devices), shape, sharding.AXES)


def sync():
    """Compiles and runs the recorded operations."""
    import torch_xla
    torch_xla.sync()


# ------------------------------------------------------------------------------ the TPU's figures

def tpu_kind():
    """The kind of TPU, such as "v4" or "v5litepod", or None if it is not known or there is none."""
    from torch_xla._internal import tpu
    if os.environ["PJRT_DEVICE"] != "TPU":
        return None
    try:
        return tpu.get_tpu_type()           # from the environment or the machine's metadata
    except (OSError, LookupError, TypeError):
        return None


def tpu_memory():
    """Bytes in use on the fullest chip of this host, or None if they are not known.

    They come from libtpu's metrics server, as for the command `tpu-info`, which torch_xla installs:
    xm.get_memory_info refuses the one device of SPMD (https://github.com/pytorch/xla/issues/9022).
    """
    if os.environ["PJRT_DEVICE"] != "TPU":
        return None
    try:
        from tpu_info import device, metrics
        kind, _ = device.get_local_chips()
        return max(chip.memory_usage for chip in metrics.get_chip_usage(kind))
    except Exception as error:              # gRPC's errors and others; the run needs no figure
        reason = backend.first_line(error)
        print(f"WARNING: the memory of the chips cannot be read ({reason}); memory_gb is the "
              "host's", file=sys.stderr, flush=True)
        return None


# ------------------------------------------------------------------------------ scan over layers

def make_scan(remat):
    """torch_xla's scan, configured for ScannedStack. remat: recompute activations in backward."""
    from torch_xla.experimental import scan

    # The replaced function shards gradients like their weights. It uses JAX, which we do not
    # install, so ScannedStack annotates them itself: https://github.com/pytorch/xla/issues/8883.
    # Remove this when scan's backward runs without JAX; a test in tests/train/test_tpu.py will then
    # fail. No release after 2.9 is planned.
    scan._backward_shard_alike = backward_without_constraints
    return partial(scan.scan, partition_fn=partial(partition_scanned, remat), is_fn_pure=True)


def backward_without_constraints(carry, x, backward, init, xs):
    return backward(carry, x)


def mark_with_gradient(mesh, tensor, name):
    """Annotates the sharding of a tensor in a layer, and of its gradient. See ScannedStack.

    Otherwise the partitioner may shard D of the tokens [B,S,D], as for the weights, instead of B,
    and replicate gradients on every device.
    """
    import torch_xla.distributed.spmd as xs
    spec = sharding.partition_spec(name, tensor.shape, mesh.shape())
    return xs.mark_sharding_with_gradients(tensor, mesh, spec)


# ------------------------------------------------------------------------------ step and EMA

@torch.no_grad()
def adam_step(adam, states, learning_rate, max_norm):
    """Clips the gradients, runs Adam's step and clears the gradients. Returns the unclipped norm.

    states: a ParameterState for each of adam's parameters, which form one group.
    learning_rate: a 0-d tensor, like the norm. max_norm: 0 for no clipping.

    If the norm is not finite, nothing changes. This is decided on the device, so that the host does
    not wait for it.
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
    """Updates the EMA of every parameter. rate: 1 - decay, a 0-d tensor; 0 for no update."""
    for state in states:
        state.ema.lerp_(state.weight, rate)


@contextlib.contextmanager
def use_weights(model, weights):
    """A context in which the model has other weights. weights: {name: tensor}."""
    own = {name: model.get_parameter(name).data for name in weights}
    for name, value in weights.items():
        model.get_parameter(name).data = value
    yield model
    for name, value in own.items():
        model.get_parameter(name).data = value


# ------------------------------------------------------------------------------ the engine

# The host may record this many steps ahead of the devices. PyTorch/XLA itself would queue 32, and
# a signal is only handled, and a checkpoint read, once all that is queued has run.
STEPS_AHEAD = 2


class Engine:
    """Model, AdamW and EMA on the mesh, with the same methods as zero.Engine.

    Each micro-batch is one graph. The graph of the last micro-batch of a step also contains Adam's
    step, which `step` records, and the EMA update. `update_ema` must follow, because it runs the
    graph.
    """

    def __init__(self, run, model, vae, weights, checkpoint, accumulation, mesh):
        """model, vae and weights: as build.open_models returns them. The model is filled here.

        checkpoint: the Checkpoint to resume from, or None.
        """
        import torch_xla
        self.model = model
        self.mesh = mesh
        self.device = torch_xla.device()
        self.dtype = backend.torch_dtype(run.dtype)
        self.accumulation = accumulation
        self.max_grad_norm = run.max_grad_norm
        self.learning_rate = run.lr
        self.micro_batches = 0              # number of micro-batches so far
        self.norm = None                    # gradient norm of the last step
        self.running = deque()              # gradient norms of steps that may not be finished

        scan = make_scan(run.remat)
        mark = partial(mark_with_gradient, mesh)
        model.dit.layers = ScannedStack(model.dit.layers, scan, mark)
        model.llm.layers = ScannedStack(model.llm.layers, scan, mark)
        # The VAE and CLIP are small and are replicated on every device.
        if vae:
            vae.to(self.device)
        if model.clip_encoder:
            model.clip_encoder.model.to(self.device)

        self.state = self.load_parameters(weights, checkpoint)      # {name: ParameterState}
        self.adam = self.build_adam(run, checkpoint)

    def load_parameters(self, weights, checkpoint):
        """Puts the parameters on the mesh. Returns the ParameterStates of the trained ones.

        This host reads only what its own devices hold.
        """
        states = {}
        for name, parameter in list(self.model.named_parameters()):
            places = local_slices(self.mesh, name, parameter.shape)
            if not parameter.requires_grad:
                shards = sharding.read_shards(weights, "", name, parameter, places)
                weight = nn.Parameter(self.to_mesh(name, parameter, shards), False)
                set_parameter(self.model, name, weight)
                continue
            initial = sharding.initial_state(weights, checkpoint, name, parameter, places)
            state = [self.to_mesh(name, parameter, shards) for shards in initial]
            state = ParameterState(*state)
            states[name] = state._replace(weight=nn.Parameter(state.weight))
            set_parameter(self.model, name, states[name].weight)
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

    def to_mesh(self, name, parameter, shards):
        """A tensor on the mesh like the parameter of this name.

        shards: what each device of this host holds of it, as Shards on the CPU.
        """
        import torch_xla.distributed.spmd as xs
        if shards[0].values.shape == parameter.shape:       # load_local_shards_ refuses these
            tensor = shards[0].values.to(self.device)
            self.mark(name, tensor)
            return tensor
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        self.mark(name, tensor)
        local = [xs.XLAShard(shard.values, shard.slices, device, replica_id=0)
                 for device, shard in zip(local_devices(), shards, strict=True)]
        xs.XLAShardedTensor(tensor).load_local_shards_(local)
        return tensor

    def mark(self, name, tensor):
        """Annotates a tensor, to be sharded like the parameter of this name."""
        import torch_xla.distributed.spmd as xs
        spec = sharding.partition_spec(name, tensor.shape, self.mesh.shape())
        xs.mark_sharding(tensor, self.mesh, spec)

    def to_scalar(self, number):
        """A number as a 0-d input tensor of the graph; a constant would require recompilation.

        It is moved as a vector, because torch_xla turns the scalars 0 and 1 into constants, and
        equal scalars into one input.
        """
        return torch.tensor([number]).to(self.device)[0]

    # The training step

    def set_learning_rate(self, learning_rate):
        self.learning_rate = learning_rate

    def __call__(self, *args):
        """FuseDiT's forward, with weights cast to the dtype of the computation."""
        weights = {name: state.weight.to(self.dtype) for name, state in self.state.items()}
        return functional_call(self.model, weights, args)

    def backward(self, loss):
        """Accumulates the gradients of a micro-batch, sharded like the weights."""
        (loss / self.accumulation).backward()
        for name, state in self.state.items():
            if state.weight.grad is not None:
                self.mark(name, state.weight.grad)          # otherwise XLA may replicate it

    def step(self):
        """Ends a micro-batch. After the last one of a step, records Adam's step."""
        self.micro_batches += 1
        if self.micro_batches % self.accumulation:
            sync()
            return
        learning_rate = self.to_scalar(self.learning_rate)
        self.norm = adam_step(self.adam, list(self.state.values()), learning_rate,
                              self.max_grad_norm)

    def update_ema(self, decay):
        """Updates the EMA and runs the step. A decay of 1 keeps the EMA, with the same graph.

        Waits until the step before the last STEPS_AHEAD steps has finished.
        """
        update_ema(self.state.values(), self.to_scalar(1 - decay))
        sync()
        self.running.append(self.norm)
        if len(self.running) > STEPS_AHEAD:
            self.running.popleft().cpu()

    def grad_norm(self):
        """Norm of the last step's gradient before clipping; not finite if the step was skipped."""
        return self.norm

    # Validation and checkpoints

    @contextlib.contextmanager
    def use_ema(self):
        """A context in which the model has the EMA weights. Yields the model."""
        weights = {name: state.ema.to(self.dtype) for name, state in self.state.items()}
        with use_weights(self.model, weights):
            yield self.model

    def gather_state(self):
        """This host's part of a checkpoint: (EMA, state), each {name: tensor}, as CPU copies.

        Each shard is written by one host. The names in state are weight.NAME, exp_avg.NAME and
        exp_avg_sq.NAME.
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


def local_devices():
    """{"TPU:5": 5, ...}: the devices of this host, by torch_xla's names, and their numbers."""
    import torch_xla
    names = torch_xla._XLAC._xla_get_runtime_devices()
    return {name: int(name.partition(":")[2]) for name in names}


def local_slices(mesh, name, shape):
    """The part of a tensor that each device of this host holds: a list of tuples of slices."""
    return [sharding.device_slices(name, shape, mesh.shape(), device)
            for device in local_devices().values()]


def local_shards(prefix, name, tensor):
    """The part of a tensor on the mesh that this host writes; see sharding.slices_to_store."""
    import torch_xla.distributed.spmd as xs
    shards = xs.XLAShardedTensor(tensor).local_shards
    first = [(shard.indices, shard.data) for shard in shards if shard.replica_id == 0]
    return sharding.slices_to_store(prefix, name, first, tensor.shape)


# ------------------------------------------------------------------------------ data

# Number of dimensions of a batch's tensors (data/batches.py). All devices share the first, B.
DIMENSIONS = {"pixels": 4, "ids": 2, "mask": 2, "clip": 2, "normal": 1, "noise": 5, "counts": 1}


def place_batches(batches, mesh):
    """Yields batches with their tensors on the mesh. Threads place them ahead of time.

    Each host provides its part of a batch. Values that are not tensors are passed on unchanged.
    """
    import torch_xla
    import torch_xla.distributed.spmd as xs
    from torch_xla.distributed.parallel_loader import ParallelLoader

    specs = {}
    for name, dimensions in DIMENSIONS.items():
        spec = (sharding.AXES, *[None] * (dimensions - 1))
        specs[name] = xs.ShardingSpec(mesh, spec, minibatch=True)

    # MpDeviceLoader does the same, but this loader can be closed before the data workers.
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
    """Yields the tensors of each batch, and appends a dict of its other values to `others`.

    This runs in a thread, where an exception would be lost, so exceptions are appended to `errors`.
    """
    try:
        for batch in batches:
            tensors = {key: v for key, v in batch.items() if isinstance(v, torch.Tensor)}
            others.append({key: v for key, v in batch.items() if key not in tensors})
            yield tensors
    except Exception as error:
        errors.append(error)


# ------------------------------------------------------------------------------ the monitor

class MeshDevices:
    """The devices of a mesh, for train/monitor.py, with the methods of monitor.SeparateDevices."""

    as_one = True                           # ranks are hosts, which draw and validate together

    def __init__(self, mesh):
        self.mesh = mesh
        self.count = mesh.size()
        self.peak_flops = hardware.tpu_peak_flops(tpu_kind(), mesh.size())

    def place(self, batches):
        """The same batches on the mesh; see place_batches."""
        return place_batches(batches, self.mesh)

    def split_rows(self, tensor):
        """Shards the first dimension of a tensor over all devices. Returns the tensor."""
        import torch_xla.distributed.spmd as xs
        xs.mark_sharding(tensor, self.mesh, (sharding.AXES, *[None] * (tensor.dim() - 1)))
        return tensor

    def sync(self):
        """Runs the recorded operations."""
        sync()

    def memory_in_use(self):
        """Bytes on the fullest chip of this host, or None if they are not known."""
        return tpu_memory()

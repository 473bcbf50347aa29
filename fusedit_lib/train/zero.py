"""The engine of train_gpu.py: DeepSpeed's, with an EMA and with checkpoints for any ZeRO stage.

ZeRO shards Adam's state (stage 1), the gradients (stage 2) and the weights (stage 3) across ranks.
The functions here start the processes, merge DeepSpeed's settings, gather and scatter float32
weights and moments, and shard the EMA.

DeepSpeed is imported inside functions, because the import takes seconds and would slow down --help.
"""
import contextlib
import json
import math
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.files import read_json
from fusedit_lib.train.build import trainable

# ------------------------------------------------------------------------------ start

def set_environment_defaults():
    """Sets the environment variables of a single process, unless a launcher has set them."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def pick_device(run):
    """The GPU of this process, or the device given by --device.

    Raises FuseDiTError if one of several processes has no GPU although torch is built for CUDA,
    unless --device is given.
    """
    if run.device != "cpu" and torch.cuda.is_available():
        device = backend.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
        return device
    device = backend.pick_device(run.device)
    if int(os.environ["WORLD_SIZE"]) > 1 and run.device == "auto" and torch.version.cuda:
        raise FuseDiTError(f"no GPU is visible on {socket.gethostname()}, although torch is built "
                           "for GPUs: check nvidia-smi, or use --device cpu to train on CPUs")
    return device


def start(device):
    """Connects the processes."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)    # otherwise DeepSpeed guesses
    device_id = None
    if device.type == "cuda":
        device_id = device
    if device.type == "cpu":
        communication = "gloo"
    elif os.environ["WORLD_SIZE"] == "1":
        communication = "nccl"
    else:                                   # ranks also exchange CPU tensors
        communication = "cpu:gloo,cuda:nccl"
    dist.init_process_group(communication, timeout=timedelta(minutes=30), device_id=device_id)


def prepare_layers(run, model, vae):
    """Checks the attention kernel. Applies --float8, --compile and --remat."""
    kernel = backend.check_attention(model, vae, model.dit.proj_out.weight.device,
                                     backend.torch_dtype(run.dtype))
    if kernel and dist.get_rank() == 0:
        print(kernel, flush=True)
    if run.float8:
        backend.use_float8(model.dit)
    if run.compile:
        compile_llm = run.zero[0] != "3"    # ZeRO 3 gathers Gemma's weights one by one
        backend.compile_model(model, vae, compile_llm, run.memory_budget)
    if run.remat:
        for layer in model.dit.layers:
            layer.forward = partial(recompute, layer.forward, use_reentrant=False)


# ------------------------------------------------------------------------------ settings

def merge_config(ours, path, defaults):
    """Merges our DeepSpeed settings, those of the user's JSON file, and defaults.

    path: the file, or "". It may add to our settings and replace the defaults.
    Raises FuseDiTError if it contradicts our settings, or has an optimizer or a scheduler, which
    are set by flags.
    """
    theirs = {}
    if path:
        theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise FuseDiTError(f"{path} is not a JSON object of DeepSpeed settings")
    for key in ("optimizer", "scheduler"):
        if key in theirs:
            raise FuseDiTError(f"{path}: {key} must be set by flags instead (--lr, --beta1, "
                               "--lr-schedule, ...)")
    merged = add_settings(theirs, ours, path)

    for key, value in defaults.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict):
            merged[key] = value | merged[key]
    return merged


def add_settings(theirs, ours, path, prefix=""):
    """Adds ours to theirs recursively. prefix: the dotted path of this level, for errors."""
    for key, value in ours.items():
        if isinstance(value, dict) and isinstance(theirs.get(key, {}), dict):
            theirs[key] = add_settings(theirs.get(key, {}), value, path, f"{prefix}{key}.")
        elif key in theirs and theirs[key] not in (value, "auto"):
            raise FuseDiTError(f"{path}: {prefix}{key} is {json.dumps(theirs[key])}, but the flags "
                               f"set it to {json.dumps(value)}: change one of them")
        else:
            theirs[key] = value
    return theirs


def skip_shared_memory_op():
    """On CPUs, keeps DeepSpeed from compiling its C++ shared-memory all-reduce.

    Compiling it takes a minute at the first start, and gloo does not need it. DeepSpeed has no
    setting for this, so an entry of its private table of ops is changed. (We know of no upstream
    issue.)
    """
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def adam_is_plain(run):
    """Returns True for stage 0 in float32, where a plain Adam updates the model's own weights."""
    return run.zero[0] == "0" and run.dtype == "float32"


def clip_and_skip(adam, max_norm):
    """Makes Adam clip gradients, and skip a step whose gradient is not finite.

    This is for stage 0 in float32, where no DeepSpeed optimizer does it. As with
    GradScaler, the decision is made on the device, so that the host does not wait. adam.norm is the
    norm before clipping.
    """
    def before_step(adam, args, kwargs):
        grads = [p.grad for p in adam.param_groups[0]["params"] if p.grad is not None]
        adam.norm = torch.nn.utils.get_total_norm(grads).nan_to_num(math.inf, math.inf)
        if max_norm:
            torch._foreach_mul_(grads, (max_norm / (adam.norm + 1e-6)).clamp(max=1))
        # Fused Adam reads these: with found_inf = 1 it changes nothing.
        adam.grad_scale = None
        adam.found_inf = (~adam.norm.isfinite()).float()

    adam.register_step_pre_hook(before_step)


# ------------------------------------------------------------------------------ float32 state

class StateTensor(NamedTuple):
    """A float32 weight or moment, wherever ZeRO keeps it."""
    key: str                                # "weight", "exp_avg" or "exp_avg_sq"
    name: str                               # parameter name
    get: Callable                           # () -> whole tensor; under ZeRO every rank must call it
    put: Callable                           # (whole tensor) -> None; not for stage 3


def full_precision_state(engine, keys=("weight", "exp_avg", "exp_avg_sq")):
    """Yields a StateTensor for each key of each trained parameter. engine: DeepSpeed's."""
    for i, (name, parameter) in enumerate(trainable(engine.module)):
        for key in keys:
            if engine.zero_optimization_stage() == 0:
                get, put = whole_state(engine.basic_optimizer, i, key)
            else:
                get, put = sharded_state(parameter, key)
            yield StateTensor(key, name, get, put)


def whole_state(adam, i, key):
    """(get, put) for parameter i of an Adam that holds whole parameters."""
    parameter = adam.param_groups[0]["params"][i]
    tensor = parameter.data
    if key != "weight":
        tensor = adam.state[parameter][key]
    return tensor.clone, tensor.copy_


def sharded_state(parameter, key):
    """(get, put) for a parameter whose float32 state is sharded across ranks."""
    from deepspeed import utils as ds
    if key == "weight":
        get = partial(ds.safe_get_full_fp32_param, parameter)
        put = partial(ds.safe_set_full_fp32_param, parameter)
    else:
        get = partial(ds.safe_get_full_optimizer_state, parameter, optim_state_key=key)
        put = partial(ds.safe_set_full_optimizer_state, parameter, optim_state_key=key)
    return get, put


def load_optimizer_state(engine, checkpoint):
    """Loads Adam's float32 weights, moments and step, for any ZeRO stage and number of ranks.

    engine: DeepSpeed's.
    checkpoint: a Checkpoint, written with any stage and number of ranks or by train_tpu.py. For a
        new run it is None, and the moments are set to zero, so that they can be saved at any time.
    """
    steps = 0.0
    if checkpoint is not None:
        steps = float(checkpoint.adam_step)
    create_moments(engine, steps)
    if checkpoint is None:
        return

    parameters = dict(trainable(engine.module))
    for tensor in full_precision_state(engine):
        file, stored = checkpoint.state[f"{tensor.key}.{tensor.name}"]
        value = file.get_tensor(stored).to(engine.device)
        if engine.zero_optimization_stage() < 3:
            tensor.put(value)
        else:
            put_stage_3(parameters[tensor.name], tensor.key, value)


def create_moments(engine, steps):
    """Creates zero moments for the Adam of DeepSpeed's engine, with a count of steps."""
    stage = engine.zero_optimization_stage()
    adam = engine.basic_optimizer
    parameters = adam.param_groups[0]["params"]
    if stage == 3:
        parameters = engine.optimizer.fp32_partitioned_groups_flat
    for p in parameters:
        adam.state[p] = {"step": torch.tensor(steps, device=p.device),
                         "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if stage in (1, 2):                     # DeepSpeed does this after the first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def put_stage_3(parameter, key, value):
    """Sets this rank's part of a float32 weight or moment under ZeRO 3. value: the whole tensor.

    DeepSpeed's safe_set_full_... functions fail for a parameter that is not divisible by the number
    of ranks.
    """
    from deepspeed import utils as ds
    size = parameter.ds_tensor.ds_numel     # size of each part; the last one is padded
    missing = size * dist.get_world_size() - parameter.ds_numel
    padded = torch.nn.functional.pad(value.flatten(), (0, missing))
    start = size * dist.get_rank()
    part = padded[start:start + size]
    if key == "weight":
        ds.safe_set_local_fp32_param(parameter, part)
    else:
        ds.safe_set_local_optimizer_state(parameter, part, key)


# ------------------------------------------------------------------------------ EMA

class ShardedEMA(NamedTuple):
    """The exponential moving average (EMA) of the weights, with each tensor on one rank."""
    owner: dict                             # {name: rank that keeps and writes the tensor}
    tensors: dict                           # {name: float32 tensor} on this rank


def shard_ema(model, checkpoint, rank, world, offload=False):
    """ShardedEMA that starts from a model's trained weights, or is read from a checkpoint.

    To balance the ranks, the tensors are assigned from the largest to the smallest, each to the
    rank with the fewest elements.
    offload: keep the tensors in CPU memory, to which the weights are copied for an update.
    """
    weights = dict(trainable(model))
    owner = {}
    load = [0] * world                      # elements on each rank
    for name in sorted(weights, key=lambda name: (-weights[name].numel(), name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += weights[name].numel()

    tensors = {}
    for name in owner:
        if owner[name] != rank:
            continue
        weight = weights[name]
        device = weight.device
        if offload:
            device = torch.device("cpu")
        if checkpoint is None:
            tensors[name] = weight.detach().to(device, copy=True)
        else:
            file, stored = checkpoint.ema[name]
            tensors[name] = file.get_tensor(stored).to(device)
    return ShardedEMA(owner, tensors)


# ------------------------------------------------------------------------------ the engine

class Engine:
    """DeepSpeed's engine and the EMA, with the same methods as xla.Engine."""

    def __init__(self, deepspeed_engine, ema):
        self.deepspeed = deepspeed_engine
        self.module = deepspeed_engine.module       # the model
        self.ema = ema                      # ShardedEMA
        self.adam = deepspeed_engine.basic_optimizer

    # The training step

    def set_learning_rate(self, learning_rate):
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate

    def __call__(self, *args):
        """FuseDiT's forward."""
        return self.deepspeed(*args)

    def backward(self, loss):
        """Accumulates the gradients of a micro-batch."""
        self.deepspeed.backward(loss)

    def step(self):
        """Ends a micro-batch. After the last one of a step, DeepSpeed runs Adam's step."""
        self.deepspeed.step()

    @torch.no_grad()
    def update_ema(self, decay):
        """Updates this rank's part of the EMA. A decay of 1 does nothing."""
        if decay == 1:
            return
        for tensor in full_precision_state(self.deepspeed, ["weight"]):
            weight = tensor.get()           # gathers, so every rank takes part
            if tensor.name in self.ema.tensors:
                ema = self.ema.tensors[tensor.name]
                ema.lerp_(weight.to(ema), 1 - decay)

    def grad_norm(self):
        """Norm of the last step's gradient before clipping; not finite if the step was skipped."""
        optimizer = self.deepspeed.optimizer
        if optimizer is self.adam:          # stage 0 in float32: see clip_and_skip
            return self.adam.norm
        offload = getattr(optimizer, "cpu_offload", False)
        if self.deepspeed.zero_optimization_stage() < 3 and offload and optimizer.overflow:
            # DeepSpeed 0.19 would add the next step's gradients to those of the skipped step. (We
            # know of no upstream issue. Remove this when tests of skipped steps pass without it.)
            gradients = optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))
        return self.deepspeed.get_global_grad_norm()

    # Validation and checkpoints

    @contextlib.contextmanager
    def use_ema(self):
        """A context in which the model has the EMA weights. Yields the model in eval mode.

        Afterwards the model has exactly its previous weights again. Each rank keeps a part of them
        in the meantime.
        """
        trained_weights = {}
        self.exchange_weights(self.ema.tensors, replaced=trained_weights)
        self.deepspeed.eval()
        yield self.module                   # no finally: a failed rank must not wait for others
        self.deepspeed.train()
        self.exchange_weights(trained_weights)

    @torch.no_grad()
    def exchange_weights(self, new, replaced=None):
        """Replaces the weights on all ranks, one by one.

        new: {name: tensor} of the weights that this rank owns.
        replaced: a dict that receives CPU copies of the previous weights that this rank owns.
        """
        from deepspeed.runtime.zero import GatheredParameters
        rank = dist.get_rank()
        for name, parameter in trainable(self.module):
            owner = self.ema.owner[name]
            with GatheredParameters([parameter], modifier_rank=owner):
                if owner == rank:
                    if replaced is not None:
                        replaced[name] = parameter.detach().to("cpu", copy=True)
                    parameter.copy_(new[name])
                if self.deepspeed.zero_optimization_stage() < 3:
                    # Use DeepSpeed's group: the first use of another would take GPU memory.
                    dist.broadcast(parameter.data, owner, self.deepspeed.seq_data_parallel_group)

    def gather_state(self):
        """This rank's part of a checkpoint: (EMA, state), each {name: tensor}, as CPU copies.

        Each tensor is written by the rank that owns its EMA. The names in state are weight.NAME,
        exp_avg.NAME and exp_avg_sq.NAME.
        """
        state = {}
        for tensor in full_precision_state(self.deepspeed):
            whole = tensor.get()            # gathers, so every rank takes part
            if self.ema.owner[tensor.name] == dist.get_rank():
                state[f"{tensor.key}.{tensor.name}"] = whole.to("cpu", torch.float32, copy=True)
            del whole                       # before the next one is gathered
        ema = {name: tensor.to("cpu", copy=True) for name, tensor in self.ema.tensors.items()}
        return ema, state

"""What DeepSpeed's ZeRO takes apart, put together: settings, weights, moments, averages."""
import contextlib
import json
import math
from functools import partial

import torch
import torch.distributed as dist

from fusedit import FuseDiTError
from fusedit_lib.files import read_json
from fusedit_lib.train.models import trainable


def merge(ours, path, usual):
    """Our DeepSpeed settings with those of the user's JSON file, which may not contradict them.

    usual: more of ours, which the file may change.
    """
    def over(theirs, ours, where):
        for key, value in ours.items():
            if isinstance(value, dict) and isinstance(theirs.get(key, {}), dict):
                theirs[key] = over(theirs.get(key, {}), value, f"{where}{key}.")
            elif key in theirs and theirs[key] not in (value, "auto"):
                raise FuseDiTError(f"{path}: {where}{key} is {json.dumps(theirs[key])}, but the "
                                   f"flags say {json.dumps(value)}: change one of them")
            else:
                theirs[key] = value
        return theirs
    theirs = read_json(path) if path else {}
    if not isinstance(theirs, dict):
        raise FuseDiTError(f"{path} is not a JSON object of DeepSpeed settings")
    for key in {"optimizer", "scheduler"} & set(theirs):
        raise FuseDiTError(f"{path}: {key} is set by our flags (--lr, --beta1, --lr-schedule ...)")
    ours = over(theirs, ours, "")
    return ours | {k: v | ours[k] if isinstance(v, dict) and k in ours else ours.get(k, v)
                   for k, v in usual.items()}


def guard(adam, max_norm):
    """Clip, and skip a step whose gradient is not finite: for stage 0 in float32, where no
    optimizer of DeepSpeed's does. Decided on the device, as GradScaler does: nothing waits."""
    def check(adam, *_):
        grads = [p.grad for p in adam.param_groups[0]["params"] if p.grad is not None]
        adam.norm = torch.nn.utils.get_total_norm(grads).nan_to_num(math.inf, math.inf)
        torch._foreach_mul_(grads, (max_norm / (adam.norm + 1e-6)).clamp(max=1) if max_norm else 1)
        adam.grad_scale, adam.found_inf = None, (~adam.norm.isfinite()).float()
    adam.register_step_pre_hook(check)


def grad_norm(engine):
    """Of the step just done, before clipping; not finite: the step was skipped."""
    if plain(engine):
        return engine.basic_optimizer.norm
    shared = engine.optimizer
    if engine.zero_optimization_stage() < 3 and getattr(shared, "cpu_offload", False) and \
            shared.overflow:
        # DeepSpeed 0.19 leaves a skipped step's gradients where it adds up the next step's
        shared.averaged_gradients.update(dict.fromkeys(shared.averaged_gradients))
    return engine.get_global_grad_norm()


def plain(engine):
    """Stage 0 in float32: Adam works on the model's own weights."""
    return engine.optimizer is engine.basic_optimizer


def cells(engine, keys=("weight", "exp_avg", "exp_avg_sq")):
    """(key, name, get, put) of float32 weights and moments; get() gathers, so on all ranks."""
    from deepspeed import utils as ds
    adam = engine.basic_optimizer
    for i, (name, p) in enumerate(trainable(engine.module)):
        for key in keys:
            if engine.zero_optimization_stage() == 0:
                share = adam.param_groups[0]["params"][i]
                cell = share.data if key == "weight" else adam.state[share][key]
                get, put = cell.clone, cell.copy_
            elif key == "weight":
                get, put = ds.safe_get_full_fp32_param, ds.safe_set_full_fp32_param
                get, put = partial(get, p), partial(put, p)
            else:
                get, put = ds.safe_get_full_optimizer_state, ds.safe_set_full_optimizer_state
                get, put = (partial(f, p, optim_state_key=key) for f in (get, put))
            yield key, name, get, put


def averages(model, saved, rank, world, offload=False):
    """(the rank that has each tensor's average and writes it, {name: average} of this rank).

    Ranks hold about the same: the largest tensor comes first, to who has least. offload: they
    lie in the CPU's memory, and an update takes the weights there.
    """
    weights, load, owner = dict(trainable(model)), [0] * world, {}
    for name in sorted(weights, key=lambda name: (-weights[name].numel(), name)):
        owner[name] = least = load.index(min(load))
        load[least] += weights[name].numel()
    mine, ema = [name for name, r in owner.items() if r == rank], {}
    for name in mine:
        p = weights[name]
        file, stored = saved.ema[name] if saved else (None, None)
        home = torch.device("cpu") if offload else p.device
        ema[name] = file.get_tensor(stored).to(home) if saved else p.detach().to(home, copy=True)
    return owner, ema


@torch.no_grad()
def update_ema(engine, ema, decay):
    """Move this rank's averages towards the weights."""
    for _, name, get, _ in cells(engine, ["weight"]):
        weight = get()                      # a gathering: it takes all ranks
        if name in ema:
            ema[name].lerp_(weight.to(ema[name]), 1 - decay)


def shares(engine, ema, owner):
    """What Saver.save writes of this rank: copies of the average and of all cells it owns."""
    state = {}
    for key, name, get, _ in cells(engine):
        whole = get()                       # a gathering: it takes all ranks
        if owner[name] == dist.get_rank():
            state[f"{key}.{name}"] = whole.to("cpu", torch.float32, copy=True)
        del whole
    return {name: p.to("cpu", copy=True) for name, p in ema.items()}, state


def fill(engine, saved):
    """Fill the cells, for any ZeRO stage and number of ranks, whichever wrote the checkpoint.

    saved None, of a new run: moments of zero, so that there is something to save at any time.
    """
    from deepspeed import utils as ds
    adam, zero = engine.basic_optimizer, engine.zero_optimization_stage()
    for p in adam.param_groups[0]["params"] if zero < 3 else \
            engine.optimizer.fp32_partitioned_groups_flat:
        step = torch.tensor(float(saved.adam_step if saved else 0), device=p.device)
        adam.state[p] = dict(step=step, exp_avg=torch.zeros_like(p),
                             exp_avg_sq=torch.zeros_like(p))
    if zero in (1, 2):                      # it would look for them after the first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    weights = dict(trainable(engine.module))
    for key, name, _, put in cells(engine) if saved else ():
        file, stored = saved.state[f"{key}.{name}"]
        value, p = file.get_tensor(stored).to(engine.device), weights[name]
        if zero < 3:
            put(value)
            continue
        # DeepSpeed's own way of setting all of it stumbles where it does not divide into ranks.
        n = p.ds_tensor.ds_numel
        missing = n * dist.get_world_size() - p.ds_numel
        mine = torch.nn.functional.pad(value.flatten(), (0, missing))
        mine = mine[n * dist.get_rank():n * (dist.get_rank() + 1)]
        if key == "weight":
            ds.safe_set_local_fp32_param(p, mine)
        else:
            ds.safe_set_local_optimizer_state(p, mine, key)


@contextlib.contextmanager
def averaged(engine, ema, owner):
    """Within it the model's weights are the averaged ones; after it the very same as before.

    Each rank holds the average of the tensors it owns, and gives them to all, one at a time.
    """
    from deepspeed.runtime.zero import GatheredParameters
    rank, raw = dist.get_rank(), {}

    @torch.no_grad()
    def exchange(new, old=None):
        for name, p in trainable(engine.module):
            with GatheredParameters([p], modifier_rank=owner[name]):
                if owner[name] == rank:
                    if old is not None:
                        old[name] = p.detach().to("cpu", copy=True)
                    p.copy_(new[name])
                if engine.zero_optimization_stage() < 3:
                    # in DeepSpeed's group: another's first use would take memory of the GPU
                    dist.broadcast(p.data, owner[name], engine.seq_data_parallel_group)
    exchange(ema, raw)
    engine.eval()
    yield engine.module                     # an error of one rank must not wait for the others
    engine.train()
    exchange(raw)

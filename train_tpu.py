"""Train fusedit with PyTorch/XLA, on TPUs or, small models, on a CPU.

    python train_tpu.py --preset demo --data 'shards/*.tar'              all chips of this host
    python train_tpu.py --preset fusedit --data ... --mesh 64,2          on every host of a pod
    python train_tpu.py --preset fusedit --plan v5e-256                  what that would take
    PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 python train_tpu.py --preset demo ...

The same command again goes on from the run's last checkpoint. Flags and their defaults:
"""
import atexit
import contextlib
import os
from datetime import timedelta
from functools import partial

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import numpy as np
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition
from torch.func import functional_call

import fusedit
from fusedit_lib import backend, cli
from fusedit_lib.data.batches import Batches, load_batches, tensors, to_device
from fusedit_lib.train import checkpoints, distributed, monitor, plan, sharding, xla
from fusedit_lib.train.config import check_run, data_workers, model_config, parse_run, split_batch
from fusedit_lib.train.models import adam_steps, build_models
from fusedit_lib.train.schedule import due_after, ema_decay, learning_rate

# Unless told otherwise. NPROC: threads, of which virtual devices hold some while they wait.
os.environ |= dict(PJRT_DEVICE="TPU", PJRT_NPROC="64", TF_CPP_MIN_LOG_LEVEL="2",
    XLA_PERSISTENT_CACHE_PATH=os.path.expanduser("~/.cache/fusedit/xla")) | os.environ
with contextlib.suppress(ModuleNotFoundError):             # --help and --plan do without
    import torch_xla
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr
    from torch_xla._internal import tpu
    from torch_xla.backends import set_mat_mul_precision
    from torch_xla.distributed.parallel_loader import ParallelLoader
    from torch_xla.experimental import scan

# ------------------------------------------------------------------------------ start

def start(run):
    """(run, device, rank, world, mesh): a host is one process, all its chips are one device."""
    run, kind = checkpoints.settle_dtype(run, torch.device("xla")), os.environ["PJRT_DEVICE"]
    try:
        if kind == "TPU" and not tpu.num_available_chips():
            raise OSError("no chip on the PCI bus")        # libtpu would look for it for minutes
        xr.use_spmd()
        n = xr.global_runtime_device_count()
    except (RuntimeError, OSError) as e:
        raise fusedit.FuseDiTError(f"no {kind} is here ({str(e).splitlines()[0]}); on a CPU, "
                                   "PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 makes devices") from None
    hosts = dict(init_method="xla://", timeout=timedelta(minutes=30))
    if kind == "CPU":
        hosts = dict(store=dist.HashStore(), rank=0, world_size=1)
    elif run.dtype == "float32":
        set_mat_mul_precision("highest")    # a TPU would multiply in bf16
    dist.init_process_group("gloo", **hosts)
    mesh = xs.Mesh(np.arange(n), sharding.mesh_shape(run.mesh, n), sharding.AXES)
    return run, torch_xla.device(), dist.get_rank(), dist.get_world_size(), mesh


# ------------------------------------------------------------------------------ build

class Engine:
    """Model, Adam's moments and averages, in shards; used as DeepSpeed's engine is."""

    def __init__(self, run, model, vae, saved, times, device, mesh):
        self.run, self.model, self.times, self.micro = run, model, times, 0
        self.device, self.mesh, self.state = device, mesh, {}
        self.dtype = backend.torch_dtype(run.dtype)
        # What scan does there needs JAX, and is said by the marks of weights and of x as well.
        scan._backward_shard_alike = lambda carry, x, backward, init, xs: backward(carry, x)
        torch._functorch.config.activation_memory_budget = 0 if run.remat else 1
        scanned = partial(scan.scan, partition_fn=min_cut_rematerialization_partition,
                          is_fn_pure=True)
        def shard(t, name=""):
            axes = sharding.spec(name, t.shape, mesh.shape()) if name else ("fsdp", None, None)
            return xs.mark_sharding_with_gradients(t, mesh, axes)
        for tower in (model.dit, model.llm):
            tower.layers = xla.Stack(tower.layers, scanned, shard)
        for small in filter(None, (vae, model.clip_encoder and model.clip_encoder.model)):
            small.to(device)                # whole on every chip
        for name, p in list(model.named_parameters()):
            weight = torch.nn.Parameter(self.place(name, p.detach()), p.requires_grad)
            xla.put(model, name, weight)
            if p.requires_grad:
                first = sharding.first_state(saved, name, p)
                average, *moments = (self.place(name, t) for t in first)
                self.state[name] = average, weight, *moments
        self.adam = torch.optim.AdamW([p for _, p, *_ in self.state.values()],
                                      betas=(run.beta1, run.beta2), capturable=True, foreach=False,
                                      weight_decay=run.weight_decay)
        for _, p, mean, square in self.state.values():
            step = torch.full((), float(saved.adam_step if saved else 0), device=device)
            self.adam.state[p] = dict(step=step, exp_avg=mean, exp_avg_sq=square)

    def place(self, name, value):
        value = value.to(self.device)
        xs.mark_sharding(value, self.mesh, sharding.spec(name, value.shape, self.mesh.shape()))
        return value

    def lower(self, which):                 # in the type that is computed in: 0 averages, 1 weights
        return {name: state[which].to(self.dtype) for name, state in self.state.items()}

    def __call__(self, *args):
        return functional_call(self.model, self.lower(1), args)

    def backward(self, loss):
        (loss / self.times).backward()
        for name, (_, p, *_) in self.state.items():
            if p.grad is not None:
                self.place(name, p.grad)    # else XLA might keep it whole

    def step(self, lr, decay):
        """After the last of `times` micro-batches Adam's step, in the same graph."""
        self.micro += 1
        if self.micro % self.times == 0:
            lr, rate = torch.tensor([lr, 1 - decay]).to(self.device)   # else equal ones recompile
            self.norm = xla.adam_step(self.adam, [*self.state.values()], lr, rate,
                                       self.run.max_grad_norm)
        torch_xla.sync()

    def shares(self):
        """What Saver.save writes of this host: its chips' parts of averages, weights, moments."""
        torch_xla.sync(wait=True)
        found = {"": {}, "weight.": {}, "exp_avg.": {}, "exp_avg_sq.": {}}
        for name, tensors in self.state.items():
            for (key, to), t in zip(found.items(), tensors, strict=True):
                shards = [s for s in xs.XLAShardedTensor(t).local_shards if s.replica_id == 0]
                to |= sharding.pieces(key, name, [(s.indices, s.data) for s in shards], t.shape)
        return found.pop(""), {name: t for part in found.values() for name, t in part.items()}


def feed(batches, device, mesh):
    """Onto the mesh, ahead of time by threads; each host brings its part of the batch."""
    dims, problems = dict(pixels=4, ids=2, mask=2, clip=2, normal=1, noise=5, counts=1), []
    specs = {k: xs.ShardingSpec(mesh, (sharding.AXES, *[None] * (n - 1)), minibatch=True)
             for k, n in dims.items()}
    # What is inside an MpDeviceLoader: this can be closed, before the data workers are.
    loading = ParallelLoader(xla.until_error(batches, problems), [device], input_sharding=specs,
                             loader_prefetch_size=2, device_prefetch_size=2)
    atexit.register(loading.close)
    yield from loading.per_device_loader(device)
    atexit.unregister(loading.close)
    for problem in problems:
        raise problem


# ------------------------------------------------------------------------------ loop

def train(run, config):
    """The whole run; returns the exit code."""
    run, device, rank, world, mesh = start(run)
    micro, times = split_batch(run, mesh.size())
    micro *= mesh.size() // world           # of a host
    saved = checkpoints.load_checkpoint(checkpoints.open_run(run, config))
    model, vae = build_models(run, config, "cpu", saved)
    first, stop, bad = saved.step if saved else 0, 0, []
    source = Batches(run, config, model.tokenizer, micro, times, rank, world)
    saver = checkpoints.CheckpointWriter(run, config, saved, source.digest)
    coming = range(first * times, run.steps * times)
    onto = partial(feed, device=device, mesh=mesh)
    batches = load_batches(source, coming, data_workers(run))
    batches = onto(tensors(batches, bad))
    engine = Engine(run, model, vae, saved, times, device, mesh)
    watcher, saved = monitor.Monitor(run, config, model, vae, saved, micro, source,
        monitor.SpmdHost(onto, torch_xla.sync, mesh.size())), None     # and its files are closed
    signals, step = distributed.catch_signals(), first
    for step in range(first, run.steps):
        # ------------------------------------------------------------ the training step
        lr = learning_rate(run, step)
        for _ in range(times):
            batch = next(batches)
            x, ids, mask, clip, normal, noise = to_device(batch, device)  # x [B,3,H,W]
            if vae:
                with torch.no_grad():
                    x = vae.encode(x, noise[1])                            # [B,16,H/8,W/8]
            words = ids, mask, model.clip_encoder and model.clip_encoder(clip)
            sigma = fusedit.logit_normal_sigma(normal, config.shift)             # [B]
            loss = fusedit.flow_loss(engine, x, words, sigma, noise[0]).mean()
            engine.backward(loss)
            engine.step(lr, ema_decay(run, step + 1))
            watcher.log_micro_batch(loss, bad.pop(0))                      # no wait for the device
        step += 1
        watcher.log_step(engine.norm)
        # -------------------------------------------------------------------------------
        stop, now = saver.poll(max(signals, default=0))
        logs, looks, saves = due_after(run, step, first, stop, now)
        if logs:
            watcher.log(step, lr)
        if looks:
            with xla.lent(model, engine.lower(0)):
                watcher.validate(step, model)
        if saves:
            counts = watcher.counts | dict(adam_step=adam_steps(engine.adam))
            saver.save(step, engine.shares, counts)
        watcher.restart_clock(looks or saves)      # leaves their time out of the images/s
        if stop:
            break
    return saver.close(step, stop)


def main():
    run = parse_run(None, __doc__, "tpu")
    config = model_config(run)
    if run.plan:
        return plan.show(run, config)
    check_run(run)                     # what can be wrong should be so before the model loads
    if "torch_xla" not in globals():
        raise ModuleNotFoundError("torch_xla", name="torch_xla")
    code = train(run, config)
    dist.barrier()                          # who leaves first breaks the others' connections
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    cli.run(main, "--micro-batch (the batch stays: it is accumulated); or --remat, or more chips")

"""Train fusedit with DeepSpeed, on GPUs or, small models, on a CPU.

    python train_gpu.py --preset demo --data 'shards/*.tar'              one device
    deepspeed train_gpu.py --preset fusedit --data 'shards/*.tar'        all GPUs of this machine
    python train_gpu.py --preset fusedit --plan 8xH100                   what that would take

The same command again goes on from the run's last checkpoint. Flags and their defaults:
"""
import contextlib
import io
import os
import socket
import warnings
from datetime import timedelta
from functools import partial

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute

import fusedit
from fusedit_lib import backend, cli
from fusedit_lib.data.batches import Batches, load_batches, to_device
from fusedit_lib.train import checkpoints, distributed, monitor, plan, zero
from fusedit_lib.train.config import check_run, data_workers, model_config, parse_run, split_batch
from fusedit_lib.train.models import adam_steps, build_models
from fusedit_lib.train.schedule import due_after, ema_decay, learning_rate

# ------------------------------------------------------------------------------ start

def start(run):
    """(run, device, rank, world). Without a launcher this process is the only one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(free.getsockname()[1]))
    gpu = run.device != "cpu" and torch.cuda.is_available()
    device = backend.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else run.device)
    if gpu:
        torch.cuda.set_device(device)
    world = int(os.environ["WORLD_SIZE"])
    if world > 1 and run.device == "auto" and torch.version.cuda and not gpu:
        raise fusedit.FuseDiTError(f"{socket.gethostname()} shows no GPU, which torch is built for "
                                   "(nvidia-smi?); on CPUs, --device cpu says that none is meant")
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed would guess
    torch.set_float32_matmul_precision("high")
    run = checkpoints.settle_dtype(run, device)
    backend.configure(device, backend.torch_dtype(run.dtype))
    # Several ranks also talk through their CPUs, in distributed.largest_of_all_ranks().
    comm = "gloo" if device.type == "cpu" else "nccl" if world == 1 else "cpu:gloo,cuda:nccl"
    dist.init_process_group(comm, timeout=timedelta(minutes=30),
                            device_id=device if gpu else None)
    return run, device, dist.get_rank(), world


# ------------------------------------------------------------------------------ build

def blocks(run, model, vae):
    """Try attention's kernel; compile and recompute the blocks, if asked to."""
    kernel = backend.check_attention(model, backend.torch_dtype(run.dtype))
    if kernel and dist.get_rank() == 0:
        print(kernel, flush=True)
    if run.float8:
        backend.use_float8(model.dit)
    if run.compile:                         # ZeRO 3: there the Gemma's weights come one by one
        backend.compile_model(model, vae, run.zero[0] != "3", run.memory_budget)
    for layer in model.dit.layers if run.remat else ():
        layer.forward = partial(recompute, layer.forward, use_reentrant=False)


def build_engine(run, model, vae, saved, micro, times):
    """The DeepSpeed engine: by ZeRO stage it shares out Adam's state, gradients and weights."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed's to heed
    import deepspeed                        # takes seconds: not for --help
    stage, offload = int(run.zero[0]), run.zero.endswith("offload")
    plain = stage == 0 and run.dtype == "float32"          # then Adam works without DeepSpeed's
    blocks(run, model, vae)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], run.lr,
                             (run.beta1, run.beta2), fused=True, weight_decay=run.weight_decay)
    config = dict(train_batch_size=run.batch, train_micro_batch_size_per_gpu=micro,
                  gradient_accumulation_steps=times,
                  gradient_clipping=run.max_grad_norm, fp16=dict(enabled=False),
                  bf16=dict(enabled=run.dtype == "bf16", check_grad_overflow=True),
                  zero_optimization=dict(stage=stage),
                  zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    if stage:                               # stage 0 can only add gradients up in bf16
        config["data_types"] = dict(grad_accum_dtype="fp32")
    bucket = min(plan.BUCKET, sum(p.numel() for p in model.parameters() if p.requires_grad))
    usual = dict(zero_optimization=dict(reduce_bucket_size=bucket,
                                        stage3_max_live_parameters=plan.BUCKET),
                 timers=dict(throughput=dict(enabled=False)))      # it would wait for the device
    if offload:
        config["zero_optimization"]["offload_optimizer"] = dict(device="cpu")
    if os.environ["DS_ACCELERATOR"] == "cpu":              # a minute of C++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = zero.merge(config, run.deepspeed_config, usual)
    if plain:
        config["gradient_clipping"] = 0.0   # zero.guard does it
    if stage == 3:                          # a block's weights come together, as it is compiled
        deepspeed.utils.set_z3_leaf_modules(model, [fusedit.DiTBlock])
    with contextlib.redirect_stdout(io.StringIO()):                 # pages about memory
        engine = deepspeed.initialize(model=model, optimizer=adam, config=config)[0]
    adam.state.clear()                      # stage 0 in bf16 has made an empty step to fill it
    if plain:
        zero.guard(adam, run.max_grad_norm)
    zero.fill(engine, saved)
    return engine


# ------------------------------------------------------------------------------ loop

def train(run, config):
    """The whole run; returns the exit code."""
    run, device, rank, world = start(run)
    micro, times = split_batch(run, world)
    saved = checkpoints.load_checkpoint(checkpoints.open_run(run, config))
    model, vae = build_models(run, config, device, saved)
    owner, ema = zero.averages(model, saved, rank, world, run.ema_offload)
    first, stop = saved.step if saved else 0, 0
    source = Batches(run, config, model.tokenizer, micro, times, rank, world)
    saver = checkpoints.CheckpointWriter(run, config, saved, source.digest)
    watcher = monitor.Monitor(run, config, model, vae, saved, micro, source)
    coming = range(first * times, run.steps * times)
    batches = load_batches(source, coming, data_workers(run), device)
    engine, saved = build_engine(run, model, vae, saved, micro, times), None     # files closed
    signals, step = distributed.catch_signals(), first
    for step in range(first, run.steps):
        # ------------------------------------------------------------ the training step
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(run, step)
        for _ in range(times):
            batch = next(batches)                                          # pixels [B,3,H,W]
            x, ids, mask, clip, normal, noise = to_device(batch, device, cut_text=True)
            if vae:
                with torch.no_grad():
                    x = vae.encode(x, noise[1])                            # [B,16,H/8,W/8]
            words = ids, mask, model.clip_encoder and model.clip_encoder(clip)
            sigma = fusedit.logit_normal_sigma(normal, config.shift)             # [B]
            loss = fusedit.flow_loss(engine, x, words, sigma, noise[0]).mean()
            engine.backward(loss)
            engine.step()                   # changes weights every `times` micro-batches
            watcher.log_micro_batch(loss, batch["bad"], int(batch["mask"].sum()))
        step += 1
        watcher.log_step(zero.grad_norm(engine))
        if (decay := ema_decay(run, step)) < 1:
            zero.update_ema(engine, ema, decay)
        # -------------------------------------------------------------------------------
        stop, now = saver.poll(max(signals, default=0))
        logs, looks, saves = due_after(run, step, first, stop, now)
        if logs:
            watcher.log(step, group["lr"])
        if looks:
            with zero.averaged(engine, ema, owner) as average:
                watcher.validate(step, average)
        if saves:
            counts = watcher.counts | dict(adam_step=adam_steps(engine.basic_optimizer))
            saver.save(step, lambda: zero.shares(engine, ema, owner), counts)
        watcher.restart_clock(looks or saves)               # leaves their time out of the images/s
        if stop:
            break
    return saver.close(step, stop)


def main():
    run = parse_run(None, __doc__)
    config = model_config(run)
    if run.plan:
        return plan.show(run, config)
    check_run(run)                     # what can be wrong should be so before the model loads
    code = train(run, config)
    dist.barrier()                          # who leaves first breaks the others' connections
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    cli.run(main, "--micro-batch (the batch stays: it is accumulated); or use --remat, or on "
                  "several GPUs a higher --zero")

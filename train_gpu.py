"""Train fusedit with DeepSpeed, on GPUs or, small models, on a CPU.

    python train_gpu.py --preset demo --data 'shards/*.tar'              one device
    deepspeed train_gpu.py --preset fusedit --data 'shards/*.tar'        all GPUs of this machine

The same command again goes on from the run's last checkpoint. Flags and their defaults:
"""
import contextlib
import io
import os
import socket
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

import cli
import fusedit
import loader
import training

# ------------------------------------------------------------------------------ start

def start(run):
    """(device, rank, world). Without a launcher this process is the only one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(free.getsockname()[1]))
    device, world = cli.pick_device(run.device), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device := cli.pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed would guess
    torch.set_float32_matmul_precision("high")
    # The CPU's fused attention is slow backwards: 108 against 155 images/s in the demo's training.
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda")
    # Several ranks also talk through their CPUs, in training.agree().
    backend = "gloo" if device.type == "cpu" else "nccl" if world == 1 else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device, dist.get_rank(), world


# ------------------------------------------------------------------------------ build

def build(run, dit, saved, micro, times):
    """The DeepSpeed engine: by ZeRO stage it shares out Adam's state, gradients and weights."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed's to heed
    import deepspeed                        # takes seconds: not for --help
    adam = torch.optim.AdamW(dit.parameters(), run.lr, (run.beta1, run.beta2), fused=True,
                             weight_decay=run.weight_decay)
    config = dict(train_batch_size=run.batch, train_micro_batch_size_per_gpu=micro,
                  gradient_accumulation_steps=times, gradient_clipping=run.max_grad_norm,
                  bf16=dict(enabled=run.dtype == "bf16"), zero_optimization=dict(stage=run.zero),
                  zero_allow_untested_optimizer=True)
    if run.zero:                            # stage 0 can only add gradients up in bf16
        config["data_types"] = dict(grad_accum_dtype="fp32")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU, a minute of C++
    with contextlib.redirect_stdout(io.StringIO()):                 # pages about memory
        engine = deepspeed.initialize(model=dit, optimizer=adam, config=config)[0]
    adam.state.clear()                      # stage 0 in bf16 has made an empty step to fill it
    if saved:
        restore(engine, saved)
    return engine


# ------------------------------------------------------------------------------ save

def cells(engine, keys=("weight", "exp_avg", "exp_avg_sq")):
    """(name, get, put) of float32 weights and moments; get() gathers shares, so on all ranks."""
    from deepspeed import utils as ds
    adam = engine.basic_optimizer
    for i, (name, p) in enumerate(engine.module.named_parameters()):
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
            yield f"{key}.{name}", get, put


def restore(engine, saved):
    """Fill the cells, for any ZeRO stage and number of ranks, whichever wrote the checkpoint."""
    adam, zero = engine.basic_optimizer, engine.zero_optimization_stage()
    for p in adam.param_groups[0]["params"] if zero < 3 else \
            engine.optimizer.fp32_partitioned_groups_flat:
        adam.state[p] = dict(step=torch.tensor(float(saved.step), device=p.device),
                             exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    if zero in (1, 2):                      # it would look for them after the first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, _, put in cells(engine):
        file, stored = saved.state[name]
        put(file.get_tensor(stored).to(engine.device))


def save(run, config, engine, ema, step):
    """A checkpoint, gathered from all ranks and written by rank 0."""
    state = {}
    for name, get, _ in cells(engine):
        whole = get()
        if ema is not None:
            state[name] = whole.cpu()
    if ema is not None:
        training.save_checkpoint(run, config, step, ema.state_dict(), state)
    dist.barrier()


# ------------------------------------------------------------------------------ loop

def train(run, config, folder):
    """The whole run; returns the exit code."""
    device, rank, world = start(run)
    micro, times = training.split_batch(run, world)
    saved = training.load_checkpoint(folder) if folder else None
    model, ema, vae = training.build(run, config, device, saved, rank)
    engine = build(run, model.dit, saved, micro, times)
    first = saved.step if saved else 0
    source = loader.Batches(run, config, model.tokenizer, micro, rank, world, first)
    batches = loader.load_batches(source, run.workers, pin=device.type == "cuda")
    log = training.Log(run, config, first, ema)
    draw = training.sampler(run, config, model, vae)
    generator, seen, signals = torch.Generator(device), [], training.catch_signals()
    for step in range(first, run.steps):
        # ------------------------------------------------------------ the training step
        for group in engine.optimizer.param_groups:
            group["lr"] = lr = training.learning_rate(run, step)
        for i in range(times):
            # Noise depends on which micro-batch of the run this is, not on who computes it.
            generator.manual_seed(run.seed * 1_000_003 + (step * times + i) * world + rank)
            batch = next(batches)
            x, ids, mask = loader.to_device(batch, device)             # [B,3,H,W] in [-1,1]
            if vae:
                with torch.no_grad():
                    x = vae.encode(x, generator)                       # [B,16,H/8,W/8]
            pooled = model.pool(batch["captions"]) if model.pool else None
            text = model.read(ids, mask, pooled)
            loss = fusedit.flow_loss(engine, x, text, config.shift, generator)
            engine.backward(loss)
            engine.step()                          # changes weights every `times` micro-batches
            seen.append((loss.detach(), batch["skipped"]))             # read later: no wait here
        step += 1
        if step % run.ema_every == 0:
            latest = ((name, get()) for name, get, _ in cells(engine, ["weight"]))
            training.update_ema(ema, latest, step // run.ema_every - 1, run.ema_decay)
        # -------------------------------------------------------------------------------
        stop = training.agree(max(signals, default=0))
        logs, samples, saves = training.due(run, step, first, stop)
        if logs:
            log.write(step, *training.mean_losses(seen, times), lr, engine.get_global_grad_norm())
        if samples and rank == 0:
            draw(ema, step)
        if saves:
            save(run, config, engine, ema, step)
        if samples or saves:
            log.resume()                           # leaves their time out of the images/s
        if stop:
            return 128 + stop
    return 0


def main():
    run = training.parse_run(None, __doc__)
    config = training.model_config(run)
    loader.expand_shards(run.data)          # what can be wrong should be so before the model loads
    code = train(run, config, training.open_run(run, config))
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    cli.run(main, "--micro-batch (the batch stays: it is accumulated); or use --remat, or on "
                  "several GPUs a higher --zero")

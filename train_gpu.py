"""Train fusedit with DeepSpeed, on GPUs or, for small models, on a CPU.

    python train_gpu.py --preset demo --data shards           # one device
    deepspeed train_gpu.py --preset fusedit --data shards     # all local GPUs
    python train_gpu.py --preset fusedit --plan 8xH100        # estimate only

Running the same command again resumes the run from its latest checkpoint.
"""
import contextlib
import io
import os
import warnings

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch
import torch.distributed as dist

import fusedit
from fusedit_lib import backend, cli
from fusedit_lib.data.batches import Batches, load_batches, to_device
from fusedit_lib.train import checkpoints, distributed, memory, plan, resuming, zero
from fusedit_lib.train.config import check_run, data_workers, model_config, split_batch
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.build import adam_steps, build_models
from fusedit_lib.train.monitor import Monitor
from fusedit_lib.train.schedule import due_after, ema_decay, learning_rate
from fusedit_lib.train.text_cache import make_text_cache

# ------------------------------------------------------------------------------ start

def start(run):
    """Connects the processes, one per GPU. Returns the run and the device.

    The run is returned with its dtype and its seed resolved (--dtype auto, --seed -1).
    Launchers (deepspeed, torchrun) set RANK, WORLD_SIZE, ... in each process. Without a launcher,
    this process is the only one.
    """
    zero.set_environment_defaults()
    device = zero.pick_device(run)
    if run.compile:
        backend.check_compiler(device)
    run = resuming.settle_dtype(run, device)
    torch.set_float32_matmul_precision("high")
    backend.configure(device, backend.torch_dtype(run.dtype))
    zero.start(device)
    return resuming.settle_seed(run), device


# ------------------------------------------------------------------------------ build

def build_engine(run, model, vae, checkpoint, micro_batch, accumulation):
    """DeepSpeed's engine with an EMA. ZeRO shards the training state across ranks."""
    # triggered by DeepSpeed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    import deepspeed

    ema_offload = run.ema_offload or run.zero.endswith("offload")
    ema = zero.shard_ema(model, checkpoint, dist.get_rank(), dist.get_world_size(), ema_offload)
    zero.prepare_layers(run, model, vae)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], run.lr,
                             betas=(run.beta1, run.beta2), weight_decay=run.weight_decay,
                             fused=True)
    config = deepspeed_config(run, model, micro_batch, accumulation)
    if os.environ["DS_ACCELERATOR"] == "cpu":
        zero.skip_shared_memory_op()
    if run.zero[0] == "3":                  # gather the weights of a whole block together
        deepspeed.utils.set_z3_leaf_modules(model, [fusedit.DiTBlock])
    with contextlib.redirect_stdout(io.StringIO()):         # hides pages of memory statistics
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)

    adam.state.clear()                      # in stage 0 with bf16, an empty step fills it
    if zero.adam_is_plain(run):
        zero.clip_and_skip(adam, run.max_grad_norm)
    zero.load_optimizer_state(engine, checkpoint)
    return zero.Engine(engine, ema)


def deepspeed_config(run, model, micro_batch, accumulation):
    """DeepSpeed's configuration, merged with the file given by --deepspeed-config."""
    stage = int(run.zero[0])
    config = {
        "train_batch_size": run.batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.max_grad_norm,
        "fp16": {"enabled": False},
        "bf16": {"enabled": run.dtype == "bf16", "check_grad_overflow": True},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage > 0:                           # in bf16, stage 0 can only accumulate gradients in bf16
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if run.zero.endswith("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}

    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    defaults = {
        "zero_optimization": {"reduce_bucket_size": min(memory.BUCKET, weights),
                              "stage3_max_live_parameters": memory.BUCKET},
        "timers": {"throughput": {"enabled": False}},       # would wait for the device
    }
    config = zero.merge_config(config, run.deepspeed_config, defaults)
    if zero.adam_is_plain(run):
        config["gradient_clipping"] = 0.0   # zero.clip_and_skip clips instead
    return config


# ------------------------------------------------------------------------------ train

def train(run, config):
    """Trains from the latest checkpoint, if any, to the last step. Returns the exit code."""
    signals = distributed.catch_sigterm()   # also while the model is loaded
    run, device = start(run)
    rank, world = distributed.rank_and_world()
    micro_batch, accumulation = split_batch(run, world)

    run, checkpoint = resuming.resume(run, config)
    step = first_step = checkpoint.step if checkpoint else 0
    seen = checkpoint.seen if checkpoint else 0             # samples so far
    model, vae = build_models(run, config, device, checkpoint)
    dataset = Batches(run, config, model.tokenizer, micro_batch, accumulation, rank, world, seen)
    writer = checkpoints.CheckpointWriter(run, config, checkpoint, dataset.digest)
    micro_batches = range((run.steps - first_step) * accumulation)
    batches = load_batches(dataset, micro_batches, data_workers(run), device)
    text_cache = make_text_cache(run, model, dataset)       # None without --cache-text
    # The monitor counts the weights, so it is created before ZeRO 3 shards them.
    monitor = Monitor(run, config, model, vae, checkpoint, micro_batch, dataset)
    engine = build_engine(run, model, vae, checkpoint, micro_batch, accumulation)
    del checkpoint                          # closes its files
    distributed.catch_while_training(signals)
    stop = validate_start(run, step, engine, monitor, writer, signals)
    while step < run.steps and not stop:
        # ------------------------------------------------------------ the training step
        lr = learning_rate(run, step)
        engine.set_learning_rate(lr)
        for _ in range(accumulation):
            loaded = next(batches)
            batch = to_device(loaded, device, cut_text=True)
            x = batch.x                                                 # pixels [B,3,H,W]
            if vae is not None:
                with torch.no_grad():
                    x = vae.encode(x, batch.vae_noise)                  # latents [B,16,H/8,W/8]
            pooled = None
            if model.clip_encoder is not None:
                pooled = model.clip_encoder(batch.clip_ids)
            text = batch.ids, batch.mask, pooled
            if text_cache is not None:
                text = text_cache.features(loaded, batch.mask, pooled)
            sigma = fusedit.logit_normal_sigma(batch.normal, config.shift)       # [B]
            loss = fusedit.flow_loss(engine, x, text, sigma, batch.eps).mean()
            engine.backward(loss)
            engine.step()                   # updates the weights after the last micro-batch
            monitor.log_micro_batch(loss, loaded)                       # no wait for the device
        step += 1
        engine.update_ema(ema_decay(run, step))
        monitor.log_step(engine.grad_norm())
        # -------------------------------------------------------------------------------
        stop = finish_step(run, step, first_step, lr, engine, monitor, writer, signals)
    return writer.close(step, stop)


def validate_start(run, step, engine, monitor, writer, signals):
    """With --init, validates the model and draws its image grid before the first step.

    Returns the number of the signal that any rank has received so far, or 0.
    """
    stop, _ = writer.poll(max(signals, default=0))
    if run.init and step == 0 and not stop:
        with engine.use_ema() as model:
            monitor.validate(step, model)
        monitor.restart_clock(True)
        stop, _ = writer.poll(max(signals, default=0))
    return stop


def finish_step(run, step, first_step, lr, engine, monitor, writer, signals):
    """Logs, validates and saves if due after this step. Returns the stop signal's number, or 0."""
    stop, save_now = writer.poll(max(signals, default=0))
    due = due_after(run, step, first_step, stop, save_now)
    if due.log:
        monitor.log(step, lr)
    if due.validate:
        with engine.use_ema() as model:
            monitor.validate(step, model)
    if due.save:
        counts = monitor.counts | {"adam_step": adam_steps(engine.adam)}
        writer.save(step, engine.gather_state, counts)
    monitor.restart_clock(due.validate or due.save)     # images/s excludes validation and saving
    return stop


def main():
    run = parse_run(None, __doc__)
    config = model_config(run)
    if run.plan:
        return plan.show(run, config)
    check_run(run)                          # finds most mistakes before the model is loaded
    code = train(run, config)
    distributed.disconnect()
    return code


if __name__ == "__main__":
    cli.run(main, "--micro-batch (gradient accumulation keeps --batch the same), or add --compile, "
                  "--zero 2, --ema-offload or --remat, or leave out --cache-text; --plan names "
                  "flags with which a run fits")

"""Train fusedit with PyTorch/XLA, on TPUs or, for small models, on a CPU.

    python train_tpu.py --preset demo --data shards           # all local chips
    python train_tpu.py --preset fusedit --mesh 64,2 ...      # on every pod host
    python train_tpu.py --preset fusedit --plan v5e-256       # estimate only
    PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 python train_tpu.py ... # 4 virtual devices

Running the same command again resumes the run from its latest checkpoint.
"""
from functools import partial

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import torch

import fusedit
from fusedit_lib import cli
from fusedit_lib.data.batches import Batches, load_batches, to_device
from fusedit_lib.train import checkpoints, distributed, plan, resuming, xla
from fusedit_lib.train.config import check_run, data_workers, model_config, split_batch
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.build import adam_steps, open_models
from fusedit_lib.train.monitor import Monitor
from fusedit_lib.train.schedule import due_after, ema_decay, learning_rate

# ------------------------------------------------------------------------------ start

def start(run):
    """Connects the processes, one per host. Returns the run and the mesh.

    The run is returned with its dtype and its seed resolved (--dtype auto, --seed -1).
    All chips of all hosts act as one XLA device. The mesh (--mesh) determines which of them share
    the batch and which share the heads.
    """
    xla.set_environment_defaults()
    run = resuming.settle_dtype(run, torch.device("xla"))
    mesh = xla.start(run)
    return resuming.settle_seed(run), mesh


# ------------------------------------------------------------------------------ build

def build_engine(run, model, vae, weights, checkpoint, accumulation, mesh):
    """The XLA engine with an EMA. The mesh shards the training state across devices."""
    return xla.Engine(run, model, vae, weights, checkpoint, accumulation, mesh)


# ------------------------------------------------------------------------------ train

def train(run, config):
    """Trains from the latest checkpoint, if any, to the last step. Returns the exit code."""
    signals = distributed.catch_sigterm()   # also while the model is loaded
    run, mesh = start(run)
    rank, world = distributed.rank_and_world()
    micro_batch, accumulation = split_batch(run, mesh.size())
    micro_batch *= mesh.size() // world     # per host: all of its devices together

    run, checkpoint = resuming.resume(run, config)
    step = first_step = checkpoint.step if checkpoint else 0
    seen = checkpoint.seen if checkpoint else 0             # samples so far
    model, vae, weights = open_models(run, config, checkpoint, partial(xla.local_slices, mesh))
    dataset = Batches(run, config, model.tokenizer, micro_batch, accumulation, rank, world, seen)
    writer = checkpoints.CheckpointWriter(run, config, checkpoint, dataset.digest)
    micro_batches = range((run.steps - first_step) * accumulation)
    devices = xla.MeshDevices(mesh)
    batches = devices.place(load_batches(dataset, micro_batches, data_workers(run)))
    engine = build_engine(run, model, vae, weights, checkpoint, accumulation, mesh)
    monitor = Monitor(run, config, model, vae, checkpoint, micro_batch, dataset, devices)
    del weights, checkpoint                 # closes their files
    distributed.catch_while_training(signals)
    stop = validate_start(run, step, engine, monitor, writer, signals)
    while step < run.steps and not stop:
        # ------------------------------------------------------------ the training step
        lr = learning_rate(run, step)
        engine.set_learning_rate(lr)
        for _ in range(accumulation):
            loaded = next(batches)
            batch = to_device(loaded, engine.device)
            x = batch.x                                                 # pixels [B,3,H,W]
            if vae is not None:
                with torch.no_grad():
                    x = vae.encode(x, batch.vae_noise)                  # latents [B,16,H/8,W/8]
            pooled = None
            if model.clip_encoder is not None:
                pooled = model.clip_encoder(batch.clip_ids)
            text = batch.ids, batch.mask, pooled
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
    run = parse_run(None, __doc__, "tpu")
    config = model_config(run)
    if run.plan:
        return plan.show(run, config)
    check_run(run)                          # finds most mistakes before the model is loaded
    code = train(run, config)
    distributed.disconnect()
    return code


if __name__ == "__main__":
    cli.run(main, "--micro-batch (gradient accumulation keeps --batch the same); or use --remat "
                  "or more chips")

"""Models to start from, runs with --init, and the losses that the models give by themselves."""
import fusedit
from launching import flags, launch, metrics

from fusedit_lib import pretrained
from fusedit_lib.data.batches import Batches, to_device
from fusedit_lib.export import export
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.validation import held_out_batches, validation_losses
from fusedit_lib.vae import load_vae


# What a run can start from: a folder that write_models writes, and more flags.
STARTS = {"run": ("run", []), "checkpoint": ("run/step-0000002", []),
          "raw": ("run/step-0000002", ["--init-raw"]), "released": ("released", [])}


def write_models(folder, gemma, data):
    """Writes run/, a run of train_gpu.py of 4 steps, and released/, its export."""
    launch(flags(gemma, data, folder / "run", "--steps", "4", "--save-every", "2",
                 "--ema-every", "1", "--sample-every", "0"))
    export(pretrained.load_model(folder / "run"), folder / "released")


def start_flags(model, data, out, *more):
    """The flags of a float32 run of one step that starts from a model and validates it first."""
    return ["--init", str(model), "--data", str(data), "--val-data", str(data), "--out", str(out),
            "--val-samples", "12", "--steps", "1", "--batch", "8", "--lr", "3e-3", "--workers", "0",
            "--log-every", "1", "--dtype", "float32", "--sample-every", "0", *more]


def own_losses(argv, model=None):
    """(validation loss, loss of the first batch) of the model of --init, without the launchers.

    model: the FuseDiT, if it is not the one that load_model returns.
    """
    run = parse_run(argv, "")
    model = model or pretrained.load_model(run.init, ema=not run.init_raw)
    config = model_config(run)
    vae = None
    if config.vae:
        vae = load_vae(config.vae)
    held_out = held_out_batches(run, config, model, run.batch, 0, 1)
    levels = validation_losses(held_out, model, vae, "cpu", lambda: None)

    batch = to_device(Batches(run, config, model.tokenizer, run.batch)[0], "cpu")
    x = batch.x
    if vae is not None:
        x = vae.encode(x, batch.vae_noise)
    pooled = None
    if model.clip_encoder is not None:
        pooled = model.clip_encoder(batch.clip_ids)
    sigma = fusedit.logit_normal_sigma(batch.normal, config.shift)
    loss = fusedit.flow_loss(model, x, (batch.ids, batch.mask, pooled), sigma, batch.eps)
    return sum(levels) / len(levels), loss.mean().item()


def first_losses(out):
    """(validation loss before the first step, loss of the first step) that a run has logged."""
    validation, first, *_ = metrics(out)
    assert validation["step"] == 0
    assert first["step"] == 1
    return validation["val_loss"], first["loss"]

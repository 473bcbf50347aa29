"""Traces the training step of train_tpu.py on virtual CPU devices, for tpu_compile.py.

    python benchmarks/tpu_trace.py --devices 64 step.pb --preset fusedit/large-scale --batch 128

train_tpu.train() itself runs, up to the first call of sync. What it would then send to the
compiler is written to a file instead, as an HLO module (a protocol buffer). Nothing is read:
weights and data are placeholders with a shape, a dtype and a sharding, so that a model of any size
can be traced for a mesh of any size. tpu_compile.py makes them parameters of the program, which
they are in a real run.

The flags that torch_xla passes to libtpu on this kind of TPU are written to step.pb.flags.
"""
import argparse
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import train_tpu
from fusedit_lib import cli
from fusedit_lib.backend import torch_dtype
from fusedit_lib.data.batches import to_device
from fusedit_lib.train import costs, sharding, xla
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.scan import set_parameter
from fusedit_lib.train.sharding import ParameterState
from fusedit_lib.vae import VAE, latent_side, vae_config

PLACEHOLDER = "fusedit_placeholder"         # begins the target of a custom call
DATA = "fusedit_placeholder_data"           # the same for a batch, which a step does not update


class Traced(BaseException):
    """Ends train() when its first graph has been written."""


# ---------------------------------------------------------------------------- placeholders
class Placeholders:
    """Makes tensors on the device that have a shape and a dtype, but no values."""

    def __init__(self):
        import torch_xla
        self.operand = torch.zeros(1).to(torch_xla.device())       # a custom call needs one
        self.made = set()                   # ids of the tensors

    def make(self, tensor, name=PLACEHOLDER):
        """A placeholder like a tensor, which may be on the meta device. name: or DATA."""
        import torch_xla
        from torch_xla.experimental.stablehlo_custom_call import stablehlo_custom_call
        # torch_xla remembers the shape of a custom call by its operands and its target.
        target = f"{name} {tensor.dtype} {list(tensor.shape)}"
        made = stablehlo_custom_call([self.operand], target, [list(tensor.shape)], [tensor.dtype])
        self.made.add(torch_xla._XLAC._xla_get_tensor_id(made))
        return made

    def replace_pending(self):
        """Replaces tensors that a real run computes before the first step, such as Adam's step."""
        import torch_xla
        for tensor in pending_tensors():
            if torch_xla._XLAC._xla_get_tensor_id(tensor) not in self.made:
                tensor.data = self.make(tensor)

    def fill(self, module):
        """Replaces the parameters of a module on the meta device."""
        for name, parameter in list(module.named_parameters()):
            made = torch.nn.Parameter(self.make(parameter), parameter.requires_grad)
            set_parameter(module, name, made)


# ---------------------------------------------------------------------------- what train() uses
def open_models(placeholders, run, config):
    """(FuseDiT on the meta device, VAE or None, no weights), as build.open_models returns them."""
    dtype = torch_dtype(run.dtype)
    model = costs.training_model(run, config)
    if not run.train_llm:
        model.llm.to(dtype)
    model.tokenizer = None
    model.clip_encoder = None
    return model, build_vae(placeholders, run, config), {}


def build_vae(placeholders, run, config):
    """The VAE on the device, or None."""
    if not config.vae:
        return None
    with torch.device("meta"):
        vae = VAE(vae_config(config.vae)).to(torch_dtype(run.dtype)).requires_grad_(False).eval()
    placeholders.fill(vae)
    return vae


def place_batch(placeholders, run, config, latents, mesh):
    """A batch of all devices on the mesh. latents: it has latents instead of pixels."""
    import torch_xla.distributed.spmd as xs
    os.environ["PJRT_DEVICE"] = "TPU"       # some operations are recorded differently for TPUs
    side = latent_side(config)
    C = config.in_channels
    draws = 1
    if config.vae:
        draws = 2                           # one for the posterior of the VAE
    with torch.device("meta"):
        pixels = torch.empty(run.batch, 3, config.image_size, config.image_size, dtype=torch.uint8)
        if latents:
            pixels = torch.empty(run.batch, 2 * C, side, side, dtype=torch.bfloat16)
        ids = torch.empty(run.batch, config.max_text_tokens, dtype=torch.long)
        batch = dict(pixels=pixels, ids=ids, mask=ids > 0, normal=torch.empty(run.batch),
                     noise=torch.empty(run.batch, draws, C, side, side))
    for name, tensor in batch.items():
        batch[name] = placeholders.make(tensor, DATA)
        xs.mark_sharding(batch[name], mesh, (sharding.AXES, *[None] * (tensor.dim() - 1)))
    return batch


class Writer:
    """Takes the place of CheckpointWriter."""

    def poll(self, signal):
        return 0, False


class Recorder:
    """Keeps the losses and norms on the device, as Monitor does."""

    def __init__(self, *_):
        self.kept = []

    def log_micro_batch(self, loss, loaded):
        self.kept.append(loss.detach())

    def log_step(self, norm):
        self.kept.append(norm)


# ---------------------------------------------------------------------------- tracing
def write_graph(out, outputs):
    """Writes the operations recorded for some tensors on the device as one HLO module."""
    import torch_xla
    out.write_bytes(torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs))


def pending_tensors():
    """All tensors that the next call of torch_xla.sync would compute."""
    import torch_xla
    alive = [value for value in gc.get_objects()
             if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "xla"]
    pending = torch_xla._XLAC._check_tensor_need_materialization(alive)
    return [tensor for tensor, is_pending in zip(alive, pending, strict=True) if is_pending]


def trace_step(args, run, config):
    """Runs train() up to the first sync and writes its graph to args.out."""
    started = train_tpu.start(run)
    placeholders = Placeholders()
    dataset = SimpleNamespace(digest="")

    def place_batches(_, mesh):
        placeholders.replace_pending()
        yield place_batch(placeholders, run, config, args.latents, mesh) | dict(bad=[], notes={})

    def sync():
        write_graph(args.out, pending_tensors())
        raise Traced

    def to_mesh(engine, name, parameter, shards):
        tensor = placeholders.make(parameter)
        engine.mark(name, tensor)
        return tensor

    unread = ParameterState(None, None, None, None)
    train = patch.multiple(
        train_tpu, start=lambda run: started, Batches=lambda *_: dataset, Monitor=Recorder,
        open_models=lambda *_: open_models(placeholders, run, config),
        load_batches=lambda *_: [], data_workers=lambda run: 0)
    with (train, patch.object(train_tpu.resuming, "resume", lambda run, config: (run, None)),
          patch.object(train_tpu.checkpoints, "CheckpointWriter", lambda *_: Writer()),
          patch.multiple(sharding, initial_state=lambda *_: unread, read_shards=lambda *_: None),
          patch.multiple(xla, place_batches=place_batches, sync=sync, local_slices=lambda *_: []),
          patch.object(xla.Engine, "to_mesh", to_mesh)):
        try:
            train_tpu.train(run, config)
        except Traced:
            return


@torch.no_grad()
def trace_encoder(args, run, config):
    """Writes the graph of the VAE's encoder alone, for the batch of a step."""
    _, mesh = train_tpu.start(run)
    placeholders = Placeholders()
    vae = build_vae(placeholders, run, config)
    batch = to_device(place_batch(placeholders, run, config, False, mesh), "xla")
    latents = vae.encode(batch.x, batch.vae_noise)
    del batch
    write_graph(args.out, [latents])


@torch.no_grad()
def trace_decoder(args, run, config):
    """Writes the graph of the VAE's decoder alone, for one image on every chip."""
    train_tpu.start(run)
    placeholders = Placeholders()
    vae = build_vae(placeholders, run, config)
    os.environ["PJRT_DEVICE"] = "TPU"
    side = latent_side(config)
    x = placeholders.make(torch.empty(1, config.in_channels, side, side, device="meta"))
    write_graph(args.out, [vae.decode(x)])


PROGRAMS = dict(step=trace_step, encoder=trace_encoder, decoder=trace_decoder)


def libtpu_flags(kind):
    """The flags that torch_xla gives libtpu on a kind of TPU, such as "v5e"."""
    import torch_xla
    from torch_xla._internal import tpu
    with patch.object(tpu, "version", lambda: int(kind[1])):
        torch_xla._setup_libtpu_flags()
    return os.environ["LIBTPU_INIT_ARGS"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    p.add_argument("--devices", type=cli.positive, default=8, help="number of chips")
    p.add_argument("--kind", default="v5e", help="kind of TPU, for the flags of libtpu")
    p.add_argument("--program", choices=PROGRAMS, default="step",
                   help="encoder and decoder: those of the VAE alone")
    p.add_argument("--latents", action="store_true",
                   help="train on precomputed latents, without the VAE")
    p.add_argument("--layers", type=cli.positive,
                   help="layers of Gemma and of the DiT, instead of the preset's")
    p.add_argument("out", type=Path, metavar="FILE.pb", help="the file to write")
    p.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="flags of train_tpu.py")
    args = p.parse_args()

    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="2")      # for SPMD; the mesh has more
    flags = ["--dtype", "bf16", "--data", "none", "--out", "none", *args.flags]
    run = replace(parse_run(flags, __doc__, "tpu"), steps=1)
    config = model_config(run)
    if args.layers:
        costs.GEMMAS[config.base] = costs.GEMMAS[config.base] | dict(num_hidden_layers=args.layers)

    import torch_xla.runtime as xr
    with patch.object(xr, "global_runtime_device_count", lambda: args.devices):
        PROGRAMS[args.program](args, run, config)
    args.out.with_suffix(".pb.flags").write_text(libtpu_flags(args.kind))
    sys.stdout.flush()
    os._exit(0)                             # torch_xla's threads would delay the exit


if __name__ == "__main__":
    cli.run(main, "")

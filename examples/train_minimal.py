"""Train a small fusedit in plain PyTorch: the whole recipe in one short file and one process.

    python examples/train_minimal.py                                coloured shapes, drawn here
    python examples/train_minimal.py --data 'shards/*.tar'          any captioned images

Trains the DiT of the preset "demo" from scratch, in float32. train_gpu.py has the same losses
on the same shards and settings. It adds several GPUs, bf16, compilation, latents and checkpoints.
"""
import argparse
import copy
import math
import random
import time
from pathlib import Path

from fusedit_lib import threads
threads.limit_spinning()                    # before torch is imported

import torch

import fusedit
from fusedit_lib import backend, cli, pretrained, sampling, seeds
from fusedit_lib.data.batches import Batches, load_batches, to_device
from fusedit_lib.shapes import render, scenes
from fusedit_lib.train.config import RunConfig, data_workers, lasting_name

PROMPTS = ["a red circle", "a green heart", "a small blue square", "a yellow star on black",
           "a white cross on red", "a purple triangle", "an orange square", "a small pink heart"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
parser.add_argument("--data", help="shards to train on (default: draw scenes of one shape)")
parser.add_argument("--base", default="demo/gemma", help="folder or hub id of the frozen Gemma")
parser.add_argument("--steps", type=cli.positive, default=3200, help="number of training steps")
parser.add_argument("--batch", type=cli.positive, default=8, help="number of images in a step")
parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
parser.add_argument("--seed", type=cli.seed, default=42,
                    help="seed of weights, data and noise; -1: draw one")
parser.add_argument("--log-every", type=cli.positive, default=20, help="steps between log lines")
parser.add_argument("--out", type=Path, default="runs/minimal", help="folder for the new model")


def scene_batches(args, config, tokenizer):
    """Yields batches of captioned scenes of a single shape, each drawn when it is needed."""
    rng = random.Random(args.seed)
    for _ in range(args.steps):
        batch = [scenes.random_scene(rng, "single") for _ in range(args.batch)]
        images = [render.render(scene, scenes.layout(scene, rng)) for scene in batch]
        captions = [scenes.caption(scenes.omit_defaults(scene, rng), rng) for scene in batch]
        # Guidance needs the velocity without a caption, so one in ten is left out.
        captions = [caption if rng.random() > 0.1 else "" for caption in captions]

        data = bytearray(b"".join(image.tobytes() for image in images))
        pixels = torch.frombuffer(data, dtype=torch.uint8)
        pixels = pixels.view(-1, 32, 32, 3).movedim(3, 1)           # [B,3,H,W]
        ids, mask = fusedit.tokenize(tokenizer, captions, config)   # [B,T] each
        normal = torch.randn(args.batch)                            # [B], for the noise levels
        noise = torch.randn(args.batch, 1, 3, 32, 32)
        yield dict(pixels=pixels, ids=ids, mask=mask, normal=normal, noise=noise)


def learning_rate(args, step):
    """A linear warmup in the first tenth of the steps, then half a cosine down to zero."""
    warmup = max(1, args.steps // 10)
    rising = step / warmup
    progress = max(0, step - 1 - warmup) / max(1, args.steps - warmup)
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return args.lr * min(rising, falling)


def train(args, model, batches, device):
    """Trains model.dit. Returns a DiT with the EMA (exponential moving average) of its weights."""
    weights = list(model.dit.parameters())
    ema = copy.deepcopy(model.dit).requires_grad_(False)
    adam = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4)
    losses = []
    start = time.time()
    for step, loaded in enumerate(batches, 1):
        adam.param_groups[0]["lr"] = learning_rate(args, step)
        batch = to_device(loaded, device, cut_text=True)            # x: pixels in [-1,1]
        text = batch.ids, batch.mask
        sigma = fusedit.logit_normal_sigma(batch.normal, model.config.shift)            # [B]
        loss = fusedit.flow_loss(model, batch.x, text, sigma, batch.eps).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()

        decay = min(0.995, step / (9 + step))           # lower at first, to forget the start
        for ema_weight, weight in zip(ema.parameters(), weights, strict=True):
            ema_weight.lerp_(weight.detach(), 1 - decay)

        losses.append(loss.detach())
        if step % args.log_every == 0 or step == args.steps:
            mean = torch.stack(losses[-args.log_every:]).mean()
            rate = args.batch * step / (time.time() - start)
            print(f"step {step}/{args.steps}  loss {mean:.6f}  {rate:.0f} images/s", flush=True)
    return ema


def main():
    args = parser.parse_args()
    if args.out.exists():
        raise fusedit.FuseDiTError(f"{args.out} exists: choose another --out, or remove it")
    device = backend.pick_device("auto")
    backend.configure(device, torch.float32)
    torch.set_float32_matmul_precision("high")
    args.seed = seeds.settle(args.seed)
    torch.manual_seed(seeds.torch_seed(args.seed))
    config = fusedit.preset("demo", base=lasting_name(args.base))
    model = pretrained.build_model(config, device)
    batches = scene_batches(args, config, model.tokenizer)
    if args.data:                           # each sample has its own noise, as in train_gpu.py
        run = RunConfig(data=[args.data], batch=args.batch, seed=args.seed)
        dataset = Batches(run, config, model.tokenizer, args.batch)
        batches = load_batches(dataset, range(args.steps), data_workers(run), device)
    model.dit = train(args, model, batches, device)

    pretrained.save_model(args.out, config, model.dit.state_dict())
    images = sampling.generate(model, PROMPTS)
    sampling.image_grid(images, columns=4).save(args.out / "samples.png")
    print(f"wrote {args.out}/samples.png; more: python sample.py --model {args.out} --prompt ...")


if __name__ == "__main__":
    cli.run(main, "--batch")

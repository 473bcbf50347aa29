"""Trains and scores one design point of ablations.py.

All points see the same images and captions in the same order, with the same noise, for the same
seed. The images are rendered once and stay in memory.
"""
import math
import os
import statistics
import time
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from ablation_points import config_of
from common import Adam, machine, wait
from tqdm import tqdm

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.data import packing
from fusedit_lib.data.batches import to_device
from fusedit_lib.data.shapes import captioned_scene
from fusedit_lib.evaluation import benchmarks, judging
from fusedit_lib.evaluation.drawing import image_seed
from fusedit_lib.pretrained import build_model, save_model
from fusedit_lib.sampling import batches_of, generate
from fusedit_lib.seeds import torch_seed
from fusedit_lib.train.config import RunConfig
from fusedit_lib.train.schedule import ema_decay, learning_rate

DATA_SEED = 0                               # of the scenes, which are the same for all seeds
EVALUATION_SEED = 0                         # of prompts and noise, as in `evaluate.py shapes`
CAPTION_DROP = 0.1                          # share of captions left out, as guidance requires
DRAWN_AT_ONCE = 120                         # images; 600 are five whole batches
CHUNK = 500                                 # scenes that a process renders at a time
WARM = 3                                    # steps before a CUDA graph is recorded


# ---------------------------------------------------------------------------- data
class Scenes(NamedTuple):
    """Captioned scenes, on the device that trains on them."""
    pixels: torch.Tensor                    # uint8 [N,3,H,W]
    captions: torch.Tensor                  # [N,2] the rows of their captions in ids and mask
    ids: torch.Tensor                       # [C,T] distinct captions; the first one is empty
    mask: torch.Tensor                      # [C,T] True: a real token


class Order(NamedTuple):
    """The images of a run, in the order in which they are trained on."""
    scenes: torch.Tensor                    # [images] rows of Scenes.pixels
    captions: torch.Tensor                  # [images] rows of Scenes.ids


def render_chunk(image_size, numbers):
    """The pixels [n,H,W,3] and the captions, two per scene, of a range of scene numbers.

    It runs in a process that was forked, where torch's threads would not work, so it uses NumPy.
    """
    found = [captioned_scene(DATA_SEED, image_size, i) for i in numbers]
    pixels = np.stack([np.asarray(scene.image) for scene in found])
    return pixels, [scene.captions for scene in found]


def render_scenes(n, image_size):
    """The pixels [n,3,H,W] and the captions of the scenes of `prepare_data.py shapes -n N`."""
    chunks = batches_of(range(n), CHUNK)
    rendered = {}                           # chunk -> its pixels and captions
    render = partial(render_chunk, image_size)
    progress = tqdm(total=len(chunks), desc="rendering", disable=None)
    with progress, packing.in_parallel(render, chunks, os.cpu_count()) as events:
        for event in events:
            if event is not None:
                chunk, result = event
                rendered[chunk] = result
                progress.update()
    pixels = np.concatenate([rendered[chunk][0] for chunk in chunks])
    captions = [pair for chunk in chunks for pair in rendered[chunk][1]]
    return torch.from_numpy(pixels).movedim(3, 1).contiguous(), captions


def make_scenes(n, model, device):
    """Scenes: n of them, on a device. model: a FuseDiT, for its config and tokenizer."""
    pixels, captions = render_scenes(n, model.config.image_size)
    distinct = {"": 0}                      # caption -> its row
    for pair in captions:
        for caption in pair:
            distinct.setdefault(caption, len(distinct))
    rows = torch.tensor([[distinct[caption] for caption in pair] for pair in captions])
    ids, mask = fusedit.tokenize(model.tokenizer, list(distinct), model.config,
                                 pad_to=model.config.max_text_tokens)
    return Scenes(pixels.to(device), rows, ids.to(device), mask.to(device))


def draw_order(scenes, images, seed):
    """The Order of a run: passes over all scenes, each shuffled, with one caption of the two.

    It depends only on the arguments, so it is the same for all points.
    """
    rng = torch.Generator().manual_seed(torch_seed(seed))
    n = len(scenes.pixels)
    passes = [torch.randperm(n, generator=rng) for _ in range(math.ceil(images / n))]
    rows = torch.cat(passes)[:images]
    which = torch.randint(2, (images,), generator=rng)
    is_dropped = torch.rand(images, generator=rng) < CAPTION_DROP
    captions = scenes.captions[rows, which].masked_fill(is_dropped, 0)
    device = scenes.pixels.device
    return Order(rows.to(device), captions.to(device))


def run_batches(scenes, images, batch, seed):
    """Yield the TrainingBatches of a run, including their noise.

    The noise is drawn on the device, one batch after the other, from the seed alone.
    """
    order = draw_order(scenes, images, seed)
    device = scenes.pixels.device
    rng = torch.Generator(device).manual_seed(torch_seed(seed))
    shape = scenes.pixels.shape[1:]
    for start in range(0, images - batch + 1, batch):
        rows = order.scenes[start:start + batch]
        captions = order.captions[start:start + batch]
        loaded = dict(pixels=scenes.pixels[rows], ids=scenes.ids[captions],
                      mask=scenes.mask[captions],
                      normal=torch.randn(batch, generator=rng, device=device),
                      noise=torch.randn(batch, 1, *shape, generator=rng, device=device))
        # On a GPU all batches have one shape, which a CUDA graph requires.
        yield to_device(loaded, device, cut_text=device.type == "cpu")


# ---------------------------------------------------------------------------- the training step
class TrainingStep:
    """Updates the weights of a model's DiT with one batch."""

    def __init__(self, model, run, device):
        on_gpu = device.type == "cuda"
        lr = run.lr
        if on_gpu:                          # a CUDA graph reads the rate from memory
            lr = torch.tensor(run.lr, device=device)
        self.model = model
        self.adam = Adam(model.dit.parameters(), lr, betas=(run.beta1, run.beta2),
                         weight_decay=run.weight_decay, capturable=on_gpu)

    def __call__(self, batch):
        """The loss of a TrainingBatch, on the device; the weights are then updated."""
        sigma = fusedit.logit_normal_sigma(batch.normal, self.model.config.shift)       # [B]
        text = batch.ids, batch.mask
        loss = fusedit.flow_loss(self.model, batch.x, text, sigma, batch.eps).mean()
        loss.backward()
        self.adam.step()
        return loss.detach()

    def set_learning_rate(self, lr):
        group = self.adam.adam.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class GraphedStep:
    """A TrainingStep as one CUDA graph, which a GPU runs without waiting for Python.

    The first WARM steps run as usual, on a stream of their own; then the graph is recorded.
    (Written without a GPU at hand, and not run on one yet.)
    """
    def __init__(self, step):
        self.step = step
        self.set_learning_rate = step.set_learning_rate
        self.adam = step.adam
        self.stream = torch.cuda.Stream()
        self.graph = None
        self.static = None                  # the batch and the loss that the graph reads and writes
        self.loss = None
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls <= WARM:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.record(batch)
        for static, new in zip(self.static, batch, strict=True):
            if static is not None:
                static.copy_(new)
        self.graph.replay()
        return self.loss.clone()

    def record(self, batch):
        """Record the graph of a step on a copy of the batch, without running it.

        Raises FuseDiTError if that is not possible. The usual steps could not go on: gradients and
        torch's allocator are then left as they were in the middle of the recording.
        """
        self.static = [None if tensor is None else tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.step(type(batch)(*self.static))
        except RuntimeError as e:
            reason = backend.first_line(e.__context__ or e)    # e itself may only be the aftermath
            raise FuseDiTError(f"the training step cannot be recorded as a CUDA graph ({reason}): "
                               "give --no-cuda-graph") from e
        self.graph = graph


# ---------------------------------------------------------------------------- a run
class Settings(NamedTuple):
    """The settings that all runs of an OUT share."""
    images: int                             # trained on by each run
    batch: int
    distinct: int                           # scenes that the images are taken from
    prompts: int                            # of the evaluation
    dtype: str                              # "bf16" or "float32"
    reader_steps: int                       # of the readers that were trained for the experiment


class Execution(NamedTuple):
    """The ways in which steps are made faster. They change results by rounding only."""
    compile: bool                           # compile the blocks of both towers
    cuda_graph: bool                        # record the training step as a CUDA graph


class Trained(NamedTuple):
    """The result of training."""
    loss: float                             # mean of the last tenth of the steps
    images_per_s: float                     # median of ten parts of the run
    seconds: float                          # all steps, and compiling


def run_config(settings, images, lr, seed):
    """The RunConfig with the recipe of the demo (docs/demo.md)."""
    steps = images // settings.batch
    return RunConfig(steps=steps, batch=settings.batch, lr=lr, seed=seed,
                     warmup_steps=min(300, steps // 10), lr_schedule="cosine", beta2=0.99,
                     ema_every=5)


def new_model(point, base, dtype, seed, device):
    """The FuseDiT of a Point with fresh weights. base: the folder of its reader."""
    torch.manual_seed(torch_seed(seed))
    dtype = backend.torch_dtype(dtype)
    model = build_model(config_of(point, base), device, dtype)
    model.dit.to(dtype)
    return model


def train(model, scenes, settings, images, lr, seed, execution):
    """Train a model, which then has its EMA weights. Returns Trained.

    execution: an Execution. Where no progress bar is shown, a line per tenth of the run is printed.
    """
    device = scenes.pixels.device
    run = run_config(settings, images, lr, seed)
    if execution.compile:
        backend.compile_model(model, None)
    step_of = TrainingStep(model, run, device)
    if execution.cuda_graph:
        step_of = GraphedStep(step_of)
    adam = step_of.adam
    ema = [weight.detach().clone() for weight in adam.high]

    losses = []
    part = max(1, run.steps // 10)
    marks = []                              # the times at the beginning of each part
    begin = time.perf_counter()
    batches = run_batches(scenes, run.steps * run.batch, run.batch, seed)
    progress = tqdm(batches, total=run.steps, unit="step", disable=None)
    for step, batch in enumerate(progress):
        if step % part == 0:
            wait(device)
            marks.append(time.perf_counter())
            if progress.disable and step > 0:
                print(f"  step {step} of {run.steps}: loss {losses[-1]:.4f}, "
                      f"{marks[-1] - begin:,.0f} s", flush=True)
        step_of.set_learning_rate(learning_rate(run, step))
        losses.append(step_of(batch))
        decay = ema_decay(run, step + 1)
        if decay < 1:
            with torch.no_grad():
                torch._foreach_lerp_(ema, adam.high, 1 - decay)
    wait(device)
    marks.append(time.perf_counter())

    with torch.no_grad():
        torch._foreach_copy_(adam.low, ema)
    whole_parts = pairwise(marks[:run.steps // part + 1])
    seconds_of_part = statistics.median(end - start for start, end in whole_parts)
    loss = float(torch.stack(losses[-part:]).mean())
    return Trained(loss, part * run.batch / seconds_of_part, marks[-1] - begin)


def score(model, settings):
    """The result of the shapes benchmark, as `evaluate.py shapes` would compute it."""
    benchmark = benchmarks.shapes(settings.prompts, EVALUATION_SEED)
    images = []
    batches = batches_of(range(settings.prompts), DRAWN_AT_ONCE)
    for numbers in tqdm(batches, desc="drawing", disable=None):
        images += generate(model, [benchmark.prompts[k] for k in numbers],
                           [image_seed(EVALUATION_SEED, k, 0) for k in numbers])
    return judging.judge_shapes(images, settings.prompts, EVALUATION_SEED)


def run_point(point, base, scenes, settings, lr, seed, execution, folder=None):
    """Train and score a Point. Returns the measured part of its row in runs.jsonl.

    folder: for the model with its EMA weights; None: it is not kept.
    """
    device = scenes.pixels.device
    model = new_model(point, base, settings.dtype, seed, device)
    trained = train(model, scenes, settings, settings.images, lr, seed, execution)
    model.eval()
    rows = score(model, settings)
    if folder is not None:
        save_model(folder, model.config, model.dit.state_dict())
    if execution.compile:
        torch.compiler.reset()              # the code of this model's graphs is not used again
    parameters = sum(p.numel() for p in model.dit.parameters())
    return dict(parameters=parameters, **trained._asdict(), device=machine(device),
                torch=torch.__version__, rows=rows)

"""Makes training batches from WebDataset shards, in an order that depends only on the seed.

Each position of the run (see order.py) is computed directly, without replaying earlier ones:

    position -> data set, epoch, offset in it -> shard, sample -> pixels, caption, noise

A position has the same pixels, caption and noise on every rank and in every worker. order.py
implements the first two arrows and shards.py reads the samples; this file makes the batches in
worker processes.
"""
import atexit
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import threading
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.data.images import Notes, read_square
from fusedit_lib.data.layout import REMEDIES, LayoutError, find_captions, find_image, pick_caption
from fusedit_lib.data.order import CYCLE, Mixture, streams_per_rank
from fusedit_lib.data.shards import ShardReader, can_read_latents, expand_shards, is_url
from fusedit_lib.pretrained import ClipTokenizer
from fusedit_lib.vae import latent_side

DOWNLOADS = 8                               # remote shards that a process copies at the same time
SAMPLE_TIMEOUT = 1800                       # seconds without progress before a worker is killed
MAX_ATTEMPTS = 100                          # samples tried for one position before giving up

download_slots = threading.BoundedSemaphore(DOWNLOADS)


class Sample(NamedTuple):
    """One position of the run."""
    pixels: torch.Tensor                    # uint8 [3,H,W]; or latents, see Batches
    caption: str
    normal: torch.Tensor                    # [] standard normal number for the noise level
    noise: torch.Tensor                     # [1,C,h,w]; with a VAE [2,C,h,w]


def decode(files, run, size, rng):
    """Decode a sample's files to (pixels uint8 [3,size,size] or latents, caption).

    Raises ValueError or one of Pillow's exceptions if the sample cannot be used.
    """
    use_original = rng.random() < run.original_caption_rate    # drawn for every sample
    image = find_image(files, run.image_key)
    texts = list(find_captions(files, run.caption_key).values())
    text = texts[-1] if use_original else texts[0]         # the original caption is the last
    caption = pick_caption(text, run.caption_pick, rng)
    if "latents" in files:
        pixels = files["latents"]
    else:
        pixels = read_square(files[image], size, run.crop, rng, run.resize)
    if pixels is None:
        raise ValueError("damaged image")

    if rng.random() < run.caption_drop:
        caption = ""
    return pixels, caption


# ------------------------------------------------------------------------------ micro-batches

class Batches(Dataset):
    """The micro-batches of one rank. self[m] is a dict for any m >= 0; no state is kept.

    Micro-batch 0 is the first one after the run was started or resumed.

        pixels     uint8 [B,3,H,W]; or latents [B,2*C,h,w]: a VAE's mean and log variance
        ids, mask  [B,T] tokens of the captions, padded to self.pad_to
        captions   the text of the captions
        text_tokens  the number of tokens of all captions, without padding
        normal     [B] standard normal numbers for the noise levels
        noise      [B,1,C,h,w]; with a VAE [B,2,C,h,w]: the second is for sampling its posterior
        clip       [B,77] CLIP tokens, if the model has CLIP modulation
        bad        one line for each sample that could not be read and was replaced by another
        notes      the kinds of flaws of images that were read, one for each flaw

    If an error occurs, self[m] is {"error": message} instead, since an exception raised in a worker
    would arrive with the worker's traceback.
    """

    def __init__(self, run, config, tokenizer, micro_batch, accumulation=1, rank=0, world=1,
                 start=0):
        """micro_batch: samples per micro-batch; accumulation: micro-batches per training step.

        Both numbers are per rank. start: the position of the first sample, which is the number of
        samples that the run has had so far. Raises FuseDiTError if --data is missing or matches
        nothing, or if --data-weights does not match it.
        """
        self.run = run
        self.config = config
        self.side = latent_side(config)     # height and width of x
        self.tokenizer = tokenizer
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank = rank
        self.world = world
        self.start = start

        if not run.data:
            raise FuseDiTError("--data is missing: give the shards to train on, such as "
                               "--data 'shards/*.tar'")
        sets = [expand_shards(pattern) for pattern in run.data]
        if run.data_weights and len(run.data_weights) != len(sets):
            raise FuseDiTError(f"--data-weights has {len(run.data_weights)} numbers, but --data "
                               f"has {len(sets)} data sets")
        self.shards = sum(sets, [])
        if not run.data_weights:            # one data set: an epoch contains every sample once
            sets = [self.shards]
        self.digest = digest(self.shards)
        self.order = mixture(run, sets)

        # The number of shards that are read at a time, by this rank and by all ranks of this host.
        streams = streams_per_rank(run.streams, world)
        of_host = min(run.streams, streams * backend.local_world())
        per_stream = shards_per_stream(run) * len(sets)
        self.latents = can_read_latents(self.shards, run, config, rank)
        self.reader = ShardReader(self.shards, streams * per_stream, run.cache, self.latents,
                                  of_host * per_stream, restart_alarm)
        self.is_remote = any(is_url(shard.path) for shard in self.shards)
        self.downloads = {}                 # shards passed to download(), oldest first
        self.clip_tokenizer = None
        if config.clip:
            self.clip_tokenizer = ClipTokenizer(config.clip)
        # All batches have the same length, as XLA requires; to_device cuts the text for other
        # devices.
        _, self.pad_to = fusedit.token_ids(tokenizer, [""], config)

    def __len__(self):
        """Number of samples in one epoch of all shards."""
        return sum(shard.samples for shard in self.shards)

    def check_copies(self):
        """Say what has to be copied before the first step, if shards are remote.

        Raises FuseDiTError if the cache has too little room.
        """
        if not self.is_remote:
            return
        self.reader.check_space()
        if self.rank > 0:
            return
        paths = set()
        for position in range(self.start, self.start + self.run.batch):
            if (position - self.start) % self.world < backend.local_world():
                shard, _ = self.order[position]
                paths.add(self.shards[shard].path)
        cache = self.reader.cache
        count = sum(is_url(path) and not cache.path(path).exists() for path in paths)
        if count:
            hint = ""
            if count > DOWNLOADS and not self.start:
                hint = " (fewer with fewer --streams)"
            print(f"shards to copy to {cache.folder} before the first step: {count}{hint}",
                  file=sys.stderr)

    def download(self, shard):
        """Copy a remote shard. Errors are ignored here: the reader will try again."""
        with contextlib.suppress(Exception), download_slots:
            self.reader.copy(shard)

    def prefetch(self, positions):
        """Start copying remote shards in the background.

        They are those that these positions need, and those that their streams will need once half
        of a shard has been read.
        """
        if not self.is_remote:
            return
        half = len(self) * shards_per_stream(self.run) // (2 * len(self.shards))
        ahead = max(1, half) * self.run.streams
        for position in (*positions, *(position + ahead for position in positions)):
            shard, _ = self.order[position]
            if shard in self.downloads or not is_url(self.shards[shard].path):
                continue
            self.downloads[shard] = None
            while len(self.downloads) > 4 * self.reader.keep:
                oldest = next(iter(self.downloads))
                del self.downloads[oldest]
            threading.Thread(target=self.download, args=[shard], daemon=True).start()

    def draw_noise(self, rng):
        """Draw (normal [], noise [1,C,h,w] or, with a VAE, [2,C,h,w]) for one sample."""
        count = 2 if self.config.vae else 1
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        normal = torch.randn((), generator=generator)
        noise = torch.randn(count, self.config.in_channels, self.side, self.side,
                            generator=generator)
        return normal, noise

    def sample(self, position, bad):
        """The Sample at a position. If it cannot be read, a later one of its stream replaces it.

        bad: list to which a line about the unreadable sample is appended. Raises FuseDiTError
        after MAX_ATTEMPTS.
        """
        rng = random.Random(f"{self.run.seed} {position}")
        normal, noise = self.draw_noise(rng)
        for attempt in range(MAX_ATTEMPTS):
            shard, i = self.order[position]
            try:
                files = self.reader.read(shard, i)
                pixels, caption = decode(files, self.run, self.config.image_size, rng)
                return Sample(pixels, caption, normal, noise)
            except (MemoryError, FuseDiTError):
                raise
            except Exception as e:          # Pillow raises many kinds of errors on broken files
                reason = str(e).split(" <")[0] or type(e).__name__
                remedy = ""
                if isinstance(e, LayoutError):
                    remedy = f". {REMEDIES[e.kind]}"
            problem = f"sample {i} of {self.shards[shard].path}: {reason}"
            if attempt == 0:                # report each position only once
                bad.append(problem)
            # 1 to CYCLE samples later in the same stream, usually of a shard that is open. Shorter
            # jumps would not leave a lost shard in MAX_ATTEMPTS.
            position += self.run.streams * (1 + rng.randrange(CYCLE))
        raise FuseDiTError(f"{MAX_ATTEMPTS} samples in a row cannot be read; the last is {problem}"
                           f"{remedy}")

    def positions(self, m):
        """The positions of the samples of micro-batch m, as a range.

        The ranks take positions in turn. If their number divides that of the streams, a rank
        therefore reads whole streams.
        """
        step, i = divmod(m, self.accumulation)
        first = self.start + step * self.run.batch + i * self.world * self.micro_batch
        return range(first, first + self.world * self.micro_batch)[self.rank::self.world]

    def make_batch(self, m):
        """Micro-batch m, without a time limit."""
        positions = self.positions(m)
        bad = []
        samples = []
        notes = []
        try:
            self.prefetch(positions)
            with Notes() as image_notes:
                for position in positions:
                    restart_alarm()
                    samples.append(self.sample(position, bad))
                    notes += image_notes.take()
        except FuseDiTError as e:
            return {"error": str(e)}

        captions = tuple(sample.caption for sample in samples)
        ids, mask = fusedit.tokenize(self.tokenizer, captions, self.config, self.pad_to)
        # Images are channels last in memory; stacking them in that layout copies each in one piece.
        pixels = torch.stack([sample.pixels.movedim(0, -1) for sample in samples])
        batch = dict(
            pixels=pixels.movedim(-1, 1),
            ids=ids,
            mask=mask,
            text_tokens=int(mask.sum()),    # without padding
            captions=captions,
            bad=bad,
            notes=notes,
            normal=torch.stack([sample.normal for sample in samples]),
            noise=torch.stack([sample.noise for sample in samples]),
        )
        if self.clip_tokenizer:
            prompts = fusedit.add_instruction(captions, self.config.instruction)
            batch["clip"] = self.clip_tokenizer(prompts)
        return batch

    def __getitem__(self, m):
        if get_worker_info() is None:
            return self.make_batch(m)
        try:
            return self.make_batch(m)
        finally:
            signal.alarm(0)


def restart_alarm():
    """Give a worker SAMPLE_TIMEOUT more seconds, after which it is killed, which ends the run.

    Called for each sample and whenever a copy has grown. Copies that other threads make in the
    background may go on after the batch, when there is no alarm.
    """
    if get_worker_info() and threading.current_thread() is threading.main_thread():
        signal.alarm(SAMPLE_TIMEOUT)


def shards_per_stream(run):
    """The number of shards whose samples are shuffled together in each stream."""
    return math.ceil(run.mix_shards / run.streams)


def mixture(run, sets):
    """The order of the run's samples, as a Mixture of its data sets.

    Where the run has changed --data-weights, each data set continues where it was. It cannot if the
    number of data sets has changed; then the order is as if the new weights had always held.
    """
    pool = shards_per_stream(run)
    order = None
    for change in run.changes:
        if "data_weights" not in change:
            continue
        old, new = change["data_weights"]
        if not len(old) == len(new) == len(sets):
            order = None
            continue
        if order is None:
            order = Mixture(sets, old, run.seed, pool, run.streams)
        taken = order.taken_before(change["seen"])
        order = Mixture(sets, new, run.seed, pool, run.streams, change["seen"], taken)
    if order is None:
        order = Mixture(sets, run.data_weights or [1], run.seed, pool, run.streams)
    return order


def digest(shards):
    """A hash of the shards' names and sample counts, which determine the order of samples."""
    counts = [(os.path.basename(shard.path), shard.samples) for shard in shards]
    return hashlib.sha1(json.dumps(counts).encode()).hexdigest()


# ------------------------------------------------------------------------------ worker processes

def start_worker(_):
    """Set up a worker. It ignores signals: the training process, which handles them, needs
    batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class DoneEvent:
    """Replaces the event with which a DataLoader tells its workers to exit, and kills them instead.

    The DataLoader's own event contains a lock. If a worker was killed while holding it, setting the
    event blocks forever (such hangs are reported in pytorch/pytorch#21554 and #39570). Killing the
    workers is safe because they hold nothing that has to be saved.
    """

    def __init__(self, workers):
        self.workers = workers
        self.event = threading.Event()

    def is_set(self):
        return self.event.is_set()

    def set(self):
        self.event.set()
        for worker in self.workers:
            worker.kill()


def is_worker_death(error):
    """True if an error raised by the DataLoader means that a worker died."""
    if isinstance(error, RuntimeError):
        names = "DataLoader worker", "Pin memory thread"
        return any(name in str(error) for name in names)
    return True                             # OSError, EOFError: a pipe broke mid-batch


def stream_batches(batches, which, workers, device):
    """The generator behind load_batches. It first yields None, once the workers have started."""
    prefetch = None
    if workers:
        prefetch = 4
    pin = device is not None and device.type == "cuda"
    iterator = iter(DataLoader(batches, batch_size=None, sampler=which, num_workers=workers,
                               pin_memory=pin, worker_init_fn=start_worker,
                               prefetch_factor=prefetch))
    # PyTorch's SIGCHLD handler raises an error wherever the main thread happens to be. Without the
    # handler, next(iterator) detects a worker's death; it checks every 5 seconds.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if workers:
        iterator._workers_done_event = DoneEvent(iterator._workers)
    yield None

    try:
        for batch in iterator:
            if "error" in batch:
                raise FuseDiTError(batch["error"])
            yield batch
    except (RuntimeError, OSError, EOFError) as e:
        if not workers or not is_worker_death(e):
            raise
        reason = backend.first_line(e)
        raise FuseDiTError(f"a data process died ({reason}). If it ran out of memory, lower "
                           "--workers. A data process is also killed if a sample or a copy "
                           f"makes no progress for {SAMPLE_TIMEOUT / 60:g} minutes") from e
    finally:
        iterator = None                     # its destructor stops the workers


def load_batches(batches, which, workers, device=None):
    """A generator of the micro-batches `which` (a range), prepared ahead of time by processes.

    The processes start immediately. Call this before creating the optimizer, since each worker
    keeps a copy of all of this process's memory. workers: number of processes, 0 for none; device:
    where the batches will be used. Raises FuseDiTError if data cannot be read or a process dies.
    """
    batches.check_copies()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"         # its threads do not survive a fork
    stream = stream_batches(batches, which, workers, device)
    next(stream)
    atexit.register(stream.close)           # otherwise Python would wait forever for the workers
    return stream


# ------------------------------------------------------------------------------ on the device

class TrainingBatch(NamedTuple):
    """A micro-batch on the device that trains on it."""
    x: torch.Tensor                         # pixels [B,3,H,W] in [-1,1]; or latents [B,2*C,h,w]
    ids: torch.Tensor                       # [B,T]
    mask: torch.Tensor                      # [B,T] True: a real token
    clip_ids: torch.Tensor | None           # [B,77] CLIP tokens, with CLIP modulation
    normal: torch.Tensor                    # [B] for the noise levels
    eps: torch.Tensor                       # [B,C,h,w] noise of the flow
    vae_noise: torch.Tensor | None          # [B,C,h,w] with a VAE: for sampling its posterior


def cut_text_length(mask, device):
    """The length to which a batch's text is cut: that of its longest caption, rounded up.

    It is rounded up to quarters of the full length, since a compiled model is recompiled for some
    new lengths. On a GPU, it is rounded up to whole tiles instead (backend.round_up_to_tile).
    mask: [B,T] before the cut, on the CPU, which avoids waiting for the device.
    """
    full = mask.shape[1]
    longest = int(mask.sum(1).max())
    if device.type == "cuda":
        return backend.round_up_to_tile(longest, full, device)
    quarter = -(-full // 32) * 8            # attention kernels prefer multiples of 8
    return min(full, -(-longest // quarter) * quarter)


def to_device(batch, device, cut_text=False):
    """Move a batch (a dict of CPU tensors) to a device. Returns a TrainingBatch.

    cut_text: cut the text to cut_text_length. This is done after the copy because a slice is not
    contiguous, and copying such a tensor makes the CPU wait.
    """
    moved = {}
    for name in ("pixels", "ids", "mask", "clip", "normal", "noise"):
        if name in batch:
            moved[name] = batch[name].to(device, non_blocking=True)
    ids = moved["ids"]
    mask = moved["mask"]
    if cut_text:
        length = cut_text_length(batch["mask"], device)
        ids = ids[:, :length]
        mask = mask[:, :length]

    x = moved["pixels"].float()
    if moved["pixels"].dtype == torch.uint8:
        x = x.div_(127.5).sub_(1)
    noise = moved["noise"]
    eps = noise[:, 0]
    vae_noise = None
    if noise.shape[1] == 2:
        vae_noise = noise[:, 1]
    return TrainingBatch(x.contiguous(), ids, mask, moved.get("clip"), moved["normal"], eps,
                         vae_noise)

"""WebDataset shards to training batches, in an order that is a function of the seed alone.

Every position of the run is found directly, without replaying what came before it:

    position -> data set, epoch, offset in it -> shard, sample -> pixels, caption, noise

Whichever rank or worker asks for a position gets the same pixels, caption and noise. The first two
arrows are order.py, the reading is shards.py; this file makes the batches, in worker processes.
"""
import atexit
import contextlib
import hashlib
import json
import os
import random
import signal
import threading
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.data.images import read_square
from fusedit_lib.data.order import CYCLE, Mixture
from fusedit_lib.data.shards import ShardReader, can_read_latents, expand_shards, is_url
from fusedit_lib.pretrained import ClipTokenizer

DOWNLOAD_AHEAD = 20_000                     # positions by which copying of remote shards is ahead
BATCH_TIMEOUT = 1800                        # seconds for a batch, after which its worker is killed
MAX_ATTEMPTS = 100                          # samples tried for one position before giving up


class Sample(NamedTuple):
    """One position of the run."""
    pixels: torch.Tensor                    # uint8 [3,H,W]; or latents, see Batches
    caption: str
    normal: torch.Tensor                    # [] standard normal number, for the noise level
    noise: torch.Tensor                     # [1,C,h,w]; with a VAE [2,C,h,w]


def decode(files, run, size, rng):
    """(pixels uint8 [3,size,size] or latents, caption) of a sample's files.

    Raises ValueError, or whatever Pillow does, if the sample cannot be used.
    """
    image = None
    for name in files:
        if name.startswith("image."):
            image = name
            break
    kinds = ["synthetic_caption.txt", "original_caption.txt"]
    if rng.random() < run.original_caption_rate:
        kinds.reverse()
    available = [kind for kind in kinds if kind in files]

    if image is None:
        raise ValueError("no image")
    if not available:
        raise ValueError("no caption")
    caption = files[available[0]].decode("utf-8").strip()
    if "latents" in files:
        pixels = files["latents"]
    else:
        pixels = read_square(files[image], size, run.crop, rng)
    if pixels is None:
        raise ValueError("damaged image")

    if rng.random() < run.caption_drop:
        caption = ""
    return pixels, caption


# ------------------------------------------------------------------------------ micro-batches

class Batches(Dataset):
    """The micro-batches of one rank: self[m] is a dict, for any m >= 0, and no state is kept.

        pixels     uint8 [B,3,H,W]; or latents [B,2*C,h,w]: a VAE's mean and log variance
        ids, mask  [B,T] tokens of the captions, padded to self.pad_to
        captions   the captions themselves
        normal     [B] standard normal numbers, for the noise levels
        noise      [B,1,C,h,w]; with a VAE [B,2,C,h,w]: the second is for sampling its posterior
        clip       [B,77] CLIP's tokens, if the model has CLIP modulation
        bad        a line for each sample that could not be read, and was replaced by another

    Or {"error": message}: an exception that a worker raises would arrive as a traceback.
    """

    def __init__(self, run, config, tokenizer, micro_batch, accumulation=1, rank=0, world=1):
        """micro_batch: of this rank; accumulation: micro-batches of a rank in a training step.

        Raises FuseDiTError if --data or --data-weights is missing or wrong.
        """
        self.run = run
        self.config = config
        self.tokenizer = tokenizer
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank = rank
        self.world = world

        if not run.data:
            raise FuseDiTError("--data is missing: say what to train on, --data 'shards/*.tar'")
        sets = [expand_shards(pattern) for pattern in run.data]
        if run.data_weights and len(run.data_weights) != len(sets):
            raise FuseDiTError(f"--data-weights has {len(run.data_weights)} numbers for the "
                               f"{len(sets)} data sets of --data")
        self.shards = sum(sets, [])
        weights = run.data_weights
        if not weights:                     # one data set: an epoch has each sample of all once
            sets = [self.shards]
            weights = [1]
        self.digest = digest(self.shards)
        self.order = Mixture(sets, weights, run.seed, run.mix_shards)

        self.latents = can_read_latents(self.shards, run, config, rank)
        self.reader = ShardReader(self.shards, run.mix_shards * len(sets), run.cache, self.latents)
        self.downloads = {}                 # shards that download() was called for, oldest first
        self.clip_tokenizer = None
        if config.clip:
            self.clip_tokenizer = ClipTokenizer(config.clip)
        # One length for all batches, as XLA needs it; to_device cuts them for other devices.
        _, self.pad_to = fusedit.token_ids(tokenizer, [""], config)

    def __len__(self):
        """Samples in an epoch of all shards."""
        return sum(shard.samples for shard in self.shards)

    def download(self, shard):
        """Copy a remote shard; an error is left to the reader, which will try again."""
        with contextlib.suppress(Exception):
            self.reader.local_files(shard)

    def prefetch(self, position):
        """Start to copy the shard of a position, if it is remote, while others are read."""
        shard, _ = self.order[position]
        if shard in self.downloads or not is_url(self.shards[shard].path):
            return
        self.downloads[shard] = None
        while len(self.downloads) > 4 * self.reader.keep:
            oldest = next(iter(self.downloads))
            del self.downloads[oldest]
        threading.Thread(target=self.download, args=[shard], daemon=True).start()

    def draw_noise(self, rng):
        """(normal [], noise [1,C,h,w] or, with a VAE, [2,C,h,w]) for one sample."""
        side = self.config.image_size
        count = 1
        if self.config.vae:
            side //= 8
            count = 2
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        normal = torch.randn((), generator=generator)
        noise = torch.randn(count, self.config.in_channels, side, side, generator=generator)
        return normal, noise

    def sample(self, position, bad):
        """The Sample at a position. One that cannot be read is replaced by one near it.

        bad: list to which a line about the first replaced sample is appended. Raises FuseDiTError
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
            except MemoryError:
                raise
            except Exception as e:          # Pillow's decoders raise anything on broken files
                reason = str(e).split(" <")[0] or type(e).__name__
            problem = f"sample {i} of {self.shards[shard].path}: {reason}"
            if attempt == 0:                # a position counts once, whatever replaced it
                bad.append(problem)
            position += 1 + rng.randrange(CYCLE)           # near: in a shard that is open already
        raise FuseDiTError(f"{MAX_ATTEMPTS} samples in a row cannot be read; the last is {problem}")

    def make_batch(self, m):
        """Micro-batch m, without a time limit."""
        step, i = divmod(m, self.accumulation)
        first = step * self.run.batch + (i * self.world + self.rank) * self.micro_batch
        bad = []
        try:
            self.prefetch(first + DOWNLOAD_AHEAD)
            samples = [self.sample(first + j, bad) for j in range(self.micro_batch)]
        except FuseDiTError as e:
            return {"error": str(e)}

        captions = tuple(sample.caption for sample in samples)
        ids, mask = fusedit.tokenize(self.tokenizer, captions, self.config, self.pad_to)
        # Images lie in memory channels last; stacked that way they are copied in one piece.
        pixels = torch.stack([sample.pixels.movedim(0, -1) for sample in samples])
        batch = dict(
            pixels=pixels.movedim(-1, 1),
            ids=ids,
            mask=mask,
            captions=captions,
            bad=bad,
            normal=torch.stack([sample.normal for sample in samples]),
            noise=torch.stack([sample.noise for sample in samples]),
        )
        if self.clip_tokenizer:
            batch["clip"] = self.clip_tokenizer(captions)
        return batch

    def __getitem__(self, m):
        if get_worker_info() is None:
            return self.make_batch(m)
        signal.alarm(BATCH_TIMEOUT)         # ends this worker, and so the run
        try:
            return self.make_batch(m)
        finally:
            signal.alarm(0)


def digest(shards):
    """A hash of the shards' names and sample counts, on which the order of samples depends."""
    counts = [(os.path.basename(shard.path), shard.samples) for shard in shards]
    return hashlib.sha1(json.dumps(counts).encode()).hexdigest()


# ------------------------------------------------------------------------------ worker processes

def start_worker(_):
    """Set a worker up. Signals are the launcher's to handle: it needs batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class DoneEvent:
    """Stands in for the event by which a DataLoader tells its workers to end: it kills them.

    The DataLoader's own event has a lock, which a worker that was killed may have held; setting it
    then waits forever (reports of such hangs: pytorch/pytorch#21554 and #39570). Workers hold
    nothing that has to be saved.
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
    """Whether an error that the DataLoader raised means that a worker died."""
    if isinstance(error, RuntimeError):
        names = "DataLoader worker", "Pin memory thread"
        return any(name in str(error) for name in names)
    return True                             # OSError, EOFError: a pipe broke within a batch


def stream_batches(batches, which, workers, device):
    """The generator of load_batches. Its first item is None, when the workers have started."""
    prefetch = None
    if workers:
        prefetch = 4
    pin = device is not None and device.type == "cuda"
    iterator = iter(DataLoader(batches, batch_size=None, sampler=which, num_workers=workers,
                               pin_memory=pin, worker_init_fn=start_worker,
                               prefetch_factor=prefetch))
    # PyTorch's handler of SIGCHLD raises an error wherever the main thread happens to be. Without
    # it a worker's death is noticed in next(iterator), which checks every 5 seconds.
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
        reason = str(e).splitlines()[0]
        raise FuseDiTError(f"a data process died ({reason}): out of memory? Then lower --workers. "
                           f"Or did a batch take over {BATCH_TIMEOUT / 60:g} minutes?") from e
    finally:
        iterator = None                     # its destructor ends the workers


def load_batches(batches, which, workers, device=None):
    """A generator of the micro-batches `which` (a range), made ahead of time by processes.

    The processes start at once. Call this before there is an optimizer, since a worker keeps a copy
    of all memory that this process has. workers: number of processes, 0 for none; device: where
    the batches will go. Raises FuseDiTError if data cannot be read or a process dies.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"         # its threads do not survive a fork
    stream = stream_batches(batches, which, workers, device)
    next(stream)
    atexit.register(stream.close)           # or Python would wait forever for the workers to end
    return stream


# ------------------------------------------------------------------------------ on the device

class TrainingBatch(NamedTuple):
    """A micro-batch on the device where it is used."""
    x: torch.Tensor                         # pixels [B,3,H,W] in [-1,1]; or latents [B,2*C,h,w]
    ids: torch.Tensor                       # [B,T]
    mask: torch.Tensor                      # [B,T] True: a real token
    clip_ids: torch.Tensor | None           # [B,77] CLIP's tokens, with CLIP modulation
    normal: torch.Tensor                    # [B] for the noise levels
    eps: torch.Tensor                       # [B,C,h,w] noise of the flow
    vae_noise: torch.Tensor | None          # [B,C,h,w] with a VAE: to sample its posterior


def cut_text_length(mask, device):
    """The length to which a batch's text is cut: its longest caption, rounded up.

    Rounded to quarters of the full length, since a compiled model is compiled anew for some
    lengths; on a GPU whole tiles (backend.round_up_to_tile). mask: [B,T], all tokens, on the CPU,
    so that the device is not waited for.
    """
    full = mask.shape[1]
    longest = int(mask.sum(1).max())
    if device.type == "cuda":
        return backend.round_up_to_tile(longest, full, device)
    quarter = -(-full // 32) * 8            # attention kernels prefer multiples of 8
    return min(full, -(-longest // quarter) * quarter)


def to_device(batch, device, cut_text=False):
    """TrainingBatch of a batch (dict of CPU tensors) on a device.

    cut_text: cut the text to cut_text_length. It is cut after the copy: a slice is not
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

"""WebDataset shards to training batches, in an order that is a function of the seed alone.

A shard is a tar of KEY.image.png (or jpg, webp), KEY.synthetic_caption.txt and, if there is one,
KEY.original_caption.txt. index.json beside the shards says how many samples each one holds, so
that any place of the run is found at once, with no replay of what came before it:

    place in the run -> data set, epoch, place in it -> shard, sample -> pixels, words, noise

Whoever asks for a place, whichever rank or worker, gets the same pixels, words and noise.
"""
import atexit
import contextlib
import hashlib
import json
import os
import random
import signal
import threading
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.data.images import read_square
from fusedit_lib.data.order import CYCLE, Mixture
from fusedit_lib.data.shards import Tars, encoded, expand_shards
from fusedit_lib.pretrained import ClipTokenizer

AHEAD = 20_000                              # places before their turn, remote shards are copied
HANGS = 1800                                # seconds for a batch, after which a worker gives up


def decode(files, run, size, rng):
    """(pixels uint8 [3,H,W], or latents, and caption) of a sample's files; raises ValueError."""
    name = next((k for k in files if k.startswith("image.")), None)
    kinds = ["synthetic_caption.txt", "original_caption.txt"]
    if rng.random() < run.original_caption_rate:
        kinds.reverse()
    kind = next((k for k in kinds if k in files), None)
    if name is None or kind is None:
        raise ValueError("no image" if name is None else "no caption")
    caption = files[kind].decode("utf-8").strip()
    pixels = files["latents"] if "latents" in files else read_square(files[name], size, run.crop,
                                                                      rng)
    if pixels is None:
        raise ValueError("damaged image")
    return pixels, "" if rng.random() < run.caption_drop else caption


class Batches(Dataset):
    """Micro-batch m of a rank, for any m: no state is kept, so a run can go on anywhere.

    Pixels uint8 [B,3,H,W], or latents, a VAE's mean and log variance [B,2*C,h,w]; ids and mask
    [B,T], captions, noise [B,1,C,h,w] (with a VAE also its own, [B,2,C,h,w]), normal [B] for the
    noise level, clip [B,77] if the model has CLIP's vector; bad: what could not be read, by name.
    """

    def __init__(self, run, config, tokenizer, micro, times=1, rank=0, world=1):
        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.micro, self.times, self.rank, self.world = micro, times, rank, world
        if not run.data:
            raise FuseDiTError("--data is missing: say what to train on, --data 'shards/*.tar'")
        sets = [expand_shards(p) for p in run.data]
        if run.data_weights and len(run.data_weights) != len(sets):
            raise FuseDiTError(f"--data-weights has {len(run.data_weights)} numbers for the "
                               f"{len(sets)} data sets of --data")
        if not run.data_weights:            # as one: each sample once in an epoch of them all
            sets = [sum(sets, [])]
        self.shards = sum(sets, [])
        said = json.dumps([(os.path.basename(s[0]), s[1]) for s in self.shards])
        self.digest = hashlib.sha1(said.encode()).hexdigest()
        self.order = Mixture(sets, run.data_weights or [1], run.seed, run.mix_shards)
        self.asked, self.clip = {}, config.clip and ClipTokenizer(config.clip)
        self.latents = encoded(self.shards, run, config, rank)
        self.tars = Tars(self.shards, run.mix_shards * len(sets), run.cache, self.latents)
        # one length for all batches, as XLA wants it; train_gpu.py cuts them
        self.pad_to = fusedit.token_ids(tokenizer, [""], config)[1]

    def __len__(self):
        return sum(s[1] for s in self.shards)

    def ahead(self, place):
        """Begin to copy the remote shard of a place that comes later, while others are read."""
        shard, _ = self.order[place]
        if "://" in self.shards[shard][0] and shard not in self.asked:
            self.asked[shard] = None
            while len(self.asked) > 4 * self.tars.keep:
                del self.asked[next(iter(self.asked))]
            def fetch():
                with contextlib.suppress(Exception):       # who needs it says what is wrong
                    self.tars.files(shard)
            threading.Thread(target=fetch, daemon=True).start()

    def sample(self, place, bad):
        """(pixels, caption, noise) of a place. A bad sample is named, and a near one stands in."""
        rng = random.Random(f"{self.run.seed} {place}")
        c, side = self.config, self.config.image_size // (8 if self.config.vae else 1)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        noise = (torch.randn((), generator=noise),
                 torch.randn(1 + bool(c.vae), c.in_channels, side, side, generator=noise))
        for attempt in range(100):
            shard, i = self.order[place]
            try:
                pixels, caption = decode(self.tars.read(shard, i), self.run, c.image_size, rng)
                return pixels, caption, *noise
            except MemoryError:
                raise
            except Exception as e:          # broken files raise anything in Pillow's decoders
                why = str(e).split(" <")[0] or type(e).__name__
            problem = f"sample {i} of {self.shards[shard][0]}: {why}"
            bad += [problem] * (not attempt)    # each place counts once, whatever stood in
            place += 1 + rng.randrange(CYCLE)   # near it: of a shard that is open already
        raise FuseDiTError(f"100 samples in a row cannot be read; the last is {problem}")

    def __getitem__(self, m):
        if get_worker_info() is None:
            return self.batch(m)
        signal.alarm(HANGS)                 # ends the worker, and so the run
        try:
            return self.batch(m)
        finally:
            signal.alarm(0)

    def batch(self, m):
        step, i = divmod(m, self.times)
        first = step * self.run.batch + (i * self.world + self.rank) * self.micro
        try:
            bad = []
            self.ahead(first + AHEAD)
            pixels, captions, normal, noise = zip(*[self.sample(first + j, bad)
                                                    for j in range(self.micro)], strict=True)
        except FuseDiTError as e:           # raised in a worker, it would arrive as a traceback
            return {"error": str(e)}
        ids, mask = fusedit.tokenize(self.tokenizer, captions, self.config, self.pad_to)
        pixels = torch.stack([p.movedim(0, -1) for p in pixels]).movedim(-1, 1)  # as they lie
        batch = dict(pixels=pixels, ids=ids, mask=mask, captions=captions, bad=bad,
                     normal=torch.stack(normal), noise=torch.stack(noise))
        return batch | dict(clip=self.clip(captions)) if self.clip else batch


def start_worker(_):
    """Ctrl-C and SIGTERM are the launcher's to handle: it needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def load_batches(batches, which, workers, device=None):
    """The micro-batches `which` (a range), made ahead of time by worker processes, from now on.

    Call it before there is an optimizer: a worker keeps a copy of all that this process has.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork

    def stream():
        pin = device is not None and device.type == "cuda"
        made = iter(DataLoader(batches, batch_size=None, sampler=which, num_workers=workers,
                               pin_memory=pin, worker_init_fn=start_worker,
                               prefetch_factor=4 if workers else None))
        # torch's handler of a worker's death raises wherever the run is just then; without it the
        # error comes from next(made), which looks every 5 seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if workers:                         # torch's event takes a lock that a dead worker may hold
            over, processes = threading.Event(), made._workers
            made._workers_done_event = SimpleNamespace(
                is_set=over.is_set, set=lambda: over.set() or [w.kill() for w in processes])
        yield
        try:
            for batch in made:
                if "error" in batch:
                    raise FuseDiTError(batch["error"])
                yield batch
        except (RuntimeError, OSError, EOFError) as e:     # of a pipe that broke in the middle
            if not workers or isinstance(e, RuntimeError) and not any(
                    who in str(e) for who in ("DataLoader worker", "Pin memory thread")):
                raise
            raise FuseDiTError(f"a data process died ({str(e).splitlines()[0]}): out of memory? "
                               "Then lower --workers. Or did a batch take over "
                               f"{HANGS / 60:g} minutes?") from e
        finally:
            made = None                     # ends the workers
    started = stream()
    next(started)
    atexit.register(started.close)          # else Python would wait for the workers forever
    return started


def tensors(batches, bad):
    """Of each batch the tensors alone; its list of bad samples is appended to `bad`."""
    for batch in batches:
        bad.append(batch["bad"])
        yield {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}


def text_length(mask, device):
    """How many tokens a batch's text needs: its longest caption, in quarters of the full length.

    Few lengths, since a compiled model compiles anew for some of them; XLA would for all. On a GPU
    as backend.round_up_to_tile says.

    mask: [B,T] of all tokens, on the CPU, so that nothing waits for the device.
    """
    full, most = mask.shape[1], int(mask.sum(1).max())
    if device.type == "cuda":
        return backend.round_up_to_tile(most, full, device)
    unit = -(-full // 32) * 8               # attention kernels like multiples of 8
    return min(full, -(-most // unit) * unit)


def to_device(batch, device, cut_text=False):
    """(pixels in [-1, 1] or latents, ids, mask, clip's tokens or None, normal, noises) there.

    cut_text: to text_length, and on the device: what is cut before is no longer in one piece, and
    such a copy makes the CPU wait.
    """
    length = text_length(batch["mask"], device) if cut_text else None
    pixels, ids, mask, clip, normal, noise = (
        batch[k].to(device, non_blocking=True) if k in batch else None
        for k in ("pixels", "ids", "mask", "clip", "normal", "noise"))
    if length:
        ids, mask = ids[:, :length], mask[:, :length]
    pixels = pixels.float() if pixels.dtype != torch.uint8 else pixels.float().div_(127.5).sub_(1)
    return pixels.contiguous(), ids, mask, clip, normal, noise.unbind(1)

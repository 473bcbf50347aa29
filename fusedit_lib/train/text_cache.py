"""--cache-text: Gemma runs once per distinct caption of the data, before the first step.

Gemma is frozen, so a caption has the same features at every visit. A TextCache keeps the features
of all captions that a run can draw in the memory of the training device:

    shards -> captions -> distinct token ids, sorted -> Gemma -> features [total tokens, ...]

and a training step gathers those of its batch. The order of the captions and the batches in which
Gemma encodes them depend on the data alone. A resumed run therefore has the same features to the
bit. Every rank encodes all captions.
"""
import itertools
import time

import torch
from tqdm import tqdm

import fusedit
from fusedit import FuseDiTError, TextFeatures
from fusedit_lib import backend
from fusedit_lib.data.layout import caption_lines, find_captions
from fusedit_lib.files import say_once

BATCH_TOKENS = 4096                         # tokens that Gemma encodes at a time
MEMORY_SHARE = 0.5                          # of the free memory that the features may take


def make_text_cache(run, model, source):
    """The TextCache of a run with --cache-text; None for a run without it.

    model: the FuseDiT, whose forward from now on takes TextFeatures in place of the arguments of
    encode_ids. Validation and image grids still use its Gemma. source: the training data, a
    Batches. Call it before ZeRO 3 shards the weights and after the data processes have started.
    Raises FuseDiTError if the features would not fit in memory.
    """
    if not run.cache_text:
        return None

    def forward(x_t, sigma, text):
        return model.dit(x_t, sigma, text)

    model.forward = forward
    return TextCache(model, source)


# ------------------------------------------------------------------------------ the captions

def possible_captions(files, run):
    """The captions that batches.decode may draw from a sample's files, with or without dropping.

    Raises LayoutError if the sample has none.
    """
    texts = list(find_captions(files, run.caption_key).values())
    captions = []
    if run.original_caption_rate < 1:
        captions += captions_of(texts[0], run.caption_pick)
    if run.original_caption_rate > 0:       # the original caption is the last
        captions += captions_of(texts[-1], run.caption_pick)
    return captions


def captions_of(text, pick):
    """All captions that layout.pick_caption may return for a text."""
    if pick == "whole":
        return [text]
    lines = caption_lines(text)
    if pick == "first":
        return lines[:1]
    return lines


def shard_captions(source, number, bar):
    """The set of captions that the samples of a shard may have. Unreadable samples have none."""
    captions = set()
    for i in range(source.shards[number].samples):
        bar.update()
        try:
            files = source.reader.read(number, i)
            captions.update(possible_captions(files, source.run))
        except (MemoryError, FuseDiTError):
            raise
        except Exception:                   # training reports these samples and skips them
            continue
    return captions


def distinct_captions(source, check):
    """The token ids of all captions of the data, as a sorted list of tuples; shorter ones first.

    source: a Batches. check: called with the ids found so far after each shard.
    """
    found = set()
    with progress(source, len(source), "sample") as bar:
        for number in range(len(source.shards)):
            captions = shard_captions(source, number, bar) | {""}          # --caption-drop
            all_ids, limit = fusedit.token_ids(source.tokenizer, sorted(captions), source.config)
            found.update(tuple(ids[:limit]) for ids in all_ids)
            check(found)
    return sorted(found, key=lambda ids: (len(ids), ids))


def progress(source, total, unit):
    """A progress bar, on rank 0 only."""
    disable = None                          # no bar if stderr is not a terminal
    if source.rank > 0:
        disable = True
    return tqdm(total=total, unit=unit, disable=disable, leave=False)


# ------------------------------------------------------------------------------ memory

def token_bytes(model, dtype):
    """The bytes that the features of a token take. dtype: that of Gemma's weights."""
    gemma = model.llm.config
    numbers = gemma.hidden_size
    if model.dit.text_mix is not None:      # the hidden states of all layers
        numbers *= gemma.num_hidden_layers
    if model.config.fusion == "deep":
        layers = sum(i is not None for i in model.dit.text_layers)
        numbers = 2 * layers * gemma.num_key_value_heads * gemma.head_dim
    return numbers * dtype.itemsize


def free_memory(device):
    """The free bytes of a device. Ranks that share a CPU's memory have equal parts of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil                           # installed with DeepSpeed
    return psutil.virtual_memory().available // backend.local_world()


def check_memory(model, found):
    """Raise FuseDiTError if the features of captions, given by their ids, take too much memory."""
    weight = model.llm.embed_tokens.weight
    tokens = sum(map(len, found))
    needed = tokens * token_bytes(model, weight.dtype)
    free = free_memory(weight.device)
    if needed > MEMORY_SHARE * free:
        raise FuseDiTError(
            f"--cache-text needs {needed / 1e9:.3g} GB or more for {len(found):,} distinct "
            f"captions ({tokens:,} tokens), but at most {MEMORY_SHARE:.0%} of the {free / 1e9:.3g} "
            "GB of free memory. It is meant for data sets with at most some 100,000 captions: "
            "leave it out")


# ------------------------------------------------------------------------------ the cache

class TextCache:
    """The features of captions, without padding, on the device of the model.

    flat    TextFeatures of all captions, one after the other: keys and values are
            [total tokens,K,h], hidden is [total tokens,D] or [total tokens,L,D] and mask is
            [total tokens]
    starts  {token ids of a caption: its first row in flat}
    model   the FuseDiT, which encodes batches with a caption that is not among them
    """

    def __init__(self, model, source):
        """Encodes the captions of the training data; see make_text_cache."""
        self.model = model
        captions = distinct_captions(source, lambda found: check_memory(model, found))
        self.starts = {}
        total = 0                           # tokens
        for ids in captions:
            self.starts[ids] = total
            total += len(ids)

        began = time.perf_counter()
        with progress(source, len(captions), "caption") as bar:
            self.flat = encode_all(model, captions, total, bar)
        seconds = time.perf_counter() - began
        size = sum(tensor.nbytes for tensor in tensors(self.flat))
        say_once(f"--cache-text: Gemma has encoded {len(captions):,} distinct captions ({total:,} "
                 f"tokens, {size / 1e9:.3g} GB) in {seconds:.0f} s, "
                 f"{len(captions) / seconds:,.0f} captions/s")

    def features(self, loaded, mask, pooled=None):
        """TextFeatures of a micro-batch.

        loaded: the dict from Batches. mask: [B,T] on the device, cut to the batch's text length.
        pooled: CLIP's pooled vectors, for CLIP modulation. Gemma encodes a batch with a caption
        that is not in the cache, because its sample could not be read at the start.
        """
        T = mask.shape[1]
        is_real = loaded["mask"][:, :T]
        lengths = is_real.sum(1).tolist()
        starts = []
        for ids, length in zip(loaded["ids"].tolist(), lengths, strict=True):
            starts.append(self.starts.get(tuple(ids[:length])))
        if None in starts:
            return self.encode(loaded, starts.index(None), mask, pooled)

        # At padding, which the mask hides, <bos> is repeated.
        starts = torch.tensor(starts)[:, None]                                   # [B,1]
        rows = torch.where(is_real, starts + torch.arange(T), starts)            # [B,T]
        rows = rows.to(mask.device, non_blocking=True)
        features = self.flat.map(lambda t: t[rows])
        return features._replace(keys=swap_heads(features.keys),                 # [B,K,T,h]
                                 values=swap_heads(features.values), mask=mask, pooled=pooled)

    @torch.no_grad()
    def encode(self, loaded, unknown, mask, pooled):
        """TextFeatures of a micro-batch without the cache; the arguments are those of features().

        unknown: the index of a caption that is not in the cache, for the message. Raises
        FuseDiTError if ZeRO 3 has sharded Gemma, which would need all ranks at the same time.
        """
        if hasattr(self.model.llm.embed_tokens.weight, "ds_id"):
            caption = loaded["captions"][unknown]
            raise FuseDiTError(f"--cache-text does not know the caption {caption!r}: the shards "
                               "have changed, or could not be read, since this run was started or "
                               "resumed. Start the same command again")
        say_once("note: some captions could not be read when this run was started or resumed, and "
                 "are not in --cache-text: Gemma encodes their batches")
        ids = loaded["ids"][:, :mask.shape[1]].to(mask.device)
        return self.model.encode_ids(ids, mask, pooled)


def batches_of_equal_length(captions):
    """Cuts a list of token ids, sorted by length, into lists of one length, without padding."""
    for length, group in itertools.groupby(captions, len):
        group = list(group)
        count = max(1, BATCH_TOKENS // length)
        for first in range(0, len(group), count):
            yield group[first:first + count]


@torch.no_grad()
def encode_all(model, captions, total, bar):
    """The flat TextFeatures of captions, a sorted list of token ids. total: their tokens."""
    device = model.llm.embed_tokens.weight.device
    flat = None
    row = 0
    for batch in batches_of_equal_length(captions):
        ids = torch.tensor(batch, device=device)
        part = flatten(model.encode_ids(ids, torch.ones_like(ids, dtype=torch.bool)))
        if flat is None:
            flat = part.map(lambda t: t.new_empty(total, *t.shape[1:]))
        stop = row + ids.numel()
        for target, source in zip(tensors(flat), tensors(part), strict=True):
            target[row:stop] = source
        row = stop
        bar.update(len(batch))
    return flat


def flatten(features):
    """TextFeatures with the samples and their tokens as one dimension: [B,T,...] -> [B*T,...]."""
    features = features._replace(keys=swap_heads(features.keys),                 # [B,T,K,h]
                                 values=swap_heads(features.values))
    return features.map(lambda t: t.flatten(0, 1))


def swap_heads(keys):
    """[B,K,T,h] -> [B,T,K,h], or back, for each tensor of a tuple that is not None."""
    return tuple(None if k is None else k.transpose(1, 2) for k in keys)


def tensors(features):
    """The tensors of TextFeatures, as a list."""
    everything = (*features.keys, *features.values, features.hidden, features.mask)
    return [tensor for tensor in everything if tensor is not None]

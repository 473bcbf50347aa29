"""Filters for packing: captions by their number of words, and images by their pixels."""
import hashlib
import json
from typing import NamedTuple

import numpy as np

from fusedit_lib.data.images import Skip, read_image

DUPLICATE = "same pixels as another image"


# ---------------------------------------------------------------------------- captions
def select_captions(captions, rules):
    """The captions of an image within the limits of ImageRules, and a note for every other one.

    captions: kind -> text or list of texts; so is the result. Raises Skip if none is left.
    """
    if not rules.min_words and not rules.max_words:
        return captions, []
    selected = {}
    notes = []
    for kind, texts in captions.items():
        within = []
        for text in texts if isinstance(texts, list) else [texts or ""]:
            fault = length_fault(text, rules)
            if fault:
                notes.append(fault)
            else:
                within.append(text)
        selected[kind] = within
    if notes and not any(map(any, selected.values())):
        raise Skip(f"no caption of {limits(rules)} words")
    return selected, notes


def length_fault(text, rules):
    """A note on a caption with too few or too many words, or "". Words are separated by spaces."""
    count = len(text.split())
    if 0 < count < rules.min_words:
        return f"caption of fewer than {rules.min_words} words left out"
    if 0 < rules.max_words < count:
        return f"caption of more than {rules.max_words} words left out"
    return ""


def limits(rules):
    """A phrase for the numbers of words that are allowed."""
    if not rules.max_words:
        return f"at least {rules.min_words}"
    if not rules.min_words:
        return f"at most {rules.max_words}"
    return f"{rules.min_words} to {rules.max_words}"


# ---------------------------------------------------------------------------- duplicate images
class PackedImage(NamedTuple):
    """An image in a shard, for the search for duplicates."""
    name: str               # of the input, as in the report
    pixels: int             # their hash
    number: int             # of the input, if inputs are shuffled; 0 for all otherwise


def pixel_hash(data):
    """The hash of the pixels that training sees of an image file, an integer of 64 bits.

    data: the bytes of the file. Raises Skip. Among 26 million images, the probability of even one
    pair with different pixels and the same hash is 2e-5.
    """
    image = read_image(data)
    sha1 = hashlib.sha1(f"{image.size}".encode())          # CPUs have instructions for it
    sha1.update(image.tobytes())
    return int.from_bytes(sha1.digest()[:8], "little")


def write_images(images, path):
    """Write a shard's PackedImages, in the order of its samples, to a new JSON file."""
    path.write_text(json.dumps(images))


def read_images(path):
    return [PackedImage(*fields) for fields in json.loads(path.read_text())]


def find_duplicates(paths):
    """Find the images whose pixels are those of an earlier input.

    paths: the files of PackedImages of all shards. Returns [{sample: "NAME = NAME OF THE FIRST"}],
    a dict for each shard. It needs 16 bytes of memory per image, since there can be millions, and
    the names of those images that are not unique.
    """
    hashes = [np.array([image.pixels for image in read_images(path)], np.uint64) for path in paths]
    hashes = np.concatenate(hashes)
    hashes.sort()
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    copies = {pixels: [] for pixels in repeated}
    for shard, path in enumerate(paths):
        for sample, image in enumerate(read_images(path)):
            if image.pixels in repeated:
                copies[image.pixels].append((image.number, shard, sample, image.name))

    duplicates = [{} for _ in paths]
    for same in copies.values():
        (*_, first), *others = sorted(same)
        for _, shard, sample, name in others:
            duplicates[shard][sample] = f"{name} = {first}"
    return [dict(sorted(samples.items())) for samples in duplicates]

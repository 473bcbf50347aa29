"""The real images of emoji shards, and which of them are nearest to another image."""
import hashlib
from collections import defaultdict
from typing import NamedTuple

import torch

from fusedit import FuseDiTError
from fusedit_lib.data.emoji_captions import STYLES, without_tone
from fusedit_lib.data.images import Skip, read_square
from fusedit_lib.data.layout import LayoutError, find_image
from fusedit_lib.data.shards import expand_shards, read_sample, sample_offsets
from fusedit_lib.evaluation import emoji_features

PARTS = ("train", "held-out")               # of the folder that prepare_data.py emoji writes
NEAR = 5                                    # nearest concepts of each real image to find
TRAINING = 3                                # nearest training images to find
SKIN_TONES = {f"1f3f{digit}" for digit in "bcdef"}         # code points


# ---- real images ---------------------------------------------------------------------------------

class RealImage(NamedTuple):
    """One sample of the shards."""
    key: str                                # google-1f44b-1f3fb
    part: str                               # one of PARTS
    style: str                              # a key of STYLES
    concept: str                            # the code points without skin tones: 1f44b
    label: str                              # the name without a skin tone: waving hand
    prompt: str                             # waving hand: light skin tone, flat
    data: bytes                             # the image file


def concept_without_tone(concept):
    """The concept of an emoji with its skin tones taken together.

    Other variants, such as the man and the woman of a profession, stay different concepts.
    """
    return "-".join(point for point in concept.split("-") if point not in SKIN_TONES)


def read_images(folder):
    """All RealImages of the shards in folder/train and folder/held-out. Raises FuseDiTError."""
    images = []
    for part in PARTS:
        if not (folder / part / "index.json").exists():
            raise FuseDiTError(f"--data {folder} has no {part}/index.json: give the OUT of "
                               "`python prepare_data.py emoji OUT`")
        for shard in expand_shards(str(folder / part)):
            offsets = sample_offsets(shard.path)
            with open(shard.path, "rb") as file:
                for i in range(len(offsets) - 1):
                    key, files = read_sample(file, offsets, i)
                    images.append(real_image(key, files, part))
    return images


def real_image(key, files, part):
    """The RealImage of a sample. files: {"image.png": bytes, ...}. Raises FuseDiTError."""
    style, _, concept = key.partition("-")
    prompt = files.get("original_caption.txt", b"").decode()
    label, _, words = prompt.rpartition(", ")
    if style not in STYLES or words != STYLES[style]:
        raise FuseDiTError(f"the sample {key} has the caption {prompt!r}, not one such as 'red "
                           "apple, flat': pack the shards again with `python prepare_data.py "
                           "emoji OUT`")
    try:
        data = files[find_image(files)]
    except LayoutError as e:
        raise FuseDiTError(f"the sample {key} has no image that can be read: {e}") from None
    concept = concept_without_tone(concept)
    return RealImage(key, part, style, concept, without_tone(label), prompt, data)


def held_out_categories(images):
    """Numbers of held-out RealImages by what training contains of their emoji.

    "held-out": at most the other style; "other tone": the same style, in another skin tone.
    """
    trained = {(image.style, image.concept) for image in images if image.part == "train"}
    numbers = {"held-out": [], "other tone": []}
    for number, image in enumerate(images):
        if image.part == "held-out":
            category = "held-out"
            if (image.style, image.concept) in trained:
                category = "other tone"
            numbers[category].append(number)
    return numbers


def decode(images, size):
    """The pixels, uint8 [3,size,size], of RealImages. Raises FuseDiTError."""
    decoded = []
    for image in images:
        try:
            decoded.append(read_square(image.data, size))
        except Skip as e:
            raise FuseDiTError(f"cannot read the image of the sample {image.key}: {e}") from None
    return decoded


# ---- neighbours ----------------------------------------------------------------------------------

class Neighbours(NamedTuple):
    """The real images nearest to one image, as their numbers in the gallery."""
    concepts: list[int]                     # the nearest image of each concept, nearest first, of
                                            # the asked style
    nearest: int                            # the nearest image of any style
    training: list[int]                     # the TRAINING nearest training images of any style


def gallery_digest(images, features_digest):
    """A digest of RealImages and of their features: results with the same one are comparable."""
    digest = hashlib.sha256(features_digest.encode())
    for image in images:
        digest.update(f"{image.part} {image.key} {image.prompt}\n".encode())
    return digest.hexdigest()


class Gallery:
    """The real images with their features, in which the neighbours of other images are found."""

    def __init__(self, folder, size, extractor, device):
        """folder: --data, where the features are stored once they are computed.

        size: of the images in pixels. Raises FuseDiTError.
        """
        self.images = read_images(folder)
        self.extractor = extractor
        self.device = device
        self.pixels = decode(self.images, size)
        path = folder / f"features-{size}.safetensors"
        features_digest = emoji_features.digest(self.pixels, extractor)
        features = emoji_features.stored_features(self.pixels, path, features_digest, extractor,
                                                  device)
        self.digest = gallery_digest(self.images, features_digest)
        self.whitenings = [emoji_features.fit_whitening(block) for block in features]
        self.features = emoji_features.normalise(features, self.whitenings)      # [n,D]

        self.of_style = {}                  # style -> {concept: numbers of its images}
        for number, image in enumerate(self.images):
            concepts = self.of_style.setdefault(image.style, defaultdict(list))
            concepts[image.concept].append(number)

    def concepts(self, style):
        """{concept: numbers of its images} of a style."""
        return self.of_style.get(style, {})

    def nearest_of_real(self, style):
        """The NEAR nearest concepts [images,NEAR] of each real image of a style, the nearest first.

        Concepts are numbered in the order of self.concepts(style). If there are fewer than NEAR,
        they are all listed.
        """
        concepts = list(self.concepts(style).values())
        numbers = [number for images in concepts for number in images]
        concept = torch.repeat_interleave(torch.tensor([len(images) for images in concepts]))
        similarities = self.features[numbers] @ self.features[numbers].T
        best = torch.full((len(numbers), len(concepts)), -torch.inf)
        best.scatter_reduce_(1, concept.expand_as(similarities), similarities, "amax")
        return best.topk(min(NEAR, len(concepts))).indices

    def neighbours(self, drawn, styles):
        """The Neighbours of uint8 images [3,H,W], which were asked for in these styles."""
        features = emoji_features.extract(drawn, self.extractor, self.device)
        features = emoji_features.normalise(features, self.whitenings)
        similarities = features @ self.features.T
        held_out = torch.tensor([image.part == "held-out" for image in self.images])
        found = []
        for row, style in zip(similarities, styles, strict=True):
            concepts = self.nearest_per_concept(row, style)
            training = row.masked_fill(held_out, -torch.inf).topk(TRAINING).indices.tolist()
            found.append(Neighbours(concepts, int(row.argmax()), training))
        return found

    def nearest_per_concept(self, similarities, style):
        """For each concept of a style, the number of its nearest image, the nearest first."""
        values = similarities.tolist()
        best = []
        for numbers in self.concepts(style).values():
            best.append(max(numbers, key=values.__getitem__))
        return sorted(best, key=values.__getitem__, reverse=True)

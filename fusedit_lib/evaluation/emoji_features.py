"""Features of emoji, in which an image is near to others that show the same thing.

They come from EfficientNet-Lite0, which was trained on photos. The size of its input, its layers
and the normalisation were chosen once, by two measures on the 5,017 real emoji at 64 pixels: how
often one of 500 changed images (a quarter of the resolution; noise; ...) is found again, and how
often an image of one style finds its concept among the images of the other style.

                                        a quarter of
                                        the resolution    noise           other style
    input, features                     top-1    top-5    top-1   top-5   top-1   top-5
    224 px, the head's 1280             0.39     0.65     0.50    0.75    0.43    0.65
    224 px, the same, whitened          0.45     0.70     0.50    0.74    0.51    0.74
    224 px, blocks 10 and 15, whitened  0.82     0.97     0.81    0.95    0.65    0.84
    128 px, blocks 10 and 15, whitened  0.86     0.97     0.86    0.99    0.62    0.80
     64 px, blocks 10 and 15, whitened  0.83     0.98     0.84    0.96    0.52    0.75
     64 px, block 10, whitened          0.88     1.00     0.90    0.99    0.56    0.75

The two blocks at 128 pixels are within 0.04 of the best in every column and cost a third of 224.
docs/evaluation.md has the figures of the scorer that was chosen.
"""
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from torch.nn.functional import adaptive_avg_pool2d, normalize
from tqdm import tqdm

from fusedit_lib.evaluation import metrics
from fusedit_lib.files import atomic_write, save_file
from fusedit_lib.sampling import batches_of

SIDE = 128                                  # pixels of EfficientNet's input
BLOCKS = (10, 15)                           # of EfficientNet's 16, from 0: strides 16 and 32
POOLED = 2                                  # rows and columns that a block's output is averaged to
SHRINKAGE = 1.0                             # of the whitening, see fit_whitening
BATCH = 64                                  # images passed to the network at once


class BlockExtractor(NamedTuple):
    """A vision network whose features are compared, one set per block."""
    label: str                              # names the features: others need another label
    prepare: Callable                       # PIL image -> tensor
    network: Callable                       # batch of such tensors -> list of features [B,D]


def load_extractor(device):
    """The BlockExtractor of EfficientNet-Lite0: outputs of BLOCKS, averaged over the quarters."""
    model = metrics.efficientnet_lite0(device)

    def prepare(image):
        return metrics.efficientnet_input(image, SIDE)

    def network(x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = model._swish(model._bn0(model._conv_stem(x)))
        features = []
        for number, block in enumerate(model._blocks):
            x = block(x)
            if number in BLOCKS:
                features.append(adaptive_avg_pool2d(x, POOLED).flatten(1))
        return features
    return BlockExtractor(f"efficientnet-lite0 {SIDE} {BLOCKS} {POOLED}", prepare, network)


@torch.no_grad()
def extract(images, extractor, device):
    """The features, a list of [n,D], of uint8 images [3,H,W]."""
    batches = []
    with tqdm(total=len(images), unit="image", disable=None, desc="features") as bar:
        for batch in batches_of(images, BATCH):
            inputs = []
            for image in batch:
                pil = Image.fromarray(image.permute(1, 2, 0).numpy())
                inputs.append(extractor.prepare(pil))
            features = extractor.network(torch.stack(inputs).to(device))
            batches.append([block.float().cpu() for block in features])
            bar.update(len(batch))
    return [torch.cat(block) for block in zip(*batches, strict=True)]


def digest(images, extractor):
    """A digest of uint8 images [3,H,W] and of the kind of features that are extracted."""
    found = hashlib.sha256(extractor.label.encode())
    for image in images:
        found.update(image.numpy().tobytes())
    return found.hexdigest()


def stored_features(images, path, key, extractor, device):
    """The features, a list of [n,D], of uint8 images [3,H,W], whose digest is `key`.

    They are stored in the file `path` when they are computed, and read from there while the digest
    stays the same.
    """
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata().get("digest") == key:
                return [file.get_tensor(name) for name in sorted(file.keys())]

    features = extract(images, extractor, device)
    tensors = {f"block_{number}": block for number, block in enumerate(features)}
    with atomic_write(path) as tmp:
        save_file(tensors, tmp, {"digest": key})
    return features


# ---- normalisation -------------------------------------------------------------------------------

class Whitening(NamedTuple):
    """A linear map that gives features nearly equal variances in all directions."""
    mean: torch.Tensor                      # [D]
    matrix: torch.Tensor                    # [D,D]


def fit_whitening(features):
    """Fit a Whitening to the features [n,D] of the real images.

    SHRINKAGE times the mean variance is added to the variance in each principal direction, so that
    directions in which the images hardly differ are not amplified.
    """
    mean = features.double().mean(0)
    centred = features.double() - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    scales = (variances + SHRINKAGE * variances.mean() + 1e-12).rsqrt()
    return Whitening(mean.float(), (directions * scales).float())


def normalise(features, whitenings):
    """Unit vectors [n,D] from the features of all blocks, whose products are cosines.

    features: a list of [n,D], one per block, each with its Whitening. Blocks have equal weights.
    """
    parts = []
    for block, whitening in zip(features, whitenings, strict=True):
        parts.append(normalize((block - whitening.mean) @ whitening.matrix))
    return normalize(torch.cat(parts, 1))

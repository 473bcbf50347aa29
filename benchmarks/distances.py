"""Growth of the Frechet and kernel distances when real images are changed in known ways.

    python prepare_data.py emoji shards/emoji
    python benchmarks/distances.py shards/emoji/train          4 minutes on two cores

One half of the flat emoji is compared with the other half: unchanged, blurred, noisy, and in
another style.
"""
import argparse
import io
import random
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.backend import pick_device
from fusedit_lib.cli import HelpFormatter, run
from fusedit_lib.evaluation import figures, metrics
from fusedit_lib.evaluation.figures import Measurement
from fusedit_lib.files import unused_path
from fusedit_lib.sampling import batches_of

SIDE = 64                                   # pixels of the images that are compared


# ---- images --------------------------------------------------------------------------------------

def read_emoji(folder):
    """{style: {concept: image}} from the shards that prepare_data.py emoji writes."""
    styles = {"google": {}, "fluent": {}}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind.startswith("image."):
                    style, concept = key.split("-", 1)
                    styles[style][concept] = on_white(tar.extractfile(member).read())
    return styles


def on_white(data):
    """Decode the bytes of an image file, with a white background."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB").resize((SIDE, SIDE), Image.LANCZOS)


def add_noise(image, rng, sd):
    pixels = np.asarray(image, float) + rng.normal(0, sd, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def blur(image, sd):
    return image.filter(ImageFilter.GaussianBlur(sd))


def image_sets(styles, rng):
    """The reference images, and {name of a change: the same number of changed images}.

    Only concepts that exist in both styles are used. They are split at random into two halves.
    """
    concepts = sorted(styles["google"].keys() & styles["fluent"].keys())
    if len(concepts) < 4:
        raise FuseDiTError("these are not shards of prepare_data.py emoji: give its OUT/train")
    random.Random(0).shuffle(concepts)
    half = min(500, len(concepts) // 2)
    reference = [styles["google"][concept] for concept in concepts[:half]]
    others = concepts[half:2 * half]
    flat = [styles["google"][concept] for concept in others]

    changed = {"the other half": flat}
    for sd in (0.5, 1, 2):
        changed[f"blurred by {sd:g}"] = [blur(image, sd) for image in flat]
    for sd in (5, 15, 45):
        changed[f"with noise of {sd}"] = [add_noise(image, rng, sd) for image in flat]
    changed["in 3D style"] = [styles["fluent"][concept] for concept in others]
    return reference, changed


# ---- distances -----------------------------------------------------------------------------------

@torch.no_grad()
def extract_features(images, extractor, device):
    """The features [n,D] of images, in float64."""
    parts = []
    for batch in batches_of(images, 64):
        x = torch.stack([extractor.prepare(image) for image in batch])
        parts.append(extractor.network(x.to(device)).double().cpu())
    return torch.cat(parts)


def measure(reference, changed, extractor, device):
    """{measure: {name of a change: Measurement}}."""
    table = {extractor.label: {}, "KID x 1000": {}}
    x = extract_features(reference, extractor, device)
    for name, images in tqdm(changed.items(), desc="features", unit="set"):
        y = extract_features(images, extractor, device)
        values = (metrics.frechet(x, y), 1000 * metrics.kid(x, y))
        for label, value in zip(table, values, strict=True):
            table[label][name] = Measurement(label, value, None, False)
    return table


def print_table(table, names):
    distance, kid = table
    print(f"{'':<24}{distance:>26}{kid:>14}")
    for name in names:
        print(f"{name:<24}{table[distance][name].value:26.3f}{table[kid][name].value:14.3f}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("shards", type=Path, help="the folder OUT/train of prepare_data.py emoji")
    parser.add_argument("--features", default="efficientnet-lite0",
                        help="network whose features are compared, as in evaluate.py fid")
    parser.add_argument("--inception", type=Path, default=Path.home() / ".cache/fusedit",
                        help=f"folder that contains {metrics.INCEPTION}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("distances.png"),
                        help="file for the figure")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    extractor = metrics.load_extractor(args.features, device, args.inception)
    path = unused_path(args.out)
    reference, changed = image_sets(read_emoji(args.shards), np.random.default_rng(0))
    table = measure(reference, changed, extractor, device)
    print(f"{len(reference)} images per set")
    print_table(table, changed)
    figures.compare_models(table, list(changed), path)
    print(path)


if __name__ == "__main__":
    run(main, "--features")

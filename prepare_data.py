"""Make data sets: captioned pictures as WebDataset shards, and the demo's tiny Gemma.

    python prepare_data.py shapes shards/shapes -n 200000
    python prepare_data.py tiny-gemma demo/gemma
    python prepare_data.py folder photos/ captions.jsonl shards/photos
    python prepare_data.py folder photos/ shards/photos      # captions in .txt beside the images
    python prepare_data.py index shards/others               # shards that came without index.json

A shard is a tar of KEY.image.png (jpg, webp), KEY.synthetic_caption.txt (a model's caption) and
KEY.original_caption.txt (the one it came with). index.json, written last, lists the shards;
offsets.npy says where in them each sample begins.
Train on them with  python train_gpu.py --data 'shards/photos/*.tar'.
"""
import argparse
import csv
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm
from webdataset import TarWriter

from cli import Help, pick_device, positive, run
from fusedit import FuseDiTError
from loader import sample_offsets
from weights import atomic_write

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}    # kept as they are; the rest become PNG
IMAGE_FIELDS = ("image", "file_name", "filename", "file", "path", "image_path", "name")
CAPTION_FIELDS = ("caption", "original_caption", "text", "prompt", "description")


# ---- shards --------------------------------------------------------------------------------------

class Shard(NamedTuple):
    """One job of a worker: the items that go into one tar."""
    path: Path
    items: list | range


class Skip(Exception):
    """Why an item is left out; the rest is packed."""


def write_shard(make, shard: Shard) -> tuple[dict, int, list]:
    """Write one tar of make(item) -> sample. Returns its index entry, items seen, [(why, item)]."""
    skipped = []
    with atomic_write(shard.path) as tmp:
        with open(tmp, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for item in shard.items:
                try:
                    tar.write(make(item))
                except Skip as why:
                    skipped.append((str(why), str(item)))
    return index_entry(shard.path), len(shard.items), skipped


def index_entry(path: Path) -> dict:
    """A tar's name, samples, bytes, and the offsets of its samples."""
    offsets = sample_offsets(path)
    return dict(name=path.name, samples=len(offsets) - 1, bytes=path.stat().st_size,
                offsets=offsets)


def write_index(out: Path, entries: list, **more) -> dict:
    """offsets.npy and then index.json, of index_entry's dicts; returns what is in the latter."""
    with atomic_write(out / "offsets.npy") as tmp, open(tmp, "wb") as file:
        np.save(file, np.concatenate([e.pop("offsets") for e in entries]))
    index = dict(shards=entries, samples=sum(e["samples"] for e in entries)) | more
    with atomic_write(out / "index.json") as tmp:
        tmp.write_text(json.dumps(index, indent=1) + "\n")
    return index


def index_folder(args) -> None:
    tars, entries = sorted(args.folder.glob("*.tar")), []
    if not tars:
        raise FuseDiTError(f"no *.tar in {args.folder}, which must be a folder of them")
    for entry in tqdm(in_parallel(index_entry, tars, args.workers), total=len(tars), unit="shard",
                      desc="indexing", disable=None):
        entries.append(entry)
        with open(args.folder / entry["name"], "rb") as tar:
            tar.seek(entry["offsets"][-1])
            if tar.read(512) != bytes(512):                # a tar's last words
                tqdm.write(f"{entry['name']} is damaged or cut short at byte "
                           f"{entry['offsets'][-1]:,}, after {entry['samples']} samples",
                           file=sys.stderr)
    if not sum(e["samples"] for e in entries):
        raise FuseDiTError(f"{args.folder}: no sample in any of {len(tars)} shards")
    print(f"{write_index(args.folder, entries)['samples']} samples in {len(tars)} shards: "
          f"{args.folder}/index.json")


def write_shards(out: Path, name: str, items, make, args, skipped=()) -> None:
    """Pack all items, shard by shard on all workers, then write the index.

    What stops it midway, Ctrl-C included, leaves nothing behind but shards of a killed process.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = [Shard(out / f"{name}-{k:06d}.tar", items[at:at + args.shard_size])
              for k, at in enumerate(range(0, len(items), args.shard_size))]
    entries, skipped = [], list(skipped)
    try:
        with tqdm(total=len(items), unit="image", desc="packing", disable=None) as bar:
            for entry, seen, skips in in_parallel(partial(write_shard, make), shards, args.workers):
                entries.append(entry)
                skipped += skips
                bar.update(seen)
        for entry in [e for e in entries if not e["samples"]]:
            (out / entry["name"]).unlink()
            entries.remove(entry)
        report(skipped)
        if not entries:
            raise FuseDiTError(f"nothing to pack: all {len(skipped)} were skipped, see above")
        reasons = Counter(why for why, _ in skipped).most_common()
        index = write_index(out, entries, **dict(skipped=dict(reasons)) if skipped else {})
    except BaseException:
        remove_shards(out, name)
        raise
    print(f"{index['samples']} images in {len(entries)} shards: {out}/*.tar")


def in_parallel(function, jobs: list, workers: int):
    """function of every job, in order, on `workers` processes."""
    workers = min(workers, len(jobs))
    if workers <= 1:                                       # also where there is nothing to do
        yield from map(function, jobs)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)               # Ctrl-C is the parent's to handle
    with multiprocessing.Pool(workers, signal.signal, ignore) as pool:
        yield from pool.imap(function, jobs)


def remove_shards(out: Path, name: str = "*") -> None:
    """Delete what write_shards wrote, and nothing else."""
    tar = f"{name}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"
    for pattern in ("index.json", "offsets.npy", tar, f".{tar}.*.tmp", ".index.json.*.tmp",
                    ".offsets.npy.*.tmp"):
        for path in out.glob(pattern):
            path.unlink()


def report(skipped: list) -> None:
    """Say on stderr how many items were left out, why, and which were the first."""
    for why, count in Counter(why for why, _ in skipped).most_common():
        names = [name for reason, name in skipped if reason == why]
        more = f" and {count - 5} more" if count > 5 else ""
        print(f"skipped {count}: {why}: {', '.join(names[:5])}{more}", file=sys.stderr)


def open_output(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something; with --overwrite, take old shards out of it."""
    if out.exists() and not out.is_dir():
        raise FuseDiTError(f"{out} is a file; OUT must be a folder")
    ours = re.compile(r"\.?(index\.json|offsets\.npy|(shapes|folder)-\d{6}\.tar)(\..*\.tmp)?")
    found = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if overwrite:
        found = [name for name in found if not ours.fullmatch(name)]
    if overwrite and not found:
        remove_shards(out)
    if found:
        state = "finished shards" if "index.json" in found else f"{found[0]}, not a finished run"
        raise FuseDiTError(f"{out} is not empty (it holds {state}); give a new folder" + (
            ", as --overwrite only replaces shards" if overwrite else
            " or --overwrite, which replaces shards and their index"))


# ---- shapes --------------------------------------------------------------------------------------

def shapes_sample(seed: int, image_size: int, i: int) -> dict:
    """Picture number i of a seed, whoever draws it: two phrasings of what may be said of it."""
    from demo import render, scenes
    rng = random.Random(f"shapes {seed} {i}")
    scene = scenes.training_scene(rng)
    picture = render.render(scene, scenes.place(scene, rng), image_size)
    captions = [scenes.caption(scenes.forget(scene, rng), rng) for _ in range(2)]
    return {"__key__": f"{i:09d}", "image.png": png(picture),
            "synthetic_caption.txt": captions[0].encode(),
            "original_caption.txt": captions[1].encode()}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def shapes(args) -> None:
    open_output(args.out, args.overwrite)
    make = partial(shapes_sample, args.seed, args.image_size)
    write_shards(args.out, "shapes", range(args.n), make, args)


# ---- a folder of images --------------------------------------------------------------------------

class Item(NamedTuple):
    """An image to pack and its captions by kind; as text, its name."""
    key: str
    name: str
    path: Path
    captions: dict[str, str]

    def __str__(self):
        return self.name


def folder_sample(item: Item) -> dict:
    """The sample of one image, or Skip. Bytes are kept where a loader reads them as they are."""
    try:
        data = item.path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            suffix = STORED.get(image.format)
            if suffix is None or image.getexif().get(0x0112, 1) != 1:      # or turned by a tag
                turned = ImageOps.exif_transpose(image)
                mode = turned.mode if turned.mode in ("L", "LA", "RGB", "RGBA") else "RGBA"
                data, suffix = png(turned.convert(mode)), "png"
    except Exception:                       # Pillow raises a dozen kinds on broken files
        raise Skip("unreadable image") from None
    try:                                    # JSON can hold half an emoji ("\ud83d")
        texts = {f"{kind}.txt": text.encode() for kind, text in item.captions.items()}
    except UnicodeEncodeError:
        raise Skip("caption is not Unicode") from None
    return {"__key__": item.key, f"image.{suffix}": data, **texts}


def text_rows(files: dict[str, Path], folder: Path, skipped: list) -> list[dict]:
    """A row for every image, of the .txt with its name; no file is the same as an empty one."""
    rows = []
    for name in list(files):
        path = (folder / name).with_suffix(".txt")
        try:
            rows.append(dict(image=name, caption=path.read_text("utf-8-sig")
                             if path.exists() else ""))
        except UnicodeDecodeError:
            skipped.append(("caption is not UTF-8", path.name))
            del files[name]
    return rows


def file_rows(path: Path, skipped: list) -> list:
    """The rows of a JSON, JSONL or CSV file; a broken line is skipped, a broken file an error."""
    rows = []
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if path.suffix == ".json":
            data = json.loads(text)
            if isinstance(data, list):
                return data
            # {"a.png": "a red fox"} or {"a.png": {"caption": "a red fox"}}
            return [(v if isinstance(v, dict) else {"caption": v}) | {"image": k}
                    for k, v in data.items()]
    except (ValueError, AttributeError, csv.Error) as e:
        raise FuseDiTError(f"cannot read {path} as {path.suffix[1:].upper()} in UTF-8: "
                           f"{e}") from None
    for n, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            skipped.append(("not JSON", f"line {n}"))
    return rows


def folder_items(files: dict[str, Path], rows: list, skipped: list) -> list[Item]:
    """What is to be packed; every row and image that is not goes into `skipped`, with why."""
    by_stem = {name.rsplit(".", 1)[0]: name for name in files}
    items, missing = [], dict(files)

    def field(row, names):
        """The first of the fields that is there, as one line of text; of a list, its first."""
        value = next((row[n] for n in names if row.get(n)), "") if isinstance(row, dict) else ""
        value = value[0] if isinstance(value, list) else value
        return " ".join(value.split()) if isinstance(value, str) else ""

    for n, row in enumerate(rows, 1):
        said = field(row, IMAGE_FIELDS).removeprefix("./")
        name = said if said in files else by_stem.get(said)
        captions = {kind: text for kind, text in [
            ("synthetic_caption", field(row, ["synthetic_caption"])),
            ("original_caption", field(row, CAPTION_FIELDS))] if text}
        if not said:
            skipped.append((f"no image name ({', '.join(IMAGE_FIELDS)})", f"row {n}"))
        elif name is None:
            skipped.append(("image is not there", said))
        elif not captions:
            skipped.append(("no caption", name))
        else:
            items.append(Item(f"{len(items):09d}", name, files[name], captions))
        missing.pop(name, None)
    skipped += [("no caption", name) for name in missing]
    return items


def folder(args) -> None:
    captions, skipped = args.captions or args.images, []
    for path in (args.images, captions):
        if not path.exists():
            raise FuseDiTError(f"no such file or folder: {path}")
    if not captions.is_dir() and captions.suffix not in (".json", ".jsonl", ".csv"):
        raise FuseDiTError(f"CAPTIONS is {captions}; it must end in .json, .jsonl or .csv, or be "
                           "a folder of .txt files")
    files = {p.relative_to(args.images).as_posix(): p for p in sorted(args.images.rglob("*"))
             if p.suffix.lower() in SUFFIXES}
    if not files:
        raise FuseDiTError(f"no images in {args.images} ({', '.join(sorted(SUFFIXES))})")
    rows = (text_rows(files, captions, skipped) if captions.is_dir() else
            file_rows(captions, skipped))
    items = folder_items(files, rows, skipped)
    open_output(args.out, args.overwrite)                  # last: it deletes
    random.Random(args.seed).shuffle(items)                # a folder is often sorted by kind
    write_shards(args.out, "folder", items, folder_sample, args, skipped)


# ---- the command line ----------------------------------------------------------------------------

def tiny_gemma(args) -> None:
    from demo import tiny_gemma as gemma
    gemma.make(args.out, args.steps, args.batch_size, args.lr, args.seed,
               pick_device(args.device), args.overwrite)


def arguments(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name, about, example):
        p = commands.add_parser(name, help=about, description=about, formatter_class=Help,
                                epilog=f"example:\n  python prepare_data.py {name} {example}")
        p.set_defaults(command=function)
        p.add_argument("--seed", type=int, default=0, help="of everything random")
        p.add_argument("--overwrite", action="store_true",
                       help="replace what an earlier run wrote to OUT")
        return p

    s = command(shapes, "shapes", "draw captioned scenes of coloured shapes, the demo's data",
                "shards/shapes -n 200000")
    s.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    s.add_argument("-n", type=positive, default=200000, help="how many pictures")
    s.add_argument("--image-size", type=positive, default=32, help="their side in pixels")
    f = command(folder, "folder", "pack a folder of images and their captions",
                "photos/ captions.jsonl shards/photos")
    f.add_argument("images", type=Path, metavar="IMAGES", help="folder, searched with all below it")
    f.add_argument("captions", type=Path, metavar="CAPTIONS", nargs="?",
                   help=".json, .jsonl or .csv with an image name and a caption a row (columns "
                   "`image` and `caption`, and `synthetic_caption` if a model wrote one), or a "
                   "folder of .txt files; left out: .txt files beside the images")
    f.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    for p in (s, f):
        p.add_argument("--shard-size", type=positive, default=2000, help="samples in a shard")
        p.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes; the "
                       "shards are the same whatever their number")
    i = command(index_folder, "index", "list the shards of a folder that came without index.json",
                "shards/others")
    i.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the *.tar")
    i.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    g = command(tiny_gemma, "tiny-gemma", "train the demo's frozen reader, a two-million-parameter "
                "Gemma 2, on text about scenes", "demo/gemma")
    g.add_argument("out", type=Path, metavar="OUT", help="folder for the model and its tokenizer")
    g.add_argument("--steps", type=positive, default=1200, help="training steps")
    g.add_argument("--batch-size", type=positive, default=64, help="texts a step")
    g.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return top.parse_args(argv)


def main():
    args = arguments()
    args.command(args)


if __name__ == "__main__":
    run(main, "--workers or --batch-size")

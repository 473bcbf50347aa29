"""What prepare_data.py packs: the paper's data sets, a folder, emoji, drawn shapes.

Each function settles which items make up which shard, and how an item becomes a sample; packing.py
does the rest. Items are read where they are packed, by a process that holds one shard's.
"""
import csv
import hashlib
import io
import itertools
import json
import random
import shutil
import sys
import warnings
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from tqdm import tqdm

import download
import packing
from fusedit import FuseDiTError
from loader import FORMATS, ends_well, read_sample, sample_offsets
from packing import Skip
from weights import atomic_write

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}     # kept as they are where they can
IMAGE_FIELDS = ("image", "file_name", "filename", "file", "path", "image_path", "name")
CAPTION_FIELDS = ("caption", "original_caption", "text", "prompt", "description")


# ---- a picture -----------------------------------------------------------------------------------

class Rules(NamedTuple):
    """Which pictures are taken, and what is made of them."""
    size: int                               # of the shorter side, at most; 0: as it is
    quality: int                            # of a JPEG that is written anew
    min_size: int                           # of the shorter side; below: skipped
    max_aspect: float                       # longer side / shorter side; above: skipped


def rules(args):
    return Rules(args.size, args.quality, args.min_size, args.max_aspect)


def opened(data, rules):
    """A picture's file, opened but not decoded, or Skip where it is not wanted."""
    if not data:
        raise Skip("empty file")
    try:
        with warnings.catch_warnings():     # from 90 megapixels; what is large may be an attack
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip("over 90 megapixels") from None
    except Exception:                       # Pillow raises a dozen kinds on broken files
        raise Skip("not an image") from None
    short, long = sorted(image.size)
    if short < rules.min_size:
        raise Skip(f"shorter side below {rules.min_size} pixels")
    if long > rules.max_aspect * short:
        raise Skip(f"longer than {rules.max_aspect:g} times its shorter side")
    if 0 < rules.size < short and long * rules.size > 65500 * short:
        raise Skip("longer than a JPEG can be")
    return image


def picture(data, rules):
    """(suffix, bytes) of a picture's file, or Skip. The bytes stay wherever they can.

    Every picture is decoded to its end, or it could be cut short; a JPEG that stays as it is at
    an eighth of its size, where little but the reading is left.
    """
    image = opened(data, rules)
    kind = "JPEG" if image.format == "MPO" else image.format    # a telephone's, with two pictures
    shrinks = 0 < rules.size < min(image.size)
    keep = kind in STORED and not shrinks and image.mode[0] not in "IF" and (   # 16, 32 bits
        kind == "JPEG" or getattr(image, "n_frames", 1) == 1)
    try:
        if kind == "JPEG":
            image.draft(None if shrinks else "L", (rules.size, rules.size) if shrinks else (1, 1))
        image.load()
        if keep:
            return STORED[kind], data
        if image.mode == "F":
            raise Skip("floating-point image")
        ImageOps.exif_transpose(image, in_place=True)
        image = plain(image)
    except (Skip, MemoryError):
        raise
    except Exception:
        raise Skip("damaged or cut short") from None
    if shrinks:
        scale = rules.size / min(image.size)
        image = image.resize([max(rules.size, round(n * scale)) for n in image.size],
                             Image.Resampling.BICUBIC)
    box = io.BytesIO()
    if image.mode in ("RGB", "L") and shrinks:
        image.save(box, "JPEG", quality=rules.quality)
        return "jpg", box.getvalue()
    image.save(box, "PNG", compress_level=1)
    return "png", box.getvalue()


def plain(image):
    """In one of the modes that every reader of JPEG and PNG knows, of 8 bits."""
    if image.mode[0] == "I":                # 16 bits, which Pillow itself would cut off at 255
        return image.convert("I").point(lambda v: v / 256).convert("L")
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "RGBA", "L", "LA") else image.convert("RGB")


def sample(key, suffix, data, captions):
    """A sample of captions by kind, of which those that are empty are left out."""
    texts = {kind: " ".join(text.split()) for kind, text in captions.items() if text}
    if not any(texts.values()):
        raise Skip("no caption")
    try:                                    # JSON can hold half an emoji ("\ud83d")
        texts = {f"{kind}.txt": text.encode() for kind, text in texts.items() if text}
    except UnicodeEncodeError:
        raise Skip("caption is not Unicode") from None
    return {"__key__": key.replace("/", "_").replace(".", "_"), f"image.{suffix}": data, **texts}


def read_file(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Skip("image is not there") from None
    except (OSError, ValueError) as e:      # ValueError: a name that no file can have
        raise Skip(f"cannot be read: {getattr(e, 'strerror', None) or 'its name'}") from None


class Item(NamedTuple):
    """A picture to pack and its captions by kind; as text, its name in the report."""
    name: str
    image: Path | bytes | Skip              # where it is, its file's bytes, or why there is none
    captions: dict
    key: str = ""

    def __str__(self):
        return self.name


def item_sample(how, item):
    if isinstance(item.image, Skip):
        raise item.image
    if not any(item.captions.values()):     # before the picture, which is dearer
        raise Skip("no caption")
    data = item.image if isinstance(item.image, bytes) else read_file(item.image)
    return sample(item.key or item.name, *picture(data, how), item.captions)


# ---- lists that are read in parts ----------------------------------------------------------------

class Lines:
    """Some lines of a file, by the bytes where they stand: read where they are packed."""

    def __init__(self, path, first, start, stop):
        self.path, self.first, self.start, self.stop = path, first, start, stop

    def __iter__(self):
        with open(self.path, "rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start)
        for n, line in enumerate(text.split(b"\n"), self.first):
            if line.strip():
                yield n, line


def cut_lines(path, size):
    """(parts of `size` lines, the number of lines that are not empty) of a file of any length."""
    parts, start, at, n, full = [], 0, 0, 0, 0
    with open(path, "rb") as file:
        for line in file:
            at, n, full = at + len(line), n + 1, full + bool(line.strip())
            if n % size == 0:
                parts.append(Lines(path, n - size + 1, start, at))
                start = at
    return parts + [Lines(path, n - n % size + 1, start, at)] * (at > start), full


def listing(folder):
    """Every image file below a folder, in order, as paths relative to it; a folder at a time."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):       # what a killed download was at, or a system's
            continue
        if path.is_dir():
            for name in listing(path):
                yield f"{path.name}/{name}"
        elif path.suffix.lower() in SUFFIXES:
            yield path.name


def need(*paths):
    for path in paths:
        if not path.exists():
            raise FuseDiTError(f"no such file or folder: {path}")


# ---- captions of millions of pictures ------------------------------------------------------------

class Captions:
    """Captions by key on disk, sorted by DuckDB, since millions would not fit into memory.

    Of keys that come twice the caption that sorts first counts, so the order of a file's rows
    does not.
    """

    def __init__(self, path):
        self.path = path

    @classmethod
    def of_files(cls, files, key, caption, path):
        """Read .jsonl, .jsonl.gz or .parquet files, those named or all in a folder, unless done."""
        import duckdb
        if path.exists():
            return cls(path)
        found = [files] if files.is_file() else sorted(
            p for kind in ("*.jsonl", "*.jsonl.gz", "*.parquet") for p in files.rglob(kind))
        if not found:
            raise FuseDiTError(f"no .jsonl, .jsonl.gz or .parquet file in {files}")
        for old in path.parent.glob(f".{path.name}.*"):    # of a killed run
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        names = ", ".join("'" + str(p).replace("'", "''") + "'" for p in found)
        rows = f"read_parquet([{names}])" if found[0].suffix == ".parquet" else (
            f"read_json([{names}], format='newline_delimited', ignore_errors=true, columns="
            f"{{'{key}': 'VARCHAR', '{caption}': 'VARCHAR'}})")
        print(f"sorting the captions of {files}, for a while", file=sys.stderr)
        with atomic_write(path) as tmp:
            with duckdb.connect(str(tmp), config=dict(
                    memory_limit="700MB", temp_directory=f"{tmp}.d", threads=2,
                    preserve_insertion_order="false")) as db:
                try:
                    db.execute(f'CREATE TABLE captions AS SELECT "{key}"::VARCHAR AS key, '
                               f'"{caption}"::VARCHAR AS caption FROM {rows} ORDER BY ALL')
                except duckdb.Error as e:
                    raise FuseDiTError(f"cannot read {files}: {str(e).splitlines()[0]}") from None
                for column, name in (("key", key), ("caption", caption)):
                    if not db.execute(f"SELECT count({column}) FROM captions").fetchone()[0]:
                        raise FuseDiTError(f"no row of {files} has a column {name}")
        return cls(path)

    def counts(self):
        """How many rows there are, keys, and rows that could not be read or have no key."""
        with self.open() as db:
            return dict(zip(("rows", "keys", "unreadable"), db.execute(
                "SELECT count(*), count(DISTINCT key), count(*) - count(key) FROM captions"
            ).fetchone(), strict=True))

    def open(self):
        import duckdb
        return duckdb.connect(str(self.path), read_only=True, config=dict(
            memory_limit="500MB", threads=1))

    def of(self, keys):
        """{key: caption} of those that have one."""
        keys = list(keys)
        with self.open() as db:
            return dict(db.execute(
                "SELECT key, min(caption) FROM captions WHERE key BETWEEN $low AND $high AND "
                "key IN (SELECT unnest($keys)) GROUP BY key",
                dict(low=min(keys), high=max(keys), keys=keys)).fetchall())


class Texts:
    """Captions by key in KEY.txt of a folder."""

    def __init__(self, folder):
        self.folder = folder

    def of(self, keys):
        found = {}
        for key in keys:
            try:
                found[key] = (self.folder / f"{key}.txt").read_text("utf-8", errors="replace")
            except FileNotFoundError:
                pass
        return found


# ---- CC12M ---------------------------------------------------------------------------------------

class Captioned:
    """Items with the new captions of their keys, looked up for some at a time."""

    def __init__(self, items, captions):
        self.items, self.captions = items, captions

    def __iter__(self):
        items = iter(self.items)
        while part := list(itertools.islice(items, 250)):
            said = self.captions.of({i.key.encode(errors="replace").decode() for i in part})
            for i in part:
                yield i._replace(captions=i.captions | dict(synthetic_caption=said.get(i.key)))


class TarSamples:
    """The samples KEY.jpg, KEY.txt, KEY.json of a tar as items; what is damaged, as one more."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        offsets = sample_offsets(self.path)
        with open(self.path, "rb") as tar:
            for i in range(len(offsets) - 1):
                key, files = read_sample(tar, offsets, i)
                yield Item(key, files.get("jpg", Skip("no image")), dict(
                    original_caption=files.get("txt", b"").decode(errors="replace")), key)
            if not ends_well(tar, offsets[-1]):
                yield Item(f"{self.path.name} from byte {offsets[-1]}", Skip("damaged tar"), {}, "")


def cc12m_sample(how, item):
    if not isinstance(item.image, Skip) and not item.captions["synthetic_caption"]:
        raise Skip("no synthetic caption")
    return item_sample(how, item)


def cc12m(args):
    need(args.images, args.captions)
    tars = sorted(args.images.rglob("*.tar"))
    if not tars:
        raise FuseDiTError(f"no *.tar in {args.images}, which must be a folder of cc12m-wds's")
    if not packing.begin(args, **said(args, tars=digest((p.name, p.stat().st_size)
                                                        for p in tars))):
        return
    captions = Captions.of_files(args.captions, args.key_column, args.caption_column,
                                 args.out / ".progress" / "captions.duckdb")
    packing.pack(args, "cc12m", [Captioned(TarSamples(path), captions) for path in tars],
                 partial(cc12m_sample, rules(args)), captions=captions.counts())


def said(args, **more):
    """What of the flags decides the output."""
    return {k: v for k, v in vars(args).items()
            if k not in ("out", "overwrite", "workers", "run", "packages", "registry")} | more


def digest(parts):
    """A short name of all that the parts say."""
    whole = hashlib.sha1()
    for part in parts:
        whole.update(f"{part}\n".encode(errors="surrogatepass"))
    return whole.hexdigest()


# ---- SA-1B ---------------------------------------------------------------------------------------

class Listed:
    """Items of a part of the list of images, below a folder."""

    def __init__(self, lines, folder):
        self.lines, self.folder = lines, folder

    def __iter__(self):
        for _, line in self.lines:
            name = line.decode(errors="surrogateescape")
            yield Item(name, self.folder / name, {}, Path(name).stem)


def sa1b(args):
    need(args.images, args.captions)
    folders = [p for p in sorted(args.images.iterdir()) if p.is_dir() and p.name[0] != "."]
    if not packing.begin(args, **said(args, folders=digest(
            (p.name, p.stat().st_mtime_ns) for p in folders or [args.images]))):
        return
    names, progress = args.out / ".progress" / "images.txt", args.out / ".progress"
    if not names.exists():
        with atomic_write(names) as tmp, open(tmp, "w", errors="surrogateescape") as file:
            for name in tqdm(listing(args.images), unit="image", desc="listing", disable=None):
                file.write(f"{name}\n")
    parts, total = cut_lines(names, args.shard_size)
    if not total:
        packing.remove(args.out)
        raise FuseDiTError(f"no images in {args.images} ({', '.join(sorted(SUFFIXES))})")
    texts = args.captions.is_dir() and not any(
        next(args.captions.glob(kind), None) for kind in ("*.parquet", "*.jsonl*", "*/*.parquet"))
    captions = Texts(args.captions) if texts else Captions.of_files(
        args.captions, args.key_column, args.caption_column, progress / "captions.duckdb")
    packing.pack(args, "sa1b", [Captioned(Listed(part, args.images), captions) for part in parts],
                 partial(item_sample, rules(args)), total=total,
                 **{} if texts else dict(captions=captions.counts()))


# ---- JourneyDB -----------------------------------------------------------------------------------

class Annotated:
    """Items of lines of the annotations: the prompt is the caption, and GPT's the other one."""

    def __init__(self, lines, folder):
        self.lines, self.folder = lines, folder

    def __iter__(self):
        for n, line in self.lines:
            try:
                row = json.loads(line)
                name, prompt = row["img_path"].removeprefix("./"), " ".join(row["prompt"].split())
                other = row["Task2"].get("Caption") if isinstance(row.get("Task2"), dict) else None
                other = other if isinstance(other, str) else None
                yield Item(name, self.folder / name, dict(
                    synthetic_caption=prompt, original_caption=other), name.rpartition(".")[0])
            except (ValueError, KeyError, TypeError, AttributeError):
                yield Item(f"line {n}", Skip("not JSON with img_path and prompt"), {})


def journeydb(args):
    need(args.annotations, args.images)
    parts, total = cut_lines(args.annotations, args.shard_size)
    if packing.begin(args, **said(args, rows=total, bytes=args.annotations.stat().st_size)):
        packing.pack(args, "journeydb", [Annotated(part, args.images) for part in parts],
                     partial(item_sample, rules(args)), total=total)


# ---- a folder of images --------------------------------------------------------------------------

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
            items.append(Item(name, files[name], captions, f"{len(items):09d}"))
        missing.pop(name, None)
    skipped += [("no caption", name) for name in missing]
    return items


def folder(args):
    captions, skipped = args.captions or args.images, []
    need(args.images, captions)
    if not captions.is_dir() and captions.suffix not in (".json", ".jsonl", ".csv"):
        raise FuseDiTError(f"CAPTIONS is {captions}; it must end in .json, .jsonl or .csv, or be "
                           "a folder of .txt files")
    files = {name: args.images / name for name in listing(args.images)}
    if not files:
        raise FuseDiTError(f"no images in {args.images} ({', '.join(sorted(SUFFIXES))})")
    rows = (text_rows(files, captions, skipped) if captions.is_dir() else
            file_rows(captions, skipped))
    items = folder_items(files, rows, skipped)
    if packing.begin(args, **said(args, items=digest((i.name, i.captions) for i in items))):
        random.Random(args.seed).shuffle(items)            # a folder is often sorted by kind
        packing.pack(args, "folder", cut(items, args.shard_size),
                     partial(item_sample, rules(args)), skipped, len(items))


def cut(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


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
    download.emoji_packages(args.packages, args.registry)
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


def shapes(args):
    if packing.begin(args, **said(args)):
        packing.pack(args, "shapes", cut(range(args.n), args.shard_size),
                     partial(shapes_sample, args.seed, args.image_size), total=args.n)

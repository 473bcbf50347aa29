"""Small versions of the data sets that prepare_data.py packs, in their published layouts.

They contain plain images, unusual image files and broken files.
"""
import gzip
import io
import json
import random
from typing import NamedTuple

import numpy as np
from PIL import Image
from tiny_shards import write_shard

KEPT = ["cmyk", "sixteen", "palette", "animated", "turned"]   # unusual, but valid images
LOST = {"zero": "empty file", "broken": "not an image", "short": "damaged or cut short",
        "huge": "over 90 megapixels"}
KINDS = ["plain", *KEPT, *LOST]
EVERY = 50                                  # one in 50 images is of each unusual kind


# ---- image files of all kinds --------------------------------------------------------------------

class ImageFile(NamedTuple):
    number: int
    kind: str                               # one of KINDS
    data: bytes                             # content of the file
    image: Image.Image | None               # the image it shows; None if it must be skipped


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(image, **options):
    return saved(image, "JPEG", quality=95, **options)


def scene(seed):
    """An image with a different colour in each quarter, so that a rotation changes it."""
    colours = np.random.RandomState(seed).randint(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(24, 0).repeat(32, 1))              # 64 x 48


def image_file(kind, seed):
    """An ImageFile of the given kind, whose number is the seed."""
    image = scene(seed)
    shown = image
    if kind == "plain":
        data = jpeg(image)
    elif kind == "cmyk":
        data = jpeg(image.convert("CMYK"))
    elif kind == "sixteen":
        gray = np.asarray(image.convert("L"))
        data = saved(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
        shown = Image.fromarray(gray)
    elif kind == "palette":
        data = saved(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")
    elif kind == "animated":
        data = saved(image, "GIF", save_all=True, append_images=[scene(seed + 1)])
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6                    # orientation: rotate by 90 degrees clockwise
        data = jpeg(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    else:
        data = broken_data(kind, image)
        shown = None
    return ImageFile(seed, kind, data, shown)


def broken_data(kind, image):
    if kind == "zero":
        return b""
    if kind == "broken":
        return b"<html>404</html>"
    if kind == "short":
        return jpeg(image)[:-30]
    assert kind == "huge"
    return saved(Image.new("1", (12000, 8000)), "PNG")


def image_files(count, first=0):
    """ImageFiles with numbers from `first`; 2 % are of each kind other than plain."""
    kinds = []
    for kind in KINDS[1:]:
        kinds += [kind] * (count // EVERY)
    kinds += ["plain"] * (count - len(kinds))
    random.Random(first).shuffle(kinds)
    return [image_file(kind, number) for number, kind in enumerate(kinds, first)]


def numbers_of_plain(image_files):
    return [one.number for one in image_files if one.kind == "plain"]


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- the data sets, as they are published --------------------------------------------------------

class DataSet(NamedTuple):
    """A data set on disk. The tests damage the captions of its first plain images."""
    image_files: list
    plain: list                             # numbers of the plain images


def cc12m(folder, n=100):
    """pixparse/cc12m-wds (KEY.jpg, KEY.json, KEY.txt) and CaptionEmporium's train.jsonl.gz.

    The first plain image has no synthetic caption, and the second has two.
    """
    (folder / "cc12m-wds").mkdir(parents=True)
    all_files = []
    for t in range(n // EVERY):
        in_tar = image_files(EVERY, first=1000 * t)
        all_files += in_tar
        samples = []
        for one in in_tar:
            key = f"{one.number:09d}"
            samples.append((key, {"jpg": one.data, "json": json.dumps(dict(key=key)),
                                  "txt": f"alt text of {one.number}"}))
        write_shard(folder / "cc12m-wds" / f"cc12m-train-{t:04d}.tar", samples)

    plain = numbers_of_plain(all_files)
    rows = []
    for one in all_files:
        if one.number != plain[0]:
            rows.append(dict(key=f"{one.number:09d}", url="http://x/y.jpg",
                             caption_llava_short=f"of {one.number}",
                             caption_llava=f"A long caption\nof {one.number}."))
    rows.append(dict(key=f"{plain[1]:09d}", caption_llava="A caption that sorts first."))
    for number in range(5000, 5007):
        rows.append(dict(key=f"{number:09d}", caption_llava="of no image"))
    random.Random(0).shuffle(rows)
    lines = [json.dumps(row) for row in rows]
    lines.insert(10, '{"key": "0000')       # a broken line
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return DataSet(all_files, plain)


def sa1b(folder, n=100):
    """The output of sa1b-download (sa_000000/sa_1.jpg) and captions as sa_1.txt.

    The first plain image has no caption.
    """
    all_files = image_files(n)
    for number, _, data, _ in all_files:
        name = f"sa_{number}"
        write_file(folder / "images" / f"sa_{number // 40:06d}" / f"{name}.jpg", data)
        write_file(folder / "captions" / f"{name}.txt", f"The image shows {number}.\n")
    plain = numbers_of_plain(all_files)
    (folder / "captions" / f"sa_{plain[0]}.txt").unlink()
    return DataSet(all_files, plain)


def journeydb_name(number):
    return f"{number % 3:03d}/{number:08x}-{number}"


def journeydb(folder, n=100):
    """train_anno_realease_repath.jsonl, and imgs/000/NAME.jpg, ...

    The row of the first plain image names a missing file; that of the second has no GPT caption.
    """
    all_files = image_files(n)
    rows = []
    for number, _, data, _ in all_files:
        name = f"{journeydb_name(number)}.jpg"
        write_file(folder / "imgs" / name, data)
        rows.append(dict(img_path=f"./{name}", Task1={}, Task3={},
                         prompt=f"prompt {number} --ar 3:2",
                         Task2=dict(Caption=f"GPT's caption of {number}.")))
    plain = numbers_of_plain(all_files)
    rows[plain[0]]["img_path"] = "./002/gone.jpg"
    del rows[plain[1]]["Task2"]
    lines = [json.dumps(row) for row in rows]
    lines += ['{"img_path":', "", '{"prompt": "no path"}']
    write_file(folder / "train_anno_realease_repath.jsonl", "\n".join(lines) + "\n")
    return DataSet(all_files, plain)


def photo_folder(folder):
    """A folder of images with .txt files beside them."""
    for number, _, data, _ in image_files(150):
        write_file(folder / "photos" / f"{number}.jpg", data)
        write_file(folder / "photos" / f"{number}.txt", f"photo {number}")


def emoji_packages(folder):
    """The unpacked packages: 30 concepts, of which 5 have one style and 1 has skin tones."""
    words = []
    packages = folder / "packages"
    for i in range(30):
        code = f"1F{600 + i}"
        skins = []
        if i == 7:
            for tone in (1, 2, [1, 5]):
                label = "thing 7: light skin tone"
                skins.append(dict(label=label, hexcode=f"{code}-1F3FB", tone=tone))
        tags = [f"tag{i}", "thing"]
        words.append(dict(label=f"thing {i}", hexcode=code, tags=tags, skins=skins, group=7))
        write_file(packages / "google" / f"{code.lower()}-fe0f.png", saved(scene(i), "PNG"))
        if i < 25:
            write_file(packages / "fluent" / f"{code.lower()}.webp", saved(scene(i), "WEBP"))
    write_file(packages / "google" / "1f607-1f3fb.png", saved(scene(7), "PNG"))
    write_file(packages / "words" / "data.json", json.dumps(words))

"""Images have the same pixels when they are packed, loaded, checked, encoded and compared."""
import io
import json
import sys
import types
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from image_cases import (
    COLOURS,
    SIDE,
    Case,
    all_cases,
    grey_tiff,
    images_of_all_modes,
    quadrants,
    saved,
)
from PIL import Image
from test_latents import encode
from test_prepare_data import command, pack, read_shards
from tiny_shards import ORIGINAL_CAPTIONS, batch_keys, index, tiny_batches, write_shard

from fusedit import FuseDiTError
from fusedit_lib.data import check, images, packing
from fusedit_lib.data.latents import ShardImages
from fusedit_lib.evaluation import metrics

RULES = images.ImageRules(size=0, quality=95, min_size=1, max_aspect=1000)


@pytest.fixture(scope="module")
def cases():
    return all_cases()


def assert_shows(case, pixels):
    """Assert that uint8 pixels [16,16,3] are those of a Case."""
    difference = np.abs(np.asarray(pixels).astype(int) - case.expected).max()
    assert difference <= case.tolerance, case.name


@pytest.fixture
def shard(cases, tmp_path):
    """The path of an indexed shard with the files of all cases, unchanged."""
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = []
    for case in cases:
        stem, _, suffix = case.name.rpartition(".")
        captions = {"original_caption.txt": f"a star {stem}"}
        samples.append((stem, {f"image.{suffix}": case.data} | captions))
    write_shard(folder / "s-000000.tar", samples)
    index(folder)
    return folder / "s-000000.tar"


# ---- the five paths ------------------------------------------------------------------------------

def test_the_cases_are_of_all_formats(cases):
    assert len(cases) > 130
    formats = {images.open_image(case.data).format for case in cases}
    writable = images.FORMATS.keys() & Image.SAVE.keys() - {"ICNS"}
    assert formats == writable, formats ^ writable


def test_images_in_memory_of_all_modes():
    for mode, (image, colours) in images_of_all_modes().items():
        pixels = np.asarray(images.to_rgb(images.decode(image)))
        assert_shows(Case(mode, b"", quadrants(np.array(colours)), 2), pixels)


def test_packing(cases):
    for case in cases:
        suffix, data = images.pack_image(case.data, RULES)
        assert suffix in ("jpg", "png", "webp")
        assert_shows(case, images.read_image(data))
        assert_shows(case, images.read_square(data, SIDE).movedim(0, -1))


def test_training_on_other_peoples_shards(cases, shard, gemma_folder):
    batch = tiny_batches(gemma_folder, shard.parent, *ORIGINAL_CAPTIONS, micro_batch=len(cases))[0]
    assert not batch["bad"]
    assert not batch["notes"]
    pixels = dict(zip(batch_keys(batch), batch["pixels"].movedim(1, -1), strict=True))
    for case in cases:
        assert_shows(case, pixels[case.name.rpartition(".")[0]])


def test_check(cases, shard):
    args = Namespace(image_key="", caption_key="")
    contents = check.read_shard(shard, **vars(args))
    assert not contents.problems
    assert not contents.notes
    for i, case in enumerate(cases):
        page = Image.new("RGB", (SIDE, 200))
        sample = check.read_shard_sample(contents, i)
        check.draw_sample(page, (0, 0), SIDE, sample, args)
        assert_shows(case, page.crop((0, 0, SIDE, SIDE)))


def test_encoding(cases, shard):
    offsets = packing.index_entry(shard)["offsets"]
    stored = ShardImages(shard, offsets, SIDE, "bicubic", "")
    for i, case in enumerate(cases):
        pixels, readable, notes = stored[i]
        assert readable
        assert not notes
        assert_shows(case, pixels.movedim(0, -1))


def pixels_as_features(side):
    """An Extractor whose features are the pixels of an image of side x side."""
    def prepare(image):
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image))
    return metrics.Extractor("pixels", prepare, lambda x: x.reshape(-1, side * side * 3))


def features(folder, side=SIDE):
    paths = metrics.image_files(folder)
    extractor = pixels_as_features(side)
    return paths, metrics.extract_features(paths, extractor, torch.device("cpu"), 7, 3)


def test_metrics(cases, tmp_path):
    for case in cases:
        (tmp_path / case.name).write_bytes(case.data)
    paths, found = features(tmp_path)
    by_name = {path.name: pixels for path, pixels in zip(paths, found, strict=True)}
    for case in cases:
        assert_shows(case, by_name[case.name].reshape(SIDE, SIDE, 3))


def test_16_bits_are_the_same_images_as_8_bits(tmp_path):
    """The distance of their folders was 149.9, because Pillow's conversion clips at 255."""
    rng = np.random.default_rng(0)
    for k in range(6):
        pixels = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
        for name, array in (("8", pixels), ("16", pixels.astype(np.uint16) * 257)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{k}.png")
    _, narrow = features(tmp_path / "8")
    _, wide = features(tmp_path / "16")
    assert narrow.equal(wide)


# ---- formats -------------------------------------------------------------------------------------

# Suffixes that Pillow registers and that are left out, for the reasons given above FORMATS.
LEFT_OUT = set(".eps .ps .emf .wmf .bufr .grib .h5 .hdf .mpg .mpeg .iim .fit .fits .im .gbr .pdf "
               ".palm .heic .heif .hif .jxl".split())


def test_every_format_of_pillow_is_read_or_left_out_for_a_reason():
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    assert known - LEFT_OUT <= images.SUFFIXES
    assert not images.FORMATS.keys() & {"EPS", "WMF", "IPTC"}


def folder_of(tmp_path, files):
    """A folder with files {name: bytes}, each with a caption in a .txt file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a red fox")
    return folder


def test_a_packed_png_has_no_profile_of_other_channels():
    """Pillow's profile of a LAB image contains the time, so the bytes would differ every second."""
    rules = images.ImageRules(size=0, quality=95, min_size=1, max_aspect=1000)
    for mode in ("LAB", "CMYK"):
        buffer = io.BytesIO()
        image = Image.new("RGB", (8, 8), "orange").convert(mode)
        image.save(buffer, "TIFF", icc_profile=bytes(128))
        suffix, data = images.pack_image(buffer.getvalue(), rules)
        assert suffix == "png" and "icc_profile" not in Image.open(io.BytesIO(data)).info


def test_all_suffixes_are_packed(tmp_path):
    jpeg = saved(Image.fromarray(quadrants(COLOURS)), "JPEG")
    tga = saved(Image.fromarray(quadrants(COLOURS)), "TGA")
    photos = folder_of(tmp_path, {"a.jfif": jpeg, "b.JPE": jpeg, "c.tga": tga, "d.heic": jpeg})
    pack("folder", photos, tmp_path / "out")
    samples, index = read_shards(tmp_path / "out")
    assert index["skipped"] == {}
    stored = [dict(sample) for sample in samples.values()]
    assert sum(sample.get("image.jpg") == jpeg for sample in stored) == 3
    assert sum("image.png" in sample for sample in stored) == 1


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
JXL = b"\xff\x0a" + bytes(99)


@pytest.fixture
def no_plugins(monkeypatch):
    for plugin in images.PLUGINS:
        monkeypatch.setitem(sys.modules, plugin.module, None)
    images.register.cache_clear()


def test_what_needs_a_plugin_is_skipped_with_its_pip_command(tmp_path, no_plugins):
    """Also if the suffix is another format's."""
    plain = saved(Image.fromarray(quadrants(COLOURS)), "PNG")
    photos = folder_of(tmp_path, {"a.heic": HEIC, "b.jpg": HEIC, "c.jxl": JXL, "d.png": plain})
    pack("folder", photos, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == {"HEIC image: pip install pillow-heif": 2,
                                 "JPEG XL image: pip install pillow-jxl-plugin": 1}
    with pytest.raises(FuseDiTError, match="a.heic: HEIC image: pip install pillow-heif"):
        features(photos)


def test_a_plugin_is_used_if_it_is_installed(monkeypatch):
    from PIL import PngImagePlugin

    class Heif(PngImagePlugin.PngImageFile):
        """A PNG after the signature of a HEIC file."""
        format = "HEIF"

        def __init__(self, file, name):
            file.read(len(HEIC))
            super().__init__(io.BytesIO(file.read()), name)

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: Image.register_open("HEIF", Heif)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    images.register.cache_clear()
    data = HEIC + saved(Image.fromarray(quadrants(COLOURS)), "PNG")
    assert_shows(Case("a.heic", data, quadrants(COLOURS), 0), images.read_image(data))
    suffix, stored = images.pack_image(data, RULES)
    assert suffix == "png"
    assert_shows(Case("a.heic", data, quadrants(COLOURS), 0), images.read_image(stored))
    images.register.cache_clear()


def test_real_heic_files():
    heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(quadrants(COLOURS))).save(buffer, quality=-1, chroma=444)
    images.register.cache_clear()
    case = Case("a.heic", buffer.getvalue(), quadrants(COLOURS), 6)
    assert_shows(case, images.read_image(case.data))


# ---- what is refused -----------------------------------------------------------------------------

def refused():
    """{name: (bytes, reason)} of images whose white is not defined."""
    signed = quadrants(np.array([-5, 0, 100, 32000], np.int16))
    numbers = quadrants(np.array([0, 1, 2, 3], np.int32))
    return {
        "signed.tif": (grey_tiff("<", 16, signed.tobytes(), 2), "signed 16-bit image"),
        "signed-big.tif": (grey_tiff(">", 16, signed.astype(">i2").tobytes(), 2),
                           "signed 16-bit image"),
        "integers.tif": (saved(Image.fromarray(numbers), "TIFF"), "32-bit image"),
        "floats.tif": (saved(Image.fromarray(numbers.astype(np.float32)), "TIFF"),
                       "floating-point image"),
        "floats.pfm": (saved(Image.fromarray(numbers.astype(np.float32)), "PPM"),
                       "floating-point image"),
    }


@pytest.mark.parametrize("name", refused())
def test_images_without_a_defined_white_are_refused_everywhere(name, tmp_path, gemma_folder):
    data, reason = refused()[name]
    for shrink in (0, 8):
        with pytest.raises(images.Skip, match=f"^{reason}$"):
            images.pack_image(data, RULES._replace(size=shrink))
    plain = saved(Image.fromarray(quadrants(COLOURS)), "PNG")
    folder = tmp_path / "shards"
    folder.mkdir()
    captions = {"original_caption.txt": "a star"}
    write_shard(folder / "s.tar", [("a", {"image.tif": data} | captions),
                                   ("b", {"image.png": plain} | captions)])
    index(folder)
    out, _ = command("check", folder, code=1)
    assert f"1 x {reason}: a of s.tar" in out
    batch = tiny_batches(gemma_folder, folder, micro_batch=2)[0]
    assert [line.rpartition(": ")[2] for line in batch["bad"]] == [reason]
    offsets = packing.index_entry(folder / "s.tar")["offsets"]
    _, readable, _ = ShardImages(folder / "s.tar", offsets, SIDE, "bicubic", "")[0]
    assert not readable
    (folder / name).write_bytes(data)
    (folder / "b.png").write_bytes(plain)
    with pytest.raises(FuseDiTError, match=f"cannot read .*{name}: {reason}"):
        features(folder)


# ---- notes ---------------------------------------------------------------------------------------

NOTE = "damaged EXIF block, ignored"


def cut_exif(colours=COLOURS):
    """A JPEG whose EXIF block ends too early."""
    exif = Image.Exif()
    exif[0x10F] = "the maker of the camera"
    exif[0x112] = 1
    return saved(Image.fromarray(quadrants(colours)), "JPEG", exif=exif.tobytes()[:-9])


def test_the_warnings_of_pillow_become_notes():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images.read_image(cut_exif())
        assert len(caught) == 1             # as before
        with images.Notes() as notes:
            for _ in range(3):
                images.read_image(cut_exif())
            assert notes.take() == [NOTE]
            assert notes.take() == []
            warnings.warn("something else", stacklevel=1)
        assert [str(warning.message) for warning in caught[1:]] == ["something else"]
        images.read_image(cut_exif())
        assert len(caught) == 3


def test_an_exif_block_that_cannot_be_written_again_is_a_note():
    """exif_transpose turns the image and then raises an error, for which the image was skipped."""
    exif = Image.Exif()
    exif[0x10F] = "the maker of the camera"
    exif[0x112] = 6
    width_is_text = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    stored = np.ascontiguousarray(np.rot90(quadrants(COLOURS)))
    data = saved(Image.fromarray(stored), "JPEG", exif=width_is_text)
    with images.Notes() as notes:
        assert_shows(Case("a.jpg", data, quadrants(COLOURS), 6), images.read_image(data))
        assert notes.take() == [NOTE]


def test_notes_are_counted_everywhere(tmp_path, gemma_folder, capsys):
    """In report.json, by check, in batches, by encode and for FID; each kind is one line."""
    plain = saved(Image.fromarray(quadrants(COLOURS)), "JPEG")
    files = {f"{k:02d}.jpg": cut_exif() for k in range(9)} | {"plain.jpg": plain}
    photos = folder_of(tmp_path, files)
    out = tmp_path / "out"
    _, err = command("folder", photos, out, "--workers", 1)
    report = json.loads((out / "report.json").read_text())
    assert report["notes"] == {NOTE: 9}
    assert sorted(report["note_keys"][NOTE]) == sorted(files)[:9]
    assert err.count(NOTE) == 1
    assert "Warning" not in err

    text, err = command("check", out)
    assert text.count(f"9 x {NOTE}: ") == 1
    assert not err.strip()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batch = tiny_batches(gemma_folder, out, micro_batch=10)[0]
    assert batch["notes"] == [NOTE] * 9

    encode(out)
    assert capsys.readouterr().err.count(f"noted {NOTE}: 9 images\n") == 1

    features(photos)
    err = capsys.readouterr().err
    assert err == f"noted {NOTE}: 9 images, such as {photos / '00.jpg'}\n"


def test_what_libtiff_writes_to_stderr_is_not_shown(tmp_path, capfd):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    data = saved(Image.fromarray(pixels), "TIFF", compression="tiff_lzw")
    with pytest.raises(images.Skip, match="damaged or cut short"):
        images.read_image(data[:12] + b"\x55" * 200 + data[212:])
    assert capfd.readouterr().err == ""

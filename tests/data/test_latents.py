"""prepare_data.py encode, whose latents replace images in training, and prepare_data.py check."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import REFERENCE, assert_near, tiny_vae
from launching import flags, launch_all, losses
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_datasets import kill
from test_prepare_data import command, files, pack
from tiny_shards import index, numbered, png, scene, write_shard

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.data import images, latents
from fusedit_lib.data.shards import ShardReader, can_read_latents, expand_shards, read_index
from fusedit_lib.folders import vae_fingerprint
from fusedit_lib.pretrained import load_model
from fusedit_lib.sampling import generate
from fusedit_lib.train.config import RunConfig
from fusedit_lib.vae import load_vae

VAE = REFERENCE / "released_layout" / "pipeline" / "vae"
UNREADABLE = (1, 3)                         # index of the shard, index of the sample


@pytest.fixture
def shards(tmp_path):
    """Three shards of 8 images each, which are not square; one image is unreadable."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for s in range(3):
        samples = []
        for i in range(8):
            pixels = rng.randint(0, 256, (40 + i, 70, 3), dtype=np.uint8)
            data = png(Image.fromarray(pixels))
            if (s, i) == UNREADABLE:
                data = data[:500]
            samples.append(scene(f"n{s}{i}", **{"image.png": data}))
        write_shard(folder / f"s-{s:06d}.tar", samples)
    index(folder)
    return folder


ENCODE = ["--vae", VAE, "--image-size", 32, "--workers", 1, "--dtype", "float32"]


def encode(folder, *more):
    pack("encode", folder, *ENCODE, "--batch-size", 3, *more)


# ------------------------------------------------------------------------------ encode

def test_latents_are_the_posterior_of_the_central_square(shards):
    encode(shards)
    vae = load_vae(VAE)
    reader = ShardReader(expand_shards(str(shards)), 2, "", latents=True)
    for s in range(3):
        for i in range(8):
            sample = reader.read(s, i)
            stored = sample["latents"]
            if (s, i) == UNREADABLE:
                assert stored is None
                continue
            pixels = images.read_square(sample["image.png"], 32)[None].float() / 127.5 - 1
            moments = torch.cat(vae.moments(pixels), 1)[0]
            assert stored.dtype == torch.bfloat16
            # Rounded to bf16; convolutions over 3 images and over 1 may also differ slightly.
            assert_near(stored, moments, 2**-8)
            noise = torch.randn(1, *moments[:16].shape)
            of_latents = vae.encode(stored.float()[None], noise)
            assert torch.allclose(of_latents, vae.encode(pixels, noise), atol=0.05)


def test_the_index_lists_the_latents(shards):
    encode(shards)
    entry = json.loads((shards / "index.json").read_text())["shards"][1]
    latents = shards / "s-000001.latents.safetensors"
    assert entry["latents"] == dict(
        vae=vae_fingerprint(VAE), image_size=32, resize="bicubic", bytes=latents.stat().st_size)
    assert load_file(latents)["whole"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_the_compile_flag_compiles_the_vae(shards, monkeypatch):
    compiled = []
    monkeypatch.setattr(backend, "compile_vae", compiled.append)
    encode(shards, "--overwrite")
    assert not compiled
    encode(shards, "--overwrite", "--compile")
    assert len(compiled) == 1
    assert hasattr(compiled[0], "encoder")


def test_an_interrupted_run_says_how_to_resume(shards, capsys, monkeypatch):
    encode_shard = latents.encode_shard

    def interrupt(tar, *args):
        if tar.name == "s-000001.tar":
            raise KeyboardInterrupt
        return encode_shard(tar, *args)

    monkeypatch.setattr(latents, "encode_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(shards)
    assert "stopped: 1 of 3 shards are encoded; repeat the command to resume\n" in (
        capsys.readouterr().err)
    monkeypatch.undo()
    encode(shards)
    assert len(list(shards.glob("*.latents.safetensors"))) == 3


@pytest.mark.slow
def test_eight_kills_do_not_change_the_bytes(tmp_path, capsys):
    whole = numbered(tmp_path / "whole", shards=12)
    killed = numbered(tmp_path / "killed", shards=12)
    pack("encode", whole, *ENCODE)
    kill(["encode", killed, *ENCODE], 0.3)
    assert files(killed) == files(whole)
    capsys.readouterr()
    with pytest.raises(FuseDiTError, match="12 shards.*a different VAE, image size.*--overwrite"):
        encode(whole, "--image-size", "16")
    encode(whole, "--image-size", "16", "--overwrite")
    assert expand_shards(str(whole))[0].latents["image_size"] == 16


def test_latents_remember_the_filter(shards, capsys):
    """Latents are only used, and only kept, with the filter that they were made with."""
    run = RunConfig(data=(str(shards),), resize="bilinear")
    encode(shards)
    assert not can_read_latents(expand_shards(str(shards)), run, Config(), 0)
    assert "their resize is bicubic, not bilinear" in capsys.readouterr().err
    with pytest.raises(FuseDiTError, match="3 shards.*--resize.*--overwrite"):
        encode(shards, "--resize", "bilinear")

    encode(shards, "--resize", "bilinear", "--overwrite")
    reader = ShardReader(expand_shards(str(shards)), 2, "", latents=True)
    sample = reader.read(0, 0)
    pixels = images.read_square(sample["image.png"], 32, resize="bilinear")[None].float()
    moments = torch.cat(load_vae(VAE).moments(pixels / 127.5 - 1), 1)[0]
    assert_near(sample["latents"], moments, 2**-8)
    assert can_read_latents(expand_shards(str(shards)), run, Config(), 0)
    assert not can_read_latents(expand_shards(str(shards)), RunConfig(), Config(), 0)


def test_latents_of_an_earlier_version_are_bicubic(shards):
    """They do not name their filter."""
    encode(shards)
    path = shards / "index.json"
    content = json.loads(path.read_text())
    for shard in content["shards"]:
        del shard["latents"]["resize"]
        latents = shards / shard["name"].replace(".tar", ".latents.safetensors")
        with safe_open(latents, "pt") as file:
            description = json.loads(file.metadata()["encoded"])
        del description["resize"]
        save_file(load_file(latents), latents, {"encoded": json.dumps(description)})
    path.write_text(json.dumps(content))
    read_index.cache_clear()
    listed = expand_shards(str(shards))
    assert can_read_latents(listed, RunConfig(), Config(), 0)
    assert not can_read_latents(listed, RunConfig(resize="bilinear"), Config(), 0)
    before = {path: path.stat().st_mtime_ns for path in shards.glob("*.safetensors")}
    encode(shards)                          # keeps them
    assert before == {path: path.stat().st_mtime_ns for path in shards.glob("*.safetensors")}


# ------------------------------------------------------------------------------ training on them

WATCH_VAE = """
from fusedit_lib.vae import VAE
move = VAE.to
def watched(vae, *args, **kwargs):
    if args:
        print("VAE to", args[0])
    return move(vae, *args, **kwargs)
VAE.to = watched
"""


def test_stored_latents_need_no_weights_of_the_vae():
    """So that the VAE may stay on the CPU while a GPU trains on them."""
    torch.manual_seed(0)
    moments = torch.randn(2, 32, 4, 4)
    noise = torch.randn(2, 16, 4, 4)
    wanted = load_vae(VAE).encode(moments, noise)
    assert load_vae(VAE, "meta").encode(moments, noise).equal(wanted)


def test_training_from_latents_matches_training_from_pixels(shards, gemma_folder, tmp_path):
    encode(shards)
    shape = [f"vae={VAE}", "in_channels=16", "image_size=32", "patch_size=2"]
    more = ["--steps", "10", "--sample-every", "0", "--val-data", str(shards), "--val-every", "5",
            "--set", *shape, "--max-skipped", "0.2"]
    from_latents = flags(gemma_folder, shards, tmp_path / "latents", *more)
    from_pixels = flags(gemma_folder, shards, tmp_path / "pixels", *more, "--no-latents")
    latents, pixels = launch_all([(from_latents, WATCH_VAE), (from_pixels, WATCH_VAE)])
    # moved for each of the two validations and back; to read latents, it stays on the CPU
    assert latents.stdout.count("VAE to cpu") == 1 + 2 * 2
    assert pixels.stdout.count("VAE to cpu") == 2 * 2
    # once for training and once for validation
    assert latents.stderr.count("reading the latents beside the shards") == 2
    assert "reading the latents" not in pixels.stderr
    a = losses(tmp_path / "latents")
    b = losses(tmp_path / "pixels")
    assert len(a) == 10
    assert a != b
    assert a == pytest.approx(b, rel=1e-3)


def test_a_vae_of_factor_4_encodes_trains_and_samples(shards, gemma_folder, tmp_path):
    """With a normalisation per channel, which training from latents applies as well."""
    vae = tiny_vae(tmp_path / "vae", 3, latents_mean=[0.1, 0.2, 0.3, 0.4],
                   latents_std=[0.5, 0.25, 2, 1])
    pack("encode", shards, *ENCODE, "--vae", vae)
    stored = load_file(shards / "s-000000.latents.safetensors")["latents"]
    assert stored.shape == (8, 2 * 4, 32 // 4, 32 // 4)

    shape = [f"vae={vae}", "in_channels=4", "image_size=32", "patch_size=2"]
    more = ["--steps", "3", "--sample-every", "3", "--val-data", str(shards), "--val-every", "3",
            "--set", *shape, "--max-skipped", "0.2"]
    from_latents = flags(gemma_folder, shards, tmp_path / "latents", *more)
    from_pixels = flags(gemma_folder, shards, tmp_path / "pixels", *more, "--no-latents")
    launch_all([from_latents, from_pixels])
    assert losses(tmp_path / "latents") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-2)

    model = load_model(tmp_path / "pixels")
    image, = generate(model, ["a star"], [0], vae=load_vae(vae), steps=2)
    assert image.size == (32, 32)
    grid = Image.open(next((tmp_path / "pixels" / "samples").glob("*.png")))
    assert min(grid.size) >= 32


class Config:
    """The part of a model's config that can_read_latents uses."""

    def __init__(self, vae=VAE, image_size=32):
        self.vae = str(vae)
        self.image_size = image_size


def test_unsuitable_latents_are_reported_and_not_used(shards, tmp_path, capsys):
    encode(shards)
    run = RunConfig(data=(str(shards),), image_size=32)
    listed = expand_shards(str(shards))
    assert can_read_latents(listed, run, Config(), 0)
    assert "reading the latents" in capsys.readouterr().err

    other_vae = tmp_path / "vae"
    shutil.copytree(VAE, other_vae)
    weights = other_vae / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    partly = [listed[0]._replace(latents=None), *listed[1:]]
    cases = [
        (listed, Config(image_size=64), "center", "their image_size is 32, not 64"),
        (listed, Config(vae=other_vae), "center", "their vae is"),
        (listed, Config(), "random", "--crop random needs"),
        (partly, Config(), "center", "some shards have no latents"),
    ]
    for case_shards, config, crop, message in cases:
        run.crop = crop
        assert not can_read_latents(case_shards, run, config, 0)
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------ check

def test_check_reports_contents_and_problems(shards, tmp_path):
    write_shard(shards / "s-000003.tar", [
        scene("n00", "blue"),
        scene("b", "blue", **{"image.png": None}),
        scene("c", "blue", **{"synthetic_caption.txt": None, "original_caption.txt": None}),
    ])
    whole = (shards / "s-000002.tar").read_bytes()
    (shards / "s-000002.tar").write_bytes(whole[:-20_000])
    grid = tmp_path / "grid.png"
    out, _ = command("check", shards, "--grid", grid, "--workers", 2, code=1)
    count = 16 + 7 + 3                      # the cut shard has seven, the last without captions
    for message in (
        f"{count} samples in 4 shards",
        "shorter side: 16 to 47",
        "1 x damaged or cut short: n13 of s-000001.tar",
        "1 x no image: b of s-000003.tar",
        "2 x no caption: n26 of s-000002.tar, c of s-000003.tar",
        "1 x damaged or truncated shard",
        "1 keys occur more than once, such as n00",
        "index.json was wrong and has been rewritten",
        f"synthetic_caption: {count - 2}, length 3 to 3",
    ):
        assert message in out, out
    with Image.open(grid) as image:
        image.load()
        assert image.size == (1208, 1048)
        assert len(set(image.convert("L").getdata())) > 50
    out, _ = command("check", shards, code=1)
    assert "index.json is correct" in out


def test_check_repairs_the_index(shards):
    for name in ("s-000001.tar", "s-000002.tar", "index.json"):
        (shards / name).unlink()
    out, _ = command("check", shards)
    assert "8 samples in 1 shards" in out
    assert "index.json was missing and has been rewritten" in out
    out, _ = command("check", shards)
    assert "is correct" in out

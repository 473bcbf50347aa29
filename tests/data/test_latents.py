"""prepare_data.py encode: latents beside the shards train as their pictures would; check."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import REFERENCE, assert_near
from launching import flags, launch_all, losses
from PIL import Image
from safetensors.torch import load_file
from test_datasets import kill
from test_prepare_data import command, files, pack
from tiny_shards import index, numbered, png, scene, write_shard

from fusedit import FuseDiTError
from fusedit_lib import backend
from fusedit_lib.data import images
from fusedit_lib.data.shards import Tars, encoded, expand_shards
from fusedit_lib.pretrained import vae_fingerprint
from fusedit_lib.train.config import RunConfig
from fusedit_lib.vae import load_vae

VAE = REFERENCE / "released_layout" / "pipeline" / "vae"


@pytest.fixture
def pictures(tmp_path):
    """Three shards of pictures that are not square, with one that cannot be read."""
    folder, rng = tmp_path / "data", np.random.RandomState(0)
    folder.mkdir()
    for s in range(3):
        samples = [scene(f"n{s}{i}", "red", **{"image.png": png(Image.fromarray(rng.randint(
            0, 256, (40 + i, 70, 3), dtype=np.uint8)))}) for i in range(8)]
        if s == 1:
            samples[3][1]["image.png"] = samples[3][1]["image.png"][:500]
        write_shard(folder / f"s-{s:06d}.tar", samples)
    index(folder)
    return folder


def encode(folder, *more):
    pack("encode", folder, "--vae", VAE, "--image-size", 32, "--batch-size", 3, "--workers", 1,
         "--dtype", "float32", *more)


def test_latents_are_the_posterior_of_the_central_square(pictures):
    encode(pictures)
    vae, tars = load_vae(VAE), Tars(expand_shards(str(pictures)), 2, "", True)
    for s in range(3):
        for i in range(8):
            sample = tars.read(s, i)
            if (s, i) == (1, 3):
                assert sample["latents"] is None
                continue
            pixels = images.read_square(sample["image.png"], 32)[None].float() / 127.5 - 1
            want = torch.cat(vae.moments(pixels), 1)[0]
            assert sample["latents"].dtype == torch.bfloat16
            # Rounded to bf16 where convolutions over 3 pictures and over 1 may differ a little.
            assert_near(sample["latents"], want, 2**-8)
            noise = torch.randn(1, *want[:16].shape)
            assert torch.allclose(vae.encode(sample["latents"].float()[None], noise),
                                  vae.encode(pixels, noise), atol=0.05)
    entry = json.loads((pictures / "index.json").read_text())["shards"][1]
    assert entry["latents"] == dict(vae=vae_fingerprint(VAE), image_size=32, bytes=(
        pictures / "s-000001.latents.safetensors").stat().st_size)
    assert load_file(pictures / "s-000001.latents.safetensors")["whole"].tolist() == [1] * 3 + [
        0] + [1] * 4


def test_its_vae_is_compiled_if_asked_for(pictures, monkeypatch):
    seen = []
    monkeypatch.setattr(backend, "compile_vae", seen.append)
    encode(pictures, "--overwrite")
    assert not seen
    encode(pictures, "--overwrite", "--compile")
    assert len(seen) == 1 and hasattr(seen[0], "encoder")


def test_training_from_latents_is_training_from_pixels(pictures, gemma_folder, tmp_path):
    encode(pictures)
    shape = ["--set", f"vae={VAE}", "in_channels=16", "image_size=32", "patch_size=2",
             "--max-skipped", "0.2"]
    job = [flags(gemma_folder, pictures, tmp_path / name, "--steps", "10", "--sample-every", "0",
                 "--val-data", str(pictures), "--val-every", "5", *shape, *more)
           for name, more in (("latents", []), ("pixels", ["--no-latents"]))]
    latents, pixels = (done.stderr for done in launch_all(job))
    assert latents.count("reading the latents beside the shards") == 2     # training, validation
    assert "reading the latents" not in pixels
    a, b = losses(tmp_path / "latents"), losses(tmp_path / "pixels")
    assert len(a) == 10 and a != b and a == pytest.approx(b, rel=1e-3)


def test_what_does_not_fit_is_said_and_not_read(pictures, tmp_path, capsys):
    encode(pictures)
    run = RunConfig(data=(str(pictures),), image_size=32)

    class Config:
        vae, image_size = str(VAE), 32
    shards = expand_shards(str(pictures))
    assert encoded(shards, run, Config, 0)
    other = Config()
    other.image_size = 64
    other_vae = Config()
    shutil.copytree(VAE, tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    other_vae.vae = str(tmp_path / "vae")
    part = [(*s[:3], None, s[4]) for s in shards[:1]] + shards[1:]
    for given, config, crop, says in [(shards, other, "center", "of image_size 32, not 64"),
                                      (shards, other_vae, "center", "they are of vae"),
                                      (shards, Config, "random", "--crop random needs"),
                                      (part, Config, "center", "some shards have none")]:
        run.crop = crop
        assert not encoded(given, run, config, 0)
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_killed_eight_times_and_again_the_same_bytes(tmp_path, capsys):
    for name in ("whole", "killed"):
        numbered(tmp_path / name, shards=12)
    words = ["--vae", VAE, "--image-size", 32, "--workers", 1, "--dtype", "float32"]
    pack("encode", tmp_path / "whole", *words)
    kill(["encode", tmp_path / "killed", *words], 0.3)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    capsys.readouterr()
    with pytest.raises(FuseDiTError, match="another VAE, size or shard.*11 more.*--overwrite"):
        encode(tmp_path / "whole", "--image-size", "16")
    encode(tmp_path / "whole", "--image-size", "16", "--overwrite")
    assert expand_shards(str(tmp_path / "whole"))[0][3]["image_size"] == 16


# ---- check ---------------------------------------------------------------------------------------

def test_check_counts_what_is_there_and_what_is_wrong(pictures, tmp_path):
    write_shard(pictures / "s-000003.tar", [
        scene("n00", "blue"), scene("b", "blue", **{"image.png": None}), scene("c", "blue", **{
            "synthetic_caption.txt": None, "original_caption.txt": None})])
    cut = (pictures / "s-000002.tar").read_bytes()
    (pictures / "s-000002.tar").write_bytes(cut[:len(cut) - 20_000])
    sheet = tmp_path / "sheet.png"
    out, _ = command("check", pictures, "--sheet", sheet, "--workers", 2, code=1)
    n = 16 + 7 + 3                          # of the cut shard seven, the last without its words
    assert f"{n} samples in 4 shards" in out and "shorter side: 16 to 47" in out
    for said in ("1 x damaged image: n13 of s-000001.tar", "1 x no image: b of s-000003.tar",
                 "2 x no caption: n26 of s-000002.tar, c of s-000003.tar",
                 "1 x the shard is damaged or cut short", "1 keys come more than once, as n00",
                 "index.json was wrong: written anew"):
        assert said in out, out
    assert f"synthetic_caption: {n - 2}, of 3 to 3" in out
    with Image.open(sheet) as image:
        image.load()
        assert image.size == (1208, 1048) and len(set(image.convert("L").getdata())) > 50
    out, _ = command("check", pictures, code=1)
    assert "index.json is right" in out
    for name in ("s-000001.tar", "s-000002.tar", "s-000003.tar", "index.json"):
        (pictures / name).unlink()
    out, _ = command("check", pictures)
    assert "8 samples in 1 shards" in out and "index.json was missing: written anew" in out
    assert "is right" in command("check", pictures)[0]

"""prepare_data.py tiny-vae, which trains a small VAE on the images of shards."""
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from test_prepare_data import command, files, pack
from tiny_shards import index, png, scene, write_shard

import prepare_data
from fusedit import FuseDiTError
from fusedit_lib.data import tiny_vae
from fusedit_lib.vae import VAE, VAEConfig, load_vae

SIZE = 16
IMAGES = 150                                # in two shards, and one that is not readable
STEPS = 80
DEMO_VAE = ROOT / "demo" / "emoji" / "vae"


def draw(rng):
    """An image that is not square, of four parts, each black, white or of a bright colour."""
    parts = rng.randint(0, 2, (2, 2, 3)) * 255
    pixels = np.kron(parts.astype(np.uint8), np.ones((10, 14, 1), dtype=np.uint8))
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.RandomState(0)
    samples = [scene(f"n{i:03d}", **{"image.png": png(draw(rng))}) for i in range(IMAGES)]
    damaged = scene("damaged", **{"image.png": b"no image"})
    write_shard(folder / "s-0.tar", samples[:100])
    write_shard(folder / "s-1.tar", [damaged, *samples[100:]])
    index(folder)
    return folder


def make(shards, out, *more, steps=2):
    """Run the command inside this process."""
    words = ["tiny-vae", shards, out, "--image-size", SIZE, "--steps", steps, "--batch-size", 2]
    args = prepare_data.parse_args([str(word) for word in [*words, *more]])
    args.run(args)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """(the folder of a VAE trained on the shards, what the command printed)."""
    out = tmp_path_factory.mktemp("made") / "vae"
    printed, _ = command("tiny-vae", shards, out, "--image-size", SIZE, "--steps", STEPS,
                         "--batch-size", 4)
    return out, printed


@pytest.fixture(scope="module")
def images(shards):
    return tiny_vae.load_images(shards, SIZE)


# ------------------------------------------------------------------------------ training

def test_images_are_central_squares_and_damaged_ones_are_left_out(images, capsys, shards):
    assert images.dtype == torch.uint8
    assert images.shape == (IMAGES, 3, SIZE, SIZE)
    again = tiny_vae.load_images(shards, SIZE)
    assert "left out 1 images" in capsys.readouterr().err
    assert torch.equal(again, images)
    first = draw(np.random.RandomState(0)).resize((SIZE, SIZE), Image.Resampling.BICUBIC,
                                                  (4, 0, 24, 20))
    assert torch.equal(images[0], torch.from_numpy(np.array(first)).permute(2, 0, 1))


def test_it_learns_to_reconstruct_images(trained, images):
    out, printed = trained
    pixels = tiny_vae.to_pixels(images)
    average_image = pixels.mean(0)
    by_average = (pixels - average_image).abs().mean()
    vae = load_vae(out)
    assert (pixels - vae.decode(vae.encode(pixels))).abs().mean() < 0.85 * by_average

    psnr, noisy = map(float, re.search(r"not trained on: (\S+) dB, and (\S+) dB", printed).groups())
    held_out = images[::tiny_vae.HELD_OUT]
    assert f"PSNR of {len(held_out)} images" in printed
    assert psnr == pytest.approx(tiny_vae.decoded_psnr(vae, held_out, "cpu"), abs=0.3)
    assert noisy == pytest.approx(tiny_vae.decoded_psnr(vae, held_out, "cpu", 0.2), abs=0.3)


def test_half_of_a_batch_is_mirrored_and_half_has_its_colours_in_random_order():
    image = torch.tensor([[0, 90], [30, 120], [60, 150]], dtype=torch.uint8)       # [3,W]
    torch.manual_seed(0)
    batch = tiny_vae.random_batch(image[None, :, None], 2000)
    seen = Counter()
    for pixels in ((batch[:, :, 0] + 1) * 127.5).round().int():
        is_mirrored = int(pixels[0, 0] > pixels[0, 1])
        if is_mirrored:
            pixels = pixels.flip(1)
        assert torch.equal(pixels[:, 1] - pixels[:, 0], torch.full((3,), 90))
        seen[is_mirrored, tuple(pixels[:, 0].tolist())] += 1
    assert len(seen) == 2 * 6
    for (_, order), count in seen.items():
        expected = 2000 / 2 / 2 / 6         # the recoloured half is in any of six orders
        if order == (0, 30, 60):
            expected += 2000 / 2 / 2        # the other half
        assert count == pytest.approx(expected, abs=5 * expected ** 0.5)


def test_psnr_is_that_of_the_squared_error_with_noise():
    class Darker(VAE):
        """A VAE whose decoder returns its latents, which are pixels / 2."""
        def encode(self, pixels):
            return pixels / 2

        def decode(self, latents):
            return latents

    vae = Darker(tiny_vae.CONFIG)
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    # pixels 0.5 instead of 1, a change by a quarter of their range: -10 log10(0.25^2)
    assert tiny_vae.decoded_psnr(vae, white, "cpu") == pytest.approx(12.04, abs=0.01)
    # with noise of 0.2, a tenth of the range: -10 log10(0.25^2 + 0.1^2)
    assert tiny_vae.decoded_psnr(vae, white, "cpu", 0.2) == pytest.approx(11.40, abs=0.05)


def test_latents_have_mean_0_and_variance_1(trained, images):
    vae = load_vae(trained[0])
    torch.manual_seed(0)
    used = [i for i in range(IMAGES) if i % tiny_vae.HELD_OUT]
    latents = vae.encode(tiny_vae.to_pixels(images[used]))
    assert latents.shape == (len(used), 8, SIZE // 4, SIZE // 4)
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(8), atol=0.05, rtol=0)
    torch.testing.assert_close(std, torch.ones(8), atol=0.05, rtol=0)
    raw_std = torch.tensor(vae.config.latents_std)
    assert (raw_std - 1).abs().max() > 0.1, "the test needs statistics that are not trivial"


def test_the_kl_divergence_is_that_of_torch():
    torch.manual_seed(0)
    vae = VAE(tiny_vae.CONFIG)
    pixels = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    mean, logvar = vae.moments(pixels)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1))
    _, kl = tiny_vae.reconstruction_and_kl(vae, pixels)
    torch.testing.assert_close(kl, expected.mean())


def test_small_updates_are_not_rounded_away_in_bfloat16(images):
    """A step of 2e-5 is below a tenth of the distance between bfloat16 numbers above 0.03."""
    torch.manual_seed(0)
    before = torch.cat([p.flatten() for p in VAE(tiny_vae.CONFIG).bfloat16().parameters()])
    torch.manual_seed(0)
    small = images[:, :, :8, :8]
    vae = tiny_vae.train(small, 25, 2, 2e-5, torch.device("cpu"), torch.bfloat16)
    after = torch.cat([p.flatten() for p in vae.parameters()])
    large = before.abs() > 1 / 32
    assert (after != before)[large].float().mean() > 0.2


def test_the_seed_determines_the_file(shards, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make(shards, tmp_path / name, "--seed", seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a").keys() == tiny_vae.FILES
    assert files(tmp_path / "a") != files(tmp_path / "c")


# ------------------------------------------------------------------------------ the saved VAE

def test_the_saved_vae_is_small_and_in_the_format_of_diffusers(trained):
    out, _ = trained
    assert sorted(path.name for path in out.parent.iterdir()) == ["vae"]
    path = out / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size < 3_000_000
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}

    config = json.loads((out / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    assert config["up_block_types"] == ["UpDecoderBlock2D"] * 3
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 8
    # These make both conventions for latents_mean and latents_std the same.
    assert (config["scaling_factor"], config["shift_factor"]) == (1, 0)
    assert VAEConfig.from_dict(config, out) == load_vae(out).config


def test_encode_accepts_it(trained, shards, images):
    out, _ = trained
    pack("encode", shards, "--vae", out, "--image-size", SIZE, "--dtype", "float32")
    stored = load_file(shards / "s-0.latents.safetensors")["latents"]
    expected = torch.cat(load_vae(out).moments(tiny_vae.to_pixels(images[:100])), 1)
    torch.testing.assert_close(stored, expected.bfloat16(), atol=0.02, rtol=0.02)


# ------------------------------------------------------------------------------ refusals

def test_only_a_vae_is_replaced(shards, tmp_path):
    out = tmp_path / "vae"
    make(shards, out)
    with pytest.raises(FuseDiTError, match="not empty: give a new folder or --overwrite"):
        make(shards, out)
    before = files(out)
    make(shards, out, "--overwrite", "--seed", 1)
    assert files(out) != before

    (out / "notes.txt").write_text("mine")
    with pytest.raises(FuseDiTError, match="only replaces a VAE"):
        make(shards, out, "--overwrite")
    assert files(out)["notes.txt"] == b"mine"


def test_a_failed_run_leaves_the_old_vae(shards, tmp_path):
    out = tmp_path / "vae"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(FuseDiTError, match="not finite at step 2: try a lower --lr"):
        make(shards, out, "--overwrite", "--lr", "1e30", steps=4)
    assert files(tmp_path) == {"vae/config.json": b"old"}


def test_wrong_input_is_refused(shards, tmp_path):
    with pytest.raises(FuseDiTError, match="--image-size 30 is not a multiple of 4"):
        make(shards, tmp_path / "vae", "--image-size", 30)
    with pytest.raises(FuseDiTError, match=r"no \*.tar"):
        make(tmp_path / "none", tmp_path / "vae")
    one = tmp_path / "one"
    one.mkdir()
    write_shard(one / "s-0.tar", [scene("n0")])
    with pytest.raises(FuseDiTError, match="one has 1 readable images; at least 2 are needed"):
        make(one, tmp_path / "vae")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# ------------------------------------------------------------------------------ the bundled VAE

@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow", "purple", "teal", "brown"])
def test_the_vae_of_the_emoji_demo_keeps_colours(colour):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=colour)
    pixels = tiny_vae.to_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    vae = load_vae(DEMO_VAE)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels)).float()
    assert (decoded - pixels).abs().mean() < 0.08
    middle = (slice(None), slice(None), slice(24, 40), slice(24, 40))
    assert decoded[middle].mean((0, 2, 3)).tolist() == pytest.approx(
        pixels[middle].mean((0, 2, 3)).tolist(), abs=0.15)

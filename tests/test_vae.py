"""The VAE, compared with the published numbers (tests/reference/released_layout)."""
import json
import shutil

import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import load_file, save_file

from fusedit import FuseDiTError
from fusedit_lib.vae import VAE, load_vae

RELEASED = REFERENCE / "released_layout"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIFT = 0.0609
SCALE = 1.5305


@pytest.fixture(scope="module")
def vae():
    return load_vae(RELEASED / "pipeline")


@pytest.fixture(scope="module")
def golden():
    return load_file(RELEASED / "golden.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A vae/ folder that a test may change."""
    return shutil.copytree(RELEASED / "pipeline" / "vae", tmp_path / "vae")


def edit_weights(folder, edit):
    """Apply edit(tensors) to the dict of weights in a folder."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder, edit):
    """Apply edit(values) to the dict in config.json."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def error(a, b):
    """The largest absolute difference."""
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()


def scaled(z):
    """Latents as the diffusion model sees them."""
    return (z - SHIFT) * SCALE


# ---- numbers -------------------------------------------------------------------------------------

def test_moments_match(vae, golden):
    mean, logvar = vae.moments(golden["vae_pixels"])
    assert error(mean, golden["vae_mean"]) < 1e-5
    assert error(logvar, golden["vae_logvar"]) < 1e-5


def test_decode_matches(vae, golden):
    """The latents are scaled, so this also tests that decode undoes scale and shift.

    The golden image differs by 2.1e-5 from a decode in float64, and ours by 0.7e-5.
    """
    decoded = vae.decode(scaled(golden["vae_mean"]))
    assert error(decoded, golden["vae_decoded"]) < 5e-5


@pytest.mark.parametrize("run", ["cfg6_25", "nocfg_10", "neg_7"])
def test_images_match(vae, golden, run):
    pixels = vae.decode(golden[f"latents_{run}"])
    levels = (pixels / 2 + 0.5).clamp(0, 1) * 255
    levels = levels.round().permute(0, 2, 3, 1)                    # [2,64,96,3]
    difference = (levels - golden[f"images_{run}"].float()).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.999


def test_encode_samples_the_posterior(vae, golden):
    mean = golden["vae_mean"]
    std = torch.exp(golden["vae_logvar"] / 2)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    latents = vae.encode(golden["vae_pixels"], noise)
    assert error(latents, scaled(mean + std * noise)) < 1e-5


def test_encode_draws_noise_if_it_is_given_none(vae, golden):
    torch.manual_seed(4)
    first = vae.encode(golden["vae_pixels"])
    second = vae.encode(golden["vae_pixels"])
    assert error(first, second) > 0.1


def test_decode_undoes_the_scaling_of_encode(golden):
    """With a posterior of zero width, decode(encode(x)) is the decoder applied to the mean."""
    vae = load_vae(RELEASED / "pipeline")   # not the fixture, since it is modified
    conv = vae.encoder.conv_out
    conv.weight[16:] = 0
    conv.bias[16:] = -1000                  # far below the clamp
    mean, logvar = vae.moments(golden["vae_pixels"])
    assert (logvar == -30).all()
    decoded = vae.decode(vae.encode(golden["vae_pixels"]))
    assert error(decoded, vae.decoder(mean)) < 1e-4

    conv.bias[16:] = 1000
    _, logvar = vae.moments(golden["vae_pixels"])
    assert (logvar == 20).all()


def test_bfloat16(golden):
    vae = load_vae(RELEASED / "pipeline", dtype=torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    latents = vae.encode(golden["vae_pixels"])
    pixels = vae.decode(scaled(golden["vae_mean"]))
    assert latents.dtype == torch.bfloat16
    assert pixels.dtype == torch.bfloat16
    assert (pixels.float() - golden["vae_decoded"]).abs().mean() < 0.02


def test_shapes(vae):
    assert vae.factor == 8
    pixels = torch.zeros(1, 3, 24, 40)
    latents = vae.encode(pixels)
    assert latents.shape == (1, 16, 3, 5)
    assert vae.decode(latents).shape == pixels.shape
    with pytest.raises(AssertionError):
        vae.encode(torch.zeros(1, 3, 24, 41))


def test_it_is_frozen(vae):
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.encode(torch.zeros(1, 3, 8, 8)).requires_grad


def test_the_default_vae_has_the_size_of_sd3s():
    """Our defaults are the published configuration of Stable Diffusion 3's VAE."""
    with torch.device("meta"):
        vae = VAE()
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    shortcut = vae.encoder.down_blocks[2].resnets[0].conv_shortcut
    assert shortcut.weight.shape == (512, 256, 1, 1)
    conv = vae.decoder.up_blocks[3].resnets[0].conv1
    assert conv.weight.shape == (128, 256, 3, 3)


# ---- loading -------------------------------------------------------------------------------------

def test_the_folder_itself_or_its_parent(folder):
    edit_config(folder, lambda c: c.pop("mid_block_add_attention"))   # SD 3 is older than that key
    itself = load_vae(folder)
    parent = load_vae(str(folder.parent))
    for a, b in zip(itself.parameters(), parent.parameters(), strict=True):
        assert a.equal(b)


def test_a_middle_without_attention(folder):
    def drop_attention(tensors):
        for name in list(tensors):
            if ".attentions." in name:
                del tensors[name]

    edit_weights(folder, drop_attention)
    edit_config(folder, lambda c: c.update(mid_block_add_attention=False))
    vae = load_vae(folder)
    assert vae.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 16, 16)


NORM = "decoder.conv_norm_out.weight"


@pytest.mark.parametrize("edit, name", [
    (lambda t: t.pop(NORM), NORM),
    (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    (lambda t: t.update({NORM: torch.zeros(31)}), NORM),
    (lambda t: t.update({"quant_conv.bias": torch.zeros(32)}), "quant_conv"),    # before SD 3
], ids=["missing", "unexpected", "shape", "quant_conv"])
def test_weights_that_do_not_fit_are_named(folder, edit, name):
    edit_weights(folder, edit)
    with pytest.raises(FuseDiTError, match=name):
        load_vae(folder)


@pytest.mark.parametrize("edit, name", [
    (lambda c: c.update(latent_channels=4), "conv_in.weight"),
    (lambda c: c.pop("shift_factor"), "shift_factor"),
    (lambda c: c.update(shift_factor=None), "shift_factor"),
    (lambda c: c.update(block_out_channels=128), "block_out_channels"),
], ids=["latents", "no shift", "null shift", "type"])
def test_a_config_that_does_not_fit_is_named(folder, edit, name):
    edit_config(folder, edit)
    with pytest.raises(FuseDiTError, match=name):
        load_vae(folder)


def test_a_model_of_other_channels_is_refused():
    load_vae(RELEASED / "pipeline", channels=16)
    with pytest.raises(FuseDiTError, match="16 channels.*in_channels 4"):
        load_vae(RELEASED / "pipeline", channels=4)


def test_broken_weights_are_named(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    for part in (data[:-1000], data[:100], b""):
        path.write_bytes(part)
        with pytest.raises(FuseDiTError, match=WEIGHTS):
            load_vae(folder)
    path.unlink()
    with pytest.raises(FuseDiTError, match=WEIGHTS):
        load_vae(folder)


def test_a_broken_config_is_named(folder):
    path = folder / "config.json"
    path.write_text("{")
    with pytest.raises(FuseDiTError, match="config.json"):
        load_vae(folder)
    path.unlink()
    with pytest.raises(FuseDiTError, match="config.json"):
        load_vae(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(FuseDiTError, match="nowhere"):
        load_vae(tmp_path / "nowhere")

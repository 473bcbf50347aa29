"""The autoencoder against the published numbers (tests/reference/released_layout)."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedit import FuseDiTError
from fusedit_lib.vae import VAE, load_vae

RELEASED = Path(__file__).parent / "reference" / "released_layout"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIFT, SCALE = 0.0609, 1.5305


@pytest.fixture(scope="module")
def vae():
    return load_vae(RELEASED / "pipeline")


@pytest.fixture(scope="module")
def golden():
    return load_file(RELEASED / "golden.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A vae/ folder to spoil, and a function that rewrites its tensors or its config."""
    shutil.copytree(RELEASED / "pipeline" / "vae", tmp_path / "vae")

    def spoil(tensors=None, config=None):
        if tensors:
            state = load_file(tmp_path / "vae" / WEIGHTS)
            tensors(state)
            save_file(state, tmp_path / "vae" / WEIGHTS)
        if config:
            path = tmp_path / "vae" / "config.json"
            values = json.loads(path.read_text())
            config(values)
            path.write_text(json.dumps(values))
        return tmp_path / "vae"
    return spoil


def error(a, b):
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()


# ------------------------------------------------------------------------------ numbers

def test_moments_match(vae, golden):
    mean, logvar = vae.moments(golden["vae_pixels"])
    assert error(mean, golden["vae_mean"]) < 1e-5
    assert error(logvar, golden["vae_logvar"]) < 1e-5


def test_decode_matches(vae, golden):
    """Fed with scaled latents, so this is also the scale and shift of the way back.

    The golden picture itself is 2.1e-5 from a decode in float64, and ours 0.7e-5.
    """
    latents = (golden["vae_mean"] - SHIFT) * SCALE
    assert error(vae.decode(latents), golden["vae_decoded"]) < 5e-5


@pytest.mark.parametrize("run", ["cfg6_25", "nocfg_10", "neg_7"])
def test_pictures_match(vae, golden, run):
    x = (vae.decode(golden[f"latents_{run}"]) / 2 + 0.5).clamp(0, 1)
    x = (x * 255).round().permute(0, 2, 3, 1)                 # [2,64,96,3]
    off = (x - golden[f"images_{run}"].float()).abs()
    assert off.max() <= 1 and (off == 0).float().mean() >= 0.999


def test_encode_samples_the_posterior(vae, golden):
    mean, logvar = golden["vae_mean"], golden["vae_logvar"]
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    expected = (mean + torch.exp(logvar / 2) * noise - SHIFT) * SCALE
    assert error(vae.encode(golden["vae_pixels"], noise), expected) < 1e-5
    torch.manual_seed(4)
    first, second = vae.encode(golden["vae_pixels"]), vae.encode(golden["vae_pixels"])
    assert error(first, second) > 0.1                         # no noise given: drawn all the same


def test_what_encode_scales_decode_undoes(vae, golden):
    """With a posterior of no width, decode(encode(x)) is the decoder on the bare mean."""
    conv = vae.encoder.conv_out
    saved = conv.weight.clone(), conv.bias.clone()
    try:
        conv.weight[16:], conv.bias[16:] = 0, -1000           # far below the clamp
        mean, logvar = vae.moments(golden["vae_pixels"])
        assert (logvar == -30).all()
        assert error(vae.decode(vae.encode(golden["vae_pixels"])), vae.decoder(mean)) < 1e-4
        conv.bias[16:] = 1000
        assert (vae.moments(golden["vae_pixels"])[1] == 20).all()
    finally:
        conv.weight.copy_(saved[0])
        conv.bias.copy_(saved[1])


def test_bfloat16(golden):
    vae = load_vae(RELEASED / "pipeline", dtype=torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    latents = vae.encode(golden["vae_pixels"])
    pixels = vae.decode((golden["vae_mean"] - SHIFT) * SCALE)
    assert latents.dtype == pixels.dtype == torch.bfloat16
    assert (pixels.float() - golden["vae_decoded"]).abs().mean() < 0.02


def test_shapes_and_frozen(vae):
    assert vae.factor == 8
    pixels = torch.zeros(1, 3, 24, 40)
    latents = vae.encode(pixels)
    assert latents.shape == (1, 16, 3, 5) and not latents.requires_grad
    assert vae.decode(latents).shape == pixels.shape
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    with pytest.raises(AssertionError):
        vae.encode(torch.zeros(1, 3, 24, 41))


def test_the_real_one_has_its_size():
    """Stable Diffusion 3's autoencoder, by its published configuration: our defaults."""
    with torch.device("meta"):
        vae = VAE()
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    assert vae.encoder.down_blocks[2].resnets[0].conv_shortcut.weight.shape == (512, 256, 1, 1)
    assert vae.decoder.up_blocks[3].resnets[0].conv1.weight.shape == (128, 256, 3, 3)


# ------------------------------------------------------------------------------ loading

def test_the_folder_itself_or_its_parent(folder):
    path = folder(config=lambda c: c.pop("mid_block_add_attention"))  # SD 3 came before that key
    a, b = load_vae(path), load_vae(str(path.parent))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_middle_without_attention(folder):
    def drop(state):
        for name in [name for name in state if ".attentions." in name]:
            del state[name]
    vae = load_vae(folder(drop, lambda c: c.update(mid_block_add_attention=False)))
    assert vae.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 16, 16)


NORM = "decoder.conv_norm_out.weight"
SPOILED = {
    "missing": (lambda s: s.pop(NORM), None, NORM),
    "unexpected": (lambda s: s.update(extra=torch.zeros(1)), None, "extra"),
    "shape": (lambda s: s.update({NORM: torch.zeros(31)}), None, NORM),
    "latents": (None, lambda c: c.update(latent_channels=4), "conv_in.weight"),
    "no shift": (None, lambda c: c.pop("shift_factor"), "shift_factor"),
    "null shift": (None, lambda c: c.update(shift_factor=None), "shift_factor"),
    "before SD 3": (lambda s: s.update({"quant_conv.bias": torch.zeros(32)}), None, "quant_conv"),
    "type": (None, lambda c: c.update(block_out_channels=128), "block_out_channels"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_does_not_fit_is_named(folder, case):
    tensors, config, named = SPOILED[case]
    with pytest.raises(FuseDiTError, match=named):
        load_vae(folder(tensors, config))


def test_a_model_of_other_channels_is_refused():
    load_vae(RELEASED / "pipeline", channels=16)
    with pytest.raises(FuseDiTError, match="16 channels.*in_channels 4"):
        load_vae(RELEASED / "pipeline", channels=4)


def test_broken_files_are_named(folder, tmp_path):
    path = folder()
    data = (path / WEIGHTS).read_bytes()
    for part in (data[:-1000], data[:100], b""):
        (path / WEIGHTS).write_bytes(part)
        with pytest.raises(FuseDiTError, match=WEIGHTS):
            load_vae(path)
    (path / WEIGHTS).unlink()
    with pytest.raises(FuseDiTError, match=WEIGHTS):
        load_vae(path)
    (path / "config.json").write_text("{")
    with pytest.raises(FuseDiTError, match="config.json"):
        load_vae(path)
    (path / "config.json").unlink()
    with pytest.raises(FuseDiTError, match="config.json"):
        load_vae(path)
    with pytest.raises(FuseDiTError, match="nowhere"):
        load_vae(tmp_path / "nowhere")

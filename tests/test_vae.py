"""The VAE, compared with the published numbers (tests/reference/released_layout)."""
import json
import shutil

import pytest
import torch
from conftest import REFERENCE, tiny_vae
from safetensors.torch import load_file, save_file

from fusedit import FuseDiTError, preset
from fusedit_lib.export import copy_weights
from fusedit_lib.folders import vae_fingerprint
from fusedit_lib.vae import VAE, VAEConfig, config_on_disk, latent_side, load_vae, vae_config

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


@pytest.mark.parametrize("stages, factor", [(1, 1), (2, 2), (3, 4), (5, 16)])
def test_the_factor_follows_from_the_number_of_resolutions(tmp_path, stages, factor):
    folder = tiny_vae(tmp_path / "vae", stages)
    vae = load_vae(folder)
    assert vae.factor == vae_config(folder).factor == factor
    pixels = torch.zeros(1, 3, 32, 48)
    latents = vae.encode(pixels)
    assert latents.shape == (1, 4, 32 // factor, 48 // factor)
    assert vae.decode(latents).shape == pixels.shape
    assert latent_side(preset("fusedit", vae=str(folder), image_size=64)) == 64 // factor


# Each is a change to config.json, then shift and scale in latents = (z - shift) * scale.
STATISTICS = dict(latents_mean=[1, -0.5, 0.25, 0], latents_std=[2, 0.5, 4, 0.3])
MEAN = [1, -0.5, 0.25, 0]
INVERSE_STD = [0.5, 2, 0.25, 1 / 0.3]
NORMALISATIONS = {
    "both": (dict(shift_factor=0.1, scaling_factor=0.4), [0.1], [0.4]),
    "integers": (dict(shift_factor=1, scaling_factor=2), [1], [2]),
    "null shift": (dict(shift_factor=None, scaling_factor=0.13025), [0], [0.13025]),     # SDXL
    "statistics": (STATISTICS | dict(shift_factor=0.1, scaling_factor=0.4), MEAN, INVERSE_STD),
    "scale 1": (STATISTICS | dict(shift_factor=None, scaling_factor=1.0), MEAN, INVERSE_STD),
    # SDXL's (z - mean) * 0.5 / std, as the error message says how to write it
    "SDXL's": (STATISTICS | dict(shift_factor=None, scaling_factor=1,
                                 latents_std=[2 / 0.5, 0.5 / 0.5, 4 / 0.5, 0.3 / 0.5]),
               MEAN, [0.25, 1, 0.125, 0.5 / 0.3]),
}


@pytest.mark.parametrize("changes, shift, scale", NORMALISATIONS.values(), ids=NORMALISATIONS)
def test_latents_are_normalised(tmp_path, changes, shift, scale):
    vae = load_vae(tiny_vae(tmp_path / "vae", **changes), dtype=torch.float64)
    torch.manual_seed(1)
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    mean, logvar = vae.moments(pixels)
    z = mean + torch.exp(logvar / 2) * noise
    shift = torch.tensor(shift, dtype=torch.float64).view(1, -1, 1, 1)
    scale = torch.tensor(scale, dtype=torch.float64).view(1, -1, 1, 1)
    latents = vae.encode(pixels, noise)
    assert latents.dtype == torch.float64
    assert (latents - (z - shift) * scale).abs().max() < 1e-12
    assert (vae.decode(latents) - vae.decoder(z)).abs().max() < 1e-12
    assert (vae.decode(noise) - vae.decoder(noise / scale + shift)).abs().max() < 1e-12


def test_statistics_in_bfloat16(tmp_path):
    """Only the result is rounded to bfloat16; with a rounded 1 / std, it would differ more."""
    changes = STATISTICS | dict(scaling_factor=1, latents_std=[2.0, 0.511, 4.03, 0.3])
    vae = load_vae(tiny_vae(tmp_path / "vae", **changes), dtype=torch.bfloat16)
    moments = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    moments[:, 4:] = -30                    # so narrow that the sample is the mean
    latents = vae.encode(moments)
    assert latents.dtype == torch.bfloat16
    mean = torch.tensor(MEAN).view(1, -1, 1, 1)
    std = torch.tensor(changes["latents_std"]).view(1, -1, 1, 1)
    assert latents.equal(((moments[:, :4].float() - mean) * (1 / std)).bfloat16())
    assert vae.decode(latents).dtype == torch.bfloat16


def test_quant_convolutions(tmp_path):
    """They are 1 x 1: a product of matrices at every position."""
    folder = tiny_vae(tmp_path / "vae", use_quant_conv=True, use_post_quant_conv=True)
    vae = load_vae(folder, dtype=torch.float64)
    stored = {name: t.double() for name, t in load_file(folder / WEIGHTS).items()}
    assert stored["quant_conv.weight"].shape == (8, 8, 1, 1)
    assert stored["post_quant_conv.weight"].shape == (4, 4, 1, 1)

    def product(name, x):
        weight = stored[f"{name}.weight"][:, :, 0, 0]
        return torch.einsum("oc,bchw->bohw", weight, x) + stored[f"{name}.bias"].view(1, -1, 1, 1)

    torch.manual_seed(1)
    pixels = torch.rand(1, 3, 8, 12, dtype=torch.float64)
    moments = product("quant_conv", vae.encoder(pixels))
    assert (torch.cat(vae.moments(pixels), 1) - moments).abs().max() < 1e-12
    z = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    decoded = vae.decoder(product("post_quant_conv", z))
    assert (vae.decode((z - 0.25) * 1.5) - decoded).abs().max() < 1e-12


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


def test_stable_diffusion_1s_and_sdxls_vae_have_the_published_size():
    with torch.device("meta"):
        vae = VAE(VAEConfig(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True))
    assert sum(p.numel() for p in vae.encoder.parameters()) == 34_163_592
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


# ---- loading -------------------------------------------------------------------------------------

def test_the_folder_itself_or_its_parent(folder):
    edit_config(folder, lambda c: c.pop("mid_block_add_attention"))   # SD 3 is older than that key
    itself = load_vae(folder)
    parent = load_vae(str(folder.parent))
    for a, b in zip(itself.parameters(), parent.parameters(), strict=True):
        assert a.equal(b)


def test_absent_keys_have_the_defaults_of_diffusers(tmp_path):
    """As in Stable Diffusion 1's config.json, which is older than all of these keys."""
    folder = tiny_vae(tmp_path / "vae", use_quant_conv=True, use_post_quant_conv=True)
    edit_config(folder, lambda c: [c.pop(name) for name in (
        "use_quant_conv", "use_post_quant_conv", "scaling_factor", "shift_factor")])
    config = load_vae(folder).config
    assert config.scaling_factor == 0.18215
    assert config.shift_factor == 0
    assert config.use_quant_conv and config.use_post_quant_conv
    assert config.norm_num_groups == 4
    edit_config(folder, lambda c: c.pop("norm_num_groups"))
    edit_config(folder, lambda c: c.update(block_out_channels=[32, 32, 32]))
    assert vae_config(folder).norm_num_groups == 32


def test_old_names_of_the_attention(folder, vae, golden):
    """Stable Diffusion 1's weights have the names of older versions of diffusers."""
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in list(tensors):
            for new, old in old_names.items():
                if f".attentions.0.{new}." in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    edit_weights(folder, rename)
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in load_file(folder / WEIGHTS)
    mean, _ = load_vae(folder).moments(golden["vae_pixels"])
    assert mean.equal(vae.moments(golden["vae_pixels"])[0])


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
    (lambda c: c.update(scaling_factor=None), "scaling_factor is missing"),
    (lambda c: c.update(scaling_factor=0), "scaling_factor 0"),
    (lambda c: c.update(scaling_factor=float("nan")), "scaling_factor is nan"),
    (lambda c: c.update(block_out_channels=128), "block_out_channels is 128"),
    (lambda c: c.update(block_out_channels=[]), "block_out_channels is \\[\\]"),
    (lambda c: c.update(block_out_channels=[32.0, 64.0]), "block_out_channels is \\[32.0"),
    (lambda c: c.pop("block_out_channels"), "block_out_channels is missing.*\\(128, 256, 512, 512"),
    (lambda c: c.update(layers_per_block=0), "layers_per_block is 0"),
    (lambda c: c.update(use_quant_conv=1), "use_quant_conv is 1"),
    (lambda c: c.update(norm_num_groups=24), "norm_num_groups 24 does not divide"),
    (lambda c: c.update(shift_factor="0"), "shift_factor is '0'"),
])
def test_a_config_that_does_not_fit_is_named(folder, edit, name):
    edit_config(folder, edit)
    with pytest.raises(FuseDiTError, match=name):
        load_vae(folder)


def test_a_vae_of_another_class_is_named(folder):
    """The keys of Qwen-Image's VAE, which has no block_out_channels."""
    qwen = dict(_class_name="AutoencoderKLQwenImage", base_dim=96, dim_mult=[1, 2, 4, 4], z_dim=16)
    (folder / "config.json").write_text(json.dumps(qwen))
    with pytest.raises(FuseDiTError, match=f"{folder} is of class AutoencoderKLQwenImage; fusedit "
                                           "reads AutoencoderKL only: use a VAE such as"):
        load_vae(folder)


@pytest.mark.parametrize("name, value", [
    ("act_fn", "relu"), ("in_channels", 1), ("out_channels", 4),
    ("down_block_types", ["DownEncoderBlock2D"] * 3),
    ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
    ("up_block_types", ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3)])
def test_another_network_is_named(folder, name, value):
    edit_config(folder, lambda c: c.update({name: value}))
    with pytest.raises(FuseDiTError, match=f"has {name} .*; fusedit reads only"):
        load_vae(folder)


def test_a_config_without_block_types(folder):
    edit_config(folder, lambda c: [c.pop(name) for name in (
        "_class_name", "act_fn", "out_channels", "down_block_types", "up_block_types")])
    assert load_vae(folder).factor == 8


@pytest.mark.parametrize("changes, message", [
    (dict(shift_factor=None, scaling_factor=0.5),
     r"scaling_factor 0.5, which can mean \(z - mean\) / std or \(z - mean\) \* 0.5 / std: "
     "in a copy of the folder, set scaling_factor to 1 and, for the second, divide latents_std by "
     "0.5"),
    (dict(latents_std=None), "needs both latents_mean and latents_std"),
    (dict(latents_mean=None), "needs both latents_mean and latents_std"),
    (dict(latents_mean=[0, 0, 0]), "latent_channels = 4 numbers"),
    (dict(latents_std=[1, 1, 1, 1, 1]), "latent_channels = 4 numbers"),
    (dict(latents_std=[1, 1, 0, 1]), "positive"),
    (dict(latents_mean=[0, 0, "0", 0]), "latents_mean is"),
    (dict(latents_mean=0.5), "latents_mean is 0.5"),
])
def test_statistics_that_cannot_be_used_are_named(tmp_path, changes, message):
    folder = tiny_vae(tmp_path / "vae")
    edit_config(folder, lambda c: c.update(STATISTICS | changes))
    with pytest.raises(FuseDiTError, match=message):
        load_vae(folder)


def test_the_config_is_read_without_a_download(tmp_path, monkeypatch):
    """A hub id that is not in the cache is assumed to be Stable Diffusion 3's."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert config_on_disk("someone/pipeline") is None
    assert vae_config("someone/pipeline") == VAEConfig()
    assert vae_config("someone/not a name") == VAEConfig()
    assert latent_side(preset("fusedit", vae="someone/pipeline", image_size=256)) == 32

    for name, subfolder in (("pipeline", "vae"), ("only-vae", "")):
        repo = tmp_path / f"models--someone--{name}"
        tiny_vae(repo / "snapshots" / "abc" / subfolder)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        assert vae_config(f"someone/{name}").latent_channels == 4
        assert latent_side(preset("fusedit", vae=f"someone/{name}", image_size=256)) == 64
    with pytest.raises(FuseDiTError, match="no such model folder"):
        vae_config(tmp_path / "nowhere")


def test_a_model_of_other_channels_is_refused():
    load_vae(RELEASED / "pipeline", channels=16)
    message = "has 16 channels, but .* in_channels .* is 4: .* --set in_channels=16"
    with pytest.raises(FuseDiTError, match=message):
        load_vae(RELEASED / "pipeline", channels=4)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_only_variant_of_the_weights_is_taken(folder, golden, capsys, sharded):
    """In the precision of the computation, which on a CPU is never float16."""
    tensors = {name: t.half() for name, t in load_file(folder / WEIGHTS).items()}
    stem = "diffusion_pytorch_model"
    names = {name: f"{stem}.fp16.safetensors" for name in tensors}
    if sharded:
        for number, name in enumerate(tensors):
            names[name] = f"{stem}.fp16-{number % 2 + 1:05d}-of-00002.safetensors"
        index = folder / f"{stem}.safetensors.index.fp16.json"
        index.write_text(json.dumps({"weight_map": names}))
    for file in set(names.values()):
        save_file({name: t for name, t in tensors.items() if names[name] == file}, folder / file)
    load_vae(folder)
    assert capsys.readouterr().err == ""                   # the usual file is there, and is used
    before = vae_fingerprint(folder)
    (folder / WEIGHTS).unlink()

    vae = load_vae(folder)
    line = f"{folder} has no {WEIGHTS}: using its variant fp16\n"
    assert capsys.readouterr().err == line
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    mean, _ = vae.moments(golden["vae_pixels"])
    assert 0 < error(mean, golden["vae_mean"]) < 0.01
    assert vae_fingerprint(folder) != before

    copy_weights(folder, stem, folder.parent / "exported")
    same = load_vae(folder.parent / "exported")
    assert capsys.readouterr().err == ""
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), same.parameters(), strict=True))


def test_weights_that_cannot_be_used_are_listed(folder):
    """Two variants, or a pickled file; and a file instead of the folder."""
    with pytest.raises(FuseDiTError, match="is a file: give its folder"):
        load_vae(folder / WEIGHTS)
    shutil.copy(folder / WEIGHTS, folder / WEIGHTS.replace(".s", ".bf16.s"))
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".s", ".fp16.s"))
    with pytest.raises(FuseDiTError, match=r"vae has .*\.bf16\.safetensors, .*\.fp16\.saf"):
        load_vae(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(FuseDiTError, match=f"{WEIGHTS} is missing.*diffusion_pytorch_model.bin"):
        load_vae(folder)


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

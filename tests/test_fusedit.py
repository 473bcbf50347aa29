"""fusedit.py against the published numbers, against transformers and against its own definition."""
import json
import math
from dataclasses import asdict
from typing import NamedTuple

import pytest
import torch
from conftest import REFERENCE, assert_near, tiny_gemma
from safetensors.torch import load_file

import fusedit
from fusedit import FuseDiT, FuseDiTConfig, FuseDiTError, TextFeatures, preset
from fusedit_lib.pretrained import build_model, gemma_config, load_model
from fusedit_lib.vae import load_vae

CASES = sorted(p.name for p in (REFERENCE / "cases").iterdir())
RELEASED = REFERENCE / "released_layout"


# ---- the published implementation's numbers ------------------------------------------------------

def case_model(folder):
    """The model of a reference case, with its weights."""
    config = json.loads((folder / "config.json").read_text())
    published = config["dit"]
    fusion = {"DiT": "shallow", "FuseDiT": "deep"}[published["model"]]
    fields = {name: value for name, value in published.items()
              if name not in ("model", "text_hidden_size")}
    fields["fusion"] = fusion
    model = FuseDiT(FuseDiTConfig.from_dict(fields), gemma_config(config["base"]))

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("dit.patch_embed.pos_embed", None)
    model.load_state_dict(tensors)          # strict
    return model


def exact_frequencies(count, theta=10000.0, device=None):
    """inverse_frequencies with exp in float64, rounded once, to the same bits on any machine."""
    exponents = -math.log(theta) * torch.arange(count) / count
    return torch.exp(exponents.double()).float()


def test_frequencies():
    for count, theta in ((128, 1e4), (64, 1e6), (8, 1e4)):
        powers = [theta ** (-k / count) for k in range(count)]
        want = torch.tensor(powers, dtype=torch.float64)
        got = fusedit.inverse_frequencies(count, theta)
        assert (got / want - 1).abs().max() < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_design_space(name, monkeypatch):
    # exp in float32 differs in its last bit from one CPU to the next. At timestep 731 that changes
    # outputs by up to 5e-5 of the largest one. With exact rounding, outputs on all our machines are
    # within 6e-6 of those that the published code computed on its machine.
    monkeypatch.setattr(fusedit, "inverse_frequencies", exact_frequencies)
    folder = REFERENCE / "cases" / name
    model = case_model(folder)
    case = load_file(folder / "case.safetensors")
    with torch.no_grad():
        text = model.encode_ids(case["input_ids"], case["attention_mask"].bool(),
                                case.get("text_modulation_embeds"))
        sigma = case["timestep"].double() / 1000
        got = model.dit(case["latents"], sigma, text)
    assert_near(got, case["output"], 1e-5)


def test_there_are_16_cases():
    assert len(CASES) == 16


def test_sigmas():
    tables = load_file(RELEASED / "sigmas.safetensors")
    assert tables
    for name, want in tables.items():       # train_shift3, sample_shift3_n25, timesteps_...
        kind, shift, *steps = name.replace("shift", "").split("_")
        unit = 1
        if kind == "train":
            got = fusedit.training_sigmas(float(shift))
        else:
            count = int(steps[0].removeprefix("n"))
            got = fusedit.sampling_sigmas(count, float(shift))
        if kind == "timesteps":
            unit = 1000
            got = got[:-1] * unit
        assert torch.allclose(got, want, atol=1e-6 * unit), name


@pytest.fixture(scope="session")
def released():
    return load_model(RELEASED / "pipeline")


@pytest.mark.parametrize("name, steps, guidance, negative", [
    ("cfg6_25", 25, 6.0, ""),
    ("nocfg_10", 10, 1.0, ""),
    ("neg_7", 7, 3.5, "a black ring"),
])
def test_released_checkpoint_draws_the_published_images(released, name, steps, guidance,
                                                        negative):
    prompts = json.loads((RELEASED / "golden.json").read_text())["prompts"]
    golden = load_file(RELEASED / "golden.safetensors")
    assert len(prompts) == 2
    features = released.encode([*prompts, negative])
    text = features.map(lambda t: t[:2])
    uncond = features.map(lambda t: t[[2, 2]])
    x = fusedit.sample(released.dit, golden["noise"], text, uncond, steps, guidance,
                       released.config.shift)
    want = golden[f"latents_{name}"]
    assert (x - want).norm() / want.norm() < 1e-4

    vae = load_vae(RELEASED / "pipeline")
    with torch.no_grad():
        pixels = vae.decode(x).clamp(-1, 1)
    levels = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1)
    difference = (levels - golden[f"images_{name}"].float()).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.999


def test_blocks_beyond_the_layers_that_may_be_read_read_none():
    """A published pipeline contains Gemma's layers only up to the last one that is read."""
    config = FuseDiTConfig(dit_num_hidden_layers=5, shared_attention_layers=(0, 2))
    assert fusedit.layers_to_read(config, 3) == [0, None, 2, None, None]
    with pytest.raises(FuseDiTError, match="do not fit a Gemma of 2 layers"):
        fusedit.layers_to_read(config, 2)
    for layers in ("all", (0, 7), ()):              # too many, one missing, none read
        config = FuseDiTConfig(dit_num_hidden_layers=5, shared_attention_layers=layers)
        with pytest.raises(FuseDiTError, match="do not fit a Gemma of 3 layers"):
            fusedit.layers_to_read(config, 3)


HUB_GEMMAS = {                              # the shapes on the hub
    "google/gemma-2-2b": dict(model_type="gemma2", hidden_size=2304, intermediate_size=9216,
                              num_hidden_layers=26, num_key_value_heads=4),
    "other": dict(model_type="gemma", hidden_size=2048, intermediate_size=16384,
                  num_hidden_layers=18, num_key_value_heads=1),
}
PAPER_RUNS = json.loads((REFERENCE / "paper_runs.json").read_text())


def model_on_meta(config):
    """The full-size model on the meta device, which has shapes but no memory."""
    shape = HUB_GEMMAS.get(config.base, HUB_GEMMAS["other"])
    shape = shape | dict(vocab_size=256000, num_attention_heads=8, head_dim=256)
    with torch.device("meta"):
        return FuseDiT(config, gemma_config(shape))


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_presets_are_the_papers_runs(name):
    run = PAPER_RUNS[name]
    config = preset(name)
    model = model_on_meta(config)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(trained) == run["dit_parameters"]
    assert len(model.dit.layers) == run["dit_num_hidden_layers"]

    fields = asdict(config)
    compared = set(run) & set(fields) - {"dit_num_hidden_layers", "shared_attention_layers"}
    for key in compared:
        assert fields[key] == run[key], key
    if run.get("shared_attention_layers", "all") != "all":         # ours: from initial_layers
        assert model.dit.text_layers == run["shared_attention_layers"]

    model.llm.keep_layers(model.last_layer)
    assert len(model.llm.layers) == run["llm_layers"]


def test_tensors_of_the_large_model():
    want = json.loads((REFERENCE / "large_scale_tensors.json").read_text())
    model = model_on_meta(preset("fusedit"))
    got = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert got == want


# ---- transformers' Gemma -------------------------------------------------------------------------

class SavedGemma(NamedTuple):
    folder: object                          # pathlib.Path: config.json, model.safetensors
    theirs: torch.nn.Module                 # transformers' model with the same weights


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def saved_gemma(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny_gemma(folder, request.param)
    return SavedGemma(folder, theirs)


IDS = torch.randint(4, 20, (2, 11), generator=torch.Generator().manual_seed(0))
LENGTHS = (11, 7)                           # numbers of real tokens in the two rows


def assert_equals_cache(ours, theirs):
    """Compare our keys or values at real tokens with those in transformers' cache.

    For a layer with a sliding window, the cache contains only the last tokens.
    """
    first = ours.shape[2] - theirs.shape[2]
    assert theirs.shape[2] >= 2
    for row, length in enumerate(LENGTHS):
        if length > first:
            assert_near(ours[row, :, first:length], theirs[row, :, :length - first], 1e-5)


@torch.no_grad()
def test_gemma_equals_transformers(saved_gemma):
    theirs = saved_gemma.theirs
    mask = torch.arange(11) < torch.tensor(LENGTHS)[:, None]
    out = theirs(IDS, attention_mask=mask.long(), use_cache=True)

    L = theirs.config.num_hidden_layers
    config = FuseDiTConfig(base=str(saved_gemma.folder), fusion="shallow")       # all layers run
    model = build_model(config)
    keys, values, hidden = model.llm(IDS, L)
    assert len(keys) == len(values) == len(out.past_key_values.layers) == L
    for i, cached in enumerate(out.past_key_values.layers):
        assert_equals_cache(keys[i], cached.keys)
        assert_equals_cache(values[i], cached.values)

    # Row 1 is compared with our run of it alone: transformers' outputs at and after padding are
    # meaningless.
    without_padding = model.llm(IDS[1:, :7], L)[2][-1]
    assert_near(hidden[-1][0], out.last_hidden_state[0], 1e-5)
    assert_near(hidden[-1][1, :7], without_padding[0], 1e-5)


@torch.no_grad()
def test_gemma_stops_early_with_the_same_keys(saved_gemma):
    gemma = fusedit.load_gemma(saved_gemma.folder)
    keys, _, _ = gemma(IDS, gemma.config.num_hidden_layers)
    early, _, _ = gemma(IDS, 1)
    assert len(early) == 2
    assert torch.equal(early[1], keys[1])


@torch.no_grad()
def test_keys_without_rotation(saved_gemma):
    """Unrotated keys equal the rotated ones at position 0, where the angle is 0, and only there."""
    gemma = fusedit.load_gemma(saved_gemma.folder)
    keys, _, _ = gemma(IDS, 1)
    plain, _, _ = gemma(IDS, 1, rotate_keys=False)
    assert_near(plain[1][:, :, 0], keys[1][:, :, 0], 1e-5)
    difference = (plain[1] - keys[1])[:, :, 1:]
    assert difference.norm() > 0.1 * keys[1].norm()


@torch.no_grad()
def test_load_gemma_equals_transformers(saved_gemma):
    """The hidden state before every layer, and after the last one and the final norm."""
    want = saved_gemma.theirs(IDS, output_hidden_states=True).hidden_states
    gemma = fusedit.load_gemma(saved_gemma.folder)
    _, _, hidden = gemma(IDS, gemma.config.num_hidden_layers)
    assert len(hidden) == len(want) == gemma.config.num_hidden_layers + 1
    for i, theirs in enumerate(want):
        assert_near(hidden[i], theirs, 1e-5)


def test_load_gemma_equals_build_model(saved_gemma):
    gemma = fusedit.load_gemma(saved_gemma.folder)
    built = build_model(FuseDiTConfig(base=str(saved_gemma.folder), fusion="shallow")).llm
    assert gemma.config == built.config
    want = built.state_dict()
    got = gemma.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.equal(want[name]), name
    assert not gemma.training
    assert not any(p.requires_grad for p in gemma.parameters())


def test_load_gemma_converts_to_dtype(gemma_folder):
    whole = fusedit.load_gemma(gemma_folder).state_dict()
    half = fusedit.load_gemma(gemma_folder, dtype=torch.bfloat16).state_dict()
    for name, tensor in half.items():
        assert tensor.equal(whole[name].bfloat16()), name


def test_gemma3_windows_and_bases(tmp_path):
    """The tiny Gemma 3 has the windows and the two rotary bases that the tests above compare."""
    theirs = tiny_gemma(tmp_path, "gemma3")
    config = gemma_config(theirs.config.to_dict())
    assert config.sliding_layers == (0, 1, 2, 3, 4)
    assert config.sliding_window == 3
    assert config.query_pre_attn_scalar == 24
    assert (config.rope_theta, config.local_theta) == (1e6, 1e4)


def test_gemma3_config_of_transformers_4():
    """transformers 4 has other keys for the rotary settings, as in the configs on the hub."""
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240,
                sliding_window=1024, num_hidden_layers=34,
                rope_scaling={"factor": 8.0, "rope_type": "linear"})
    config = gemma_config(dict(model_type="gemma3", text_config=text))
    assert config.rope_factor == 8
    assert config.num_attention_heads == 8
    assert config.vocab_size == 262208
    assert 5 not in config.sliding_layers
    assert len(config.sliding_layers) == 29


# ---- keep_layers ---------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("last_layer", [0, 2, 3])
def test_keep_layers_keeps_what_reading_needs(gemma_folder, last_layer):
    whole = fusedit.load_gemma(gemma_folder)
    trimmed = fusedit.load_gemma(gemma_folder)
    trimmed.keep_layers(last_layer)

    assert len(trimmed.layers) == last_layer + 1
    assert trimmed.norm is None
    last = f"layers.{last_layer}."
    kept = {name.removeprefix(last) for name in trimmed.state_dict() if name.startswith(last)}
    assert {"input_layernorm.weight", "self_attn.k_proj.weight",
            "self_attn.v_proj.weight"} <= kept
    unused = ("mlp.", "self_attn.q_proj.", "self_attn.o_proj.")
    assert not any(name.startswith(unused) for name in kept)
    assert len(trimmed.state_dict()) < len(whole.state_dict())

    want = whole(IDS, last_layer)
    got = trimmed(IDS, last_layer)
    for name, ours, theirs in zip(("keys", "values", "inputs"), got, want, strict=True):
        assert len(ours) == len(theirs) == last_layer + 1
        for a, b in zip(ours, theirs, strict=True):
            assert a.equal(b), name


def test_keep_layers_drops_nothing_if_the_final_norm_is_read(gemma_folder):
    gemma = fusedit.load_gemma(gemma_folder)
    names = list(gemma.state_dict())
    gemma.keep_layers(4)
    assert list(gemma.state_dict()) == names
    assert torch.isfinite(gemma(IDS, 4)[2][-1]).all()


# ---- one joint attention -------------------------------------------------------------------------

def small_model(folder, **changes):
    """A random model in the default dtype, which is float64 in tests with that fixture."""
    torch.manual_seed(1)
    fields = dict(base=str(folder), pos_embed="2d-rope", sandwich_norm=True, in_channels=4)
    config = FuseDiTConfig.from_dict(fields | changes)
    model = build_model(config, dtype=torch.get_default_dtype())
    for p in model.dit.parameters():        # a newly initialised DiT predicts 0 for any input
        torch.nn.init.normal_(p, std=0.1)
    return model


def joint_mask(mask, N):
    """Visible keys [B,T+N,T+N]: text is causal; the image sees all real text and the image."""
    B, T = mask.shape
    visible = torch.zeros(B, T + N, T + N, dtype=torch.bool)
    visible[:, :T, :T] = torch.ones(T, T).tril().bool()
    visible[:, T:, :T] = mask[:, None]
    visible[:, T:, T:] = True
    return visible


def query_key_value(attn, x, rope):
    """q, k and v of a stream, [B,heads,S,h] each, written out."""
    q = attn.q_norm(attn.split_heads(attn.q_proj(x)))
    k = attn.k_norm(attn.split_heads(attn.k_proj(x)))
    v = attn.split_heads(attn.v_proj(x))
    return fusedit.apply_rope(q, rope), fusedit.apply_rope(k, rope), v


def joint_layer(gemma_layer, dit_block, txt, img, ropes, visible, query_pre_attn_scalar):
    """txt [B,T,D] and img [B,N,D] after one layer of both towers, computed as one sequence.

    ropes: of the text and of the image. visible: joint_mask.
    """
    T = txt.shape[1]
    h = gemma_layer.self_attn.head_dim
    txt_rope, img_rope = ropes
    txt_normed = gemma_layer.input_layernorm(txt)
    img_normed = dit_block.input_layernorm(img)
    txt_q, txt_k, txt_v = query_key_value(gemma_layer.self_attn, txt_normed, txt_rope)
    img_q, img_k, img_v = query_key_value(dit_block.self_attn, img_normed, img_rope)

    txt_q = txt_q * math.sqrt(h / query_pre_attn_scalar)                     # Gemma's own scale
    q = torch.cat([txt_q, img_q], dim=2)                           # [B,H,T+N,h]
    k = torch.cat([txt_k, img_k], dim=2)                           # [B,K,T+N,h]
    v = torch.cat([txt_v, img_v], dim=2)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / math.sqrt(h)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)      # [B,T+N,H*h]

    txt = gemma_layer.add_attention(txt, gemma_layer.self_attn.o_proj(out[:, :T]))
    img = dit_block.add_attention(img, dit_block.self_attn.o_proj(out[:, T:]))
    return gemma_layer.add_mlp(txt), dit_block.add_mlp(img)


def joint_attention_forward(model, ids, mask, x_t):
    """The reference for the two phases: both streams in one sequence under one mask."""
    llm = model.llm
    dit = model.dit
    gemma = llm.config
    B, T = ids.shape
    h = gemma.head_dim
    rows = x_t.shape[2] // 2
    cols = x_t.shape[3] // 2

    txt = llm.embed_tokens(ids) * math.sqrt(gemma.hidden_size)
    img = dit.patch_embed["proj"](x_t).flatten(2).transpose(1, 2)
    visible = joint_mask(mask, rows * cols)
    frequencies = 1e4 ** (-torch.arange(h // 2) / (h // 2))
    angles = torch.outer(torch.arange(T), frequencies)
    txt_rope = fusedit.cos_sin(angles[None])
    img_rope = fusedit.image_rope("2d-rope", rows, cols, mask.sum(1), h, None)
    for gemma_layer, dit_block in zip(llm.layers, dit.layers, strict=True):
        txt, img = joint_layer(gemma_layer, dit_block, txt, img, (txt_rope, img_rope), visible,
                               gemma.query_pre_attn_scalar)

    out = dit.proj_out(dit.norm_out(img)).view(B, rows, cols, 2, 2, 4)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape)


def test_two_phases_equal_one_joint_attention(gemma_folder, float64):
    torch.manual_seed(1)
    config = FuseDiTConfig(base=str(gemma_folder), pos_embed="2d-rope", sandwich_norm=True,
                           timestep_conditioning=None, in_channels=4)
    gemma = gemma_config(json.loads((gemma_folder / "config.json").read_text()))
    model = FuseDiT(config, gemma)
    for p in model.parameters():            # no trimming: the joint form runs the last layer too
        torch.nn.init.normal_(p, std=0.2)

    ids = torch.randint(4, 20, (2, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    x_t = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        want = joint_attention_forward(model, ids, mask, x_t)
        text = model.encode_ids(ids, mask)
        got = model.dit(x_t, torch.tensor([0.3, 0.9]), text)
    assert want.abs().max() > 0.1
    assert_near(got, want, 1e-9)


# ---- its own definition --------------------------------------------------------------------------

FUSIONS = [
    dict(fusion="deep", attention="self"),
    dict(fusion="deep", attention="cross"),
    dict(fusion="shallow", attention="self"),
    dict(fusion="shallow", attention="cross"),
]


@pytest.mark.parametrize("point", FUSIONS, ids=str)
def test_padding_and_neighbours_change_nothing(gemma_folder, point, float64):
    model = small_model(gemma_folder, **point)
    x_t = torch.randn(3, 4, 4, 6)
    sigma = torch.tensor([0.2, 0.5, 0.8])
    prompts = ["a red circle", "", "a small blue star above the large green square"]
    with torch.no_grad():
        together = model.dit(x_t, sigma, model.encode(prompts))
        padded = model.dit(x_t, sigma, model.encode(prompts, pad_to=30))
        alone = []
        for i, prompt in enumerate(prompts):
            text = model.encode([prompt])
            alone.append(model.dit(x_t[i:i + 1], sigma[i:i + 1], text))
    assert_near(padded, together, 1e-9)
    assert_near(torch.cat(alone), together, 1e-9)


def sum_of_features(text):
    """The sum of all text features that the DiT reads."""
    if text.hidden is not None:
        return text.hidden.sum()
    total = 0
    for k, v in zip(text.keys, text.values, strict=True):
        total = total + k.sum() + v.sum()
    return total


@pytest.mark.parametrize("point", FUSIONS, ids=str)
def test_gradients_show_which_tokens_see_which(gemma_folder, point):
    """The image sees every real token and no padding; the text does not see the image."""
    model = small_model(gemma_folder, **point)
    model.llm.requires_grad_(True)
    embedded = []

    def keep_gradient(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.llm.embed_tokens.register_forward_hook(keep_gradient)
    ids, mask = fusedit.tokenize(model.tokenizer, ["a red circle", "a star"], model.config)
    x_t = torch.randn(2, 4, 4, 6, requires_grad=True)
    text = model.encode_ids(ids, mask)

    # the text does not depend on the image
    (gradient,) = torch.autograd.grad(sum_of_features(text), x_t, allow_unused=True,
                                      retain_graph=True)
    assert gradient is None or gradient.abs().max() == 0

    # row 0 of the velocity depends on row 0 of the image and of the text, and on no other row
    model.dit(x_t, torch.tensor([0.5, 0.5]), text)[0].square().sum().backward()
    reached = embedded[0].grad.abs().sum(-1) > 0                   # [B,T]
    assert reached[0].equal(mask[0])
    assert not reached[1].any()
    assert (x_t.grad[0] != 0).all()
    assert (x_t.grad[1] == 0).all()


def test_a_frozen_gemma_records_no_graph(gemma_folder):
    model = small_model(gemma_folder)
    text = model.encode(["a red circle"])
    assert not any(k.requires_grad for k in text.keys)
    x = torch.randn(1, 4, 4, 4)
    eps = torch.randn(1, 4, 4, 4)
    fusedit.flow_loss(model.dit, x, text, torch.tensor([0.3]), eps).sum().backward()
    assert all(p.grad is None for p in model.llm.parameters())
    assert all(p.grad is not None for p in model.dit.parameters())


def test_layers_without_text_see_the_image_only(gemma_folder):
    model = small_model(gemma_folder, shared_attention_layers=[1])
    text = model.encode(["a red circle"])
    assert [k is not None for k in text.keys] == [False, True, False, False]
    assert len(model.llm.layers) == 2       # and the upper half of Gemma was never loaded
    v = model.dit(torch.randn(1, 4, 4, 4), torch.tensor([0.5]), text)
    assert v.isfinite().all()


def test_flow_loss_is_the_velocity_error(float64):
    """The loss of an oracle that knows x is 0; if it is off by d everywhere, it is d squared."""
    x = torch.randn(4, 3, 2, 2)
    eps = torch.randn(4, 3, 2, 2)
    error = torch.tensor([0.0, 1.0, 2.0, 0.5])

    def oracle(x_t, sigma, text):
        s = sigma[:, None, None, None]
        v = (x_t - x) / s                   # (1-s) x + s eps - x = s (eps - x)
        return v + error[:, None, None, None]

    sigma = torch.tensor([0.2, 0.5, 0.9, 1.0])
    loss = fusedit.flow_loss(oracle, x, None, sigma, eps)
    assert_near(loss, error ** 2, 1e-9)


def test_noise_levels_of_training_are_logit_normal_and_shifted():
    sigma = fusedit.logit_normal_sigma(torch.randn(20_000), 3.0)
    u = sigma / (3 - 2 * sigma)                                    # the shift undone
    normal = torch.logit(u.double(), 1e-4)
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
    ends = fusedit.logit_normal_sigma(torch.tensor([-100.0, 0.0, 100.0]), 3.0)
    assert ends.equal(fusedit.training_sigmas(3.0)[[0, 500, 999]])


def test_forward_encodes_and_then_calls_the_dit(gemma_folder):
    model = small_model(gemma_folder)
    ids, mask = fusedit.tokenize(model.tokenizer, ["a red circle", "a star"], model.config)
    x = torch.randn(2, 4, 4, 4)
    sigma = torch.tensor([0.3, 0.8])
    want = model.dit(x, sigma, model.encode_ids(ids, mask))
    assert model(x, sigma, (ids, mask)).equal(want)


def test_sampler_is_exact_on_straight_paths(float64):
    """With the true velocity of one image, any number of Euler steps ends at that image."""
    x = torch.randn(2, 1, 4, 4)
    noise = torch.randn(2, 1, 4, 4)
    text = TextFeatures((), (), None, torch.ones(2, 1).bool())

    def true_velocity(x_t, sigma, text):
        return noise - x

    for steps in (1, 3):
        called = []
        got = fusedit.sample(true_velocity, noise, text, text, steps, 1.0, 3.0,
                             callback=lambda i, x_t: called.append(i))
        assert_near(got, x, 1e-9)
        assert called == list(range(steps))


def test_guidance_extrapolates_from_the_empty_prompt():
    x = torch.zeros(1, 1, 2, 2)
    mask = torch.ones(1, 1).bool()
    text = TextFeatures((), (), torch.full((1, 1, 1), 2.0), mask)
    uncond = TextFeatures((), (), torch.full((1, 1, 1), 1.0), mask)

    def dit(x_t, sigma, t):
        return t.hidden[..., None].expand_as(x_t)

    for guidance, v in ((1.0, 2.0), (0.0, 1.0), (6.0, 7.0)):
        got = fusedit.sample(dit, x, text, uncond, 1, guidance, 3.0)
        assert torch.allclose(got, torch.full_like(x, -v))


def test_guidance_only_in_a_span_of_noise_levels():
    """Outside the span, a step calls the DiT with the prompt only."""
    x = torch.zeros(1, 1, 2, 2)
    mask = torch.ones(1, 1).bool()
    text = TextFeatures((), (), torch.full((1, 1, 1), 2.0), mask)
    uncond = TextFeatures((), (), torch.full((1, 1, 1), 1.0), mask)
    calls = []

    def dit(x_t, sigma, t):
        calls.append((float(sigma[0]), len(x_t)))
        return t.hidden[..., None].expand_as(x_t)

    sigmas = fusedit.sampling_sigmas(5, 3.0).tolist()
    low = sigmas[3] + 1e-3
    high = sigmas[1] + 1e-3                 # the second and the third of 5 steps
    got = fusedit.sample(dit, x, text, uncond, 5, 6.0, 3.0, guidance_span=(low, high))
    assert [batch for _, batch in calls] == [1, 2, 2, 1, 1]
    assert [sigma for sigma, _ in calls] == pytest.approx(sigmas[:-1], abs=1e-4)

    velocities = [2.0, 7.0, 7.0, 2.0, 2.0]  # 7 = 1 + 6 * (2 - 1)
    want = 0
    for i, v in enumerate(velocities):
        want += (sigmas[i + 1] - sigmas[i]) * v
    assert torch.allclose(got, torch.full_like(x, want), atol=1e-5)


def test_too_large_for_the_sine_table(gemma_folder):
    model = small_model(gemma_folder, pos_embed="ape")
    with pytest.raises(FuseDiTError, match="64 x 64"):
        model.dit(torch.randn(1, 4, 130, 8), torch.tensor([0.5]), model.encode(["a star"]))


# ---- text features -------------------------------------------------------------------------------

def some_features(kind):
    """Random TextFeatures of 3 prompts, for a DiT of 3 blocks: "deep", "shallow" or "clip".

    In deep fusion the second block reads no text. "clip" is deep with CLIP's pooled vectors.
    """
    mask = torch.rand(3, 5) < 0.5
    if kind == "shallow":
        nothing = (None, None, None)
        return TextFeatures(nothing, nothing, torch.randn(3, 5, 8), mask)

    keys = (torch.randn(3, 2, 5, 4), None, torch.randn(3, 2, 5, 4))
    values = (torch.randn(3, 2, 5, 4), None, torch.randn(3, 2, 5, 4))
    pooled = None
    if kind == "clip":
        pooled = torch.randn(3, 6)
    return TextFeatures(keys, values, None, mask, pooled)


def tensors_of(text):
    """All fields of TextFeatures in one list, tensors and Nones."""
    return [*text.keys, *text.values, text.hidden, text.mask, text.pooled]


def assert_same_features(got, want):
    """Assert that two TextFeatures are equal, with None in the same places."""
    assert type(got) is TextFeatures
    assert type(got.keys) is type(got.values) is tuple
    for a, b in zip(tensors_of(got), tensors_of(want), strict=True):
        if b is None:
            assert a is None
        else:
            assert a.equal(b)


@pytest.mark.parametrize("kind", ["deep", "shallow", "clip"])
def test_map_applies_to_every_tensor_once(kind):
    text = some_features(kind)
    tensors = [t for t in tensors_of(text) if t is not None]
    given = []

    def reverse(t):
        given.append(t)
        return t.flip(0)

    reversed_text = text.map(reverse)
    assert len(given) == len(tensors)
    assert {id(t) for t in given} == {id(t) for t in tensors}
    for got, t in zip(tensors_of(reversed_text), tensors_of(text), strict=True):
        if t is None:
            assert got is None
        else:
            assert got.equal(t.flip(0))
    assert_same_features(reversed_text.map(lambda t: t.flip(0)), text)


@pytest.mark.parametrize("kind", ["deep", "shallow", "clip"])
def test_concat_is_both_batches_in_order(kind):
    text = some_features(kind)
    first = text.map(lambda t: t[:1])
    rest = text.map(lambda t: t[1:])
    assert len(first.mask) == 1
    assert len(rest.mask) == 2
    assert_same_features(first.concat(rest), text)


# ---- tokens --------------------------------------------------------------------------------------

def test_the_instruction_does_not_count_towards_the_limit(gemma_folder):
    config = FuseDiTConfig(base=str(gemma_folder), max_text_tokens=4, instruction="imagine : ")
    tokenizer = build_model(config).tokenizer
    prompts = ["red circle and blue star", "", "star"]
    ids, mask = fusedit.tokenize(tokenizer, prompts, config)
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert words == ["<bos>", "imagine", ":", "red", "circle", "and"]           # 4 + 2
    assert mask.sum(1).tolist() == [6, 1, 4]
    assert ids[1, 0] == tokenizer.bos_token_id


def test_chat_template(gemma_folder):
    config = FuseDiTConfig(base=str(gemma_folder), apply_chat_template=True)
    tokenizer = build_model(FuseDiTConfig(base=str(gemma_folder))).tokenizer
    tokenizer.chat_template = "{{ bos_token }}the {{ messages[0]['content'] }} and"
    ids, mask = fusedit.tokenize(tokenizer, ["red star", ""], config)
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert words == ["<bos>", "the", "red", "star", "and"]
    assert mask.sum(1).tolist() == [5, 1]


# ---- configuration -------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(patchsize=2), "patchsize.*patch_size"),
    (dict(patch_size=0), "patch_size is 0.*positive"),
    (dict(shift=-1), "shift is -1.0.*positive"),
    (dict(initial_layers=-1), "initial_layers is -1.*positive"),
    (dict(text_modulation_embeds_dim=768, timestep_conditioning=None), "timestep_conditioning"),
    (dict(clip="x/y"), "text_modulation_embeds_dim"),
    # types
    (dict(patch_size="2"), "patch_size is '2'.*allowed: int"),
    (dict(patch_size=2.0), "patch_size is 2.0.*allowed: int"),
    (dict(patch_size=True), "patch_size is True.*allowed: int"),
    (dict(patch_size=None), "patch_size is None.*allowed: int"),
    (dict(qk_norm=1), "qk_norm is 1.*allowed: bool"),
    (dict(shift="3"), "shift is '3'.*allowed: float"),
    (dict(dit_hidden_size=64.0), "dit_hidden_size is 64.0.*allowed: int, None"),
    # choices
    (dict(attention="slef"), "attention is 'slef'.*allowed: self, cross"),
    (dict(fusion=None), "fusion is None.*allowed: deep, shallow"),
    (dict(timestep_conditioning="adaln"), "allowed: adaln-zero, adaln-single, addition, None"),
    (dict(pos_embed=2), "pos_embed is 2.*allowed: ape, 1d-rope, 2d-rope, m-rope"),
    # layers
    (dict(shared_attention_layers="some"), "layers is 'some'.*allowed: all, tuple"),
    (dict(shared_attention_layers=[0, "1"]), "shared_attention_layers must be .* layer numbers"),
    (dict(shared_attention_layers=[0.0]), "shared_attention_layers must be .* layer numbers"),
    (dict(shared_attention_layers=[True]), "shared_attention_layers must be .* layer numbers"),
    (dict(shared_attention_layers=[[0]]), "shared_attention_layers must be .* layer numbers"),
])
def test_bad_config_names_the_field(changes, message):
    with pytest.raises(FuseDiTError, match=message):
        FuseDiTConfig.from_dict(changes)


def test_numbers_and_lists_from_json_are_converted():
    """Some programs write 3.0 as 3 in JSON, and JSON has no tuples."""
    config = FuseDiTConfig.from_dict(dict(shift=3, guidance=1, shared_attention_layers=[4, 5]))
    assert type(config.shift) is type(config.guidance) is float
    assert config.shift == 3
    assert config.shared_attention_layers == (4, 5)
    hash(config)                            # possible for a frozen dataclass with tuples


def test_values_that_fields_allow():
    config = FuseDiTConfig(timestep_conditioning=None, dit_hidden_size=None, vae=None,
                           initial_layers=0, text_hidden_states_index=-2)
    assert config.timestep_conditioning is None
    assert config.text_hidden_states_index == -2
    for choice in ("adaln-zero", "adaln-single", "addition"):
        assert FuseDiTConfig(timestep_conditioning=choice).timestep_conditioning == choice


def test_config_survives_json():
    config = preset("fusedit/layers-10", shift=1, shared_attention_layers=[4, 5])
    text = json.dumps(asdict(config))
    assert FuseDiTConfig.from_dict(json.loads(text)) == config


def test_an_unknown_preset_suggests_similar_names():
    with pytest.raises(FuseDiTError, match="fusedit/2d-rope"):
        preset("2d-rope")
    with pytest.raises(FuseDiTError, match="demo"):
        preset("dmeo")


def test_more_layers_than_gemma_has(gemma_folder):
    with pytest.raises(FuseDiTError, match="initial_layers 2.*Gemma of 4 layers"):
        small_model(gemma_folder, dit_num_hidden_layers=4, initial_layers=2)

"""The method: equal to the published numbers, to transformers, and to its own definition."""
import json
import math
from dataclasses import asdict

import pytest
import torch
from conftest import REFERENCE, assert_near, tiny_gemma
from safetensors.torch import load_file

import fusedit
from fusedit import FuseDiT, FuseDiTConfig, FuseDiTError, preset
from fusedit_lib.pretrained import build_model, gemma_config, load_model
from fusedit_lib.vae import load_vae

CASES = sorted(p.name for p in (REFERENCE / "cases").iterdir())
PIPELINE = REFERENCE / "released_layout"


# ---- against the published implementation

def run_case(name):
    """(output, published output) of one forward pass, float32."""
    folder = REFERENCE / "cases" / name
    config = json.loads((folder / "config.json").read_text())
    fields = {k: v for k, v in config["dit"].items() if k not in ("model", "text_hidden_size")}
    fusion = {"DiT": "shallow", "FuseDiT": "deep"}[config["dit"]["model"]]
    model = FuseDiT(FuseDiTConfig.from_dict(fields | {"fusion": fusion}),
                    gemma_config(config["base"]))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("dit.patch_embed.pos_embed", None)
    model.load_state_dict(tensors)          # strict
    case = load_file(folder / "case.safetensors")
    with torch.no_grad():
        text = model.encode_ids(case["input_ids"], case["attention_mask"].bool(),
                          case.get("text_modulation_embeds"))
        out = model.dit(case["latents"], case["timestep"].double() / 1000, text)
    return out, case["output"]


def exact_frequencies(count, theta=10000.0, device=None):
    """fusedit.inverse_frequencies with exp in float64, rounded once: the same bits on every machine."""
    return torch.exp((-math.log(theta) * torch.arange(count) / count).double()).float()


def test_frequencies():
    for count, theta in ((128, 1e4), (64, 1e6), (8, 1e4)):
        want = torch.tensor([theta ** (-k / count) for k in range(count)], dtype=torch.float64)
        assert (fusedit.inverse_frequencies(count, theta) / want - 1).abs().max() < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_design_space(name, monkeypatch):
    # float32's exp differs in its last bit from one CPU to the next, which timestep 731 turns into
    # up to 5e-5 of the largest output. Rounded exactly it is 6e-6 from what the published code had
    # on its machine, on any machine of ours.
    monkeypatch.setattr(fusedit, "inverse_frequencies", exact_frequencies)
    assert_near(*run_case(name), 1e-5)


def test_all_16_points_are_there():
    assert len(CASES) == 16


def test_sigmas():
    tables = load_file(PIPELINE / "sigmas.safetensors")
    for name, want in tables.items():
        kind, shift, *steps = name.replace("shift", "").split("_")
        if kind == "train":
            got = fusedit.training_sigmas(float(shift))
        else:
            got = fusedit.sampling_sigmas(int(steps[0][1:]), float(shift))
            got = got[:-1] * 1000 if kind == "timesteps" else got
        assert torch.allclose(got, want, atol=1e-6 * (1000 if kind == "timesteps" else 1)), name


@pytest.fixture(scope="session")
def released():
    model = load_model(PIPELINE / "pipeline")
    golden = load_file(PIPELINE / "golden.safetensors")
    return model, load_vae(PIPELINE / "pipeline"), golden, \
        json.loads((PIPELINE / "golden.json").read_text())["prompts"]


@pytest.mark.parametrize("name, steps, guidance, negative", [
    ("cfg6_25", 25, 6.0, ""), ("nocfg_10", 10, 1.0, ""), ("neg_7", 7, 3.5, "a black ring")])
def test_released_checkpoint_draws_the_published_pictures(released, name, steps, guidance,
                                                          negative):
    model, vae, golden, prompts = released
    texts = model.encode([*prompts, negative])
    x = fusedit.sample(model.dit, golden["noise"], texts.map(lambda t: t[:2]),
                       texts.map(lambda t: t[[2, 2]]), steps, guidance, model.config.shift)
    want = golden[f"latents_{name}"]
    assert (x - want).norm() / want.norm() < 1e-4
    with torch.no_grad():
        pixels = ((vae.decode(x).clamp(-1, 1) + 1) * 127.5).round()
    off = (pixels.permute(0, 2, 3, 1) - golden[f"images_{name}"].float()).abs()
    assert off.max() <= 1 and (off == 0).float().mean() >= 0.999


GEMMAS = {  # the shapes on the hub
    "google/gemma-2-2b": dict(model_type="gemma2", hidden_size=2304, intermediate_size=9216,
                              num_hidden_layers=26, num_key_value_heads=4),
    "other": dict(model_type="gemma", hidden_size=2048, intermediate_size=16384,
                  num_hidden_layers=18, num_key_value_heads=1)}


def on_meta(config):
    shape = dict(vocab_size=256000, num_attention_heads=8, head_dim=256)
    with torch.device("meta"):
        return FuseDiT(config, gemma_config(shape | GEMMAS.get(config.base, GEMMAS["other"])))


RUNS = json.loads((REFERENCE / "paper_runs.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_presets_are_the_papers_runs(name):
    run, config = RUNS[name], preset(name)
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == run["dit_parameters"]
    assert len(model.dit.layers) == run["dit_num_hidden_layers"]
    fields = asdict(config)
    for key in set(run) & set(fields) - {"dit_num_hidden_layers", "shared_attention_layers"}:
        assert fields[key] == run[key], key
    if run.get("shared_attention_layers", "all") != "all":         # ours follow from the offset
        assert model.dit.text_layers == run["shared_attention_layers"]
    model.llm.keep_layers(model.last_layer)
    assert len(model.llm.layers) == run["llm_layers"]


def test_tensors_of_the_large_model():
    want = json.loads((REFERENCE / "large_scale_tensors.json").read_text())
    model = on_meta(preset("fusedit"))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want


# ---- against transformers

@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3"])
def test_gemma_equals_transformers(kind, tmp_path):
    theirs = tiny_gemma(tmp_path, kind)
    L = theirs.config.num_hidden_layers
    model = build_model(FuseDiTConfig(base=str(tmp_path), fusion="shallow"))     # runs all layers
    ids = torch.randint(4, 20, (2, 11))
    mask = torch.arange(11) < torch.tensor([[11], [7]])
    with torch.no_grad():
        out = theirs(ids, attention_mask=mask.long(), use_cache=True)
        keys, values, hidden = model.llm(ids, L)
        for i in range(L):
            layer = out.past_key_values.layers[i]
            for ours, his in ((keys[i], layer.keys), (values[i], layer.values)):
                n = his.shape[2]            # a sliding layer's cache holds the window's end only
                lo = 11 - n
                for row, real in ((0, 11), (1, 7)):
                    if real > lo:
                        assert_near(ours[row, :, lo:real], his[row, :, :real - lo], 1e-5)
        full = model.llm(ids[1:, :7], L)[2][-1]
        assert_near(hidden[-1][0], out.last_hidden_state[0], 1e-5)
        assert_near(hidden[-1][1, :7], full[0], 1e-5)
        # Reading stops early with the same keys, and unrotated keys are the same, turned back.
        early, _, _ = model.llm(ids, 1)
        assert len(early) == 2 and torch.equal(early[1], keys[1])
        plain, _, _ = model.llm(ids, 1, rotate_keys=False)
        assert_near(plain[1][:, :, 0], keys[1][:, :, 0], 1e-5)                   # position 0
        assert (plain[1] - keys[1])[:, :, 1:].norm() > 0.1 * keys[1].norm()


def test_gemma3_windows_and_bases(tmp_path):
    """What the comparison above relies on is really there."""
    theirs = tiny_gemma(tmp_path, "gemma3")
    g = gemma_config(theirs.config.to_dict())
    assert g.sliding_layers == (0, 1, 2, 3, 4) and g.sliding_window == 3 and g.query_scale == 24
    assert (g.rope_theta, g.local_theta) == (1e6, 1e4)
    # The keys of transformers 4, as on the hub.
    old = dict(model_type="gemma3", text_config=dict(
        model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, sliding_window=1024,
        num_hidden_layers=34, rope_scaling={"factor": 8.0, "rope_type": "linear"}))
    g = gemma_config(old)
    assert g.rope_factor == 8 and g.num_attention_heads == 8 and g.vocab_size == 262208
    assert 5 not in g.sliding_layers and len(g.sliding_layers) == 29


# ---- against its own definition

def small_model(folder, **changes):
    """In the default dtype: float64 where a test has that fixture."""
    torch.manual_seed(1)
    model = build_model(FuseDiTConfig.from_dict(dict(
        base=str(folder), pos_embed="2d-rope", sandwich_norm=True, in_channels=4) | changes),
        dtype=torch.get_default_dtype())
    for p in model.dit.parameters():        # a fresh DiT predicts zero: give it something to say
        torch.nn.init.normal_(p, std=0.1)
    return model


def joint_attention_forward(model, ids, mask, x_t, sigma):
    """Both streams in one sequence under one mask, written out: what two phases must equal."""
    llm, dit, T = model.llm, model.dit, ids.shape[1]
    g, h = llm.config, llm.config.head_dim
    rows, cols = x_t.shape[2] // 2, x_t.shape[3] // 2
    N, B = rows * cols, len(ids)
    txt = llm.embed_tokens(ids) * math.sqrt(g.hidden_size)
    img = dit.patch_embed["proj"](x_t).flatten(2).transpose(1, 2)
    see = torch.zeros(B, T + N, T + N, dtype=torch.bool)
    see[:, :T, :T] = torch.ones(T, T).tril().bool()
    see[:, T:, :T] = mask[:, None]
    see[:, T:, T:] = True
    angles = torch.outer(torch.arange(T), 1e4 ** (-torch.arange(h // 2) / (h // 2)))[None]
    by_word = fusedit.cos_sin(angles)
    by_patch = fusedit.image_rope("2d-rope", rows, cols, mask.sum(1), h, None)
    for a, b in zip(llm.layers, dit.layers, strict=True):
        s, n = a.input_layernorm(txt), b.input_layernorm(img)
        q, k, v = [], [], []
        for attn, y, turn in ((a.self_attn, s, by_word), (b.self_attn, n, by_patch)):
            q.append(fusedit.apply_rope(attn.q_norm(attn.heads(attn.q_proj(y))), turn))
            k.append(fusedit.apply_rope(attn.k_norm(attn.heads(attn.k_proj(y))), turn))
            v.append(attn.heads(attn.v_proj(y)))
        q[0] = q[0] * math.sqrt(h / g.query_scale)                 # Gemma's own scale
        q, k, v = (torch.cat(z, dim=2) for z in (q, k, v))
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(h)).masked_fill(~see[:, None], -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        txt = a.add_mlp(a.add_attention(txt, a.self_attn.o_proj(out[:, :T])))
        img = b.add_mlp(b.add_attention(img, b.self_attn.o_proj(out[:, T:])))
    out = dit.proj_out(dit.norm_out(img)).view(B, rows, cols, 2, 2, 4)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape)


def test_two_phases_equal_one_joint_attention(gemma_folder, float64):
    torch.manual_seed(1)
    config = FuseDiTConfig(base=str(gemma_folder), pos_embed="2d-rope", sandwich_norm=True,
                           timestep_conditioning=None, in_channels=4)
    whole = FuseDiT(config, gemma_config(json.loads((gemma_folder / "config.json").read_text())))
    for p in whole.parameters():            # not trimmed: the joint form runs the last layer too
        torch.nn.init.normal_(p, std=0.2)
    ids, mask = torch.randint(4, 20, (2, 9)), torch.arange(9) < torch.tensor([[9], [5]])
    x_t, sigma = torch.randn(2, 4, 6, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        want = joint_attention_forward(whole, ids, mask, x_t, sigma)
        got = whole.dit(x_t, sigma, whole.read(ids, mask))
    assert want.abs().max() > 0.1
    assert_near(got, want, 1e-9)


DEEP_AND_SHALLOW = [dict(fusion=f, attention=a) for f in ("deep", "shallow")
                    for a in ("self", "cross")]


@pytest.mark.parametrize("point", DEEP_AND_SHALLOW, ids=str)
def test_padding_and_neighbours_change_nothing(gemma_folder, point, float64):
    model = small_model(gemma_folder, **point)
    x_t, sigma = torch.randn(3, 4, 4, 6), torch.tensor([0.2, 0.5, 0.8])
    prompts = ["a red circle", "", "a small blue star above the large green square"]
    with torch.no_grad():
        together = model.dit(x_t, sigma, model.encode(prompts))
        padded = model.dit(x_t, sigma, model.encode(prompts, pad_to=30))
        alone = torch.cat([model.dit(x_t[i:i + 1], sigma[i:i + 1], model.encode([p]))
                           for i, p in enumerate(prompts)])
    assert_near(padded, together, 1e-9)
    assert_near(alone, together, 1e-9)


@pytest.mark.parametrize("point", DEEP_AND_SHALLOW, ids=str)
def test_gradients_show_who_sees_whom(gemma_folder, point):
    """The picture sees every real token and no padding; the text does not see the picture."""
    model = small_model(gemma_folder, **point)
    model.llm.requires_grad_(True)
    ids, mask = fusedit.tokenize(model.tokenizer, ["a red circle", "a star"], model.config)
    embedded = []
    model.llm.embed_tokens.register_forward_hook(
        lambda m, i, out: embedded.append(out.retain_grad() or out))
    x_t = torch.randn(2, 4, 4, 6, requires_grad=True)
    text = model.encode_ids(ids, mask)
    features = text.hidden if text.hidden is not None else sum(
        k.sum() + v.sum() for k, v in zip(text.keys, text.values, strict=True))
    grad, = torch.autograd.grad(features.sum(), x_t, allow_unused=True, retain_graph=True)
    assert grad is None or grad.abs().max() == 0
    model.dit(x_t, torch.tensor([0.5, 0.5]), text)[0].square().sum().backward()
    reached = embedded[0].grad.abs().sum(-1) > 0                   # [B,T]
    assert reached[0].equal(mask[0]) and not reached[1].any()      # nor another row's text
    assert (x_t.grad[0] != 0).all() and (x_t.grad[1] == 0).all()


def test_a_frozen_gemma_records_no_graph(gemma_folder):
    model = small_model(gemma_folder)
    text = model.encode(["a red circle"])
    assert not any(k.requires_grad for k in text.keys)
    x, eps = torch.randn(2, 1, 4, 4, 4)
    fusedit.flow_loss(model.dit, x, text, torch.tensor([0.3]), eps).sum().backward()
    assert all(p.grad is None for p in model.llm.parameters())
    assert all(p.grad is not None for p in model.dit.parameters())


def test_layers_without_text_see_the_picture_only(gemma_folder):
    model = small_model(gemma_folder, shared_attention_layers=[1])
    text = model.encode(["a red circle"])
    assert [k is not None for k in text.keys] == [False, True, False, False]
    assert len(model.llm.layers) == 2       # and the upper half of Gemma was never loaded
    assert model.dit(torch.randn(1, 4, 4, 4), torch.tensor([0.5]), text).isfinite().all()


def test_flow_loss_is_the_velocity_error(float64):
    """An oracle that knows x scores zero; one that is wrong by d everywhere scores d squared."""
    x, eps = torch.randn(2, 4, 3, 2, 2)
    wrong = torch.tensor([0.0, 1.0, 2.0, 0.5])

    def oracle(x_t, sigma, text):
        s = sigma[:, None, None, None]
        return (x_t - x) / s + wrong[:, None, None, None]   # (1-s) x + s eps - x = s (eps - x)

    sigma = torch.tensor([0.2, 0.5, 0.9, 1.0])
    loss = fusedit.flow_loss(oracle, x, None, sigma, eps)
    assert_near(loss, wrong ** 2, 1e-9)


def test_noise_levels_of_training_are_logit_normal_and_shifted():
    sigma = fusedit.logit_normal_sigma(torch.randn(20_000), 3.0)
    u = sigma / (3 - 2 * sigma)                                    # the shift undone
    assert abs(torch.logit(u.double(), 1e-4).mean()) < 0.05
    assert abs(torch.logit(u.double(), 1e-4).std() - 1) < 0.05
    ends = fusedit.logit_normal_sigma(torch.tensor([-100.0, 0.0, 100.0]), 3.0)
    assert ends.equal(fusedit.training_sigmas(3.0)[[0, 500, 999]])


def test_one_call_of_both_towers_is_two(gemma_folder):
    model = small_model(gemma_folder)
    ids, mask = fusedit.tokenize(model.tokenizer, ["a red circle", "a star"], model.config)
    x, sigma = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8])
    assert model(x, sigma, (ids, mask)).equal(model.dit(x, sigma, model.encode_ids(ids, mask)))


def test_sampler_is_exact_on_straight_paths(float64):
    """With the true velocity of one picture, any number of Euler steps ends on it."""
    x, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    text = fusedit.TextFeatures((), (), None, torch.ones(2, 1).bool())
    for steps in (1, 3):
        seen = []
        got = fusedit.sample(lambda x_t, s, t: noise - x, noise, text, text, steps, 1.0, 3.0,
                             callback=lambda i, x_t: seen.append(i))
        assert_near(got, x, 1e-9)
        assert seen == list(range(steps))


def test_guidance_moves_from_empty_through_prompt(gemma_folder):
    x = torch.zeros(1, 1, 2, 2)
    text, empty = (fusedit.TextFeatures((), (), torch.full((1, 1, 1), v), torch.ones(1, 1).bool())
                   for v in (2.0, 1.0))

    def dit(x_t, sigma, t):
        return t.hidden[..., None].expand_as(x_t)

    for guidance, v in ((1.0, 2.0), (0.0, 1.0), (6.0, 7.0)):
        got = fusedit.sample(dit, x, text, empty, 1, guidance, 3.0)
        assert torch.allclose(got, torch.full_like(x, -v))


# ---- text

def test_instruction_comes_on_top_of_the_limit(gemma_folder):
    c = FuseDiTConfig(base=str(gemma_folder), max_text_tokens=4, instruction="imagine : ")
    tok = build_model(c).tokenizer
    ids, mask = fusedit.tokenize(tok, ["red circle and blue star", "", "star"], c)
    words = tok.convert_ids_to_tokens(ids[0].tolist())
    assert words == ["<bos>", "imagine", ":", "red", "circle", "and"]           # 4 + 2
    assert mask.sum(1).tolist() == [6, 1, 4] and ids[1, 0] == tok.bos_token_id


def test_chat_template(gemma_folder):
    c = FuseDiTConfig(base=str(gemma_folder), apply_chat_template=True)
    tok = build_model(FuseDiTConfig(base=str(gemma_folder))).tokenizer
    tok.chat_template = "{{ bos_token }}the {{ messages[0]['content'] }} and"
    ids, mask = fusedit.tokenize(tok, ["red star", ""], c)
    assert tok.convert_ids_to_tokens(ids[0].tolist()) == ["<bos>", "the", "red", "star", "and"]
    assert mask.sum(1).tolist() == [5, 1]


# ---- configuration

@pytest.mark.parametrize("changes, words", [
    (dict(patchsize=2), "patchsize.*patch_size"), (dict(patch_size="2"), "patch_size.*int"),
    (dict(attention="slef"), "attention.*self, cross"), (dict(patch_size=0), "positive"),
    (dict(text_modulation_embeds_dim=768, timestep_conditioning=None), "timestep_conditioning"),
    (dict(clip="x/y"), "text_modulation_embeds_dim"),
    (dict(shared_attention_layers="some"), "shared_attention_layers"),
    (dict(qk_norm=1), "qk_norm.*bool")])
def test_bad_config_names_the_field(changes, words):
    with pytest.raises(FuseDiTError, match=words):
        FuseDiTConfig.from_dict(changes)


def test_unknown_preset_lists_near_ones():
    with pytest.raises(FuseDiTError, match="fusedit/2d-rope"):
        preset("2d-rope")
    with pytest.raises(FuseDiTError, match="demo"):
        preset("dmeo")


def test_more_layers_than_gemma_has(gemma_folder):
    with pytest.raises(FuseDiTError, match="initial_layers 2.*Gemma of 4 layers"):
        small_model(gemma_folder, dit_num_hidden_layers=4, initial_layers=2)


def test_config_survives_json():
    c = preset("fusedit/layers-10", shift=1, shared_attention_layers=[4, 5])
    assert FuseDiTConfig.from_dict(json.loads(json.dumps(asdict(c)))) == c


def test_too_large_for_the_sine_table(gemma_folder):
    model = small_model(gemma_folder, pos_embed="ape")
    with pytest.raises(FuseDiTError, match="64 x 64"):
        model.dit(torch.randn(1, 4, 130, 8), torch.tensor([0.5]), model.encode(["a star"]))

"""text_states: the mixtures of hidden states that shallow fusion reads, against their definition.

The definition is written out here with plain loops: over blocks, samples, tokens, layers and
numbers. It shares no function with fusedit.py, except a block's projection of the text that it is
given (Attention.text_kv).
"""
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import assert_near
from safetensors.torch import save_file

import fusedit
from fusedit import FuseDiTConfig, FuseDiTError, TextFeatures
from fusedit_lib import sampling
from fusedit_lib.export import export
from fusedit_lib.pretrained import build_model, load_model, save_model
from fusedit_lib.train import costs
from fusedit_lib.train.memory import count_parameters

MIXTURES = ["uniform", "static", "depth", "time", "joint"]
READERS = ["layer", *MIXTURES]
IDS = torch.tensor([[2, 5, 9, 11, 4], [2, 7, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
SIGMA = [0.3, 0.9]
L = 4                                       # layers of the tiny Gemma
BLOCKS = 3
D = 32                                      # width of the tiny Gemma


def tiny_model(gemma_folder, text_states, random=True, **changes):
    """A model of shallow fusion in the default dtype. random: all weights of the DiT are."""
    torch.manual_seed(1)
    fields = dict(base=str(gemma_folder), fusion="shallow", text_states=text_states,
                  timestep_conditioning=None, pos_embed="2d-rope", sandwich_norm=True,
                  dit_hidden_size=24, dit_num_hidden_layers=BLOCKS, in_channels=3, vae=None,
                  image_size=16, patch_size=4)
    config = FuseDiTConfig.from_dict(fields | changes)
    model = build_model(config, dtype=torch.get_default_dtype())
    if random:
        for p in model.dit.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


# ---- the definition ------------------------------------------------------------------------------

def layer_norm(x):
    """LayerNorm without parameters of a list of numbers."""
    mean = sum(x) / len(x)
    variance = sum((number - mean) ** 2 for number in x) / len(x)
    return [(number - mean) / math.sqrt(variance + 1e-5) for number in x]


def hidden_states(model):
    """S_1 .. S_L: the normalised hidden states after the layers, [L][B][T] lists of D numbers."""
    outputs = []
    handles = [layer.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
               for layer in model.llm.layers]
    _, _, hidden = model.llm(IDS, L)
    for handle in handles:
        handle.remove()
    outputs[-1] = model.llm.norm(outputs[-1])
    assert len(outputs) == L
    assert outputs[-1].equal(hidden[-1])
    return [[[layer_norm(token.tolist()) for token in row] for row in state] for state in outputs]


def softmax(numbers):
    total = sum(math.exp(number) for number in numbers)
    return [math.exp(number) / total for number in numbers]


def linear(weight, bias, x):
    """A Linear applied to a list of numbers."""
    outputs = []
    for row, b in zip(weight.tolist(), bias.tolist(), strict=True):
        outputs.append(b + sum(w * number for w, number in zip(row, x, strict=True)))
    return outputs


def gate(first, second, sigma):
    """g(e(sigma)): Linear(128, 512), SiLU, Linear(512, L). first, second: (weight, bias)."""
    e = [math.cos(sigma * 10000 ** (-j / 64)) for j in range(64)]
    e += [math.sin(sigma * 10000 ** (-j / 64)) for j in range(64)]
    y = [number / (1 + math.exp(-number)) for number in linear(*first, e)]
    return linear(*second, y)


def mixing_weights(mix, text_states, block, sigma):
    """The L weights of a block's mixture. mix: the DiT's TextMix, or None."""
    if text_states == "uniform":
        return [1 / L] * L
    own = 0                                 # all blocks have one set of weights
    if text_states in ("depth", "joint"):
        own = block
    if text_states in ("static", "depth"):
        return softmax(mix.logits[own].tolist())
    rows = slice(512 * own, 512 * (own + 1))
    first = mix.time_embedder.weight[rows], mix.time_embedder.bias[rows]
    return softmax(gate(first, (mix.time_weight[own], mix.logits[own]), sigma))


def embed(dit, mixture):
    """context_embedder of a list of D numbers: RMSNorm, then Linear."""
    norm, projection = dit.context_embedder
    size = math.sqrt(sum(number ** 2 for number in mixture) / len(mixture) + norm.eps)
    normed = [number / size * (1 + w)
              for number, w in zip(mixture, norm.weight.tolist(), strict=True)]
    return linear(projection.weight, projection.bias, normed)


def defined_text(model, text_states):
    """C(mix of S_l) for each block: [BLOCKS,B,T,width]."""
    states = hidden_states(model)
    blocks = []
    for block in range(BLOCKS):
        rows = []
        for b, sigma in enumerate(SIGMA):
            weights = mixing_weights(model.dit.text_mix, text_states, block, sigma)
            tokens = []
            for t in range(IDS.shape[1]):
                mixture = [0] * D
                for weight, state in zip(weights, states, strict=True):
                    for i in range(D):
                        mixture[i] += weight * state[b][t][i]
                tokens.append(embed(model.dit, mixture))
            rows.append(tokens)
        blocks.append(rows)
    return torch.tensor(blocks)


def texts_read(model, x_t, text):
    """The velocity, and the text that each block projects: [BLOCKS,B,T,width]."""
    given = []
    handles = []
    for block in model.dit.layers:
        attn = block.cross_attn or block.self_attn
        handles.append(attn.text_k_proj.register_forward_pre_hook(
            lambda module, args: given.append(args[0])))
    v = model.dit(x_t, torch.tensor(SIGMA), text)
    for handle in handles:
        handle.remove()
    return v, torch.stack(given)


def velocity_of_one_state(model, contexts, x_t):
    """The velocity of the same blocks if block i is given the text contexts[i].

    It is that of a model with text_states "layer", whose hidden state is not used.
    """
    config = replace(model.config, text_states="layer")
    plain = fusedit.FuseDiT(config, model.llm.config)
    weights = {name: t for name, t in model.dit.state_dict().items() if "text_mix" not in name}
    plain.dit.load_state_dict(weights)
    for block, context in zip(plain.dit.layers, contexts, strict=True):
        attn = block.cross_attn or block.self_attn
        for name in ("text_k_proj", "text_v_proj"):
            attn.get_submodule(name).register_forward_pre_hook(
                lambda module, args, context=context: (context,))
    nothing = (None,) * BLOCKS
    text = TextFeatures(nothing, nothing, torch.zeros(2, IDS.shape[1], D), MASK)
    return plain.dit(x_t, torch.tensor(SIGMA), text)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("text_states", MIXTURES)
def test_a_mixture_equals_its_definition(gemma_folder, text_states, attention, float64):
    """The text that each block reads, and the velocity that follows from it."""
    model = tiny_model(gemma_folder, text_states, attention=attention)
    x_t = torch.randn(2, 3, 16, 16)
    want = defined_text(model, text_states)
    v, got = texts_read(model, x_t, model.encode_ids(IDS, MASK))
    assert_near(got, want, 1e-9)
    differs = [not torch.allclose(context, want[0]) for context in want]
    assert any(differs) == (text_states in ("depth", "joint"))
    assert v.abs().max() > 0.1
    assert_near(v, velocity_of_one_state(model, want, x_t), 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("index", [-1, -2, 1])
def test_layer_reads_the_hidden_state_of_its_index(gemma_folder, index, attention, float64):
    """-2 is the penultimate one: the input of the last layer."""
    model = tiny_model(gemma_folder, "layer", attention=attention, text_hidden_states_index=index)
    whole = fusedit.load_gemma(gemma_folder, dtype=torch.float64)
    state = whole(IDS, L)[2][index]
    want = torch.tensor([[embed(model.dit, token) for token in row] for row in state.tolist()])
    _, got = texts_read(model, torch.randn(2, 3, 16, 16), model.encode_ids(IDS, MASK))
    assert_near(got, want.expand(BLOCKS, -1, -1, -1), 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("text_states", ["static", "depth", "time", "joint"])
def test_a_new_mixture_is_the_plain_mean(gemma_folder, text_states, float64):
    """And so is one whose weights are drawn one by one, as for a TPU."""
    uniform = tiny_model(gemma_folder, "uniform", random=False)
    model = tiny_model(gemma_folder, text_states, random=False)
    model.dit.load_state_dict(uniform.dit.state_dict(), strict=False)
    x_t = torch.randn(2, 3, 16, 16)
    _, want = texts_read(uniform, x_t, uniform.encode_ids(IDS, MASK))
    _, got = texts_read(model, x_t, model.encode_ids(IDS, MASK))
    assert_near(got, want, 1e-9)

    if text_states in ("time", "joint"):    # only the gates' last Linear starts at 0
        embedder = model.dit.text_mix.time_embedder.weight
        assert embedder.std().item() == pytest.approx(0.02, rel=0.02)
        assert not model.dit.text_mix.time_weight.any()
    assert not model.dit.text_mix.logits.any()


@pytest.mark.parametrize("text_states", ["static", "depth", "time", "joint"])
def test_the_gradient_reaches_the_weights(gemma_folder, text_states):
    """In a random model all weights of each block; in a new one only those that start at 0."""
    for random in (True, False):
        model = tiny_model(gemma_folder, text_states, random)
        torch.nn.init.normal_(model.dit.proj_out.weight)
        x = torch.randn(2, 3, 16, 16)
        eps = torch.randn_like(x)
        fusedit.flow_loss(model, x, (IDS, MASK), torch.tensor(SIGMA), eps).sum().backward()
        for name, p in model.dit.text_mix.named_parameters():
            blocks = p.grad.view(len(model.dit.text_mix.logits), -1)
            assert blocks.any(1).all() or (not random and "time_embedder" in name), name
        assert all(p.grad is None for p in model.llm.parameters())


# ---- text features -------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("text_states", READERS)
def test_padding_and_neighbours_change_nothing(gemma_folder, text_states, float64):
    model = tiny_model(gemma_folder, text_states)
    x_t = torch.randn(3, 3, 16, 16)
    sigma = torch.tensor([0.2, 0.5, 0.8])
    prompts = ["a red circle", "", "a small blue star above the large green square"]
    text = model.encode(prompts)
    together = model.dit(x_t, sigma, text)
    padded = model.dit(x_t, sigma, model.encode(prompts, pad_to=30))
    rows = [text.map(lambda t, i=i: t[i:i + 1]) for i in range(3)]
    joined = rows[0].concat(rows[1]).concat(rows[2])
    alone = [model.dit(x_t[i:i + 1], sigma[i:i + 1], row) for i, row in enumerate(rows)]
    assert_near(padded, together, 1e-9)
    assert_near(torch.cat(alone), together, 1e-9)
    assert_near(model.dit(x_t, sigma, joined), together, 1e-9)


def test_gemma_is_not_cut(gemma_folder):
    """A mixture reads all layers, and only a learned one keeps them apart for the DiT."""
    for text_states in MIXTURES:
        model = tiny_model(gemma_folder, text_states)
        assert len(model.llm.layers) == L
        assert model.llm.norm is not None
        shape = (2, 5, D) if text_states == "uniform" else (2, 5, L, D)
        assert model.encode_ids(IDS, MASK).hidden.shape == shape
        assert (model.dit.text_mix is None) == (text_states == "uniform")


# ---- configuration -------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(text_states="mean"), "text_states is 'mean'; allowed: layer, uniform, static, depth, "),
    (dict(text_states="static"), "text_states is 'static', which needs fusion shallow"),
    (dict(text_states="joint", fusion="shallow", text_hidden_states_index=-2),
     "text_hidden_states_index is -2, but text_states 'joint' reads all layers: leave it at -1")])
def test_combinations_without_a_meaning_are_refused(changes, message):
    with pytest.raises(FuseDiTError, match=message):
        FuseDiTConfig.from_dict(changes)


def test_a_config_without_the_field_reads_one_layer():
    assert FuseDiTConfig.from_dict({"fusion": "shallow"}).text_states == "layer"


def test_an_older_file_does_not_differ_in_the_new_field(gemma_folder, tmp_path):
    """The hint about weights that do not fit lists no field that a file only lacks."""
    model = tiny_model(gemma_folder, "layer")
    save_model(tmp_path, model.config, {})
    tensors = {f"dit.{name}": t for name, t in model.dit.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"config": '{"attention": "self"}'})
    with pytest.raises(FuseDiTError, match="attention: 'cross', 'self'") as error:
        load_model(tmp_path, attention="cross")
    assert "text_states" not in str(error.value)


# ---- saving, drawing, exporting, planning --------------------------------------------------------

@pytest.mark.parametrize("text_states", READERS)
def test_a_saved_and_an_exported_model_draw_the_same(gemma_folder, tmp_path, capsys, text_states):
    """Two prompts of different lengths, with guidance."""
    model = tiny_model(gemma_folder, text_states, pos_embed="ape")
    save_model(tmp_path / "saved", model.config, model.dit.state_dict())
    export(model, tmp_path / "exported")
    lacks = "The published classes cannot: they need .*text_states layer"
    assert bool(re.search(lacks, capsys.readouterr().out)) == (text_states != "layer")

    images = {}
    for name in ("saved", "exported"):
        loaded = load_model(tmp_path / name)
        assert loaded.config.text_states == text_states
        prompts = ["a red circle", "a small blue star above the square", "a red circle"]
        drawn = sampling.generate(loaded, prompts, steps=2, guidance=3.0)
        images[name] = [image.tobytes() for image in drawn]
    assert images["saved"] == images["exported"]
    assert len(set(images["saved"])) == 3


@pytest.mark.parametrize("text_states", READERS)
def test_parameters_and_flops_are_those_of_the_formula(gemma_folder, text_states):
    """Compares what a mixture adds to a DiT that reads one layer."""
    n = {"layer": 0, "uniform": 0, "static": 1, "time": 1}.get(text_states, BLOCKS)
    gates = n if text_states in ("time", "joint") else 0
    tokens = 7
    found = {}
    for name in ("layer", text_states):
        config = tiny_model(gemma_folder, name).config
        model = costs.abstract_model(config)
        flops = costs.flops(model, config, tokens)
        found[name] = count_parameters(model.dit), flops.dit, flops.gemma
    parameters, dit, gemma = found[text_states]
    plain_parameters, plain_dit, plain_gemma = found["layer"]
    assert parameters - plain_parameters == n * L + gates * 512 * (128 + 1 + L)
    mixing = 2 * n * L * D * tokens + gates * 2 * 512 * (128 + L)
    embedding = 2 * D * 24 * tokens * max(0, n - 1)            # one context for each block
    assert dit - plain_dit == mixing + embedding
    assert gemma == plain_gemma             # the mean and LayerNorm are no matrix products

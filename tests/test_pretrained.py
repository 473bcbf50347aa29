"""Model folders: what loads, what is refused and how, and what is written."""
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import REFERENCE, tiny_clip, tiny_gemma
from safetensors.torch import load_file, save_file

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib import files, pretrained
from fusedit_lib.pretrained import build_model, load_model, save_model

PIPELINE = REFERENCE / "released_layout" / "pipeline"


@pytest.fixture
def folder(tmp_path, gemma_folder):
    """A checkpoint with its Gemma inside, as the demo is."""
    shutil.copytree(gemma_folder, tmp_path / "m" / "gemma")
    config = FuseDiTConfig(base=str(gemma_folder), pos_embed="2d-rope", in_channels=3, vae=None,
                           timestep_conditioning=None, image_size=8)
    model = build_model(config)
    config = FuseDiTConfig.from_dict(asdict(config) | {"base": "gemma"})
    save_model(tmp_path / "m", config, model.dit.state_dict())
    return tmp_path / "m"


def prefixed(source, target, prefix, extra=()):
    """A copy of a Gemma folder whose tensors have another prefix."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors = {prefix + k.removeprefix("model."): v for k, v in tensors.items()}
    save_file(tensors | {k: torch.zeros(1) for k in extra}, target / "model.safetensors")
    return target


def gemma_weights(folder):
    return build_model(FuseDiTConfig(base=str(folder))).llm.state_dict()


@pytest.mark.parametrize("prefix, extra", [
    ("", ()), ("model.", ("lm_head.weight",)),
    ("language_model.model.", ("vision_tower.x", "multi_modal_projector.y")),
    ("model.language_model.", ("model.vision_tower.x",)), ("llm.", ("dit.z",))])
def test_gemma_under_every_known_prefix(gemma_folder, tmp_path, prefix, extra):
    want = gemma_weights(gemma_folder)
    got = gemma_weights(prefixed(gemma_folder, tmp_path / "g", prefix, extra))
    assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)


def test_paligemma_config(gemma_folder, tmp_path):
    prefixed(gemma_folder, tmp_path / "g", "language_model.model.", ["vision_tower.x"])
    inner = json.loads((gemma_folder / "config.json").read_text())
    outer = {"model_type": "paligemma", "text_config": inner, "vision_config": {}}
    (tmp_path / "g" / "config.json").write_text(json.dumps(outer))
    assert gemma_weights(tmp_path / "g").keys() == gemma_weights(gemma_folder).keys()


def test_sharded_gemma(gemma_folder, tmp_path):
    shutil.copytree(gemma_folder, tmp_path / "g")
    tensors = load_file(gemma_folder / "model.safetensors")
    (tmp_path / "g" / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for i in range(3):
        part = {k: tensors[k] for k in names[i::3]}
        save_file(part, tmp_path / "g" / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (tmp_path / "g" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    want, got = gemma_weights(gemma_folder), gemma_weights(tmp_path / "g")
    assert all(want[k].equal(got[k]) for k in want)
    (tmp_path / "g" / "model-1.safetensors").unlink()
    with pytest.raises(FuseDiTError, match="model-1.safetensors"):
        gemma_weights(tmp_path / "g")


def test_only_what_is_read_is_loaded(gemma_folder):
    c = FuseDiTConfig(base=str(gemma_folder), dit_num_hidden_layers=2, initial_layers=1)
    llm = build_model(c).llm
    names = set(llm.state_dict())
    assert len(llm.layers) == 3 and "norm.weight" not in names
    assert {n.split(".", 2)[2] for n in names if n.startswith("layers.2")} >= {
        "self_attn.k_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight"}
    assert not any("layers.2.mlp" in n or "layers.2.self_attn.q" in n for n in names)
    half = build_model(c, dtype=torch.bfloat16)
    assert half.llm.embed_tokens.weight.dtype == torch.bfloat16
    assert half.dit.proj_out.weight.dtype == torch.float32         # to be trained
    assert not half.llm.embed_tokens.weight.requires_grad and half.dit.proj_out.weight.requires_grad


def test_missing_and_unexpected_tensors_are_named(gemma_folder, tmp_path):
    shutil.copytree(gemma_folder, tmp_path / "g")
    tensors = load_file(gemma_folder / "model.safetensors")
    dropped = next(k for k in tensors if "layers.2.mlp.up_proj" in k)
    value = tensors.pop(dropped)
    save_file(tensors, tmp_path / "g" / "model.safetensors")
    with pytest.raises(FuseDiTError, match="layers.2.mlp.up_proj.weight is missing"):
        gemma_weights(tmp_path / "g")
    odd = dropped.replace("up_proj", "sideways")
    save_file(tensors | {dropped: value, odd: value.clone()}, tmp_path / "g" / "model.safetensors")
    with pytest.raises(FuseDiTError, match="layers.2.mlp.sideways.weight is unexpected"):
        gemma_weights(tmp_path / "g")


def test_checkpoint_loads_in_either_dtype(folder):
    a, b = load_model(folder), load_model(folder, dtype=torch.bfloat16)
    assert a.dit.proj_out.weight.dtype == torch.float32 and not a.training
    assert b.dit.proj_out.weight.dtype == b.llm.embed_tokens.weight.dtype == torch.bfloat16


def test_a_run_folder_means_its_latest_checkpoint(folder):
    (folder.parent / "latest").write_text("m\n")
    assert load_model(folder.parent).config.image_size == 8


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"run": {}}')
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FuseDiTError, match="is a training run that has no checkpoint yet"):
        load_model(tmp_path)


@pytest.mark.parametrize("changes, words", [
    (dict(in_channels=16), "in_channels is 16.*vae"), (dict(text_modulation_embeds_dim=8), "clip"),
    (dict(apply_chat_template=True), "no chat template"),
    (dict(dit_hidden_size=10), "dit_hidden_size is 10.*multiple of 4"),
    (dict(shared_attention_layers=[]), "shared_attention_layers do not fit"),
    (dict(shared_attention_layers=[1], dit_num_hidden_layers=1), "shared_attention_layers do not fit"),
    (dict(initial_layers=9, fusion="shallow"), "do not fit a Gemma")])
def test_what_a_model_lacks_is_named(gemma_folder, changes, words):
    config = FuseDiTConfig(**dict(base=str(gemma_folder), vae=None, in_channels=3) | changes)
    with pytest.raises(FuseDiTError, match=words):
        build_model(config)


def test_another_architecture_names_the_fields(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"patch_size": 4}))
    with pytest.raises(FuseDiTError, match="patch_size: 4, 2"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"patch": 4}))
    with pytest.raises(FuseDiTError, match="'patch'.*patch_size"):
        load_model(folder)


@pytest.mark.parametrize("spoil, words", [
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: shutil.rmtree(f / "gemma"), "gemma"),
    (lambda f: (f / "gemma" / "tokenizer.json").write_text("{}"), "tokenizer"),
    (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]), "truncated or corrupt"),
    (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 100), "truncated or corrupt")])
def test_spoilt_folders(folder, spoil, words):
    spoil(folder)
    with pytest.raises(FuseDiTError, match=words):
        load_model(folder)


def test_not_there():
    with pytest.raises(FuseDiTError, match="no such model folder"):
        load_model("./nowhere")


def test_the_hub_is_asked_for_what_is_needed(folder, monkeypatch):
    import huggingface_hub
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("someone/a-model").config.image_size == 8
    assert asked == [("someone/a-model", ["*.json", "*.safetensors", "*.model"])]

    def refuse(name, allow_patterns):
        raise OSError("403: gated")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FuseDiTError, match="hf auth login"):
        load_model("google/gemma-2-2b")


def test_export_stands_alone_and_is_the_same_model(folder, tmp_path):
    model = load_model(folder)
    pretrained.export(model, tmp_path / "out")
    shutil.rmtree(folder)
    again = load_model(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(v.equal(again.state_dict()[k]) for k, v in model.state_dict().items())
    same = asdict(again.config) | dict(base=0) == asdict(model.config) | dict(
        base=0, dit_hidden_size=32, dit_num_hidden_layers=4)
    assert same
    with pytest.raises(FuseDiTError, match="not empty"):
        pretrained.export(again, tmp_path / "out")


def test_export_of_the_published_layout_has_every_tensor(tmp_path):
    """Strict both ways: what came from the authors' folder goes back, tensor for tensor."""
    pretrained.export(load_model(PIPELINE), tmp_path / "out")
    want = load_file(PIPELINE / "transformer" / "model.safetensors")
    got = load_file(tmp_path / "out" / "transformer" / "model.safetensors")
    assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)
    a, b = (json.loads((p / "transformer" / "config.json").read_text())
            for p in (PIPELINE, tmp_path / "out"))
    shared = set(a) - {"torch_dtype", "transformers_version", "text_modulation_embeds_dim"}
    assert {k: a[k] for k in shared} == {k: b[k] for k in shared}
    assert {p.name for p in (tmp_path / "out" / "vae").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"}


def test_export_of_an_ape_model_carries_its_table(tmp_path, gemma_folder):
    """Published checkpoints of ape models hold the constant table; it must be theirs."""
    case = REFERENCE / "cases" / "deep-self-ape-adaln_zero"
    want = load_file(case / "model.safetensors")["dit.patch_embed.pos_embed"]
    model = build_model(FuseDiTConfig(base=str(gemma_folder), vae=None, in_channels=3))
    pretrained.export(model, tmp_path / "out")
    got = load_file(tmp_path / "out" / "transformer" / "model.safetensors")
    assert (got["dit.patch_embed.pos_embed"] - want).abs().max() < 1e-5
    load_model(tmp_path / "out")


def test_atomic_write_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "a") as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_clip_modulation_end_to_end(tmp_path, gemma_folder):
    """A tiny random CLIP, saved as transformers saves one, reaches the time embedding."""
    clip = tiny_clip(tmp_path / "clip")
    config = FuseDiTConfig(base=str(gemma_folder), clip=str(clip), text_modulation_embeds_dim=24,
                           vae=None, in_channels=3)
    model = build_model(config)
    for p in model.dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    text = model.encode(["a red circle", "a blue star"])
    assert text.pooled.shape == (2, 24) and not text.pooled.requires_grad
    x, sigma = torch.randn(1, 3, 4, 4).expand(2, -1, -1, -1), torch.tensor([0.5, 0.5])
    swapped = text._replace(pooled=text.pooled.flip(0))
    with torch.no_grad():
        a, b = model.dit(x, sigma, text), model.dit(x, sigma, swapped)
    assert (a - b).abs().max() > 1e-4
    save_model(tmp_path / "m", config, model.dit.state_dict())
    pretrained.export(load_model(tmp_path / "m"), tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert torch.allclose(again.encode(["a red circle"]).pooled, text.pooled[:1], atol=1e-5)


def test_gemma_kinds_load_strictly(tmp_path):
    for kind in ("gemma", "gemma3"):
        theirs = tiny_gemma(tmp_path / kind, kind).state_dict()
        model = build_model(FuseDiTConfig(base=str(tmp_path / kind), fusion="shallow"))
        assert all(v.equal(theirs[k]) for k, v in model.llm.state_dict().items())

"""Model folders: loading them, the errors of those that do not load, and writing them."""
import json
import shutil
import stat
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
import warm
from conftest import REFERENCE, ROOT, tiny_clip, tiny_gemma
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM

from fusedit import FuseDiTConfig, FuseDiTError, load_gemma
from fusedit_lib import files, pretrained
from fusedit_lib.export import export
from fusedit_lib.folders import MODEL_FILES
from fusedit_lib.pretrained import build_model, load_model, save_model

PIPELINE = REFERENCE / "released_layout" / "pipeline"


@pytest.fixture
def folder(tmp_path, gemma_folder):
    """A checkpoint folder that contains its Gemma, like the demo."""
    folder = tmp_path / "m"
    shutil.copytree(gemma_folder, folder / "gemma")
    config = FuseDiTConfig(base=str(gemma_folder), pos_embed="2d-rope", in_channels=3, vae=None,
                           timestep_conditioning=None, image_size=8)
    model = build_model(config)
    stored_config = FuseDiTConfig.from_dict(asdict(config) | {"base": "gemma"})
    save_model(folder, stored_config, model.dit.state_dict())
    return folder


@pytest.fixture
def gemma_copy(tmp_path, gemma_folder):
    """A Gemma folder that a test may change."""
    return shutil.copytree(gemma_folder, tmp_path / "g")


def edit_weights(folder, edit):
    """Rewrite model.safetensors after edit(tensors) has changed the dict of its tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].equal(tensor), name


# ---- Gemmas --------------------------------------------------------------------------------------

def gemma_weights(folder):
    """The weights that a model loads from the Gemma in this folder."""
    return build_model(FuseDiTConfig(base=str(folder))).llm.state_dict()


def use_prefix(folder, prefix, others=()):
    """Store a Gemma's tensors under another prefix, and add small tensors named `others`."""
    path = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        renamed[prefix + name.removeprefix("model.")] = tensor
    for name in others:
        renamed[name] = torch.zeros(1)
    save_file(renamed, path)


@pytest.mark.parametrize("prefix, others", [
    ("", ()),
    ("model.", ("lm_head.weight",)),
    ("language_model.model.", ("vision_tower.x", "multi_modal_projector.y")),
    ("model.language_model.", ("model.vision_tower.x",)),
    ("llm.", ("dit.z",)),
])
def test_gemma_under_every_known_prefix(gemma_folder, gemma_copy, prefix, others):
    use_prefix(gemma_copy, prefix, others)
    assert_same_tensors(gemma_weights(gemma_copy), gemma_weights(gemma_folder))


def test_paligemma_config(gemma_folder, gemma_copy):
    use_prefix(gemma_copy, "language_model.model.", ["vision_tower.x"])
    inner = json.loads((gemma_folder / "config.json").read_text())
    outer = {"model_type": "paligemma", "text_config": inner, "vision_config": {}}
    (gemma_copy / "config.json").write_text(json.dumps(outer))
    assert gemma_weights(gemma_copy).keys() == gemma_weights(gemma_folder).keys()


def split_into_shards(folder, count):
    """Replace model.safetensors with shards and an index, as transformers saves large models."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        file_name = f"model-{i}.safetensors"
        shard = {name: tensors[name] for name in names[i::count]}
        save_file(shard, folder / file_name)
        for name in shard:
            weight_map[name] = file_name
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def test_sharded_gemma(gemma_folder, gemma_copy):
    split_into_shards(gemma_copy, 3)
    assert_same_tensors(gemma_weights(gemma_copy), gemma_weights(gemma_folder))
    (gemma_copy / "model-1.safetensors").unlink()
    with pytest.raises(FuseDiTError, match="model-1.safetensors"):
        gemma_weights(gemma_copy)


def test_gemma_kinds_load_strictly(tmp_path):
    for kind in ("gemma", "gemma3"):
        theirs = tiny_gemma(tmp_path / kind, kind).state_dict()
        config = FuseDiTConfig(base=str(tmp_path / kind), fusion="shallow")
        for name, tensor in build_model(config).llm.state_dict().items():
            assert tensor.equal(theirs[name]), name


def test_only_layers_that_are_read_are_loaded(gemma_folder):
    config = FuseDiTConfig(base=str(gemma_folder), dit_num_hidden_layers=2, initial_layers=1)
    llm = build_model(config).llm
    names = set(llm.state_dict())
    assert len(llm.layers) == 3
    assert "norm.weight" not in names

    last = {name.removeprefix("layers.2.") for name in names if name.startswith("layers.2.")}
    assert {"self_attn.k_proj.weight", "self_attn.v_proj.weight",
            "input_layernorm.weight"} <= last
    assert not any(name.startswith(("mlp", "self_attn.q")) for name in last)


def test_gemma_is_frozen_in_dtype_and_a_fresh_dit_trains_in_float32(gemma_folder):
    model = build_model(FuseDiTConfig(base=str(gemma_folder)), dtype=torch.bfloat16)
    gemma_weight = model.llm.embed_tokens.weight
    dit_weight = model.dit.proj_out.weight
    assert gemma_weight.dtype == torch.bfloat16
    assert not gemma_weight.requires_grad
    assert dit_weight.dtype == torch.float32
    assert dit_weight.requires_grad


UP_PROJ = "layers.2.mlp.up_proj.weight"
SIDEWAYS = "layers.2.mlp.sideways.weight"


def drop_tensor(tensors):
    del tensors[UP_PROJ]


def add_tensor(tensors):
    tensors[SIDEWAYS] = tensors[UP_PROJ].clone()


def reshape_tensor(tensors):
    tensors[UP_PROJ] = tensors[UP_PROJ][:40].clone()


@pytest.mark.parametrize("edit, message", [
    (drop_tensor, f"{UP_PROJ} is missing"),
    (add_tensor, f"{SIDEWAYS} is unexpected"),
    (reshape_tensor, rf"{UP_PROJ} is \(40, 32\), not \(48, 32\)"),
])
def test_tensors_that_do_not_fit_are_named(gemma_copy, edit, message):
    edit_weights(gemma_copy, edit)
    with pytest.raises(FuseDiTError, match=message):
        gemma_weights(gemma_copy)


# ---- fusedit.load_gemma, the plain path ----------------------------------------------------------

def test_load_gemma_of_shards(tmp_path, gemma_folder):
    model = Gemma2ForCausalLM.from_pretrained(gemma_folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_tensors(load_gemma(tmp_path).state_dict(), load_gemma(gemma_folder).state_dict())


def test_load_gemma_of_a_whole_language_model(tmp_path, gemma_folder):
    """The tensors have the prefix "model.", and a separate output layer is not loaded."""
    model = Gemma2ForCausalLM.from_pretrained(gemma_folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 32))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()
        assert "model.norm.weight" in file.keys()
    assert_same_tensors(load_gemma(tmp_path).state_dict(), load_gemma(gemma_folder).state_dict())


@pytest.mark.parametrize("edit, problem", [
    (drop_tensor, f"Missing.*{UP_PROJ}"),
    (add_tensor, f"Unexpected.*{SIDEWAYS}"),
    (reshape_tensor, rf"size mismatch for {UP_PROJ}.*\[40, 32\].*\[48, 32\]"),
])
def test_load_gemma_names_tensors_that_do_not_fit(gemma_copy, edit, problem):
    edit_weights(gemma_copy, edit)
    message = rf"(?s){gemma_copy} do not fit its config.json.*{problem}"
    with pytest.raises(FuseDiTError, match=message):
        load_gemma(gemma_copy)


def truncate(path, missing=100):
    """Cut the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-missing])


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


SPOIL_GEMMA = {
    "no config": lambda g: (g / "config.json").unlink(),
    "half a config": lambda g: (g / "config.json").write_text("{"),
    "another model": lambda g: edit_json(g / "config.json", model_type="llama"),
    "no layers": lambda g: edit_json(g / "config.json", num_hidden_layers=None),
    "truncated": lambda g: truncate(g / "model.safetensors"),
    "empty": lambda g: (g / "model.safetensors").write_bytes(b""),
    "no weights": lambda g: (g / "model.safetensors").unlink(),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("case, problem", [
    ("no config", "cannot read the Gemma in {folder}.*config.json"),
    ("half a config", "cannot read the Gemma in {folder}"),
    ("another model", "model_type is 'llama'.*must be a Gemma"),
    ("no layers", "has no num_hidden_layers"),
    ("truncated", "cannot read the Gemma in {folder}.*incomplete"),
    ("empty", "cannot read the Gemma in {folder}.*header"),
    ("no weights", "(?s)weights in {folder}.*Missing.*embed_tokens.weight"),
    ("no folder", "cannot read the Gemma in {folder}.*config.json"),
])
def test_load_gemma_names_what_is_broken(gemma_copy, case, problem):
    SPOIL_GEMMA[case](gemma_copy)
    with pytest.raises(FuseDiTError, match=problem.format(folder=gemma_copy)):
        load_gemma(gemma_copy)


# ---- model folders -------------------------------------------------------------------------------

def test_checkpoint_loads_in_either_dtype(folder):
    model = load_model(folder)
    assert model.dit.proj_out.weight.dtype == torch.float32
    assert not model.training
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.dit.proj_out.weight.dtype == torch.bfloat16
    assert model.llm.embed_tokens.weight.dtype == torch.bfloat16


def test_a_run_folder_means_its_latest_checkpoint(folder):
    (folder.parent / "latest").write_text("m\n")
    assert load_model(folder.parent).config.image_size == 8


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"run": {}}')
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FuseDiTError, match="is a training run that has no checkpoint yet"):
        load_model(tmp_path)


@pytest.mark.parametrize("changes, message", [
    (dict(in_channels=16), "in_channels is 16.*vae"),
    (dict(text_modulation_embeds_dim=8), "clip"),
    (dict(apply_chat_template=True), "no chat template"),
    (dict(dit_hidden_size=10), "dit_hidden_size is 10.*multiple of 4"),
    (dict(shared_attention_layers=[]), "shared_attention_layers do not fit"),
    (dict(shared_attention_layers=[1], dit_num_hidden_layers=1),
     "shared_attention_layers do not fit"),
    (dict(initial_layers=9, fusion="shallow"), "do not fit a Gemma"),
])
def test_impossible_configs_name_the_field(gemma_folder, changes, message):
    fields = dict(base=str(gemma_folder), vae=None, in_channels=3)
    config = FuseDiTConfig(**fields | changes)
    with pytest.raises(FuseDiTError, match=message):
        build_model(config)


def test_another_architecture_names_the_fields(folder):
    edit_json(folder / "config.json", patch_size=4)
    with pytest.raises(FuseDiTError, match="patch_size: 4, 2"):
        load_model(folder)
    edit_json(folder / "config.json", patch=4)
    with pytest.raises(FuseDiTError, match="'patch'.*patch_size"):
        load_model(folder)


SPOIL = {
    "no weights": lambda m: (m / "model.safetensors").unlink(),
    "no config": lambda m: (m / "config.json").unlink(),
    "half a config": lambda m: (m / "config.json").write_text("{"),
    "no Gemma": lambda m: shutil.rmtree(m / "gemma"),
    "no tokenizer": lambda m: (m / "gemma" / "tokenizer.json").write_text("{}"),
    "truncated": lambda m: truncate(m / "model.safetensors"),
    "junk": lambda m: (m / "model.safetensors").write_bytes(b"junk" * 100),
}


@pytest.mark.parametrize("case, message", [
    ("no weights", "model.safetensors is missing"),
    ("no config", "config.json"),
    ("half a config", "config.json"),
    ("no Gemma", "gemma"),
    ("no tokenizer", "tokenizer"),
    ("truncated", "truncated or corrupt"),
    ("junk", "truncated or corrupt"),
])
def test_broken_folders(folder, case, message):
    SPOIL[case](folder)
    with pytest.raises(FuseDiTError, match=message):
        load_model(folder)


def test_a_gemma_that_has_moved_is_named_and_can_be_replaced(folder):
    moved = (folder / "gemma").rename(folder.parent / "elsewhere")
    edit_json(folder / "config.json", base=str(folder / "gemma"))
    with pytest.raises(FuseDiTError, match="gemma, its base, .* use --set base=FOLDER"):
        load_model(folder)
    model = load_model(folder, base=str(moved))
    assert model.config.base == str(moved)
    with pytest.raises(FuseDiTError, match="base=./nowhere: there is no such folder"):
        load_model(folder, base="./nowhere")
    with pytest.raises(FuseDiTError, match="config field base is 3"):
        load_model(folder, base=3)


def test_a_stored_name_means_the_repositorys_own_folder(folder, tmp_path, monkeypatch):
    """Even in the working directory of another clone, or beside another demo/gemma."""
    (tmp_path / "cwd" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    beside = pretrained.load_model(folder).config
    assert beside.base == str(folder / "gemma")
    here = pretrained.with_absolute_paths(beside, folder, {"base": "gemma"})
    assert here.base == str(tmp_path / "cwd" / "gemma")

    shutil.rmtree(folder / "gemma")
    edit_json(folder / "config.json", base="demo/gemma")
    other = tmp_path / "clone" / "demo" / "gemma"
    tiny_gemma(other, vocab_size=70)
    monkeypatch.chdir(tmp_path / "clone")
    stored = FuseDiTConfig.from_dict(json.loads((folder / "config.json").read_text()))
    here = pretrained.with_absolute_paths(stored, folder, {})
    assert here.base == str(ROOT / "demo" / "gemma")
    here = pretrained.with_absolute_paths(stored, folder, {"base": "demo/gemma"})
    assert here.base == str(other)


def test_the_wrong_folder_is_recognised(tmp_path):
    """A Gemma, a part or a file of a model, a run whose newest checkpoint has been deleted."""
    whole = f"of a model: give the folder of the whole model, {PIPELINE}$"
    for part in ("transformer", "vae", "tokenizer"):
        with pytest.raises(FuseDiTError, match=f"{part} is only a part {whole}"):
            load_model(PIPELINE / part)
    for file in ("model_index.json", "transformer/model.safetensors"):
        with pytest.raises(FuseDiTError, match=f"{file} is only a file {whole}"):
            load_model(PIPELINE / file)
    with pytest.raises(FuseDiTError, match="is part of a model.*the whole model"):
        load_model(shutil.copytree(PIPELINE / "transformer", tmp_path / "a" / "b" / "alone"))
    (tmp_path / "c.safetensors").touch()
    with pytest.raises(FuseDiTError, match="c.safetensors is a file: give its folder"):
        load_model(tmp_path / "c.safetensors")

    run = shutil.copytree(REFERENCE / "old" / "run", tmp_path / "run")
    (run / "samples").mkdir()
    for part, folder in (("step-0000004/train_state", run / "step-0000004"), ("samples", run)):
        with pytest.raises(FuseDiTError, match=f"{part} is only a part of a model.* {folder}$"):
            load_model(run / part)
    (run / "step-0000004" / "config.json").unlink()        # no advice to give the run instead
    with pytest.raises(FuseDiTError, match="step-0000004/config.json"):
        load_model(run)
    with pytest.raises(FuseDiTError, match="has one set of weights"):
        load_model(PIPELINE, ema=False)
    (tmp_path / "latest").write_text("step-0000050\n")
    with pytest.raises(FuseDiTError, match="latest names step-0000050, which does not exist"):
        load_model(tmp_path)


def test_a_missing_folder():
    with pytest.raises(FuseDiTError, match="no such model folder"):
        load_model("./nowhere")


def test_only_needed_files_are_downloaded(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("someone/a-model").config.image_size == 8
    assert asked == [("someone/a-model", list(MODEL_FILES))]


def test_a_refused_download_is_an_error_with_advice(monkeypatch):
    def refuse(name, allow_patterns):
        raise OSError("403: gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FuseDiTError, match="hf auth login"):
        load_model("google/gemma-2-2b")


# ---- export --------------------------------------------------------------------------------------

def test_export_says_what_the_published_classes_would_need(folder, tmp_path, capsys):
    export(load_model(folder), tmp_path / "a")
    assert "they need Gemma's tokenizer.model and a VAE." in capsys.readouterr().out
    export(load_model(PIPELINE), tmp_path / "b")
    assert "need" not in capsys.readouterr().out
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["vae"] == [None, None]

    # with tokenizer.model, which the class GemmaTokenizer reads, whatever class ours has
    shutil.copytree(folder / "gemma", tmp_path / "gemma")
    shutil.copy(PIPELINE / "tokenizer" / "tokenizer.model", tmp_path / "gemma")
    export(load_model(folder, base=str(tmp_path / "gemma")), tmp_path / "c")
    assert "they need a VAE." in capsys.readouterr().out
    index = json.loads((tmp_path / "c" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "GemmaTokenizer"]

    tiny_gemma(tmp_path / "gemma3", "gemma3")
    export(build_model(FuseDiTConfig(base=str(tmp_path / "gemma3"), vae=None, in_channels=3)),
           tmp_path / "d")
    assert "need a Gemma 1 or 2 and Gemma's tokenizer.model and a VAE" in capsys.readouterr().out

    vae = shutil.copytree(PIPELINE / "vae", tmp_path / "vae")
    edit_json(vae / "config.json", latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    model = load_model(PIPELINE, vae=str(vae), shared_attention_layers=[0, 1])
    capsys.readouterr()
    export(model, tmp_path / "text")
    assert "they need text in every DiT block and a VAE without latents_mean." in \
        capsys.readouterr().out


def test_export_stands_alone_and_is_the_same_model(folder, tmp_path):
    model = load_model(folder)
    export(model, tmp_path / "out")
    shutil.rmtree(folder)
    again = load_model(tmp_path / "out")
    assert_same_tensors(again.state_dict(), model.state_dict())

    want = asdict(model.config) | dict(dit_hidden_size=32, dit_num_hidden_layers=4)
    got = asdict(again.config)
    del want["base"], got["base"]
    assert got == want
    with pytest.raises(FuseDiTError, match="not empty"):
        export(again, tmp_path / "out")


def test_export_of_the_published_layout_has_every_tensor(tmp_path):
    """An export of the authors' folder equals it, tensor for tensor."""
    out = tmp_path / "out"
    export(load_model(PIPELINE), out)
    want = load_file(PIPELINE / "transformer" / "model.safetensors")
    assert_same_tensors(load_file(out / "transformer" / "model.safetensors"), want)

    want = json.loads((PIPELINE / "transformer" / "config.json").read_text())
    got = json.loads((out / "transformer" / "config.json").read_text())
    for name in ("torch_dtype", "transformers_version", "text_modulation_embeds_dim"):
        want.pop(name, None)
    assert {name: got[name] for name in want} == want
    vae_files = {path.name for path in (out / "vae").iterdir()}
    assert vae_files == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_export_of_an_ape_model_contains_its_table(tmp_path, gemma_folder):
    """Published checkpoints of ape models contain the constant table; ours must equal it."""
    case = REFERENCE / "cases" / "deep-self-ape-adaln_zero"
    want = load_file(case / "model.safetensors")["dit.patch_embed.pos_embed"]
    model = build_model(FuseDiTConfig(base=str(gemma_folder), vae=None, in_channels=3))
    export(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "transformer" / "model.safetensors")
    assert (tensors["dit.patch_embed.pos_embed"] - want).abs().max() < 1e-5
    load_model(tmp_path / "out")


def test_clip_modulation_end_to_end(tmp_path, gemma_folder):
    """The vectors of a tiny random CLIP, saved by transformers, reach the time embedding."""
    clip = tiny_clip(tmp_path / "clip")
    config = FuseDiTConfig(base=str(gemma_folder), clip=str(clip), text_modulation_embeds_dim=24,
                           vae=None, in_channels=3)
    model = build_model(config)
    for p in model.dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    text = model.encode(["a red circle", "a blue star"])
    assert text.pooled.shape == (2, 24)
    assert not text.pooled.requires_grad

    # the velocity depends on the pooled vectors
    swapped = text._replace(pooled=text.pooled.flip(0))
    x = torch.randn(1, 3, 4, 4).expand(2, -1, -1, -1)
    sigma = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        difference = model.dit(x, sigma, text) - model.dit(x, sigma, swapped)
    assert difference.abs().max() > 1e-4

    # and an export includes CLIP
    save_model(tmp_path / "m", config, model.dit.state_dict())
    export(load_model(tmp_path / "m"), tmp_path / "out")
    again = load_model(tmp_path / "out")
    pooled = again.encode(["a red circle"]).pooled
    assert torch.allclose(pooled, text.pooled[:1], atol=1e-5)


# ---- files ---------------------------------------------------------------------------------------

def test_atomic_write_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "a") as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_save_file_gives_the_usual_permissions(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    path = tmp_path / "a.safetensors"
    files.save_file(tensors, path, {"format": "pt"})
    (tmp_path / "b").touch()
    assert permissions(path) == permissions(tmp_path / "b")
    assert_same_tensors(load_file(path), tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


SAVE_WITH_UMASK = """
import os, sys
import torch
from fusedit_lib import files
umask = int(sys.argv[1], 8)
os.umask(umask)
files.save_file({"a": torch.ones(2)}, sys.argv[2], {})
with files.atomic_write(sys.argv[3]) as tmp:
    files.save_file({"a": torch.ones(2)}, tmp, {})
assert os.umask(0) == umask
"""


@pytest.mark.parametrize("umask, mode", [("077", 0o600), ("022", 0o644), ("002", 0o664)])
def test_save_file_follows_the_umask(tmp_path, umask, mode):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done = warm.run(["-c", SAVE_WITH_UMASK, umask, *paths])
    assert done.returncode == 0, done.stderr
    assert [permissions(path) for path in paths] == [mode, mode]

"""Folders of the published code, read and written.

tests/reference/published has what the published scripts wrote for tiny models, and what the
published classes draw from them (README.md there).
"""
import copy
import json
import shutil
import tempfile
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
import warm
from conftest import REFERENCE, ROOT, tiny_clip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fusedit
from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib import cli, published
from fusedit_lib import export as export_module
from fusedit_lib.export import export
from fusedit_lib.folders import MODEL_FILES, TOKENIZER_FILES
from fusedit_lib.pretrained import (
    CLIP_FILES,
    ClipEncoder,
    ClipTokenizer,
    build_model,
    clip_folders,
    load_model,
    save_model,
)
from fusedit_lib.vae import load_vae

PUBLISHED = REFERENCE / "published"
PIPELINES = PUBLISHED / "pipelines"
CHECKPOINTS = PUBLISHED / "checkpoints"
VAE = str(PUBLISHED / "vae")
KINDS = json.loads((PUBLISHED / "kinds.json").read_text())
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
PROMPTS = ["a small red circle above a blue star", "a large green square"]

# A training checkpoint names its Gemma by hub id; the tests take the tokenizer from a pipeline or,
# in shallow fusion, where the checkpoint contains no Gemma, all of it.
BASES = {"fusedit-large-scale-spmd": PIPELINES / "fusedit-layers-10" / "tokenizer",
         "fusedit-large-scale-deepspeed": PIPELINES / "fusedit-layers-10" / "tokenizer",
         "baselinedit-self-attention-spmd": PIPELINES / "baselinedit-self-attention" / "llm"}


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def assert_draws_as_published(model, golden):
    """golden: the file with the published classes' latents and pixels."""
    golden = load_file(golden)
    vae = load_vae(VAE)
    text = model.encode(PROMPTS, 40)
    uncond = model.encode(["", ""], 40)
    for steps, guidance in ((4, 1.0), (25, 6.0)):
        x = fusedit.sample(model.dit, golden["noise"], text, uncond, steps, guidance,
                           model.config.shift)
        want = golden[f"latents-{steps}"]
        assert (x - want).norm() / want.norm() < 2e-6

        with torch.no_grad():
            pixels = vae.decode(x).clamp(-1, 1).permute(0, 2, 3, 1)
        levels = ((pixels + 1) * 127.5).round()
        difference = (levels - golden[f"pixels-{steps}"].float()).abs()
        assert difference.max() <= 1
        assert (difference == 0).float().mean() > 0.999


# ---- pipelines -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [path.name for path in sorted(PIPELINES.iterdir())
                                  if path.is_dir()])
def test_a_published_pipeline_draws_the_published_images(name):
    model = load_model(PIPELINES / name, vae=VAE)
    assert_draws_as_published(model, PIPELINES / f"{name}.golden.safetensors")


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the published pipeline with CLIP modulation, which a test may change."""
    return shutil.copytree(PIPELINES / "fusedit-clip-mod", tmp_path / "pipeline")


def replace_folder(folder, other):
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


SPOIL = {
    "no CLIP vocabulary": lambda p: shutil.rmtree(p / "clip_tokenizer"),
    "no vocabulary": lambda p: [path.unlink() for path in (p / "tokenizer").iterdir()],
    "CLIP's tokenizer for Gemma": lambda p: replace_folder(p / "tokenizer", p / "clip_tokenizer"),
    "another schedule": lambda p: edit_json(p / "scheduler" / "scheduler_config.json",
                                            use_dynamic_shifting=True),
    "other noise levels": lambda p: edit_json(p / "scheduler" / "scheduler_config.json",
                                              num_train_timesteps=500),
    "no shift": lambda p: edit_json(p / "scheduler" / "scheduler_config.json", shift=None),
    "another model": lambda p: edit_json(p / "transformer" / "config.json",
                                         model_type="SD3Transformer2DModel"),
    "more outputs": lambda p: edit_json(p / "transformer" / "config.json", out_channels=32),
}


@pytest.mark.parametrize("case, message", [
    ("no CLIP vocabulary", r"tokenizer in .*clip has \d+ tokens, but its model has 600"),
    ("no vocabulary", "tokenizer has no tokenizer that can be loaded"),
    ("CLIP's tokenizer for Gemma", r"has 514 tokens, but its model has 380"),
    ("another schedule", "use_dynamic_shifting, which fusedit does not support"),
    ("other noise levels", "sets num_train_timesteps, which fusedit does not support"),
    ("no shift", "needs a shift"),
    ("another model", "model_type is 'SD3Transformer2DModel'"),
    ("more outputs", "out_channels 32"),
])
def test_a_pipeline_that_would_draw_something_else_is_refused(pipeline, case, message):
    load_model(pipeline, vae=VAE)
    SPOIL[case](pipeline)
    with pytest.raises(FuseDiTError, match=message):
        load_model(pipeline, vae=VAE)


def test_the_shift_is_the_schedulers_and_is_exported(pipeline, tmp_path):
    edit_json(pipeline / "scheduler" / "scheduler_config.json", shift=1.5)
    model = load_model(pipeline, vae=VAE)
    assert model.config.shift == 1.5
    export(model, tmp_path / "out")
    assert load_model(tmp_path / "out").config.shift == 1.5
    edit_json(tmp_path / "out" / "scheduler" / "scheduler_config.json", shift=2)
    assert load_model(tmp_path / "out").config.shift == 2


def test_every_file_of_a_pipeline_is_downloaded(pipeline):
    """From the hub, whether the published scripts have written it or export()."""
    from huggingface_hub.utils import filter_repo_objects
    shutil.copytree(VAE, pipeline / "vae")
    files = {path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*")
             if path.is_file()}
    files |= {"llm/config.json", "llm/model.safetensors", "tokenizer/tokenizer.json",
              "tokenizer/chat_template.jinja"}
    assert {"clip_tokenizer/merges.txt", "tokenizer/tokenizer.model"} <= files
    assert set(filter_repo_objects(files, allow_patterns=list(MODEL_FILES))) == files

    clip = {file for file in files if file.startswith("clip")}
    taken = set(filter_repo_objects(files, allow_patterns=list(CLIP_FILES)))
    assert clip <= taken                    # a model may take its CLIP from a pipeline
    assert not any(file.endswith(".safetensors") for file in taken - clip)


def test_vocabularies_of_real_models_fit(tmp_path):
    """PaliGemma has embeddings to spare, and Gemma 3's tokenizer has a token that is not text."""
    from fusedit_lib.pretrained import check_vocabulary
    for tokens, vocab_size in ((256000, 256000), (257152, 257216), (262145, 262144),
                               (262145, 262208), (49408, 49408)):
        check_vocabulary(range(tokens), vocab_size, tmp_path)
    for tokens, vocab_size in ((256000, 262144), (262144, 256000), (49408, 256000), (4, 64)):
        with pytest.raises(FuseDiTError, match=f"{tokens} tokens"):
            check_vocabulary(range(tokens), vocab_size, tmp_path)


# ---- CLIP ----------------------------------------------------------------------------------------

def test_clip_of_a_diffusers_model(pipeline, tmp_path, monkeypatch):
    """Like SD 3's: in text_encoder/ and tokenizer/. Nothing else is downloaded."""
    shutil.copytree(pipeline / "clip", tmp_path / "sd3" / "text_encoder")
    shutil.copytree(pipeline / "clip_tokenizer", tmp_path / "sd3" / "tokenizer")
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert allow_patterns == list(CLIP_FILES)
        return str(tmp_path / "sd3")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name = fusedit.preset("fusedit/clip-mod").clip
    sd3 = ClipEncoder(name, 24, "cpu", torch.float32)
    ours = ClipEncoder(pipeline, 24, "cpu", torch.float32)
    assert sd3(PROMPTS).equal(ours(PROMPTS))
    assert set(asked) == {SD3}


def test_little_of_stable_diffusion_3_is_downloaded():
    """The patterns take one of its three text encoders and none of its other weights."""
    from fnmatch import fnmatch
    files = ["model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors",
             "tokenizer/vocab.json", "tokenizer/merges.txt", "vae/config.json"]
    large = ["text_encoder/model.fp16.safetensors", "text_encoder_2/model.safetensors",
             "text_encoder_3/model-00001-of-00002.safetensors", "tokenizer_3/spiece.model",
             "transformer/diffusion_pytorch_model.safetensors",
             "vae/diffusion_pytorch_model.safetensors", "sd3_medium.safetensors"]
    taken = [file for file in files + large
             if any(fnmatch(file, pattern) for pattern in CLIP_FILES)]
    assert set(taken) <= set(files)
    assert {file for file in files if file.startswith(("text_", "token"))} <= set(taken)


def test_clip_in_an_older_export_keeps_its_tokenizer(pipeline):
    shutil.copytree(pipeline / "clip_tokenizer", pipeline / "clip", dirs_exist_ok=True)
    want = ClipTokenizer(pipeline)(PROMPTS)
    shutil.rmtree(pipeline / "clip_tokenizer")
    assert clip_folders(pipeline).tokenizer == pipeline / "clip"
    assert ClipTokenizer(pipeline)(PROMPTS).equal(want)


def test_the_vocabulary_of_a_whole_clip_model_fits(tmp_path):
    """Its config.json also describes the vision tower."""
    clip = tiny_clip(tmp_path / "clip")
    text = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    assert ClipTokenizer(clip)(PROMPTS).shape == (2, 77)


def test_a_clip_model_without_projection_is_refused(tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    tensors = load_file(clip / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(FuseDiTError, match="lacks text_projection.weight"):
        ClipEncoder(clip, 24, "cpu", torch.float32)


def test_a_clip_model_of_another_width_is_refused(tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    with pytest.raises(FuseDiTError, match="text_modulation_embeds_dim is 768.*length 24"):
        ClipEncoder(clip, 768, "cpu", torch.float32)


# ---- training checkpoints ------------------------------------------------------------------------

def open_reference(name, ema=True):
    return load_model(CHECKPOINTS / name, vae=VAE, base=str(BASES[name]), ema=ema)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", BASES)
def test_a_published_checkpoint_draws_the_published_images(name, ema):
    assert_draws_as_published(open_reference(name, ema), CHECKPOINTS / f"{name}.golden.safetensors")


@pytest.fixture
def spmd(tmp_path):
    """A copy of a TPU run's folder."""
    return shutil.copytree(CHECKPOINTS / "fusedit-large-scale-spmd", tmp_path / "run")


@pytest.fixture
def deepspeed(tmp_path):
    """A copy of a GPU run's folder."""
    return shutil.copytree(CHECKPOINTS / "fusedit-large-scale-deepspeed", tmp_path / "gpu")


def open_state(folder, ema=True):
    """{name: tensor} of the DiT in a training checkpoint."""
    stored = published.open_checkpoint(folder, ema)
    return {name: file.get_tensor(name) for name, (file, _) in stored.dit.items()}


def load_run(folder, ema=True):
    """load_model of a copy of the reference's large-scale run, or of its checkpoint."""
    return load_model(folder, vae=VAE, base=str(BASES["fusedit-large-scale-spmd"]), ema=ema)


def test_a_gpu_run_and_its_checkpoint_are_the_same_model(deepspeed):
    """The run's file latest names the checkpoint, whose config.json is beside it."""
    assert (deepspeed / "latest").exists()
    run, checkpoint = load_run(deepspeed), load_run(deepspeed / "50")
    assert run.config == checkpoint.config
    for name, tensor in run.state_dict().items():
        assert tensor.equal(checkpoint.state_dict()[name]), name


def test_only_a_tokenizer_is_taken_from_the_gemma_of_a_checkpoint(deepspeed, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(BASES["fusedit-large-scale-deepspeed"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    want = load_model(deepspeed, vae=VAE).tokenizer
    assert asked == [("google/gemma-2-2b", list(TOKENIZER_FILES))]
    assert not any("safetensors" in pattern for pattern in TOKENIZER_FILES)
    # or from the text tower of a pipeline, which has its tokenizer beside it
    tower = PIPELINES / "fusedit-layers-10" / "transformer"
    got = load_model(deepspeed, vae=VAE, base=str(tower)).tokenizer
    assert got.get_vocab() == want.get_vocab()


def test_a_checkpoint_names_its_gemma_and_vae(spmd):
    config_path = spmd / "50" / "config.json"
    config = published.checkpoint_config(spmd / "50")
    assert (config.base, config.vae, config.clip) == ("google/gemma-2-2b", SD3, None)
    edit_json(config_path, text_modulation_embeds_dim=768, timestep_conditioning="adaln-zero")
    assert published.checkpoint_config(spmd / "50").clip == SD3


def rewrite(path, edit):
    """Apply edit to the state dict in a .pt.zst file."""
    import zstandard
    state = published.load_torch_file(path)
    plain = path.with_suffix("")
    torch.save({name: edit(t.clone()) for name, t in state.items()}, plain)
    path.write_bytes(zstandard.compress(plain.read_bytes()))
    plain.unlink()


def test_ema_and_raw_weights_are_not_confused(spmd, deepspeed):
    """In the reference data they are equal."""
    rewrite(spmd / "50" / "ema.pt.zst", lambda t: t + 1)
    ema = open_state(spmd / "50")
    raw = open_state(spmd / "50", ema=False)
    for name, tensor in ema.items():
        assert tensor.equal(raw[name] + 1), name

    path = deepspeed / "50" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["ema"] = {name: t + 1 for name, t in state["ema"].items()}
    torch.save(state, path)
    (deepspeed / "50" / "ema.pt.zst").unlink()          # a step between consolidations
    ema = open_state(deepspeed / "50")
    raw = open_state(deepspeed / "50", ema=False)
    for name, tensor in ema.items():
        assert tensor.equal(raw[name] + 1), name


def test_a_run_means_its_newest_checkpoint(spmd):
    for step in ("5", "100"):
        shutil.copytree(spmd / "50", spmd / step)
    (spmd / "200").mkdir()                              # stopped before its files were written
    rewrite(spmd / "100" / "ema.pt.zst", lambda t: t * 0 + 3)
    assert (load_run(spmd).dit.proj_out.weight == 3).all()


def test_a_newer_checkpoint_without_whole_weights_is_passed_over(spmd, capsys):
    """The published trainer keeps its newest checkpoint, which mostly consists of shards."""
    (spmd / "55").mkdir()
    (spmd / "55" / ".metadata").touch()
    assert published.last_checkpoint(spmd) == spmd / "50"
    assert "55 has no consolidated weights: using step 50" in capsys.readouterr().err
    shutil.rmtree(spmd / "50")
    assert published.last_checkpoint(spmd) == spmd / "55"


def test_a_file_that_need_not_be_decompressed_is_preferred(deepspeed, capsys):
    assert (deepspeed / "50" / "ema.pt.zst").exists()
    open_state(deepspeed / "50")
    assert "decompressing" not in capsys.readouterr().err


def test_a_full_temporary_folder_is_noticed_before_it_is_filled(spmd, monkeypatch):
    free = shutil.disk_usage(spmd)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(FuseDiTError, match="ema.pt.zst takes 0.0 GB in .* set TMPDIR"):
        open_state(spmd / "50")


def test_paths_are_checked_before_weights_are_read(spmd):
    """A published run may name its Gemma by a path of its machine or (PaliGemma) not at all."""
    (spmd / "50" / "ema.pt.zst").write_bytes(b"junk")
    config = json.loads((spmd / "50" / "config.json").read_text())
    for name, message in (("/gone/gemma-2-2b", "needs /gone/gemma-2-2b, its base"),
                          ("", "does not name its Gemma")):
        config["base_config"]["_name_or_path"] = name
        edit_json(spmd / "50" / "config.json", base_config=config["base_config"])
        with pytest.raises(FuseDiTError, match=message):
            load_model(spmd)


@pytest.mark.parametrize("name, ema", [("ema", True), ("model", False)])
def test_uncompressed_weights_are_read(spmd, name, ema):
    """Also if there is no other file, and if layers are wrapped as well as the model."""
    want = load_run(spmd).state_dict()
    state = published.load_torch_file(spmd / "50" / f"{name}.pt.zst")
    state = {key.replace("layers.0.", "layers.0._orig_module."): t for key, t in state.items()}
    torch.save(state, spmd / "50" / f"{name}.pt")
    for path in (spmd / "50").glob("*.zst"):
        path.unlink()
    got = load_run(spmd, ema).state_dict()
    assert got.keys() == want.keys()
    assert all(got[name].equal(want[name]) for name in want)


def test_nothing_remains_in_the_temporary_folder(spmd, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert open_state(spmd / "50")
    truncate(spmd / "50" / "ema.pt.zst")
    with pytest.raises(FuseDiTError):
        open_state(spmd / "50")
    assert not list((tmp_path / "tmp").iterdir())


def test_a_run_without_ema_gives_its_raw_weights_and_says_so(spmd, deepspeed, capsys):
    (spmd / "50" / "ema.pt.zst").unlink()
    assert load_run(spmd)
    assert "has no EMA: using its raw weights" in capsys.readouterr().err

    path = deepspeed / "50" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    del state["ema"]
    torch.save(state, path)
    (deepspeed / "50" / "ema.pt.zst").unlink()
    assert load_run(deepspeed)
    assert "has no EMA: using its raw weights" in capsys.readouterr().err


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def add_code(folder):
    import zstandard
    torch.save({"x": Malicious()}, folder / "plain.pt")
    (folder / "ema.pt.zst").write_bytes(zstandard.compress((folder / "plain.pt").read_bytes()))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def leave_sharded_files(folder):
    """A step between consolidations: only the shards of each TPU host."""
    for path in folder.glob("*.zst"):
        path.unlink()
    (folder / ".metadata").touch()


@pytest.mark.parametrize("spoil, ema, message", [
    (lambda c: truncate(c / "ema.pt.zst"), True, "ema.pt.zst is truncated or corrupt"),
    (lambda c: (c / "ema.pt.zst").write_bytes(b"junk" * 50), True, "ema.pt.zst is truncated"),
    (add_code, True, "contains more than tensors"),
    (leave_sharded_files, True, "every consolidation_steps steps"),
    (lambda c: (c / "model.pt.zst").unlink(), False, "has only EMA weights: leave out --no-ema"),
    (lambda c: (c / "config.json").unlink(), True, "cannot read .*config.json, nor is there one"),
    (lambda c: edit_json(c / "config.json", base_config=None), True, "has no base_config"),
    (lambda c: torch.save({"ema": [1]}, c / "mp_rank_00_model_states.pt"), True,
     "mp_rank_00_model_states.pt contains something other than the weights"),
])
def test_broken_checkpoints(spmd, capfd, spoil, ema, message):
    spoil(spmd / "50")
    with pytest.raises(FuseDiTError, match=message):
        load_run(spmd / "50", ema)
    assert "unpickled" not in capfd.readouterr().out


def test_sample_exports_a_published_checkpoint(deepspeed, tmp_path):
    """sample.py takes the run's folder, draws from it and writes a pipeline that stands alone."""
    base = BASES["fusedit-large-scale-deepspeed"]
    words = ["--set", f"base={base}", f"vae={VAE}", "--height", 64, "--width", 96, "--steps", 1,
             "--prompt", PROMPTS[1], "--dtype", "float32"]
    done = warm.run([ROOT / "sample.py", "--model", deepspeed, *words, "--out", tmp_path / "a",
                     "--export", tmp_path / "model"])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "a").glob("*.png"))) == 1
    shutil.rmtree(deepspeed)
    golden = CHECKPOINTS / "fusedit-large-scale-deepspeed.golden.safetensors"
    assert_draws_as_published(load_model(tmp_path / "model"), golden)


def test_a_model_can_be_copied(spmd):
    """No file is kept open (which deepcopy and pickle would refuse)."""
    for model in (open_reference("fusedit-large-scale-spmd"),
                  load_model(PIPELINES / "fusedit-layers-10", vae=VAE)):
        again = copy.deepcopy(model)
        assert again.dit.proj_out.weight.equal(model.dit.proj_out.weight)


def test_zstandard_is_optional(monkeypatch, spmd):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError) as error:
        open_state(spmd / "50")
    assert "pip install -e '.[published]'" in cli.explain(error.value, "")


# ---- exports -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{hub id: folder} of tiny Gemmas with the reference's tokenizer, saved by transformers 5."""
    import transformers
    classes = {"google/gemma-2b": transformers.GemmaModel,
               "google/gemma-2b-it": transformers.GemmaModel,
               "google/gemma-2-2b": transformers.Gemma2Model}
    folders = {}
    for name, model_class in classes.items():
        folder = tmp_path_factory.mktemp("bases") / name.split("/")[1]
        kind = "fusedit-gemma-2" if "gemma-2-2b" in name else "fusedit-baseline"
        shape = dict(KINDS[kind]["configs"]["transformer/config.json"]["base_config"])
        del shape["model_type"], shape["rope_theta"]
        if "gemma-2-2b" in name:
            shape["query_pre_attn_scalar"] = 16
        model = model_class(model_class.config_class(**shape))
        model.save_pretrained(folder)
        for path in (PIPELINES / "fusedit-layers-10" / "tokenizer").iterdir():
            shutil.copyfile(path, folder / path.name)
        edit_json(folder / "tokenizer_config.json", vocab_file=str(folder / "tokenizer.model"))
        folders[name] = folder
    config = json.loads((folders["google/gemma-2b"] / "config.json").read_text())
    outer = {"model_type": "paligemma", "text_config": config, "vision_config": {}}
    pali = shutil.copytree(folders["google/gemma-2b"], folder.parent / "paligemma")
    (pali / "config.json").write_text(json.dumps(outer))
    return folders | {"google/paligemma-3b-pt-448": pali}


def tiny_preset(kind, bases):
    """FuseDiTConfig of one of the paper's runs, at the size of the reference's models."""
    name = kind.replace("-", "/", 1)
    want = KINDS[kind]["configs"]["transformer/config.json"]
    changes = {"base": str(bases[fusedit.preset(name).base]), "vae": VAE}
    for field in ("dit_hidden_size", "dit_num_hidden_layers", "initial_layers"):
        if field in fusedit.PRESETS[name]:
            changes[field] = want[field]
    if "clip" in fusedit.PRESETS[name]:
        changes |= {"clip": str(PIPELINES / "fusedit-clip-mod"), "text_modulation_embeds_dim": 24}
    return fusedit.preset(name, **changes)


def shapes(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def assert_contains(got, want, where):
    """Every entry of `want`, at any depth, is in `got` with the same value."""
    for name, value in want.items():
        assert name in got, f"{where}: {name} is missing"
        if isinstance(value, dict):
            assert_contains(got[name], value, f"{where}: {name}")
        else:
            assert got[name] == value, f"{where}: {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_published_layout(kind, bases, tmp_path):
    want = KINDS[kind]
    model = build_model(tiny_preset(kind, bases))
    out = tmp_path / "out"
    export(model, out)

    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    vae = {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert files == set(want["files"]) | vae
    for file, tensors in want["tensors"].items():
        assert shapes(out / file) == tensors, file
    for file, config in want["configs"].items():
        got = json.loads((out / file).read_text())
        if file == "transformer/config.json" and "layers-" in kind:
            del config["shared_attention_layers"]       # a list there; ours follows from the others
        assert_contains(got, config, file)
    assert load_model(out).config.fusion == model.config.fusion


def text_of_files(folder):
    """The bytes of every file of a folder, in one string."""
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*")
                   if path.is_file())


def test_an_export_names_no_path(bases, tmp_path):
    """Not even one that is stored in the folders that it copies from."""
    pipeline = shutil.copytree(PIPELINES / "fusedit-clip-mod", tmp_path / "clip-pipeline")
    vae = shutil.copytree(VAE, tmp_path / "vae")
    for path in (pipeline / "clip", vae):
        edit_json(path / "config.json", _name_or_path=str(path))
    here = str(pipeline / "clip_tokenizer")
    edit_json(pipeline / "clip_tokenizer" / "tokenizer_config.json", vocab_file=here,
              merges_file=here, tokenizer_file=here, name_or_path=here,
              deeper={"list": [{"name_or_path": here, "vocab_file": SD3}]})
    base = shutil.copytree(bases["google/gemma-2b"], tmp_path / "gemma")
    edit_json(base / "config.json", _name_or_path=str(base))
    config = FuseDiTConfig(base=str(base), vae=str(vae), clip=str(pipeline),
                           text_modulation_embeds_dim=24)
    model = build_model(config)
    save_model(tmp_path / "own", config, model.dit.state_dict())
    export(load_model(tmp_path / "own"), tmp_path / "out")

    home = str(tmp_path)
    assert home in text_of_files(base)
    assert home not in text_of_files(tmp_path / "out")
    for folder in (tmp_path, bases["google/gemma-2b"].parent):
        assert str(folder) not in text_of_files(tmp_path / "out")
    path = tmp_path / "out" / "clip_tokenizer" / "tokenizer_config.json"
    assert json.loads(path.read_text())["deeper"] == {"list": [{"vocab_file": SD3}]}


def test_a_trained_gemma_is_exported(bases, tmp_path):
    """In both layouts the layers that are read are the trained ones, and the others are base's."""
    for kind, file, prefix in (
            ("fusedit-baseline", "transformer/model.safetensors", "llm."),
            ("baselinedit-self-attention", "llm/model.safetensors", "")):
        model = build_model(tiny_preset(kind, bases))
        own = tmp_path / "own" / kind
        save_model(own, model.config, model.dit.state_dict())
        stored = load_file(own / "model.safetensors")
        trained = {name: tensor + 1 for name, tensor in model.llm.state_dict().items()}
        stored |= {f"llm.{name}": tensor for name, tensor in trained.items()}
        save_file(stored, own / "model.safetensors")
        export(load_model(own), tmp_path / kind)
        tensors = load_file(tmp_path / kind / file)
        assert set(tensors) == set(KINDS[kind]["tensors"][file])
        for name, tensor in trained.items():
            assert tensors[prefix + name].equal(tensor), name


def test_an_export_of_a_hub_gemma_names_it(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: str(bases[name]))
    config = FuseDiTConfig.from_dict(asdict(tiny_preset("fusedit-gemma-2", bases))
                                     | {"base": "google/gemma-2-2b"})
    export(build_model(config), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert written["base_config"]["_name_or_path"] == "google/gemma-2-2b"

    # a relative path of the same form
    folder = bases["google/gemma-2-2b"]
    monkeypatch.chdir(folder.parents[1])
    base = f"{folder.parent.name}/{folder.name}"
    export(build_model(FuseDiTConfig.from_dict(asdict(config) | {"base": base})), tmp_path / "b")
    written = json.loads((tmp_path / "b" / "transformer" / "config.json").read_text())
    assert "_name_or_path" not in written["base_config"]


@pytest.mark.parametrize("kind", ["fusedit-baseline", "baselinedit-self-attention"])
def test_what_a_gemma_does_not_store_is_exported(kind, bases, tmp_path):
    """The text_config of a PaliGemma lacks its class, and fields that have their default values."""
    model = build_model(tiny_preset(kind, bases))
    for field in ("architectures", "head_dim", "rms_norm_eps"):
        del model.gemma_files.config[field]
    export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    gemma = written["base_config"]
    if kind == "baselinedit-self-attention":
        gemma = json.loads((tmp_path / "out" / "llm" / "config.json").read_text())
        assert gemma["architectures"] == ["GemmaModel"]
    assert gemma["head_dim"] == 16
    assert gemma["rms_norm_eps"] == 1e-6


def test_weights_in_several_files_are_exported(pipeline, tmp_path):
    """A VAE or CLIP whose weights are split, with their index."""
    stem = "diffusion_pytorch_model"
    vae = shutil.copytree(VAE, tmp_path / "vae")
    tensors = list(load_file(vae / f"{stem}.safetensors").items())
    (vae / f"{stem}.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((tensors[:9], tensors[9:])):
        save_file(dict(part), vae / f"{stem}-{i}.safetensors")
        weight_map |= dict.fromkeys(dict(part), f"{stem}-{i}.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (vae / f"{stem}.safetensors.index.json").write_text(index)

    export(load_model(pipeline, vae=str(vae)), tmp_path / "out")
    want = load_vae(VAE).state_dict()
    for name, tensor in load_vae(str(tmp_path / "out" / "vae")).state_dict().items():
        assert tensor.equal(want[name]), name


def test_an_export_in_bf16_says_so(tmp_path):
    model = load_model(PIPELINES / "fusedit-layers-10", dtype=torch.bfloat16, vae=VAE)
    export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "transformer" / "model.safetensors")
    assert tensors["dit.proj_out.weight"].dtype == torch.bfloat16


def test_an_export_appears_whole_or_not_at_all(pipeline, tmp_path, monkeypatch):
    """Until its last file is on disk, it is a hidden folder, which a failure removes."""
    model = load_model(pipeline, vae=VAE)
    out = tmp_path / "exports" / "model"
    seen = []

    def fail(path):
        seen.append([folder.name for folder in out.parent.iterdir()])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export(model, out)
    assert not list(out.parent.iterdir())
    hidden, = seen[0]
    assert hidden.startswith(".model.")

    synced = []                                         # inodes
    monkeypatch.setattr(export_module, "fsync", lambda path: synced.append(path.stat().st_ino))
    out.mkdir()                                         # an empty folder is replaced
    export(model, out)
    assert [folder.name for folder in out.parent.iterdir()] == ["model"]
    assert set(synced) == {path.stat().st_ino for path in [*out.rglob("*"), out]}


def test_a_tokenizer_is_exported_with_its_chat_template(bases, tmp_path):
    """And with tokens that were added to it. transformers 5 stores the template by itself."""
    base = shutil.copytree(bases["google/gemma-2b-it"], tmp_path / "gemma")
    template = "{{ bos_token }}{% for m in messages %}user {{ m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    (base / "added_tokens.json").write_text("{}")
    config = FuseDiTConfig(base=str(base), vae=VAE, apply_chat_template=True)
    export(build_model(config), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "added_tokens.json").exists()
    again = load_model(tmp_path / "out")
    assert again.config.apply_chat_template
    assert again.tokenizer.chat_template == template


# ---- instructions --------------------------------------------------------------------------------

def test_instructions_go_before_prompts_and_not_before_negative_ones(pipeline):
    """As in the published pipelines, for Gemma and for CLIP (pipelines.py:190-205, 464-480)."""
    model = load_model(pipeline, vae=VAE, instruction="Imagine: ")
    plain = load_model(pipeline, vae=VAE)
    with_instruction = plain.encode(["Imagine: a blue star"], 40)
    for got, want in ((model.encode(["a blue star"], 40), with_instruction),
                      (model.encode(["a blue star"], 40, instruction=""),
                       plain.encode(["a blue star"], 40)),
                      (model.encode([""], 40), plain.encode([""], 40))):
        assert got.mask.equal(want.mask)
        assert got.pooled.equal(want.pooled)
        assert all(a.equal(b) for a, b in zip(got.keys, want.keys, strict=True))

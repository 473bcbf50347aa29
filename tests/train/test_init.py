"""Runs that start from a trained model: --init."""
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import REFERENCE, tiny_clip, tiny_gemma, tiny_vae
from launching import assert_equal, flags, launch, losses, metrics, state
from safetensors.torch import load_file, save_file
from starting import STARTS, first_losses, own_losses, start_flags
from tiny_shards import SHAPE

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib import pretrained
from fusedit_lib.cli import parse_overrides
from fusedit_lib.export import export
from fusedit_lib.files import read_tensor
from fusedit_lib.train import init
from fusedit_lib.train.build import build_models, open_models
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

PUBLISHED = REFERENCE / "published"
VAE = PUBLISHED / "vae"


def check_first_losses(models, data, out, start, *more, n=1):
    """Check the first losses of a run against the model's own, to 1e-5. Returns them."""
    name, init_raw = STARTS[start]
    argv = start_flags(models / name, data, out, *init_raw, *more)
    own = own_losses(argv)
    launch(argv, n=n)
    assert first_losses(out) == pytest.approx(own, rel=1e-5)
    return own


def test_the_first_losses_are_those_of_the_model(models, data, tmp_path):
    own = set()
    for start, zero, n in (("run", "1", 1), ("checkpoint", "0", 1), ("raw", "3", 2),
                           ("released", "2-offload", 1)):
        own.add(check_first_losses(models, data, tmp_path / start, start, "--zero", zero, n=n))
    assert len(own) == 3                    # the released model is that of the run's last step


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_every_stage_starts_from_the_model(models, data, tmp_path, start):
    for zero in ("0", "1", "2", "3"):
        check_first_losses(models, data, tmp_path / f"one{zero}", start, "--zero", zero)
        check_first_losses(models, data, tmp_path / f"two{zero}", start, "--zero", zero, n=2)
    for zero in ("1-offload", "3-offload"):
        check_first_losses(models, data, tmp_path / zero, start, "--zero", zero)


def test_adam_and_the_ema_start_anew(models, data, tmp_path):
    """And the run, of two ranks under ZeRO 3, is the same whether it validates first or not."""
    out = tmp_path / "run"
    argv = start_flags(models / "run", data, out, "--zero", "3", "--sample-every", "1",
                       "--prompts", "a star", "a circle", "a square", "--sample-steps", "1",
                       "--ema-every", "1")
    done = launch([*argv, "--steps", "2"], n=2)
    assert done.stderr.count(f"starting from {models}/run/step-0000004 (its EMA weights)\n") == 1
    assert (out / "samples" / "step-0000000.png").exists()
    state_json = json.loads((out / "step-0000002/train_state/state.json").read_text())
    assert state_json["adam_step"] == 2
    stored = json.loads((out / "config.json").read_text())["run"]
    assert stored["init"] == f"{models}/run/step-0000004"
    assert stored["preset"] == ""

    quiet = [*argv[:4], *argv[6:], "--sample-every", "0", "--steps", "2",       # no --val-data
             "--out", str(tmp_path / "quiet")]
    launch(quiet, n=2)
    assert losses(tmp_path / "quiet") == losses(out)
    assert_equal(state(tmp_path / "quiet", 2), state(out, 2))

    # with a decay of 1, the EMA after a step is what the run started from
    launch([*quiet, "--out", str(tmp_path / "still"), "--ema-decay", "1", "--no-ema-warmup"])
    want = pretrained.load_model(models / "run").dit.state_dict()
    got = pretrained.load_model(tmp_path / "still").dit.state_dict()
    assert_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("zero", ["0", "1", "2", "3", "2-offload"])
def test_validation_before_the_first_step_changes_nothing(models, data, tmp_path, zero, dtype):
    """To the bit."""
    more = ["--zero", zero, "--steps", "2", "--dtype", dtype, "--ema-every", "1"]
    for name in ("validated", "plain"):
        argv = start_flags(models / "run", data, tmp_path / name, *more)
        if name == "plain":
            argv = argv[:4] + argv[6:]      # without --val-data
        launch(argv)
    assert metrics(tmp_path / "validated")[0]["step"] == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "validated")
    assert_equal(state(tmp_path / "plain", 2), state(tmp_path / "validated", 2))


OTHER_RANK = """
if os.environ["RANK"] == "1":
    sys.argv = [word.replace("step-0000004", "step-0000002") for word in sys.argv]
"""


def test_ranks_that_find_different_checkpoints_start_from_the_same(models, data, tmp_path):
    """As in the folder of a run in progress: all ranks load the one that the first has found."""
    argv = start_flags(models / "run" / "step-0000004", data, tmp_path, "--zero", "3")
    own = own_losses(argv)
    launch(argv, OTHER_RANK, n=2)
    assert first_losses(tmp_path) == pytest.approx(own, rel=1e-5)


# ------------------------------------------------------------------------------ kinds of models

KINDS = {
    "adaln-zero": ["timestep_conditioning=adaln-zero", "sandwich_norm=false", "pos_embed=1d-rope"],
    "adaln-single": ["timestep_conditioning=adaln-single", "pos_embed=m-rope"],
    "cross": ["attention=cross", "timestep_conditioning=addition", "pos_embed=ape"],
    "shallow": ["fusion=shallow", "timestep_conditioning=adaln-zero", "qk_norm=false"],
    "shallow-cross": ["fusion=shallow", "attention=cross", "text_hidden_states_index=1"],
    "joint": ["fusion=shallow", "text_states=joint"],
    "latents": [f"vae={VAE}", "in_channels=16", "patch_size=1", "text_modulation_embeds_dim=24",
                "clip=CLIP", "timestep_conditioning=adaln-zero"]}


def random_model(folder, gemma, *words):
    """Writes a model of SHAPE and more words of --set, with weights that no run starts with."""
    changes = parse_overrides([*SHAPE, "vae=null", "in_channels=3", f"base={gemma}", *words])
    model = pretrained.build_model(FuseDiTConfig.from_dict(changes))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.dit.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    pretrained.save_model(folder, model.config, model.dit.state_dict())
    return folder


def started(*words):
    """The model that build_models returns for a new float32 run with these flags.

    Checks that the weights which open_models returns for a TPU are the same.
    """
    run = parse_run(["--dtype", "float32", "--out", "nowhere", *map(str, words)], "")
    config = model_config(run)
    model, _ = build_models(run, config, "cpu", None)
    assert_equal(opened_state(run, config, None), model.state_dict())
    return model


def opened_state(run, config, checkpoint):
    """The weights of open_models, read whole: {name: tensor}."""
    model, _, weights = open_models(run, config, checkpoint, whole_tensor)
    assert all(weight.is_meta for weight in model.parameters())
    return {name: read_tensor(weights, name).to(weight.dtype)
            for name, weight in model.state_dict().items()}


def whole_tensor(name, shape):
    """The slices of a single device."""
    return [tuple(slice(0, size) for size in shape)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_started_from(gemma, tmp_path, kind):
    clip = tiny_clip(tmp_path / "clip")
    words = [word.replace("CLIP", str(clip)) for word in KINDS[kind]]
    folder = random_model(tmp_path / "model", gemma, *words)
    model = started("--init", folder)
    want = pretrained.load_model(folder)
    assert replace(model.config, vae=want.config.vae) == want.config
    assert_equal(model.state_dict(), want.state_dict())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_starts_with_its_losses(gemma, data, tmp_path, kind):
    clip = tiny_clip(tmp_path / "clip")
    words = [word.replace("CLIP", str(clip)) for word in KINDS[kind]]
    folder = random_model(tmp_path / "model", gemma, *words)
    for zero, n in (("0", 1), ("2", 2), ("3", 2)):
        argv = start_flags(folder, data, tmp_path / zero, "--zero", zero)
        own = own_losses(argv)
        launch(argv, n=n)
        assert first_losses(tmp_path / zero) == pytest.approx(own, rel=1e-5)


def test_a_model_of_the_hub(gemma, models, monkeypatch):
    """Its name is kept, and also names the default run folder."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: str(models / name.split("/")[1]))
    run = parse_run(["--init", "someone/released"], "")
    assert run.init == "someone/released"
    assert run.out == "runs/released-finetuned"
    want = pretrained.load_model(models / "released")
    model = started("--init", "someone/released")
    assert_equal(model.dit.state_dict(), want.dit.state_dict())


# ------------------------------------------------------------------------------ published models

@pytest.mark.parametrize("name", ["baselinedit-self-attention", "baselinedit-cross-attention",
                                  "fusedit-clip-mod", "fusedit-layers-10"])
def test_published_pipelines(name):
    folder = PUBLISHED / "pipelines" / name
    model = started("--init", folder, "--set", f"vae={VAE}")
    assert_equal(model.state_dict(), pretrained.load_model(folder, vae=str(VAE)).state_dict())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a published run, with a Gemma beside its checkpoint: that of its pipeline."""
    name = "fusedit-large-scale-deepspeed"
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(PUBLISHED / "checkpoints" / name, folder / "run")
    tokenizer = PUBLISHED / "pipelines" / "fusedit-layers-10" / "tokenizer"
    for ema, gemma in ((True, "ema"), (False, "raw")):
        model = pretrained.load_model(folder / "run", ema=ema, base=str(tokenizer), vae=str(VAE))
        export(model, folder / gemma)
    return folder


def test_published_checkpoints(published):
    """The EMA and the raw weights, with the Gemma that the checkpoint contains."""
    for flag, name in ((), "ema"), (("--init-raw",), "raw"):
        base = published / name / "transformer"
        model = started("--init", published / "run", *flag, "--set", f"vae={VAE}",
                        "--base", base)
        assert_equal(model.state_dict(), pretrained.load_model(published / name).state_dict())
    run = parse_run(["--init", str(published / "run")], "")
    assert run.init == str(published / "run" / "50")
    assert run.out == "runs/run-finetuned"


def test_a_published_checkpoint_needs_its_own_gemma(published, tmp_path):
    other = shutil.copytree(published / "ema", tmp_path / "other") / "transformer"
    tensors = load_file(other / "model.safetensors")
    tensors["llm.layers.0.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(FuseDiTError, match="50 was trained as well, and differs from .*/other/"
                                           "transformer, .*sample.py --export DIR"):
        started("--init", published / "run", "--set", f"vae={VAE}", "--base", other)


@pytest.mark.parametrize("answer", [True, False])
def test_only_rank_0_compares_the_gemmas(monkeypatch, answer):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(init, "gather_from_all_ranks", lambda own: [answer, own])
    monkeypatch.setattr(init, "gemma_tensors", lambda tensors: tensors)
    model = SimpleNamespace(gemma_files={}, llm=torch.nn.Linear(2, 2))
    stored = SimpleNamespace(gemma={"weight": None, "bias": None})         # None cannot be read
    assert init.is_gemma_of(stored, model) is answer


@pytest.mark.slow
def test_published_models_start_with_their_losses(published, data, tmp_path):
    """The checkpoint's run, and the pipelines, as two ranks under ZeRO 3."""
    cases = [(published / "run", ["--base", str(published / "ema" / "transformer")])]
    for path in sorted((PUBLISHED / "pipelines").iterdir()):
        if path.is_dir():
            cases.append((path, []))
    for folder, more in cases:
        out = tmp_path / folder.name
        argv = start_flags(folder, data, out, "--set", f"vae={VAE}", "--image-size", "64",
                           "--zero", "3", *more)
        model = None
        if more:
            model = pretrained.load_model(published / "ema")
        else:
            model = pretrained.load_model(folder, vae=str(VAE))
        own = own_losses(argv, model)
        launch(argv, n=2)
        assert first_losses(out) == pytest.approx(own, rel=1e-5), folder


# ------------------------------------------------------------------------------ what starts fresh

# The kind of the stored model, the fields that change, and the weights that start fresh.
ADDED = {
    "deeper": (["dit_num_hidden_layers=1"], ["dit_num_hidden_layers=2"], "layers.1"),
    "text in more layers": (["attention=cross", "shared_attention_layers=[1]"],
                            ["shared_attention_layers=all"],
                            "layers.*.cross_attn, layers.*.post_cross_attention_layernorm"),
    "CLIP modulation": (["timestep_conditioning=adaln-zero"],
                        ["clip=CLIP", "text_modulation_embeds_dim=24"], "condition_embedder"),
    "a VAE": ([], ["vae=VAE", "in_channels=4", "patch_size=1"],
              "patch_embed.proj.weight, proj_out"),
    "a mixture": (["fusion=shallow"], ["text_states=joint"], "text_mix"),
    "gates": (["fusion=shallow", "text_states=depth"], ["text_states=joint"],
              "text_mix.time_weight, text_mix.time_embedder"),
    "larger patches": ([], ["patch_size=8"], "patch_embed.proj.weight, proj_out"),
    "cross-attention": ([], ["attention=cross"],
                        "layers.*.cross_attn, layers.*.post_cross_attention_layernorm")}


@pytest.mark.parametrize("case", ADDED)
def test_what_a_field_adds_starts_as_in_a_new_run(gemma, tmp_path, capsys, case):
    stored, changes, names = ADDED[case]
    paths = {"CLIP": str(tiny_clip(tmp_path / "clip")), "VAE": str(tiny_vae(tmp_path / "vae"))}
    changes = [re.sub("CLIP|VAE", lambda match: paths[match[0]], word) for word in changes]
    folder = random_model(tmp_path / "model", gemma, *stored)
    got = started("--init", folder, "--set", *changes, "--seed", "5").dit.state_dict()
    lines = capsys.readouterr().err.splitlines()
    (line,) = {line for line in lines if line.startswith("starting from")}

    new = started("--preset", "demo", "--base", gemma, "--seed", "5", "--set", *SHAPE, "vae=null",
                  "qk_norm=true", "attention=self", "pos_embed=ape", "shared_attention_layers=all",
                  *stored, *changes).dit.state_dict()
    old = pretrained.load_model(folder).dit.state_dict()
    fresh = 0
    assert got.keys() == new.keys()
    for name, tensor in got.items():
        if name in old and old[name].shape == tensor.shape:
            assert tensor.equal(old[name]), name
        else:
            assert tensor.equal(new[name]), name
            fresh += tensor.numel()
    assert 0 < fresh
    assert line == f"starting from {folder}; {fresh:,} weights start fresh: {names}"


def test_fields_without_weights_can_be_changed(gemma, tmp_path, capsys):
    folder = random_model(tmp_path / "model", gemma, "pos_embed=2d-rope")
    words = ["pos_embed=m-rope", "shift=2", "max_text_tokens=12", "instruction=draw: "]
    model = started("--init", folder, "--image-size", "32", "--set", *words)
    assert model.config.image_size == 32
    assert model.config.pos_embed == "m-rope"
    assert capsys.readouterr().err.endswith(f"starting from {folder}\n")
    assert_equal(model.state_dict(), pretrained.load_model(folder).state_dict())


# ------------------------------------------------------------------------------ what does not fit

MISFITS = {
    "width": (["dit_hidden_size=64"], "dit_hidden_size was 32, is now 64. Leave out"),
    "fewer layers": (["dit_num_hidden_layers=1"], "dit_num_hidden_layers was None, is now 1"),
    "norms": (["sandwich_norm=false"], "sandwich_norm was True, is now False"),
    "queries and time": (["qk_norm=false", "timestep_conditioning=adaln-zero", "shift=5"],
                         "timestep_conditioning was None, is now 'adaln-zero'; qk_norm was True, "
                         "is now False")}


@pytest.mark.parametrize("case", MISFITS)
def test_fields_that_do_not_fit_are_named(gemma, tmp_path, case):
    changes, message = MISFITS[case]
    folder = random_model(tmp_path / "model", gemma)
    with pytest.raises(FuseDiTError) as error:
        started("--init", folder, "--set", *changes)
    text = str(error.value)
    assert f"{folder} do not fit fields that --set changes: " in text
    assert all(part in text for part in message.split("; "))
    assert "shift was" not in text
    assert "\n" not in text


def test_norms_that_would_move_do_not_fit(gemma, tmp_path):
    """Without sandwich_norm, post_attention_layernorm is the norm before the MLP."""
    folder = random_model(tmp_path / "model", gemma, "sandwich_norm=false")
    with pytest.raises(FuseDiTError, match="sandwich_norm was False, is now True"):
        started("--init", folder, "--set", "sandwich_norm=true")


def test_another_gemma(gemma, tmp_path):
    """One of another shape is named; one of the same shape can take its place."""
    folder = random_model(tmp_path / "model", gemma)
    tiny_gemma(tmp_path / "wide", num_hidden_layers=2, intermediate_size=64)
    tiny_gemma(tmp_path / "alike", num_hidden_layers=2, seed=1)
    with pytest.raises(FuseDiTError, match=r"mlp.*they were trained with the Gemma .*, and this "
                                           r"run has .*/wide, whose shape must be the same"):
        started("--init", folder, "--base", tmp_path / "wide")
    model = started("--init", folder, "--base", tmp_path / "alike")
    assert_equal(model.dit.state_dict(), pretrained.load_model(folder).dit.state_dict())


def test_a_vae_with_other_channels(gemma, tmp_path):
    vae = tiny_vae(tmp_path / "vae")
    folder = random_model(tmp_path / "model", gemma)
    with pytest.raises(FuseDiTError, match="has 4 channels, .*in_channels of the model is "
                                           "3: .*--set in_channels=4 as well"):
        started("--init", folder, "--set", f"vae={vae}", "patch_size=1")


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["dit.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_another_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention": "cross"}))


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "missing": (shutil.rmtree, "no such model folder: .*/model"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "cannot read"),
    "half a file": (truncated, "model.safetensors is truncated or corrupt .*: copy or download"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is missing: copy or"),
    "a lost tensor": (without_a_tensor, "layers.1.mlp.up_proj.weight is missing"),
    "another config": (with_another_config, r"cross_attn.* is missing.*fields that differ \(now, "
                                            r"when saved\): attention: 'cross', 'self'"),
    "a Gemma": (lambda folder: shutil.copytree(folder.parent / "gemma", folder,
                                               dirs_exist_ok=True), "is part of a model"),
    "a VAE": (lambda folder: (folder / "config.json").write_text(
        '{"_class_name": "AutoencoderKL"}'), "is part of a model"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"width": 3}'),
                      "unknown config field 'width'")}


@pytest.mark.parametrize("part, message", [
    ("run/step-0000004/train_state", "is only a part of a model: give .*/run/step-0000004"),
    ("run/step-0000004/model.safetensors", "is only a file of a model: give the folder"),
    ("released/transformer", "is only a part of a model: give .*/released")])
def test_a_part_of_a_model(models, part, message):
    with pytest.raises(FuseDiTError, match=message):
        started("--init", models / part)


@pytest.mark.parametrize("more", [[], ["--image-size", "32"]])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models(gemma, tmp_path, case, more):
    """Even if a field changes, nothing that is missing starts fresh."""
    spoil, message = DAMAGE[case]
    shutil.copytree(gemma, tmp_path / "gemma")
    folder = random_model(tmp_path / "model", gemma)
    spoil(folder)
    with pytest.raises(FuseDiTError, match=message) as error:
        started("--init", folder, *more)
    assert "\n" not in str(error.value)


def test_an_error_of_a_launcher_is_one_line(models, data, tmp_path):
    argv = start_flags(models / "run", data, tmp_path / "out", "--set", "dit_hidden_size=64")
    done = launch(argv, check=False)
    assert done.returncode == 1
    assert re.fullmatch("train_gpu.py: error: .*dit_hidden_size was 32, is now 64.*\n", done.stderr)


def test_raw_weights_that_a_folder_lacks(models, published, tmp_path):
    with pytest.raises(FuseDiTError, match="no raw ones, .*: leave out --no-ema or --init-raw"):
        started("--init", models / "released", "--init-raw")


def test_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FuseDiTError, match="is a training run that has no checkpoint yet"):
        parse_run(["--init", str(tmp_path)], "")


# ------------------------------------------------------------------------------ a trained Gemma

@pytest.fixture(scope="module")
def with_gemma(gemma, data, tmp_path_factory):
    """A run that has trained its Gemma as well."""
    out = tmp_path_factory.mktemp("llm") / "run"
    launch(flags(gemma, data, out, "--steps", "2", "--train-llm", "--ema-every", "1",
                 "--sample-every", "0"))
    return out


def test_a_gemma_that_was_trained_as_well(gemma, with_gemma, tmp_path):
    want = pretrained.load_model(with_gemma)
    base = started("--init", with_gemma, "--train-llm", "--out", tmp_path / "out")
    assert_equal(base.state_dict(), want.state_dict())
    assert all(weight.requires_grad for weight in base.llm.parameters())
    raw = started("--init", with_gemma, "--train-llm", "--init-raw")
    assert_equal(raw.state_dict(), pretrained.load_model(with_gemma, ema=False).state_dict())
    assert not raw.llm.embed_tokens.weight.equal(want.llm.embed_tokens.weight)

    with pytest.raises(FuseDiTError, match="was trained as well.* sample.py --export DIR, and "
                                           "start from DIR, or go on training it, with --train-"):
        started("--init", with_gemma)
    export(want, tmp_path / "whole")
    for flag in ((), ("--train-llm",)):     # an export has its own Gemma
        model = started("--init", tmp_path / "whole", *flag)
        assert_equal(model.state_dict(), want.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("zero", "0123")
def test_a_trained_gemma_starts_with_its_losses(with_gemma, data, tmp_path, zero):
    argv = start_flags(with_gemma, data, tmp_path, "--train-llm", "--zero", zero)
    own = own_losses(argv)
    launch(argv, n=2)
    assert first_losses(tmp_path) == pytest.approx(own, rel=1e-5)


def test_train_llm_of_a_model_with_a_frozen_gemma(models):
    model = started("--init", models / "run", "--train-llm")
    assert_equal(model.state_dict(), pretrained.load_model(models / "run").state_dict())
    assert all(weight.requires_grad for weight in model.llm.parameters())

"""LoRA: training, resuming and merging adapters, and their files in peft's format."""
import json
import os
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import warm
from PIL import Image
from conftest import ROOT, assert_near, tiny_gemma
from launching import assert_equal, flags, launch, launch_all, losses, metrics, state
from safetensors.torch import load_file, save_file
from test_zero import COUNTERS, counters
from tiny_shards import SHAPE

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import cli, pretrained
from fusedit_lib.data.batches import Batches
from fusedit_lib.files import read_json
from fusedit_lib.train.build import build_models
from fusedit_lib.train.checkpoints import damage
from fusedit_lib.train.config import check_run, model_config
from fusedit_lib.train.flags import parse_run
from sample import adapter_folder

peft = pytest.importorskip("peft")


def random_model(folder, gemma, **changes):
    """Save a model with random weights, the output layer included. Returns the folder."""
    shape = cli.parse_overrides(SHAPE) | {"vae": None, "in_channels": 3} | changes
    config = fusedit.preset("demo", base=str(gemma), **shape)
    torch.manual_seed(1)
    dit = pretrained.build_model(config).dit
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pretrained.save_model(folder, config, dit.state_dict())
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, gemma):
    return random_model(tmp_path_factory.mktemp("base") / "model", gemma)


@pytest.fixture(scope="module")
def run(tmp_path_factory, gemma, data, base):
    """The folder of a run of 4 steps, which has a checkpoint with adapters of rank 4."""
    out = tmp_path_factory.mktemp("lora") / "run"
    launch(lora_flags(gemma, data, out, base, 4, "--val-data", str(data)))
    return out


def lora_flags(gemma, data, out, base, steps, *more):
    return flags(gemma, data, out, "--init", str(base), "--lora", "4", "--steps", str(steps),
                 "--ema-every", "1", "--sample-every", "100", *more)


@torch.no_grad()
def velocity(model, dit=None):
    """The velocity at a fixed point."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = model.encode(["a red circle", "a star"])
    return (dit or model.dit)(x, torch.tensor([0.5, 0.9]), text)


def pixels(path):
    """The pixels of an image file, as signed integers."""
    return np.asarray(Image.open(path)).astype(int)


# ------------------------------------------------------------------------------ training

def test_only_adapters_are_trained_and_the_first_loss_is_that_of_the_model(
        gemma, data, base, run):
    settings = parse_run(lora_flags(gemma, data, "nowhere", base, 4), "")
    model = pretrained.load_model(base)
    batch = Batches(settings, model.config, model.tokenizer, settings.batch)[0]
    x = batch["pixels"] / 127.5 - 1
    text = model.encode_ids(batch["ids"], batch["mask"])
    sigma = fusedit.logit_normal_sigma(batch["normal"], model.config.shift)
    loss = fusedit.flow_loss(model.dit, x, text, sigma, batch["noise"][:, 0]).mean()
    assert losses(run)[0] == pytest.approx(loss.item(), rel=1e-5)

    names = {name.rpartition("/")[2] for name in state(run, 4)}
    kinds = {name.partition("dit.")[0] for name in names}
    assert kinds == {"", "weight.", "exp_avg.", "exp_avg_sq."}
    assert all(".lora_" in name for name in names)
    layers = {name.split(".")[4] for name in names if name.startswith("dit.")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    validated = [row["val_loss"] for row in metrics(run) if "val_loss" in row]
    assert validated[-1] < validated[0]


@pytest.mark.parametrize("stages, dtype", [
    ("1", "float32"),
    pytest.param(["0", "2", "3", "2-offload"], "float32", marks=pytest.mark.slow),
    pytest.param(["0", "1", "2", "3"], "bf16", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_never_stopped(gemma, data, base, tmp_path, stages, dtype):
    """Bit for bit, and the frozen weights are in the dtype of the run at every stage."""
    def job(name, steps, zero, *more):
        return lora_flags(gemma, data, tmp_path / name, base, steps, "--zero", zero,
                          "--dtype", dtype, *more)
    jobs = []
    for zero in stages:
        jobs += [job(f"a{zero}", 4, zero, "--save-every", "2", "--sample-every", "2"),
                 job(f"b{zero}", 2, zero), job(f"b{zero}", 4, zero)]
    launch_all(jobs)
    near = 1e-5 if dtype == "float32" else 1e-2
    for zero in stages:
        a = tmp_path / f"a{zero}"
        assert_equal(state(a, 4), state(tmp_path / f"b{zero}", 4))
        assert losses(a) == pytest.approx(losses(tmp_path / f"a{stages[0]}"), rel=near)


@pytest.mark.parametrize("stages", ["1", pytest.param("0123", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one(gemma, data, base, run, tmp_path, stages):
    """And one rank resumes what two have saved. The EMA in lora/ is complete."""
    def job(zero, steps):
        return lora_flags(gemma, data, tmp_path / zero, base, steps, "--zero", zero,
                          "--micro-batch", "2")
    launch_all([job(zero, 2) for zero in stages], n=2)
    for zero in stages:
        assert_whole_adapter(tmp_path / zero / "step-0000002")
    launch_all([job(zero, 4) for zero in stages])
    for zero in stages:
        assert losses(tmp_path / zero) == pytest.approx(losses(run), rel=1e-5)
        assert_equal(load_adapter(tmp_path / zero), load_adapter(run), atol=1e-5)


def test_remat_and_an_offloaded_ema_train_the_same(gemma, data, base, run, tmp_path):
    out = tmp_path / "run"
    launch(lora_flags(gemma, data, out, base, 4, "--remat", "--ema-offload"))
    assert losses(out) == pytest.approx(losses(run), rel=1e-5)
    assert_equal(load_adapter(out), load_adapter(run), atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(gemma, data, base, run, tmp_path):
    """Without graph breaks, even under ZeRO 3. A deeper model does not need more graphs."""
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=4)
    deep_base = random_model(tmp_path / "model", tmp_path / "gemma")

    def job(name, gemma, base, *more):
        more = ("--compile", *more)
        return lora_flags(gemma, data, tmp_path / name, base, 4, *more), COUNTERS
    one, three, deep = launch_all([
        job("one", gemma, base), job("three", gemma, base, "--zero", "3"),
        job("deep", tmp_path / "gemma", deep_base)])
    for name in ("one", "three"):
        assert losses(tmp_path / name) == pytest.approx(losses(run), rel=1e-4)
    for done in (one, three, deep):
        breaks, graphs = counters(done)
        assert breaks == 0 and graphs > 0
    assert counters(one) == counters(deep)


# ------------------------------------------------------------------------------ files and merging

def load_adapter(run, step=4):
    return load_file(run / f"step-{step:07d}" / "lora" / "adapter_model.safetensors")


def assert_whole_adapter(checkpoint):
    """Check that lora/ has every tensor of the EMA, under peft's names."""
    adapter = load_file(checkpoint / "lora" / "adapter_model.safetensors")
    ema = {}
    for path in checkpoint.glob("model*.safetensors"):
        for name, tensor in load_file(path).items():
            name = name.removeprefix("dit.").replace(".default", "")
            ema[f"base_model.model.{name}"] = tensor
    assert_equal(adapter, ema)


def test_peft_reads_the_adapter_and_merging_gives_the_same_model(run, base, tmp_path):
    checkpoint = run / "step-0000004"
    shutil.copytree(checkpoint / "lora", tmp_path / "lora")
    config = read_json(tmp_path / "lora" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base)

    model = pretrained.load_model(base)
    before = velocity(model)
    wrapped = peft.PeftModel.from_pretrained(pretrained.load_model(base).dit, tmp_path / "lora")
    expected = velocity(model, wrapped)
    assert (expected - before).abs().max() > 1e-3

    # the run, its checkpoint, and the base with the adapter
    assert_near(velocity(pretrained.load_model(run)), expected, 1e-5)
    assert_near(velocity(pretrained.load_model(checkpoint)), expected, 1e-5)
    merged = pretrained.load_model(base, lora=[tmp_path / "lora"])
    assert_near(velocity(merged), expected, 1e-5)

    # it has no raw weights
    with pytest.raises(FuseDiTError, match="has one set of weights, and no raw ones"):
        pretrained.load_model(run, ema=False)


def test_samples_and_the_export_of_a_merged_model(run, base, tmp_path):
    """sample.py draws the same images with the run, with its adapter alone, and after --export."""
    def draw(name, *words):
        done = warm.run([ROOT / "sample.py", "--prompt", "a red circle", "--steps", 2, "--dtype",
                         "float32", "--out", tmp_path / name, *words])
        assert done.returncode == 0, done.stderr
        return tmp_path / name / "a-red-circle-0.png"
    adapter = run / "step-0000004" / "lora"
    whole = draw("run", "--model", run, "--export", tmp_path / "exported")
    alone = draw("lora", "--lora", adapter, "--export", tmp_path / "merged")
    offloaded = draw("offload", "--lora", adapter, "--offload")
    both = draw("both", "--lora", run, "--model", base)
    after = draw("after", "--model", tmp_path / "exported")
    original = draw("base", "--model", base)
    assert abs(pixels(whole) - pixels(original)).max() > 10
    for path in (alone, both, after):
        assert abs(pixels(path) - pixels(whole)).max() <= 1
    text = Image.open(both).text            # enough to draw it again when the run has trained on
    assert text["model"] == str(base) and text["lora"] == str(adapter)
    once = draw("once", "--lora", adapter, "--model", run)             # which has it already
    assert abs(pixels(once) - pixels(whole)).max() == 0
    assert offloaded.read_bytes() == alone.read_bytes()

    merged = pretrained.load_model(run).dit.state_dict()
    for name in ("exported", "merged"):
        assert_equal(pretrained.load_model(tmp_path / name).dit.state_dict(), merged)


def test_a_run_of_adapters_has_a_config_of_its_own(gemma, data, base, tmp_path):
    """sample.py --lora RUN draws as RUN was trained, here at another size than its base."""
    out = tmp_path / "run"
    launch(lora_flags(gemma, data, out, base, 1, "--set", "image_size=24"))
    done = warm.run([ROOT / "sample.py", "--lora", out, "--prompt", "a star", "--steps", 1,
                     "--out", tmp_path / "images"])
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "images" / "a-star-0.png").size == (24, 24)


def test_merging_in_bf16(run, base):
    """The sum is rounded, not the adapter: it is off by half a unit for the base and for itself."""
    kwargs = dict(dtype=torch.bfloat16, lora=[adapter_of(run)])
    merged = pretrained.load_model(base, **kwargs).dit.state_dict()
    before = pretrained.load_model(base).dit.state_dict()
    changed = 0
    for name, expected in pretrained.load_model(run).dit.state_dict().items():
        W = merged[name]
        assert W.dtype == torch.bfloat16
        bound = 2 ** -8 * (before[name].abs() + expected.abs()) + 1e-6
        assert ((W - expected).abs() <= bound).all(), name
        changed += not W.equal(before[name].bfloat16())
    assert changed == 14                    # 7 linear layers in each of 2 blocks


def test_the_benchmark_of_a_lora_run(run, tmp_path):
    done = warm.run([ROOT / "evaluate.py", "shapes", "--model", run, "-n", "6", "--steps", "2",
                     "--dtype", "float32", "--out", tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/*/run.json")
    assert read_json(path)["model"] == str(run / "step-0000004")
    image = next(path.parent.glob("images/**/*.*"))
    assert pixels(image).shape == (16, 16, 3)


def test_a_damaged_adapter_makes_the_checkpoint_damaged(run, tmp_path):
    """Every file of the checkpoint, lora/ included, has its size in state.json."""
    folder = shutil.copytree(run / "step-0000004", tmp_path / "step-0000004")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    listed = read_json(folder / "train_state" / "state.json")["files"]
    assert files == {*listed, "train_state/state.json"}
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} < files
    assert damage(folder) is None
    os.truncate(folder / "lora" / "adapter_model.safetensors", 100)
    assert damage(folder).startswith("lora/adapter_model.safetensors has 100 of its")


def test_training_goes_further_from_a_lora_run(gemma, data, run, tmp_path):
    """All weights of the merged model, or an adapter beside those that were merged."""
    more = ("--val-data", str(data))
    settings = flags(gemma, data, tmp_path / "all", "--init", str(run), "--steps", "1", *more)
    launch_all([settings, lora_flags(gemma, data, tmp_path / "second", run, 2, *more)])
    validated = [row["val_loss"] for row in metrics(run) if "val_loss" in row]
    for name in ("all", "second"):
        assert metrics(tmp_path / name)[0]["val_loss"] == pytest.approx(validated[-1], rel=1e-5)

    config = read_json(tmp_path / "second" / "step-0000002" / "lora" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(run / "step-0000004")
    twice = pretrained.load_model(tmp_path / "second").dit
    adapter = adapter_folder(tmp_path / "second")
    alone = pretrained.load_model(pretrained.base_model(adapter), lora=[adapter]).dit
    assert_equal(alone.state_dict(), twice.state_dict())
    wrapped = peft.PeftModel.from_pretrained(
        pretrained.load_model(run).dit, tmp_path / "second" / "step-0000002" / "lora")
    assert_equal(twice.state_dict(), wrapped.merge_and_unload().state_dict(), atol=1e-5)


# ------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("words", [
    [], ["--init", "demo", "--float8"], ["--init", "demo", "--train-llm"],
    ["--init", "demo", "--init-raw"]])
def test_flags_with_which_it_does_not_work(words):
    check_run(parse_run(["--lora", "4", "--init", "demo"], ""))
    with pytest.raises(FuseDiTError, match="--lora needs a model to adapt, which --init names"):
        check_run(parse_run(["--lora", "4", *words], ""))


def test_a_negative_rank_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        parse_run(["--lora", "-1", "--init", "demo"], "")
    assert "--lora is -1; it must be at least 0" in capsys.readouterr().err


def test_without_peft_one_line_says_how_to_install_it(gemma, data, base, tmp_path):
    argv = lora_flags(gemma, data, tmp_path / "run", base, 2)
    done = launch(argv, "sys.modules['peft'] = None", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("peft is not installed: pip install -e '.[lora]'")


@pytest.mark.parametrize("changes", ["dit_hidden_size=48", "dit_num_hidden_layers=1"])
def test_an_adapter_of_another_model(gemma, run, base, tmp_path, changes):
    model = random_model(tmp_path / "model", gemma, **cli.parse_overrides([changes]))
    with pytest.raises(FuseDiTError) as problem:
        pretrained.load_model(model, lora=[adapter_of(run)])
    text = str(problem.value)
    with pytest.raises(FuseDiTError, match="is for another model"):    # --offload: before drawing
        pretrained.load_model(model, parts=("tokenizer",), lora=[adapter_of(run)])
    assert "is for another model, incomplete or no plain LoRA: this model has no place" in text
    assert "lora_A" in text
    assert "\n" not in text


def adapter_of(run):
    return run / "step-0000004" / "lora"


def changed_adapter(run, folder, **changes):
    """A copy of a run's adapter with changes to adapter_config.json. Returns the folder."""
    shutil.copytree(adapter_of(run), folder)
    config = read_json(folder / "adapter_config.json") | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("changes", [
    {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}, {"init_lora_weights": "pissa"}])
def test_adapters_that_only_peft_can_merge(run, base, tmp_path, changes):
    folder = changed_adapter(run, tmp_path / "lora", **changes)
    with pytest.raises(FuseDiTError, match="only peft can merge it: use its merge_and_unload"):
        pretrained.load_model(base, lora=[folder])


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.lora_magnitude_vector", "proj_out.weight"])
def test_adapters_with_other_tensors(run, base, tmp_path, name):
    """DoRA, and weights that peft has trained as a whole."""
    folder = changed_adapter(run, tmp_path / "lora")
    change_tensors(folder, lambda tensors: tensors | {f"base_model.model.{name}": torch.ones(4, 4)})
    with pytest.raises(FuseDiTError, match=f"no plain LoRA: .* no place for its .*{name}"):
        pretrained.load_model(base, lora=[folder])


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_incomplete_adapter(run, base, tmp_path, half):
    folder = changed_adapter(run, tmp_path / "lora")
    lost = f"base_model.model.layers.1.self_attn.q_proj.{half}.weight"

    def drop(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != lost}
    change_tensors(folder, drop)
    with pytest.raises(FuseDiTError, match="incomplete .* no place for its .*layers.1.*q_proj"):
        pretrained.load_model(base, lora=[folder])


def test_lora_alpha_scales_the_update(run, base, tmp_path):
    folder = changed_adapter(run, tmp_path / "lora", lora_alpha=12)
    dit = pretrained.load_model(base).dit
    expected = peft.PeftModel.from_pretrained(dit, folder).merge_and_unload().state_dict()
    merged = pretrained.load_model(base, lora=[folder]).dit.state_dict()
    assert_equal(merged, expected, atol=1e-5)


def test_folders_without_an_adapter_or_its_model(run, base, tmp_path):
    with pytest.raises(FuseDiTError, match="cannot read .*adapter_config.json"):
        pretrained.load_model(base, lora=[base])
    folder = changed_adapter(run, tmp_path / "lora", base_model_name_or_path="moved/far/away")
    with pytest.raises(FuseDiTError, match="is for moved/far/away, which does not exist.*--model "):
        pretrained.base_model(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FuseDiTError, match="adapter_model.safetensors is missing"):
        pretrained.load_model(base, lora=[folder])


def test_the_wrong_folder_for_lora(run, base, tmp_path):
    """A whole model, a run without a checkpoint, and a run whose raw weights are asked for."""
    with pytest.raises(FuseDiTError, match="neither a LoRA adapter .* a whole model to --model"):
        adapter_folder(base)
    empty = tmp_path / "run"
    empty.mkdir()
    shutil.copy(run / "config.json", empty)
    shutil.copy(run / "metrics.jsonl", empty)
    with pytest.raises(FuseDiTError, match="is a training run that has no checkpoint yet"):
        adapter_folder(empty)
    done = warm.run([ROOT / "sample.py", "--prompt", "a star", "--lora", run, "--no-ema"])
    assert done.returncode == 2
    assert "--no-ema has no effect with --lora" in done.stderr


def test_raw_weights_of_a_lora_run(gemma, data, run, tmp_path):
    settings = parse_run(flags(gemma, data, tmp_path, "--init", str(run), "--init-raw"), "")
    with pytest.raises(FuseDiTError, match="has one set of weights, and no raw .* --init-raw"):
        build_models(settings, model_config(settings), "cpu", None)


def test_a_run_whose_base_is_gone(gemma, data, run, tmp_path):
    """It cannot be resumed until the base is back."""
    out = shutil.copytree(run, tmp_path / "run")
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace(read_json(out / "config.json")["run"]["init"],
                                                  "gone/with/it"))
    settings = parse_run(flags(gemma, data, out, "--lora", "4"), "")
    with pytest.raises(FuseDiTError, match="no such model folder: gone/with/it.* put it back"):
        build_models(settings, model_config(settings), "cpu", None)


def test_an_adapter_of_the_hub(run, base, monkeypatch):
    """It is downloaded in the format of peft, which has no config.json."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(adapter_of(run))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = adapter_folder("someone/an-adapter")
    assert_equal(pretrained.load_model(base, lora=[folder]).dit.state_dict(),
                 pretrained.load_model(run).dit.state_dict())
    (name, patterns), = asked
    assert name == "someone/an-adapter"
    for file in folder.iterdir():
        assert any(file.match(pattern) for pattern in patterns)

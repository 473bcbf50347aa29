"""sample.py --offload: the same files as without it, one part of the model in memory at a time."""
import sys
import weakref

import pytest
import torch
import warm
from conftest import REFERENCE, ROOT, tiny_clip
from test_sample import count_texts

from fusedit import FuseDiTConfig
from fusedit_lib import cli, offload
from fusedit_lib.files import open_tensors
from fusedit_lib.pretrained import build_model, load_model, save_model

PIPELINE = REFERENCE / "released_layout" / "pipeline"       # with a VAE


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory, gemma_folder):
    """The folder of a model with CLIP modulation and random weights, which draws pixels."""
    folder = tmp_path_factory.mktemp("clip-model")
    clip = tiny_clip(tmp_path_factory.mktemp("clip"))
    config = FuseDiTConfig(base=str(gemma_folder), in_channels=3, vae=None, image_size=8,
                           max_text_tokens=6, clip=str(clip), text_modulation_embeds_dim=24)
    torch.manual_seed(0)
    dit = build_model(config).dit
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(folder, config, dit.state_dict())
    return folder


def sample(monkeypatch, *args):
    """Run sample.py in this process."""
    import sample
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, args)])
    sample.main()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Nine images in batches of 3, and the parts are loaded anew after every second batch.
WORDS = ("--prompt", "a red circle", "--prompt", "a small green star above the square",
         "--prompt", "a blue star", "--num-images", 3, "--batch-size", 3, "--steps", 3,
         "--negative", "a square", "--gif", "--grid")


@pytest.mark.parametrize("model, dtype, more", [
    ("{clip_model}", "float32", ()), ("{clip_model}", "bf16", ("--guidance", 1)),
    (PIPELINE, "float32", ("--height", 32, "--width", 48)),
    (PIPELINE, "bf16", ("--height", 32, "--width", 48)),
    (ROOT / "demo", "float32", ("--set", "instruction=a red"))])
def test_offloading_changes_no_byte(model, dtype, more, clip_model, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "GROUP", 6)
    model = str(model).format(clip_model=clip_model)
    words = ("--model", model, "--dtype", dtype, *WORDS, *more)
    sample(monkeypatch, *words, "--out", tmp_path / "a")
    sample(monkeypatch, *words, "--out", tmp_path / "b", "--offload")
    a = files(tmp_path / "a")
    assert len(a) == 2 * 9 + 1
    assert len(set(a.values())) == len(a)
    assert files(tmp_path / "b") == a


def test_a_published_checkpoint_is_offloaded(tmp_path, monkeypatch):
    """Its Gemma is in the checkpoint, in a file that is not safetensors."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = (PIPELINE / "transformer" / "config.json").read_text()
    (checkpoint / "config.json").write_text(config)
    stored = open_tensors(PIPELINE / "transformer")
    state = {name: file.get_tensor(key) for name, (file, key) in stored.items()}
    torch.save(state, checkpoint / "ema.pt")
    words = ("--model", checkpoint, "--set", f"base={PIPELINE / 'transformer'}",
             f"vae={PIPELINE / 'vae'}", "--prompt", "a star", "--height", 32, "--width", 32,
             "--steps", 2, "--dtype", "float32")
    sample(monkeypatch, *words, "--out", tmp_path / "a")
    sample(monkeypatch, *words, "--out", tmp_path / "b", "--offload")
    assert files(tmp_path / "b") == files(tmp_path / "a")


# ------------------------------------------------------------------------------ memory

class LiveParts:
    """The bytes of the weights that are in memory, by the parts that were loaded."""

    def __init__(self):
        self.parts = []                     # (name, {id of a storage: (weak reference, bytes)})
        self.peak = 0

    def add(self, name, module):
        weights = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            if not tensor.is_meta:
                storage = tensor.untyped_storage()
                weights[id(storage)] = weakref.ref(tensor), tensor.nbytes
        self.parts.append((name, weights))
        self.peak = max(self.peak, sum(self.live().values()))

    def live(self):
        """{part: bytes}, without the parts that have been freed."""
        found = {}
        for name, weights in self.parts:
            alive = sum(size for weight, size in weights.values() if weight() is not None)
            if alive:
                found[name] = found.get(name, 0) + alive
        return found


def modules_of(model):
    clip = torch.nn.ModuleList()
    if model.clip_encoder is not None:
        clip.append(model.clip_encoder.model)
    return {"llm": model.llm, "clip": clip, "dit": model.dit}


@pytest.mark.parametrize("model, parts", [(PIPELINE, ["llm", "dit", "vae"]),
                                          ("{clip_model}", ["llm clip", "dit", ""])])
def test_one_part_is_in_memory_at_a_time(model, parts, clip_model, tmp_path, monkeypatch):
    """While a part works, only its own weights exist; the peak is that of the largest part."""
    monkeypatch.setattr(offload, "GROUP", 6)
    live = LiveParts()
    load_parts = cli.load_model
    load_vae = offload.load_vae

    def load_and_watch(*args, **changes):
        loaded = load_parts(*args, **changes)
        for name, module in modules_of(loaded).items():
            live.add(name, module)
        return loaded

    def load_vae_and_watch(*args):
        vae = load_vae(*args)
        live.add("vae", vae)
        return vae

    seen = []

    def watch(name):
        function = getattr(offload, name)

        def watched(*args):
            seen.append(" ".join(live.live()))
            return function(*args)
        monkeypatch.setattr(offload, name, watched)
    monkeypatch.setattr(cli, "load_model", load_and_watch)
    monkeypatch.setattr(offload, "load_vae", load_vae_and_watch)
    for name in ("encode_prompts", "draw_latents", "decode_latents"):
        watch(name)

    model = str(model).format(clip_model=clip_model)
    sample(monkeypatch, "--model", model, *WORDS[:-2], "--height", 16, "--width", 16, "--offload",
           "--out", tmp_path)
    two_groups = []
    for batches in (2, 1):
        for part in parts:
            two_groups += [part] * batches
    assert seen == two_groups
    assert live.live() == {}
    sizes = {}
    for name, weights in live.parts:
        sizes[name] = max(sizes.get(name, 0), sum(size for _, size in weights.values()))
    together = sizes["llm"] + sizes["clip"]
    assert live.peak == max(together, sizes["dit"], sizes.get("vae", 0))


def test_parts_that_are_not_asked_for_stay_on_the_meta_device(clip_model):
    model = load_model(clip_model, parts=("tokenizer",))
    assert model.tokenizer is not None and model.clip_encoder is None
    assert all(p.is_meta for p in model.parameters())
    model = load_model(clip_model, parts=("llm",))
    assert not any(p.is_meta for p in model.llm.parameters())
    assert all(p.is_meta for p in model.dit.parameters())
    assert model.clip_encoder is not None and model.tokenizer is None
    model = load_model(clip_model, parts=("dit",))
    assert all(p.is_meta for p in model.llm.parameters())
    assert not any(p.is_meta for p in model.dit.parameters())
    assert model.clip_encoder is None


def test_text_features_wait_in_few_rows(clip_model, monkeypatch):
    """Between the phases, a prompt of many images is kept once, and so is the negative prompt."""
    loaded = cli.open_model(str(clip_model), "cpu", "float32", offload=True)
    counts = []
    load = loaded.load

    def load_and_count(parts):
        model = load(parts=parts)
        counts.append(count_texts(model))
        return model
    loaded = loaded._replace(load=load_and_count)
    import sample
    settings = offload.Settings(8, 8, 1, 2.0, (0, 1), "", False)
    jobs = [sample.Job("a star", seed) for seed in range(5)]
    encoded, = offload.encode(loaded, [jobs], settings)
    assert counts == [[1, 1]]
    assert [len(encoded.text.mask), len(encoded.uncond.mask)] == [1, 1]
    assert encoded.rows == [0] * 5


# ------------------------------------------------------------------------------ messages

@pytest.mark.parametrize("args, code, message", [
    (["--compile"], 2, "leave out one of them"),
    (["--model", "./nowhere"], 1, "no such model folder"),
    (["--height", "9"], 1, "height 9 is not a multiple of 2"),
    (["--model", str(PIPELINE), "--set", "vae={clip_model}"], 1, "the VAE"),
    (["--set", "dit_hidden_size=16"], 1, "do not fit its config.json")])
def test_bad_input_is_reported_before_anything_is_loaded(args, code, message, clip_model, tmp_path):
    if "--model" not in args:
        args = ["--model", clip_model, *args]
    args = [str(arg).format(clip_model=clip_model) for arg in args]
    done = warm.run([ROOT / "sample.py", *args, "--prompt", "a star", "--offload", "--out",
                     tmp_path])
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert message in lines[-1], done.stderr
    if code == 1:
        assert len(lines) == 1
    assert not list(tmp_path.iterdir())

"""Model folders: read, check and write them. fusedit.py is the method, this is the bookkeeping.

A model is loaded from
    our own folder          config.json, model.safetensors with the DiT ("dit.*"), and a Gemma that
                            config.json names by path or hub id; every checkpoint is such a folder
    a run                   the folder that its file `latest` names
    the released layout     transformer/ (config.json, model.safetensors with "llm.*" and "dit.*"),
                            vae/, scheduler/, tokenizer/
    a hub id                one of these on the Hugging Face hub
Loading is strict, as a tensor that is left out or left over means another model: both are errors
that name it. It builds on the meta device, shapes without memory, and loads only what is read.
"""
import hashlib
import json
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import fusedit
from fusedit import FuseDiT, FuseDiTConfig, FuseDiTError, GemmaConfig, sine_table
from fusedit_lib.files import atomic_write, read_json, save_file, tensor_files, weight_files


def resolve(name, near=".", patterns=("*.json", "*.safetensors", "*.model")):
    """The folder of a model: a path (also from `near` or fusedit.py's folder), or a hub id."""
    for root in (near, ".", Path(fusedit.__file__).parent):
        if (Path(root) / name).exists():
            return (Path(root) / name).resolve()
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FuseDiTError(f"no such model folder: {name}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as e:                  # any of a dozen network, login and name errors
        raise FuseDiTError(f"{name} is not a folder here, and the hub did not give it ("
                           f"{type(e).__name__}). Check the name and the network; Gemma also needs "
                           "its licence accepted on the hub and `hf auth login`") from e


def fingerprint(vae):
    """A short name of a VAE's weights, by which it is known whose latents are beside shards."""
    whole, folder = hashlib.sha256(), resolve(vae, patterns=("vae/*",))
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    for path in weight_files(folder, "diffusion_pytorch_model"):
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def gemma_config(d):
    """GemmaConfig from a transformers config.json (a dict), or its part on the text tower."""
    d = d.get("base_config") or d.get("text_config") or d  # released FuseDiT, or PaliGemma
    kind = d.get("model_type")
    if kind not in ("gemma", "gemma2", "gemma3_text"):
        raise FuseDiTError(f"model_type is {kind!r}, but the text tower must be a Gemma: gemma, "
                           "gemma2, gemma3_text or paligemma")
    new = kind == "gemma3_text"
    # Published configs leave out what equals the defaults of their transformers class.
    got = dict(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4) if new else {}
    got |= dict(head_dim=256, rms_norm_eps=1e-6, sliding_window=4096)
    names = [f.name for f in fields(GemmaConfig)]
    got |= {k: v for k, v in d.items() if k in names and v is not None}
    if missing := [k for k in names[:7] if k not in got]:
        raise FuseDiTError(f"the Gemma's config.json lacks {', '.join(missing)}")
    rope = d.get("rope_parameters") or {}  # transformers 5 keeps here what 4 had in three keys
    far, near = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    theta = far.get("rope_theta") or d.get("rope_theta") or (1e6 if new else 1e4)
    got["rope_theta"], got["query_scale"] = theta, d.get("query_pre_attn_scalar") or got["head_dim"]
    got["rope_factor"] = (d.get("rope_scaling") or far).get("factor") or 1.0
    # Only Gemma 3 has a second theta: of the layers with a sliding window.
    local = near.get("rope_theta") or d.get("rope_local_base_freq") or 1e4
    got["local_theta"] = local if new else theta
    # Every second layer of Gemma 2 and five of six of Gemma 3 have a window; no other has.
    every = {"gemma": 1, "gemma2": 2}.get(kind, d.get("sliding_window_pattern") or 6)
    kinds = d.get("layer_types") or ["full_attention" if (i + 1) % every == 0 else
                                     "sliding_attention" for i in range(got["num_hidden_layers"])]
    got["sliding_layers"] = tuple(i for i, k in enumerate(kinds) if k == "sliding_attention")
    return GemmaConfig(**got)


def gemma_tensors(folder):
    """tensor_files of a Gemma, saved by transformers or inside a FuseDiT, without its prefix."""
    tensors = tensor_files(folder)
    for prefix in ("llm.", "language_model.model.", "model.language_model.", "model.", ""):
        if prefix + "embed_tokens.weight" in tensors:
            break
    else:
        raise FuseDiTError(f"{folder} holds no Gemma: it has no embed_tokens.weight")
    # Beside it may be PaliGemma's eyes, an untied head, or the DiT of a released model.
    others = ("vision_tower", "multi_modal_projector", "model.vision_tower", "lm_head", "dit.",
              "model.multi_modal_projector", "language_model.lm_head")
    return {k.removeprefix(prefix): f for k, f in tensors.items() if not k.startswith(others)}


def check_tensors(module, found, source, hint=""):
    """Raise unless found, as from tensor_files, has just the module's tensors and shapes."""
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    have = {k: tuple(file.get_slice(name).get_shape()) for k, (file, name) in found.items()}
    wrong = [f"{k} is missing" for k in want if k not in have]
    wrong += [f"{k} is unexpected" for k in have if k not in want]
    wrong += [f"{k} is {have[k]}, not {want[k]}" for k in want if have.get(k, want[k]) != want[k]]
    if wrong:
        more = f"; and {len(wrong) - 4} more" * (len(wrong) > 4)
        raise FuseDiTError(f"the weights in {source} do not fit its config.json: "
                           + "; ".join(wrong[:4]) + more + hint)


def trim(model):
    """Drop the Gemma weights that are never used, before memory is given to them."""
    llm = model.llm
    if model.upto < len(llm.layers):
        llm.norm, llm.layers = None, llm.layers[:model.upto + 1]
        last = llm.layers[-1]               # of the last one only keys and values are computed
        last.mlp = last.self_attn.q_proj = last.self_attn.o_proj = None


def fill(module, found, device, dtype):
    """Replace a module's meta tensors by the stored ones, one at a time."""
    state = {k: found[k][0].get_tensor(found[k][1]).to(device, dtype) for k in module.state_dict()}
    module.load_state_dict(state, assign=True)


def load_tokenizer(folder):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:                  # a missing or half tokenizer raises many kinds
        raise FuseDiTError(f"cannot load a tokenizer from {folder}: {e}") from e


class ClipTokenizer:
    """prompts -> [B,77]: the tokens of a CLIP text model."""
    def __init__(self, name):
        from transformers import CLIPTokenizer
        self.tokenizer = CLIPTokenizer.from_pretrained(resolve(name))

    def __call__(self, prompts):
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77,
                              return_tensors="pt")["input_ids"]


class Clip:
    """The pooled, projected vectors [B,C] of a CLIP text model, of prompts or of their tokens."""
    def __init__(self, name, device, dtype):
        from transformers import CLIPTextModelWithProjection
        model, self.tokens = CLIPTextModelWithProjection, ClipTokenizer(name)
        self.model = model.from_pretrained(resolve(name), dtype=dtype).to(device).eval()

    @torch.no_grad()
    def __call__(self, words):
        ids = words if isinstance(words, torch.Tensor) else self.tokens(words)
        return self.model(ids.to(self.model.device)).text_embeds


def differences(a, b):
    """"field: x, y" for every field in which two configs (dicts) differ."""
    return [f"{k}: {a.get(k)!r}, {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def build_model(config, device="cpu", dtype=torch.float32, dit_tensors=None, source=None,
                llm_tensors=None):
    """FuseDiT with Gemma from config.base in dtype, and the DiT's tensors or a fresh DiT (float32).

    llm_tensors: a Gemma that was trained too, in place of base's; of what is read alone.
    Built on the meta device, shapes without memory; only what is read is then loaded.
    """
    if config.in_channels != 3 and not config.vae:
        raise FuseDiTError(f"config field in_channels is {config.in_channels}; a model without a "
                           "vae draws pixels and has 3, or name its vae")
    if config.text_modulation_embeds_dim and not config.clip:
        raise FuseDiTError("config field text_modulation_embeds_dim needs clip, the model that "
                           "gives this vector")
    if config.pos_embed == "ape" and (config.dit_hidden_size or 0) % 4:
        raise FuseDiTError(f"config field dit_hidden_size is {config.dit_hidden_size}; pos_embed "
                           "ape needs a multiple of 4: sine and cosine of row and column")
    base = resolve(config.base)
    with torch.device("meta"):
        model = FuseDiT(config, gemma_config(read_json(base / "config.json")))
    model.own_llm = bool(llm_tensors)
    if not llm_tensors:                     # base's own are all of it
        check_tensors(model.llm, llm_tensors := gemma_tensors(base), base)
    trim(model)
    if model.own_llm:
        check_tensors(model.llm, llm_tensors, source)
    fill(model.llm, llm_tensors, device, dtype)
    if dit_tensors is None:
        model.dit.to_empty(device=device).init_weights()
    else:
        written = [f.metadata() or {} for f, _ in list(dit_tensors.values())[:1]]
        then = json.loads(written[0].get("config", "{}")) if written else {}
        free = dict(base=0, vae=0, guidance=0)             # they have no say in the shapes
        changed = differences(asdict(config) | free, then | free)
        hint = "; fields (here, when written): " + "; ".join(changed) if then and changed else ""
        check_tensors(model.dit, dit_tensors, source, hint)
        fill(model.dit, dit_tensors, device, dtype)
    words = base.parent / "tokenizer" if base.name == "transformer" else base
    model.tokenizer = load_tokenizer(words)
    if config.apply_chat_template and not model.tokenizer.chat_template:
        raise FuseDiTError(f"{words} has no chat template, so apply_chat_template cannot be true: "
                           "take an instruction-tuned Gemma")
    model.pool = config.clip and Clip(config.clip, device, dtype)
    return model


def load_config(folder):
    """FuseDiTConfig of a model folder, ours or of the released layout, with absolute paths."""
    if not (folder / "transformer").exists():
        c = FuseDiTConfig.from_dict(read_json(folder / "config.json"))
        return replace(c, base=str(resolve(c.base, folder)),
                       vae=c.vae and str(resolve(c.vae, folder, ("vae/*",))))
    d = read_json(folder / "transformer" / "config.json")
    c = FuseDiTConfig.from_dict({f.name: d[f.name] for f in fields(FuseDiTConfig) if f.name in d})
    shift = read_json(folder / "scheduler" / "scheduler_config.json").get("shift")
    if d.get("model_type") not in ("DiT", "FuseDiT") or not shift:
        raise FuseDiTError(f"{folder} holds another kind of model: transformer/config.json needs "
                           "model_type DiT or FuseDiT, scheduler/scheduler_config.json a shift")
    return replace(c, base=str(folder / "transformer"), shift=float(shift),
                   fusion="shallow" if d["model_type"] == "DiT" else "deep",
                   vae=str(folder / "vae") if (folder / "vae").exists() else None,
                   clip=str(folder / "clip") if c.text_modulation_embeds_dim else None)


def last_checkpoint(path):
    """Of a run's folder, its last checkpoint; of any other path or hub id, itself."""
    latest = Path(path) / "latest"
    if latest.exists():
        return Path(path) / latest.read_text().strip()
    if (Path(path) / "metrics.jsonl").exists():
        raise FuseDiTError(f"{path} is a training run that has no checkpoint yet: the first comes "
                           "after --save-every steps")
    return path


def load_model(path, device="cpu", dtype=torch.float32, ema=True):
    """A trained model from a checkpoint, a run, a released-layout folder or a hub id.

    ema=False: a checkpoint's raw weights instead of their average.
    """
    folder = resolve(last_checkpoint(resolve(path)))
    config, released = load_config(folder), (folder / "transformer").exists()
    home, state = folder / "transformer" if released else folder, folder / "train_state"
    if not ema and not state.exists():
        raise FuseDiTError(f"{folder} has averaged weights only: the raw ones are in the "
                           "checkpoints of a run")
    found = tensor_files(home) if ema else {
        k.removeprefix("weight."): f for k, f in tensor_files(state, "state").items()}
    dit, llm = ({k[4:]: f for k, f in found.items() if k.startswith(part)}
                for part in ("dit.", "llm."))
    dit.pop("patch_embed.pos_embed", None)                         # a constant, see sine_table
    return build_model(config, device, dtype, dit, home, None if released else llm).eval()


def save_model(folder, config, dit):
    """Write a model folder: config.json and, of the DiT's tensors (a dict), model.safetensors."""
    folder, text = Path(folder), json.dumps(asdict(config), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.json") as tmp:
        tmp.write_text(text + "\n")
    with atomic_write(folder / "model.safetensors") as tmp:
        save_file({f"dit.{k}": v.contiguous() for k, v in dit.items()}, tmp, {"config": text})


def export(model, folder):
    """Write a model in the released layout (see the top), whole: both towers, tokenizer, VAE."""
    c, folder = model.config, Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FuseDiTError(f"{folder} exists and is not empty: export to a new folder")
    tmp, base = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), Path(c.base)
    tensors = {f"dit.{k}": v.detach().cpu().contiguous() for k, v in model.dit.state_dict().items()}
    if c.pos_embed == "ape":                # published models carry their constant table
        tensors["dit.patch_embed.pos_embed"] = sine_table(64, 64, model.dit.width, "cpu")
    tensors |= {f"llm.{k}": f.get_tensor(name) for k, (f, name) in gemma_tensors(base).items()}
    if model.own_llm:                       # what is read of it was trained; the rest is base's
        tensors |= {f"llm.{k}": v.cpu().contiguous() for k, v in model.llm.state_dict().items()}
    gemma = read_json(base / "config.json")
    gemma = gemma.get("base_config") or gemma.get("text_config") or gemma
    kind = "FuseDiT" if c.fusion == "deep" else "DiT"
    settings = asdict(c) | dict(base=None, vae=None, clip=None)    # they are folders beside it
    files = {
        "model_index.json": dict(
            _class_name=f"{kind}Pipeline", transformer=["diffusion.models", kind],
            scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
            tokenizer=["transformers", type(model.tokenizer).__name__],
            vae=["diffusers", "AutoencoderKL"] if c.vae else None),
        "transformer/config.json": {k: v for k, v in settings.items() if v is not None} | dict(
            architectures=[kind], model_type=kind, base_config=gemma, out_channels=c.in_channels,
            dit_hidden_size=model.dit.width, dit_num_hidden_layers=len(model.dit.layers),
            pos_embed_max_size=64, sample_size=32, text_hidden_size=model.llm.config.hidden_size,
            timestep_conditioning=c.timestep_conditioning),
        "scheduler/scheduler_config.json": dict(
            _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=c.shift)}
    try:
        for name, content in files.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_text(json.dumps(content, indent=2) + "\n")
        save_file(tensors, tmp / "transformer" / "model.safetensors", {"format": "pt"})
        model.tokenizer.save_pretrained(tmp / "tokenizer")
        for name, source in (("vae", c.vae), ("clip", c.clip)):
            if source:
                home = resolve(source)
                shutil.copytree(home / name if (home / name).is_dir() else home, tmp / name)
        if folder.exists():
            folder.rmdir()
        os.replace(tmp, folder)
        print(f"wrote {folder}")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)

"""Find, check, load and write model folders.

A model is loaded from
    our own folder          config.json, model.safetensors with the DiT ("dit.*"), and a Gemma that
                            config.json names by path or hub id; every checkpoint is such a folder
    a run                   the checkpoint that its file `latest` names
    the released layout     transformer/ (config.json, model.safetensors with "llm.*" and "dit.*"),
                            vae/, scheduler/, tokenizer/
    a hub id                one of these on the Hugging Face hub
Loading is strict: a missing or unexpected tensor means that this is another model, and raises an
error that names the tensor. Models are built on the meta device, which has shapes but no memory;
then only the tensors that are needed are read.
"""
import hashlib
import json
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import fusedit
from fusedit import FuseDiT, FuseDiTConfig, FuseDiTError, GemmaConfig, sincos_2d
from fusedit_lib.backend import warm_up_mkl
from fusedit_lib.files import (
    assign_tensors,
    atomic_write,
    check_tensors,
    open_tensors,
    read_json,
    safetensors_paths,
    save_file,
)

# ---- finding a folder ----------------------------------------------------------------------------

def resolve(name, near=".", patterns=("*.json", "*.safetensors", "*.model")):
    """The folder of a model, from a path or a hub id; raises FuseDiTError.

    A relative path is looked up in `near`, in the working directory and next to fusedit.py.
    patterns: the files to download from the hub.
    """
    for root in (near, ".", Path(fusedit.__file__).parent):
        if (Path(root) / name).exists():
            return (Path(root) / name).resolve()
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FuseDiTError(f"no such model folder: {name}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as e:                  # any of a dozen network, login and name errors
        raise FuseDiTError(f"{name} is not a local folder and cannot be downloaded from the hub ("
                           f"{type(e).__name__}). Check the name and the network; for Gemma, also "
                           "accept its licence on the hub and run `hf auth login`") from e


def resolve_vae(name):
    """The folder with a VAE's config.json and weights: `name` itself, or its subfolder vae/."""
    folder = resolve(name, patterns=("vae/*",))
    if (folder / "vae").is_dir():
        return folder / "vae"
    return folder


def vae_fingerprint(vae):
    """A short hash of a VAE's weights. Stored with latents, it identifies the VAE they are from."""
    whole = hashlib.sha256()
    for path in safetensors_paths(resolve_vae(vae), "diffusion_pytorch_model"):
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def last_checkpoint(path):
    """The last checkpoint of a run's folder; any other path or hub id is returned unchanged."""
    latest = Path(path) / "latest"
    if latest.exists():
        return Path(path) / latest.read_text().strip()
    if (Path(path) / "metrics.jsonl").exists():
        raise FuseDiTError(f"{path} is a training run that has no checkpoint yet: the first is "
                           "saved after --save-every steps")
    return path


# ---- the text tower ------------------------------------------------------------------------------

def text_config(d):
    """The part of a config.json that describes the text model; for a plain Gemma, all of it."""
    return d.get("base_config") or d.get("text_config") or d


def gemma_config(d):
    """GemmaConfig from the config.json (a dict) of a Gemma, a PaliGemma or a released FuseDiT."""
    return GemmaConfig.from_dict(text_config(d))


def gemma_tensors(folder):
    """open_tensors of a Gemma, saved by transformers or within a FuseDiT, with prefixes removed."""
    tensors = open_tensors(folder)
    for prefix in ("llm.", "language_model.model.", "model.language_model.", "model.", ""):
        if prefix + "embed_tokens.weight" in tensors:
            break
    else:
        raise FuseDiTError(f"{folder} contains no Gemma: it has no embed_tokens.weight")
    # The file may also contain PaliGemma's vision tower, an untied head, or a released model's DiT.
    others = ("vision_tower", "multi_modal_projector", "model.vision_tower", "lm_head", "dit.",
              "model.multi_modal_projector", "language_model.lm_head")
    return {name.removeprefix(prefix): stored for name, stored in tensors.items()
            if not name.startswith(others)}


def load_tokenizer(folder):
    """The transformers tokenizer in a folder; raises FuseDiTError."""
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:                  # of many types, if files are missing or incomplete
        raise FuseDiTError(f"cannot load a tokenizer from {folder}: {e}") from e


class ClipTokenizer:
    """prompts -> [B,77]: the token ids of a CLIP text model."""

    def __init__(self, name):
        from transformers import CLIPTokenizer
        self.tokenizer = CLIPTokenizer.from_pretrained(resolve(name))

    def __call__(self, prompts):
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77,
                              return_tensors="pt")["input_ids"]


class ClipEncoder:
    """prompts or token ids [B,77] -> pooled, projected vectors [B,C] of a CLIP text model."""

    def __init__(self, name, device, dtype):
        from transformers import CLIPTextModelWithProjection
        self.tokenize = ClipTokenizer(name)
        model = CLIPTextModelWithProjection.from_pretrained(resolve(name), dtype=dtype)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts_or_ids):
        ids = prompts_or_ids
        if not isinstance(ids, torch.Tensor):
            ids = self.tokenize(ids)
        return self.model(ids.to(self.model.device)).text_embeds


# ---- building a model ----------------------------------------------------------------------------

def build_model(config, device="cpu", dtype=torch.float32, dit_tensors=None, source=None,
                llm_tensors=None):
    """A FuseDiT with the Gemma of config.base and a DiT, either stored or newly initialised.

    dit_tensors: open_tensors of a DiT in the folder source, loaded in dtype, as Gemma is; None: new
    weights in float32. llm_tensors: the weights of a Gemma that was trained as well, which
    replace base's; they include only the layers that are read. Raises FuseDiTError.
    """
    check_build(config)
    warm_up_mkl()
    base = resolve(config.base)
    with torch.device("meta"):
        model = FuseDiT(config, gemma_config(read_json(base / "config.json")))
    load_llm(model, base, llm_tensors, source, device, dtype)

    if dit_tensors is None:
        model.dit.to_empty(device=device).init_weights()
    else:
        check_tensors(model.dit, dit_tensors, source, config_hint(config, dit_tensors))
        assign_tensors(model.dit, dit_tensors, device, dtype)

    tokenizer_folder = base
    if base.name == "transformer":          # the released layout
        tokenizer_folder = base.parent / "tokenizer"
    model.tokenizer = load_tokenizer(tokenizer_folder)
    if config.apply_chat_template and not model.tokenizer.chat_template:
        raise FuseDiTError(f"{tokenizer_folder} has no chat template, so apply_chat_template "
                           "cannot be true: use an instruction-tuned Gemma")
    if config.clip:
        model.clip_encoder = ClipEncoder(config.clip, device, dtype)
    return model


def check_build(config):
    """Raise FuseDiTError for combinations of fields from which no model can be built."""
    if config.in_channels != 3 and not config.vae:
        raise FuseDiTError(f"config field in_channels is {config.in_channels}; without a vae a "
                           "model draws pixels, so it must be 3, or vae must be set")
    if config.text_modulation_embeds_dim and not config.clip:
        raise FuseDiTError("config field text_modulation_embeds_dim needs clip, the model that "
                           "computes this vector")
    if config.pos_embed == "ape" and (config.dit_hidden_size or 0) % 4:
        raise FuseDiTError(f"config field dit_hidden_size is {config.dit_hidden_size}; pos_embed "
                           "ape needs a multiple of 4, for sine and cosine of row and column")


def load_llm(model, base, trained_tensors, source, device, dtype):
    """Load the layers of the text tower that are read, from base or as trained by a run."""
    if trained_tensors:
        model.llm_is_trained = True
        model.llm.keep_layers(model.last_layer)     # a run stores only these layers
        check_tensors(model.llm, trained_tensors, source)
        assign_tensors(model.llm, trained_tensors, device, dtype)
        return
    tensors = gemma_tensors(base)
    check_tensors(model.llm, tensors, base)
    model.llm.keep_layers(model.last_layer)
    assign_tensors(model.llm, tensors, device, dtype)


def config_hint(config, dit_tensors):
    """For an error message: the fields in which config differs from that of the weights."""
    if not dit_tensors:
        return ""
    file, _ = next(iter(dit_tensors.values()))
    written = json.loads((file.metadata() or {}).get("config", "{}"))
    if not written:
        return ""
    ignored = {"base": None, "vae": None, "guidance": None}        # they do not affect the shapes
    here = asdict(config) | ignored
    written |= ignored
    different = [f"{name}: {here.get(name)!r}, {written.get(name)!r}"
                 for name in sorted(here | written) if here.get(name) != written.get(name)]
    if not different:
        return ""
    return "; fields that differ (now, when saved): " + "; ".join(different)


# ---- loading -------------------------------------------------------------------------------------

def load_config(folder):
    """FuseDiTConfig of a model folder, in our layout or the released one, with absolute paths."""
    if not (folder / "transformer").exists():
        config = FuseDiTConfig.from_dict(read_json(folder / "config.json"))
        changes = {"base": str(resolve(config.base, folder))}
        if config.vae:
            changes["vae"] = str(resolve(config.vae, folder, ("vae/*",)))
        return replace(config, **changes)

    d = read_json(folder / "transformer" / "config.json")
    shift = read_json(folder / "scheduler" / "scheduler_config.json").get("shift")
    if d.get("model_type") not in ("DiT", "FuseDiT") or not shift:
        raise FuseDiTError(f"{folder} is another kind of model: transformer/config.json needs "
                           "model_type DiT or FuseDiT, and scheduler/scheduler_config.json a shift")
    known = {f.name: d[f.name] for f in fields(FuseDiTConfig) if f.name in d}
    changes = {"base": str(folder / "transformer"), "shift": float(shift), "fusion": "deep",
               "vae": None, "clip": None}
    if d["model_type"] == "DiT":
        changes["fusion"] = "shallow"
    if (folder / "vae").exists():
        changes["vae"] = str(folder / "vae")
    if known.get("text_modulation_embeds_dim"):
        changes["clip"] = str(folder / "clip")
    return FuseDiTConfig.from_dict(known | changes)


def load_model(path, device="cpu", dtype=torch.float32, ema=True):
    """A trained model from a checkpoint, a run, a released-layout folder or a hub id.

    ema=False: a checkpoint's raw weights instead of their exponential moving average.
    """
    folder = resolve(last_checkpoint(resolve(path)))
    config = load_config(folder)
    released = (folder / "transformer").exists()
    train_state = folder / "train_state"
    if not ema and not train_state.exists():
        raise FuseDiTError(f"{folder} has EMA weights only: the raw ones are in the checkpoints of "
                           "a run")

    source = folder / "transformer" if released else folder
    if ema:
        tensors = open_tensors(source)
    else:
        tensors = {name.removeprefix("weight."): stored
                   for name, stored in open_tensors(train_state, "state").items()}
    dit = tensors_below("dit.", tensors)
    dit.pop("patch_embed.pos_embed", None)              # a constant of ape models: see sincos_2d
    llm = None if released else tensors_below("llm.", tensors)
    return build_model(config, device, dtype, dit, source, llm).eval()


def tensors_below(prefix, tensors):
    """The tensors whose names start with a prefix, which is removed."""
    return {name.removeprefix(prefix): stored for name, stored in tensors.items()
            if name.startswith(prefix)}


# ---- writing -------------------------------------------------------------------------------------

def save_model(folder, config, dit):
    """Write a model folder: config.json, and model.safetensors with the DiT's tensors (a dict)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(config), indent=2)
    with atomic_write(folder / "config.json") as tmp:
        tmp.write_text(text + "\n")
    tensors = {f"dit.{name}": t.contiguous() for name, t in dit.items()}
    with atomic_write(folder / "model.safetensors") as tmp:
        save_file(tensors, tmp, {"config": text})


def export(model, folder):
    """Write a complete model in the released layout (see above): both towers, tokenizer, VAE."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FuseDiTError(f"{folder} exists and is not empty: export to a new folder")
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name, content in released_configs(model).items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_text(json.dumps(content, indent=2) + "\n")
        save_file(released_tensors(model), tmp / "transformer" / "model.safetensors",
                  {"format": "pt"})
        model.tokenizer.save_pretrained(tmp / "tokenizer")
        if model.config.vae:
            shutil.copytree(resolve_vae(model.config.vae), tmp / "vae")
        if model.config.clip:
            clip = resolve(model.config.clip)
            if (clip / "clip").is_dir():
                clip = clip / "clip"
            shutil.copytree(clip, tmp / "clip")
        if folder.exists():
            folder.rmdir()
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"wrote {folder}")


def released_tensors(model):
    """{name: tensor} of both towers of a model, on the CPU."""
    base = Path(model.config.base)
    tensors = {f"dit.{name}": t.detach().cpu().contiguous()
               for name, t in model.dit.state_dict().items()}
    if model.config.pos_embed == "ape":     # published checkpoints contain this constant table
        tensors["dit.patch_embed.pos_embed"] = sincos_2d(64, 64, model.dit.width, "cpu")
    for name, (file, stored_name) in gemma_tensors(base).items():
        tensors[f"llm.{name}"] = file.get_tensor(stored_name)
    if model.llm_is_trained:                # the layers that are read; the others are base's
        for name, t in model.llm.state_dict().items():
            tensors[f"llm.{name}"] = t.cpu().contiguous()
    return tensors


def released_configs(model):
    """{file name: content} of the released layout's JSON files."""
    c = model.config
    kind = "FuseDiT" if c.fusion == "deep" else "DiT"
    vae = ["diffusers", "AutoencoderKL"] if c.vae else None
    index = {"_class_name": f"{kind}Pipeline",
             "transformer": ["diffusion.models", kind],
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "tokenizer": ["transformers", type(model.tokenizer).__name__],
             "vae": vae}

    settings = asdict(c) | {"base": None, "vae": None, "clip": None}       # in other folders
    transformer = {name: value for name, value in settings.items() if value is not None}
    transformer |= {
        "architectures": [kind], "model_type": kind,
        "base_config": text_config(read_json(Path(c.base) / "config.json")),
        "out_channels": c.in_channels, "dit_hidden_size": model.dit.width,
        "dit_num_hidden_layers": len(model.dit.layers), "pos_embed_max_size": 64,
        "sample_size": 32, "text_hidden_size": model.llm.config.hidden_size,
        "timestep_conditioning": c.timestep_conditioning}
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                 "shift": c.shift}
    return {"model_index.json": index, "transformer/config.json": transformer,
            "scheduler/scheduler_config.json": scheduler}

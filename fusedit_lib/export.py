"""Write a model in the released layout, that of the published utils/save_pipeline.py.

published.py lists the folders. The published classes draw the same images from what is written
here, unless needed_elsewhere names a reason. An export stands alone: it names no path of this
machine.
"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from fusedit import FuseDiTError, sincos_2d
from fusedit_lib.files import (
    fsync,
    index_path,
    read_json,
    safetensors_paths,
    save_file,
    stored_variant,
)
from fusedit_lib.folders import find_local, is_hub_id, repository, resolve_vae
from fusedit_lib.pretrained import clip_folders, gemma_tensors
from fusedit_lib.vae import vae_config

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                   "vocab.json", "merges.txt")

# Keys of JSON files in which transformers and diffusers may store a path on the machine that wrote
# the file.
PATH_KEYS = ("_name_or_path", "name_or_path", "vocab_file", "merges_file", "tokenizer_file")

GEMMA_CLASSES = {"gemma": "GemmaModel", "gemma2": "Gemma2Model", "gemma3_text": "Gemma3TextModel"}

# What diffusers 0.32 stores of a FlowMatchEulerDiscreteScheduler, besides shift.
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.32.0",
    "num_train_timesteps": 1000,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
    "use_dynamic_shifting": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "invert_sigmas": False, "shift_terminal": None}


def check_new(folder):
    """Raise FuseDiTError if a folder to export to exists and is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FuseDiTError(f"{folder} exists and is not empty: export to a new folder")


def export(model, folder, dtype=None):
    """Write a complete model to a new folder: both towers, tokenizer, VAE and CLIP.

    dtype: of both towers; None: the DiT's is that in which it was loaded, and Gemma's that in which
    it is stored. VAE and CLIP are copied as they are. Raises FuseDiTError if the folder exists and
    is not empty.
    """
    check_new(folder)
    folder = Path(folder)
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        write_towers(model, tmp, dtype)
        write_json(tmp / "scheduler" / "scheduler_config.json",
                   SCHEDULER | {"shift": model.config.shift})
        copy_files(model.gemma_files.tokenizer, TOKENIZER_FILES, tmp / "tokenizer")
        if model.config.vae:
            copy_weights(resolve_vae(model.config.vae), "diffusion_pytorch_model", tmp / "vae")
        if model.config.clip:
            clip = clip_folders(model.config.clip)
            copy_weights(clip.model, "model", tmp / "clip")
            copy_files(clip.tokenizer, TOKENIZER_FILES, tmp / "clip_tokenizer")
        write_json(tmp / "model_index.json", model_index(model, tmp / "tokenizer"))

        for path in [*tmp.rglob("*"), tmp]:
            fsync(path)
        if folder.exists():
            folder.rmdir()
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"wrote {folder}")
    missing = needed_elsewhere(model)
    if missing:
        print("fusedit draws with it. The published classes cannot: they need "
              f"{' and '.join(missing)}.")


def needed_elsewhere(model):
    """The things that the published classes need and this model lacks, as phrases for a message."""
    missing = []
    if model.llm.config.model_type == "gemma3_text":
        missing.append("a Gemma 1 or 2")
    if not (model.gemma_files.tokenizer / "tokenizer.model").exists():
        missing.append("Gemma's tokenizer.model")
    if is_deep(model) and None in model.dit.text_layers:
        missing.append("text in every DiT block")
    if model.config.text_states != "layer":
        missing.append("text_states layer")
    if not model.config.vae:
        missing.append("a VAE")
    elif vae_config(model.config.vae).latents_mean is not None:
        missing.append("a VAE without latents_mean")
    return missing


def is_deep(model):
    """True if the released layout keeps both towers of this model in one folder."""
    return model.config.fusion == "deep"


# ---- the towers ----------------------------------------------------------------------------------

def write_towers(model, folder, dtype):
    """Write transformer/ and, for shallow fusion, llm/. dtype: see export."""
    dit = dit_state(model)
    llm = llm_state(model)
    if dtype is not None:
        dit = {name: t.to(dtype) for name, t in dit.items()}
        llm = {name: t.to(dtype) for name, t in llm.items()}
    config = transformer_config(model)
    config["torch_dtype"] = str(dit["proj_out.weight"].dtype).removeprefix("torch.")
    write_json(folder / "transformer" / "config.json", config)
    if is_deep(model):
        both = {f"dit.{name}": t for name, t in dit.items()}
        both |= {f"llm.{name}": t for name, t in llm.items()}
        save_file(both, folder / "transformer" / "model.safetensors", {"format": "pt"})
        return
    save_file(dit, folder / "transformer" / "model.safetensors", {"format": "pt"})
    architecture = {"architectures": [GEMMA_CLASSES[model.llm.config.model_type]]}
    write_json(folder / "llm" / "config.json", llm_config(model) | architecture)
    save_file(llm, folder / "llm" / "model.safetensors", {"format": "pt"})


def dit_state(model):
    """{name: tensor} of the DiT, on the CPU, without a prefix."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.dit.state_dict().items()}
    if model.config.pos_embed == "ape":     # published models contain this constant table
        tensors["patch_embed.pos_embed"] = sincos_2d(64, 64, model.dit.width, "cpu")
    return tensors


def llm_state(model):
    """{name: tensor} of the first num_layers layers of the text tower, without a prefix."""
    tensors = {}
    for name, (file, stored_name) in gemma_tensors(model.gemma_files).items():
        parts = name.split(".")             # layers.3.mlp.up_proj.weight, or norm.weight
        if parts[0] != "layers" or int(parts[1]) < num_layers(model):
            tensors[name] = file.get_tensor(stored_name).contiguous()
    if model.llm_is_trained:                # the layers that are read; the others are base's
        for name, t in model.llm.state_dict().items():
            tensors[name] = t.cpu().contiguous()
    return tensors


def num_layers(model):
    """The number of Gemma's layers that the released layout contains.

    In deep fusion the layers after the last one that is read are left out (models.py:902-905). The
    published forward pass relies on this: it runs a DiT block for each of Gemma's layers from
    initial_layers on (models.py:782).
    """
    if is_deep(model):
        return model.last_layer + 1
    return model.gemma_files.config["num_hidden_layers"]


# ---- configs -------------------------------------------------------------------------------------

def llm_config(model):
    """The text tower's config.json.

    Fields that the published code reads, but that newer versions of transformers store elsewhere or
    not at all, are written out.
    """
    gemma = model.llm.config
    config = without_paths(model.gemma_files.config)
    config |= {"num_hidden_layers": num_layers(model), "head_dim": gemma.head_dim,
               "rms_norm_eps": gemma.rms_norm_eps, "rope_theta": gemma.rope_theta}
    base = model.config.base
    if is_hub_id(base) and find_local(base, (".", repository())) is None:
        config["_name_or_path"] = base
    return config


def transformer_config(model):
    """transformer/config.json: the published keys, and those of our config that have no such key.

    The values are those of the published code's configs.py. Null means "not used", or that the
    value is in another folder.
    """
    c = model.config
    kind = "FuseDiT" if is_deep(model) else "DiT"
    settings = asdict(c)
    for name in ("base", "vae", "clip", "fusion"):
        del settings[name]                  # given by other folders and by model_type
    return settings | {
        "architectures": [kind], "model_type": kind, "base_config": llm_config(model),
        "out_channels": c.in_channels, "dit_hidden_size": model.dit.width,
        "dit_num_hidden_layers": len(model.dit.layers), "pos_embed_max_size": 64,
        "sample_size": 32, "text_hidden_size": model.llm.config.hidden_size}


def model_index(model, tokenizer):
    """model_index.json, which names the class of each folder. tokenizer: the exported folder."""
    c = model.config
    kind = "FuseDiT" if is_deep(model) else "DiT"
    tokenizer_class = type(model.tokenizer).__name__
    if (tokenizer / "tokenizer.model").exists():
        tokenizer_class = "GemmaTokenizer"
    index = {"_class_name": f"{kind}Pipeline", "_diffusers_version": "0.32.0",
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "tokenizer": ["transformers", tokenizer_class],
             "transformer": ["diffusion.models", kind],
             "vae": [None, None]}
    if c.vae:
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if not is_deep(model):
        index["llm"] = ["transformers", GEMMA_CLASSES[model.llm.config.model_type]]
    if c.clip:
        index |= {"_class_name": f"{kind}PipelineWithCLIP",
                  "clip": ["transformers", "CLIPTextModelWithProjection"],
                  "clip_tokenizer": ["transformers", "CLIPTokenizer"]}
    return index


# ---- files ---------------------------------------------------------------------------------------

def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def without_paths(value):
    """A JSON value without the entries of PATH_KEYS that are not hub ids."""
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_paths(item) for key, item in value.items()
            if key not in PATH_KEYS or not item or is_hub_id(item)}


def copy_files(source, names, target):
    """Copy the files that exist in the folder `source`; paths are left out of JSON files."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (source / name).exists():
            continue
        if name.endswith("config.json"):
            write_json(target / name, without_paths(read_json(source / name)))
        else:
            shutil.copyfile(source / name, target / name)


def copy_weights(source, stem, target):
    """Copy a model's config.json and stem.safetensors, which may be split over several files."""
    copy_files(source, ["config.json"], target)
    paths = safetensors_paths(source, stem)
    index = index_path(source, stem, stored_variant(source, stem))
    if not index.exists():                  # a variant, too, gets the usual name
        shutil.copyfile(paths[0], target / f"{stem}.safetensors")
        return
    shutil.copyfile(index, target / f"{stem}.safetensors.index.json")
    for path in paths:
        shutil.copyfile(path, target / path.name)

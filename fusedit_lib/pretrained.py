"""Find, check and load model folders, and write our own. (export.py writes the released layout.)

A model is loaded from
    our own folder          config.json, model.safetensors with the DiT ("dit.*"), and a Gemma that
                            config.json names by path or hub id; every checkpoint is such a folder
    a run                   the checkpoint that its file `latest` names
    the released layout     a pipeline of the published code, with transformer/, vae/, tokenizer/,
                            ...: see published.py
    a published checkpoint  what the published code saves during training: see published.py
    a hub id                one of the first three on the Hugging Face hub
Loading is strict: a missing or unexpected tensor means that this is another model, and raises an
error that names it. Models are built on the meta device, and only the tensors needed are read.
"""
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from fusedit import FuseDiT, FuseDiTConfig, FuseDiTError, GemmaConfig
from fusedit_lib import published
from fusedit_lib.backend import first_line, warm_up_mkl
from fusedit_lib.files import (
    assign_tensors,
    atomic_write,
    check_tensors,
    open_tensors,
    read_json,
    save_file,
    stored_variant,
    tensors_below,
)
from fusedit_lib.folders import (
    TOKENIZER_FILES,
    find_local,
    is_hub_id,
    last_checkpoint,
    repository,
    resolve,
)
from fusedit_lib.lora import merge
from fusedit_lib.published import GemmaFiles, StoredModel, dit_tensors

# A CLIP text model with its tokenizer: in one folder, in two as in SD 3 and similar models, or in
# two as in the released layout.
CLIP_FOLDERS = (("text_encoder", "tokenizer"), ("clip", "clip_tokenizer"))
CLIP_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer*.json",
              "special_tokens_map.json", "text_encoder/config.json",
              "text_encoder/model.safetensors", "tokenizer/*", "clip/config.json",
              "clip/model.safetensors", "clip_tokenizer/*")

# The parts of a model that load_model can load separately. CLIP belongs to llm.
PARTS = ("tokenizer", "llm", "dit")

# ---- the text tower ------------------------------------------------------------------------------

def text_config(d):
    """The part of a config.json that describes the text model; for a plain Gemma, all of it."""
    return d.get("base_config") or d.get("text_config") or d


def gemma_config(d):
    """GemmaConfig from the config.json (a dict) of a Gemma, a PaliGemma or a released FuseDiT."""
    return GemmaConfig.from_dict(text_config(d))


def gemma_tensors(gemma):
    """The tensors of GemmaFiles, in the form of open_tensors.

    Its folder may have been saved by transformers or contain a FuseDiT; prefixes are removed.
    """
    if gemma.tensors is not None:
        return gemma.tensors
    tensors = open_tensors(gemma.folder)
    for prefix in ("llm.", "language_model.model.", "model.language_model.", "model.", ""):
        if prefix + "embed_tokens.weight" in tensors:
            break
    else:
        raise FuseDiTError(f"{gemma.folder} contains no Gemma: it has no embed_tokens.weight")
    # The file may also contain PaliGemma's vision tower, an untied head, or a released model's DiT.
    others = ("vision_tower", "multi_modal_projector", "model.vision_tower", "lm_head", "dit.",
              "model.multi_modal_projector", "language_model.lm_head")
    return {name.removeprefix(prefix): stored for name, stored in tensors.items()
            if not name.startswith(others)}


def open_gemma(base):
    """GemmaFiles of a Gemma's folder or hub id, or of the text tower in the released layout."""
    folder = resolve(base)
    config = text_config(read_json(folder / "config.json"))
    return GemmaFiles(folder, config, tokenizer_folder(folder))


def tokenizer_folder(folder):
    """The folder of a Gemma's tokenizer, which the released layout keeps apart."""
    beside = folder.parent / "tokenizer"
    if folder.name in ("transformer", "llm") and beside.is_dir():
        return beside
    return folder


def load_tokenizer(folder, vocab_size, tokenizer_class="AutoTokenizer"):
    """The transformers tokenizer in a folder; raises FuseDiTError.

    vocab_size: that of the model for which it is meant; see check_vocabulary.
    """
    import transformers
    try:
        tokenizer = getattr(transformers, tokenizer_class).from_pretrained(folder)
    except Exception as e:                  # of many types, if files are missing or incomplete
        raise FuseDiTError(f"{folder} has no tokenizer that can be loaded: is tokenizer.json or "
                           f"tokenizer.model missing or damaged? ({first_line(e)})") from e
    check_vocabulary(tokenizer, vocab_size, folder)
    return tokenizer


def check_vocabulary(tokenizer, vocab_size, folder):
    """Raise FuseDiTError if a tokenizer cannot be that of a model with vocab_size tokens.

    From a folder without a vocabulary, transformers silently builds a tokenizer of a few special
    tokens. Models may have some embeddings to spare, so that their number is a multiple
    of 64 (PaliGemma), and tokenizers a few special tokens that text never contains (Gemma 3).
    """
    spare = vocab_size - len(tokenizer)
    if -16 <= spare < min(1024, 0.75 * vocab_size):
        return
    raise FuseDiTError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, but its model has "
                       f"{vocab_size}: is it another model's, or are its files (tokenizer.json, "
                       "tokenizer.model, vocab.json, ...) missing?")


# ---- CLIP ----------------------------------------------------------------------------------------

class ClipFolders(NamedTuple):
    model: Path
    tokenizer: Path


def clip_folders(name):
    """ClipFolders of a CLIP text model: a path or hub id; see CLIP_FOLDERS."""
    root = resolve(name, patterns=CLIP_FILES)
    for model, tokenizer in CLIP_FOLDERS:
        if (root / model).is_dir():
            folders = ClipFolders(root / model, root / tokenizer)
            if not folders.tokenizer.is_dir():                  # older exports of fusedit
                folders = ClipFolders(root / model, root / model)
            return folders
    return ClipFolders(root, root)


class ClipTokenizer:
    """prompts -> [B,77]: the token ids of a CLIP text model."""

    def __init__(self, name):
        folders = clip_folders(name)
        config = text_config(read_json(folders.model / "config.json"))
        vocab_size = config.get("vocab_size", 49408)           # the default of transformers
        self.tokenizer = load_tokenizer(folders.tokenizer, vocab_size, "CLIPTokenizer")

    def __call__(self, prompts):
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77,
                              return_tensors="pt")["input_ids"]


class ClipEncoder:
    """prompts or token ids [B,77] -> pooled, projected vectors [B,C] of a CLIP text model."""

    def __init__(self, name, width, device, dtype):
        """width: C, which text_modulation_embeds_dim gives. Raises FuseDiTError."""
        from transformers import CLIPTextModelWithProjection
        self.tokenize = ClipTokenizer(name)
        folder = clip_folders(name).model
        try:
            model, loaded = CLIPTextModelWithProjection.from_pretrained(
                folder, variant=stored_variant(folder)[1:] or None, dtype=dtype,
                output_loading_info=True)
        except (OSError, SafetensorError) as e:
            raise FuseDiTError(f"cannot load the CLIP text model in {folder}: "
                               f"{first_line(e)}") from e
        if loaded["missing_keys"]:          # transformers would leave them at random values
            raise FuseDiTError(f"the CLIP text model in {folder} lacks "
                               f"{', '.join(sorted(loaded['missing_keys'])[:3])}: a text encoder "
                               "with projection is needed, such as that of Stable Diffusion 3")
        if model.config.projection_dim != width:
            raise FuseDiTError(f"config field text_modulation_embeds_dim is {width}, but the CLIP "
                               f"text model in {folder} has vectors of length "
                               f"{model.config.projection_dim}")
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts_or_ids):
        ids = prompts_or_ids
        if not isinstance(ids, torch.Tensor):
            ids = self.tokenize(ids)
        return self.model(ids.to(self.model.device)).text_embeds


# ---- building a model ----------------------------------------------------------------------------

def build_model(config, device="cpu", dtype=torch.float32, dit_tensors=None, source=None,
                llm_tensors=None, gemma=None, parts=PARTS, llm_dtype=None):
    """A FuseDiT with the Gemma of config.base and a DiT, either stored or newly initialised.

    dit_tensors: open_tensors of a DiT in the folder source, loaded in dtype, as Gemma is; None: new
    weights in float32. llm_tensors: the weights of a Gemma that was trained as well, which
    replace base's; they include at least the layers that are read. gemma: GemmaFiles to use
    instead of config.base. parts: see load_model. llm_dtype: Gemma's, if it is not dtype. Raises
    FuseDiTError.
    """
    check_build(config)
    warm_up_mkl()
    if gemma is None:
        gemma = open_gemma(config.base)
    with torch.device("meta"):
        model = FuseDiT(config, GemmaConfig.from_dict(gemma.config))
    model.gemma_files = gemma
    llm_device = device if "llm" in parts else "meta"
    dit_device = device if "dit" in parts else "meta"
    load_llm(model, gemma, llm_tensors, source, llm_device, llm_dtype or dtype)

    if dit_tensors is None:
        model.dit.to_empty(device=dit_device).init_weights()
    else:
        check_tensors(model.dit, dit_tensors, source, config_hint(config, dit_tensors))
        assign_tensors(model.dit, dit_tensors, dit_device, dtype)

    if "tokenizer" in parts:
        attach_tokenizer(model, gemma, config)
    if "llm" in parts:
        attach_clip(model, config, device, dtype)
    return model


def attach_clip(model, config, device, dtype):
    """Load the CLIP text model, if the config names one. Raises FuseDiTError."""
    if config.clip:
        model.clip_encoder = ClipEncoder(config.clip, config.text_modulation_embeds_dim, device,
                                         dtype)


def attach_tokenizer(model, gemma, config):
    """Load the tokenizer of the text tower. gemma: GemmaFiles. Raises FuseDiTError."""
    model.tokenizer = load_tokenizer(gemma.tokenizer, model.llm.config.vocab_size)
    if model.tokenizer.bos_token_id is None:
        raise FuseDiTError(f"the tokenizer in {gemma.tokenizer} has no <bos> token, so it is not "
                           "that of a Gemma")
    if config.apply_chat_template and not model.tokenizer.chat_template:
        raise FuseDiTError(f"{gemma.tokenizer} has no chat template, so apply_chat_template "
                           "cannot be true: use an instruction-tuned Gemma")


def check_build(config):
    """Raise FuseDiTError for combinations of fields from which no model can be built."""
    if config.in_channels != 3 and not config.vae:
        raise FuseDiTError(f"config field in_channels is {config.in_channels}; without a vae a "
                           "model draws pixels, so it must be 3, or vae must be set, as by --set "
                           "vae=FOLDER")
    if config.text_modulation_embeds_dim and not config.clip:
        raise FuseDiTError("config field text_modulation_embeds_dim needs clip, the model that "
                           "computes this vector")
    if config.pos_embed == "ape" and (config.dit_hidden_size or 0) % 4:
        raise FuseDiTError(f"config field dit_hidden_size is {config.dit_hidden_size}; pos_embed "
                           "ape needs a multiple of 4, for sine and cosine of row and column")


def load_llm(model, gemma, trained_tensors, source, device, dtype):
    """Load the layers of the text tower that are read, from GemmaFiles or as trained by a run."""
    if trained_tensors:
        model.llm_is_trained = True
        model.llm.keep_layers(model.last_layer)     # a run stores only these layers
        check_tensors(model.llm, trained_tensors, source)
        assign_tensors(model.llm, trained_tensors, device, dtype)
        return
    tensors = gemma_tensors(gemma)
    check_tensors(model.llm, tensors, gemma.folder)
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
    written = asdict(FuseDiTConfig()) | written     # older files lack newer fields
    ignored = {"base": None, "vae": None, "guidance": None}        # they do not affect the shapes
    here = asdict(config) | ignored
    written |= ignored
    different = [f"{name}: {here.get(name)!r}, {written.get(name)!r}"
                 for name in sorted(here | written) if here.get(name) != written.get(name)]
    if not different:
        return ""
    return "; fields that differ (now, when saved): " + "; ".join(different)


# ---- loading -------------------------------------------------------------------------------------

def load_model(path, device="cpu", dtype=torch.float32, ema=True, parts=PARTS, lora=(),
               **changes):
    """A trained model from any of the folders listed at the top, or a hub id.

    dtype: of the weights; None: as they are stored. ema=False: a checkpoint's raw weights instead
    of their exponential moving average. parts: those of PARTS to load; the tensors of the others
    are checked but stay on the meta device, where they take no memory. lora: folders of adapters
    of peft, which are merged. changes: config fields that replace stored ones, such as base, if the
    Gemma has moved. Raises FuseDiTError.
    """
    folder = model_folder(path)
    config = open_config(folder, changes)
    stored = open_weights(folder, ema)
    gemma = stored.gemma
    if gemma is not None:                   # config.base has its tokenizer
        tokenizer = tokenizer_folder(resolve(config.base, patterns=TOKENIZER_FILES))
        gemma = gemma._replace(tokenizer=tokenizer)
    model = build_model(config, device, dtype, stored.dit, stored.folder, stored.trained_llm, gemma,
                        parts)
    for adapter in dict.fromkeys((*stored.adapters, *lora)):           # each of them once
        merge(model.dit, adapter)
    return model.eval()


def model_folder(path):
    """The folder that has the config and the weights of any of the models listed at the top."""
    return resolve(last_checkpoint(resolve(path)))


def open_config(folder, changes=None):
    """FuseDiTConfig of a model_folder, with absolute paths. changes: {field: value}."""
    return with_absolute_paths(stored_config(folder), folder, changes or {})


def is_model(folder):
    """True for a model folder of any layout, and for a run."""
    if published.is_pipeline(folder) or published.has_weights(folder):
        return True
    try:
        d = read_json(folder / "config.json")
    except FuseDiTError:
        return False
    return "fusion" in d or (folder / "latest").exists()   # one of FuseDiTConfig's fields


def check_whole(path):
    """Raise FuseDiTError if a path is a part of a model or a run: a file or a subfolder of it."""
    if path.is_dir() and is_model(path):
        return
    for folder in path.parents[:2]:
        if is_model(folder) and path != last_checkpoint(folder):
            kind = "a file" if path.is_file() else "a part"
            raise FuseDiTError(f"{path} is only {kind} of a model: give the folder of the whole "
                               f"model, {folder}")
    if path.is_file():
        raise FuseDiTError(f"{path} is a file: give its folder")


def stored_config(folder):
    """FuseDiTConfig of a model folder of any layout, as it is stored."""
    check_whole(folder)
    if published.is_pipeline(folder):
        return published.pipeline_config(folder)
    if published.is_checkpoint(folder):
        return published.checkpoint_config(folder)
    d = read_json(folder / "config.json")
    if "model_type" in d or "_class_name" in d:             # written by transformers or diffusers
        raise FuseDiTError(f"{folder} is part of a model, or a checkpoint without its weights: "
                           "give the folder of the whole model")
    return FuseDiTConfig.from_dict(d)


def open_weights(folder, ema):
    """StoredModel of a model folder of any layout; ema=False: its raw weights."""
    if published.is_checkpoint(folder) and not published.is_pipeline(folder):
        return published.open_checkpoint(folder, ema)
    train_state = folder / "train_state"
    adapter = folder / "lora"
    if not ema and (adapter.is_dir() or not train_state.exists()):
        raise FuseDiTError(f"{folder} has one set of weights, and no raw ones, which only the "
                           "checkpoints of a run without --lora have: leave out --no-ema or "
                           "--init-raw")
    if published.is_pipeline(folder):
        return published.open_pipeline(folder)
    if adapter.is_dir():                    # all that was trained; the other weights are its base's
        base = open_weights(model_folder(base_model(adapter)), ema=True)
        return base._replace(adapters=(*base.adapters, adapter))
    tensors = open_tensors(folder)
    if not ema:
        tensors = tensors_below("weight.", open_tensors(train_state, "state"))
    return StoredModel(folder, dit_tensors(tensors), tensors_below("llm.", tensors))


def base_model(adapter):
    """The name of the model that an adapter is for. adapter: a folder in the format of peft."""
    name = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not name or (find_local(name, (".", repository())) is None and not is_hub_id(name)):
        raise FuseDiTError(f"the adapter in {adapter} is for {name}, which does not exist: name "
                           f"its new place with sample.py --model MODEL --lora {adapter}")
    return name


def with_absolute_paths(config, folder, changes):
    """The config of a model folder, with changes, and absolute paths of its Gemma, VAE and CLIP.

    Hub ids remain. Raises FuseDiTError if a folder is missing.
    """
    config = FuseDiTConfig.from_dict(asdict(config) | changes)
    if not config.base:
        raise FuseDiTError(f"{folder} does not name its Gemma: name it with --set base=NAME, "
                           "for example base=google/paligemma-3b-pt-448")
    paths = {}
    for field in ("base", "vae", "clip"):
        name = getattr(config, field)
        if not name:
            continue
        roots = (folder, repository(), ".")         # stored: a run of the demo has "demo/gemma"
        problem = (f"{folder} needs {name}, its {field}, which does not exist. If it has been "
                   f"moved or renamed, use --set {field}=FOLDER (sample.py --export DIR then "
                   "writes a complete folder)")
        if field in changes:
            roots = (".", repository())
            problem = f"{field}={name}: there is no such folder"
        path = find_local(name, roots)
        if path is None and not is_hub_id(name):
            raise FuseDiTError(problem)
        paths[field] = str(path or name)
    return replace(config, **paths)


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

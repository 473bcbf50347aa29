"""Find the folder of a model from a path, the folder of a run, or a hub id."""
import hashlib
from pathlib import Path

import fusedit
from fusedit import FuseDiTError
from fusedit_lib import gemma_package, published
from fusedit_lib.files import safetensors_paths

# Files to download from the hub, as glob patterns.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*merges.txt")
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja")
VAE_FILES = ("vae/*", "config.json", "diffusion_pytorch_model*.safetensors*")


def resolve(name, patterns=MODEL_FILES):
    """The folder of a model, from a path or a hub id; raises FuseDiTError.

    A relative path is looked up in the working directory and next to fusedit.py. patterns: the
    files to download from the hub.
    """
    path = find_local(name, (".", repository()))
    if path is not None:
        return path
    if not is_hub_id(name):
        raise FuseDiTError(f"no such model folder: {name}. Check the path, or give a hub id, "
                           "OWNER/NAME. If a run needs it, put it back, or a link to it")
    if str(name) == gemma_package.NAME:
        path = gemma_without_network()
        if path is not None:
            return path
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as e:                  # any of a dozen network, login and name errors
        if str(name) == gemma_package.NAME:
            raise FuseDiTError(f"{name} cannot be downloaded from the hub ({type(e).__name__}). "
                               f"Get a copy with {gemma_package.HOW}, or accept the licence on "
                               "the hub and run `hf auth login`") from e
        raise FuseDiTError(f"{name} is not a local folder and cannot be downloaded from the hub ("
                           f"{type(e).__name__}). Check the name and the network; for Gemma and "
                           "Stable Diffusion 3, also accept the licence on the hub and run `hf "
                           "auth login`; or use a local folder") from e


def gemma_without_network():
    """The folder of gemma_package.NAME, from the hub's cache or else the package; or None.

    Google's release comes first, because the package's weights are rounded. The package comes
    before a download, because it needs neither the network nor an account.
    """
    from huggingface_hub import try_to_load_from_cache
    paths = []
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        path = try_to_load_from_cache(gemma_package.NAME, file)
        if not isinstance(path, str):       # absent, or known to be absent
            return gemma_package.folder()
        paths.append(Path(path))
    return paths[0].parent


def gemma_source(base):
    """The source of gemma_package.NAME, which may be two: "package" or "release".

    "" for any other base of a config, and if a local folder has this name.
    """
    if str(base) != gemma_package.NAME or find_local(base, (".", repository())):
        return ""
    if resolve(base) == gemma_package.cache_folder():
        return "package"
    return "release"


def repository():
    """The folder of fusedit.py, which also has demo/."""
    return Path(fusedit.__file__).parent


def find_local(name, roots):
    """The absolute path of a folder that may be in any of roots; None if it does not exist."""
    for root in roots:
        if (Path(root) / name).exists():
            return (Path(root) / name).resolve()
    return None


def is_hub_id(name):
    """True if a name has the form OWNER/NAME of a hub id; it may also be a relative path."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def resolve_vae(name):
    """The folder with a VAE's config.json and weights: `name` itself, or its subfolder vae/."""
    folder = resolve(name, patterns=VAE_FILES)
    if folder.is_file():
        raise FuseDiTError(f"the VAE {name} is a file: give its folder, which also has config.json")
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
    """The last checkpoint of a run's folder; any other path or hub id is returned unchanged.

    The run may also be one of the published code.
    """
    latest = Path(path) / "latest"
    if latest.exists():
        folder = Path(path) / latest.read_text().strip()
        if not folder.exists():
            raise FuseDiTError(f"{latest} names {folder.name}, which does not exist: give one of "
                               f"the other checkpoints in {path}")
        return folder
    if not (Path(path) / "config.json").exists():
        path = published.last_checkpoint(path) or path
    if (Path(path) / "metrics.jsonl").exists():
        raise FuseDiTError(f"{path} is a training run that has no checkpoint yet: the first is "
                           "saved after --save-every steps")
    return path

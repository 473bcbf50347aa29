"""LoRA: small matrices that are trained in place of a model's weights (arXiv 2106.09685).

Every linear layer of the DiT's blocks computes W x + B A x. W is frozen, and only A [rank, in] and
B [out, rank] are trained. B starts at 0, so the model starts unchanged. All A and B together are an
adapter. It is stored in the format of peft, which also adds it to a DiT for training. Loading a
model with an adapter needs no peft, because the adapter is merged: W + B A replaces W.
"""
import torch

from fusedit import FuseDiTError
from fusedit_lib.files import fsync, open_tensors, read_json, save_file, tensors_below

TARGETS = r"layers\..*proj"                 # the linear layers of attention and MLP in each block

PREFIX = "base_model.model."                # of the names in peft's files
NOTHING = torch.empty(0, 0)

# Settings in adapter_config.json: those with a fixed value, those that do not affect merging. All
# others must be off.
PLAIN = {"peft_type": "LORA", "init_lora_weights": True}
IGNORED = ("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
           "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
           "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type")


# ------------------------------------------------------------------------------ training

def adapter_config(rank, base=None):
    """peft's config of an adapter. base: name of the model that it is for."""
    from peft import LoraConfig
    # peft multiplies B A by lora_alpha / rank, here 1.
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS,
                      base_model_name_or_path=base)


def add_adapters(dit, rank):
    """Freezes a DiT, which may be on the meta device, and adds adapters in float32."""
    from peft import inject_adapter_in_model
    inject_adapter_in_model(adapter_config(rank), dit)
    for p in dit.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def write_adapter(checkpoint, rank, base):
    """Writes lora/ in the folder of a checkpoint, from the EMA in its model.safetensors."""
    tensors = {}
    for name, (file, stored_name) in tensors_below("dit.", open_tensors(checkpoint)).items():
        name = name.replace(".default.", ".")              # peft's name of a DiT's only adapter
        tensors[f"{PREFIX}{name}"] = file.get_tensor(stored_name)
    folder = checkpoint / "lora"
    adapter_config(rank, base).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    for path in (*folder.iterdir(), folder):
        fsync(path)


# ------------------------------------------------------------------------------ merging

class MergedWeight:
    """The weight W + B A, with the methods of an open safetensors file that contains W."""

    def __init__(self, file, A, B):
        self.file = file
        self.A = A
        self.B = B
        self.metadata = file.metadata
        self.get_slice = file.get_slice

    def get_tensor(self, name):
        W = self.file.get_tensor(name)
        return (W + self.B.float() @ self.A.float()).to(W.dtype)


def merge(dit, adapter, folder):
    """The tensors of a DiT, into which those of an adapter are merged when they are read.

    dit, adapter: in the form of files.open_tensors. folder: has adapter_config.json. Raises
    FuseDiTError if the adapter is not a plain LoRA or does not fit the DiT.
    """
    config = read_json(folder / "adapter_config.json")
    special = [name for name, value in config.items()
               if name not in IGNORED and value and value != PLAIN.get(name, "none")]
    if special:
        raise FuseDiTError(f"{folder} is not a plain LoRA adapter (see {', '.join(special)} in its "
                           "adapter_config.json): merge it with peft's merge_and_unload")

    matrices = {}
    for name, (file, stored_name) in adapter.items():
        name = name.removeprefix(PREFIX).replace(".default.", ".")
        matrices[name] = file.get_tensor(stored_name)

    merged = dict(dit)
    misfits = set(matrices)
    scale = config["lora_alpha"] / config["r"]
    for name, (file, stored_name) in dit.items():
        layer = name.removesuffix(".weight")
        A = matrices.get(f"{layer}.lora_A.weight", NOTHING)
        B = matrices.get(f"{layer}.lora_B.weight", NOTHING)
        if list(file.get_slice(stored_name).get_shape()) == [len(B), A.shape[1]]:
            merged[name] = MergedWeight(file, A, scale * B), stored_name
            misfits -= {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    if misfits:
        name = min(misfits)
        raise FuseDiTError(f"the adapter in {folder} is not for this model: {name} has the shape "
                           f"{tuple(matrices[name].shape)}, which fits no weight of the DiT (as "
                           f"{len(misfits) - 1} others); its own is "
                           f"{config.get('base_model_name_or_path')}")
    return merged

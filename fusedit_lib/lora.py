"""LoRA: small matrices that are trained in place of a model's weights (arXiv 2106.09685).

Every linear layer of attention and MLP in the DiT's blocks computes W x + B A x. W is frozen, and
only A [rank, in] and B [out, rank] are trained. B starts at 0, so the model starts unchanged.
Together, all A and B form an adapter. It is stored in the format of peft, which also adds it to a
DiT for training. Loading a model with an adapter needs no peft, because the adapter is merged:
W + B A replaces W.
"""
import torch

from fusedit import FuseDiTError
from fusedit_lib.files import open_tensors, read_json, read_tensor, save_file, tensors_below

TARGETS = r"layers\..*proj"                 # the linear layers of attention and MLP in each block
PREFIX = "base_model.model."                # of the names in peft's files


def adapter_config(rank, base=None):
    """peft's config of an adapter. base: the name of the model that it is for."""
    from peft import LoraConfig
    # peft multiplies B A by lora_alpha / rank, here 1.
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, base_model_name_or_path=base)


def add_adapters(dit, rank):
    """Freezes a DiT, which may be on the meta device, and adds adapters in float32."""
    from peft import get_peft_model
    get_peft_model(dit, adapter_config(rank))              # changes dit; the wrapper is not needed
    # ZeRO 3 frees the weights of a block too early if no input of the block has a gradient.
    dit.patch_embed["proj"].register_forward_hook(lambda module, args, x: x.requires_grad_())


def write_adapter(checkpoint, rank, base):
    """Writes lora/ in the folder of a checkpoint, from the EMA in its model.safetensors."""
    trained = tensors_below("dit.", open_tensors(checkpoint))
    # "default" is peft's name of a model's only adapter.
    tensors = {PREFIX + name.replace(".default.", "."): read_tensor(trained, name)
               for name in trained}
    adapter_config(rank, base).save_pretrained(checkpoint / "lora")
    save_file(tensors, checkpoint / "lora" / "adapter_model.safetensors", {"format": "pt"})


def merge(dit, folder):
    """Adds an adapter in a folder of peft to the weights of a DiT: W + B A replaces W.

    The sum is computed in float32. On the meta device, the files are only checked. Raises
    FuseDiTError if the adapter is not a plain LoRA, is incomplete or does not fit this DiT.
    """
    config = read_json(folder / "adapter_config.json")
    plain = config.get("init_lora_weights", True) in (True, False, "gaussian")
    if not plain or config.get("use_rslora") or config.get("alpha_pattern"):
        raise FuseDiTError(f"the adapter in {folder} has init_lora_weights, use_rslora or "
                           "alpha_pattern, so only peft can merge it: use its merge_and_unload")
    adapter = open_tensors(folder, "adapter_model")
    for name, W in dit.named_parameters():
        A_name = PREFIX + name.replace("weight", "lora_A.weight")
        B_name = PREFIX + name.replace("weight", "lora_B.weight")
        if A_name in adapter and B_name in adapter:
            A = read_tensor(adapter, A_name).to(W.device, torch.float32)
            B = read_tensor(adapter, B_name).to(A)
            if W.shape == (len(B), A.shape[-1]):
                W.data.copy_(W.data + config["lora_alpha"] / len(A) * B @ A)
                del adapter[A_name], adapter[B_name]
    if adapter:                             # what has not been merged
        raise FuseDiTError(f"the adapter in {folder} is for another model, incomplete or no plain "
                           f"LoRA: this model has no place for its {next(iter(adapter))}")

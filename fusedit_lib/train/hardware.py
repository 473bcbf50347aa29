"""The specifications of GPUs and TPUs, and the devices of --plan."""
import re
from typing import NamedTuple

import torch

from fusedit import FuseDiTError


RESERVE = 0.06                              # share of a device's memory that plans leave free


class Hardware(NamedTuple):
    """The specification of a device, from its data sheet."""
    flops: float                            # dense bf16 FLOP/s
    memory: float                           # bytes

    @property
    def usable(self):
        """The bytes that a plan may fill. The rest is for cuDNN and what the allocator wastes."""
        return (1 - RESERVE) * self.memory


GPUS = {
    "B200": Hardware(2250e12, 180e9),
    "H200": Hardware(989e12, 141e9),
    "H100 PCIe": Hardware(756e12, 80e9),
    "H100 NVL": Hardware(835e12, 94e9),
    "H100": Hardware(989e12, 80e9),
    "A100": Hardware(312e12, 80e9),
    "L40S": Hardware(362e12, 48e9),
    "L4": Hardware(121e12, 24e9),
    "A10": Hardware(125e12, 24e9),
    "5090": Hardware(209e12, 32e9),
    "5080": Hardware(112e12, 16e9),
    "4090": Hardware(165e12, 24e9),
    "4080": Hardware(97e12, 16e9),
    "3090": Hardware(71e12, 24e9),
}
TPUS = {
    "v4": Hardware(275e12, 32e9),
    "v5e": Hardware(197e12, 16e9),
    "v5p": Hardware(459e12, 95e9),
    "v6e": Hardware(918e12, 32e9),
}
NAMED_BY_CORES = ("v4", "v5p")              # slice names count cores, two per chip


def tpu_peak_flops(kind, chips):
    """Total FLOP/s of TPU chips, or None if theirs are not known.

    kind: the beginning of a slice's name, such as "v4" or "v5litepod", or None.
    """
    hardware = TPUS.get(plain_name(kind or ""))
    if hardware is None:
        return None
    return chips * hardware.flops


def peak_flops(device, world):
    """Total FLOP/s of `world` GPUs of this kind, or None if its FLOP/s are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for kind, hardware in GPUS.items():
        if re.search(rf"\b{kind}\b", name):
            return world * hardware.flops
    return None


def plain_name(text):
    """The name of a TPU slice or of its kind, with "v5e" for Google's "v5litepod"."""
    return text.replace("v5litepod", "v5e")


class Devices(NamedTuple):
    """The devices of a plan."""
    count: int                              # of GPUs or TPU chips
    kind: str                               # a name in GPUS or TPUS
    utilization: float                      # assumed fraction of the peak FLOP/s

    @property
    def hardware(self):
        return (GPUS | TPUS)[self.kind]


def find_kind(name, known):
    """The name in `known` that matches, ignoring case, or None."""
    for kind in known:
        if kind.upper() == name.upper():
            return kind
    return None


def parse(text):
    """Parses "64xH100@0.4" or "v4-256" (128 chips) into Devices. Raises FuseDiTError."""
    text, _, share = text.strip().partition("@")
    utilization = 0.0                       # refused below
    if not share:
        utilization = 0.4
    elif re.fullmatch(r"[01]?(\.\d+)?", share):
        utilization = float(share)

    count = 0
    kind = None
    gpus = re.fullmatch(r"(\d+) *[xX*] *([\w ]+)", text)
    tpus = re.fullmatch(r"([vV]\w+)-(\d+)", plain_name(text))
    if gpus:
        count = int(gpus[1])
        kind = find_kind(gpus[2], GPUS)
    elif tpus:
        count = int(tpus[2])
        kind = find_kind(tpus[1], TPUS)
    if kind in NAMED_BY_CORES:
        count //= 2
    if kind is None or count < 1 or not 0 < utilization <= 1:
        raise FuseDiTError(f"--plan {text}: give a number and a kind of GPU, such as 8xH100 or "
                           "8xH100@0.4, or a TPU slice, such as v4-256; known: "
                           + ", ".join([*GPUS, *TPUS]))
    return Devices(count, kind, utilization)

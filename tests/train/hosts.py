"""Makes a process of train_tpu.py one of two hosts of a TPU slice, on a CPU.

PyTorch/XLA does not connect the virtual devices of several processes. So each process here has all
8 devices of the slice, and computes what the two hosts compute together. Everything else is that of
one host: its process index, its 4 devices, the shards that it reads and writes, and its part of
each batch. What only the other host's devices would hold, the process gets from the other process.
"""
import os
import pickle
import threading
from dataclasses import replace
from datetime import timedelta
from subprocess import CompletedProcess

import launching
import torch
import torch.distributed as dist
import warm
from launching import command, free_port

# The devices of each host, as torch_xla numbers them. A v5e host has 2 x 2 chips, so in a slice of
# 4 x 2 chips the numbers of its chips are not contiguous, and neither are they in one of 16 x 16
# chips, where the first host has 0, 1, 16 and 17.
DEVICES = ((0, 1, 4, 5), (2, 3, 6, 7))


# ------------------------------------------------------------------------------ the tests' side

def virtual_devices(count):
    """An environment in which a CPU has several devices, and compiles without optimisations."""
    return launching.ENV | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(count),
                            "XLA_FLAGS": "--xla_backend_optimization_level=0",
                            "TF_CPP_MIN_LOG_LEVEL": "2"}


def run_hosts(argv, before=("", ""), check=True):
    """Runs train_tpu.py on two hosts. Returns a CompletedProcess for each.

    argv: flags, for both hosts or a list for each. before: code that each host runs before main().
    """
    env = virtual_devices(8) | {"MASTER_PORT": free_port(), "EXCHANGE_PORT": free_port()}
    if isinstance(argv[0], str):
        argv = [argv, argv]
    processes = []
    for host, code in enumerate(before):
        code = f"import hosts; hosts.emulate({host})\n{code}"
        processes.append(warm.start(command(argv[host], code, "tpu"), env, live=False))
    ends = []
    for process in processes:
        stdout, stderr = process.communicate()
        ends.append(CompletedProcess(process.args, process.returncode, stdout, stderr))
    if check:
        assert [end.returncode for end in ends] == [0, 0], [end.stderr[-3000:] for end in ends]
    return ends


# ------------------------------------------------------------------------------ the host's side

class Exchange:
    """Exchanges objects with the other host. Every thread has its own connection: get() blocks."""

    def __init__(self, host):
        self.host = host
        self.port = int(os.environ["EXCHANGE_PORT"])
        self.server = self.connect(host == 0)
        self.own = threading.local()

    def connect(self, is_server=False):
        return dist.TCPStore("127.0.0.1", self.port, is_master=is_server, wait_for_workers=False,
                             timeout=timedelta(minutes=30))

    def __call__(self, value):
        """[the value of host 0, the value of host 1].

        Each thread must make the same calls on both hosts; so must the threads' first calls.
        """
        if not hasattr(self.own, "store"):
            self.own.store = self.connect()
            self.own.thread = self.server.add(f"threads of {self.host}", 1)
            self.own.calls = 0
        self.own.calls += 1
        call = f"{self.own.thread} {self.own.calls}"
        self.own.store.set(f"{call} {self.host}", pickle.dumps(value))
        return [pickle.loads(self.own.store.get(f"{call} {host}")) for host in range(2)]


def emulate(host):
    """Makes this process host 0 or host 1."""
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    exchange = Exchange(host)
    own = DEVICES[host]
    xr.process_index = lambda: host
    xr.process_count = lambda: 2
    xr.addressable_runtime_device_count = lambda: len(own)

    # A host has and gives the shards on its own devices.
    names = [[f"CPU:{number}" for number in numbers] for numbers in DEVICES]
    local_shards = xs.XLAShardedTensor.local_shards
    load_local_shards = xs.XLAShardedTensor.load_local_shards_

    def own_shards(tensor):
        return [shard for shard in local_shards.fget(tensor) if shard.shard_device in names[host]]

    def load_shards(tensor, shards):
        assert [shard.shard_device for shard in shards] == names[host]
        both = sum(exchange(shards), [])
        load_local_shards(tensor, sorted(both, key=lambda shard: shard.shard_device))

    # A host gives the i-th part of its part of a batch to its i-th device, whatever the number of
    # that device: ShardingUtil::GetShardIndicesForMinibatchTensor in torch_xla.
    send = xm.send_cpu_data_to_device

    def send_part(part, device, sharding):
        assert sharding.minibatch and len(part) % len(own) == 0
        on_devices = {}
        for numbers, values in zip(DEVICES, exchange(part), strict=True):
            on_devices |= dict(zip(numbers, values.chunk(len(numbers)), strict=True))
        whole = torch.cat([on_devices[number] for number in sorted(on_devices)])
        return send(whole, device, replace(sharding, minibatch=False))

    torch_xla._XLAC._xla_get_runtime_devices = lambda: names[host]
    xs.XLAShardedTensor.local_shards = property(own_shards)
    xs.XLAShardedTensor.load_local_shards_ = load_shards
    xm.send_cpu_data_to_device = send_part

"""Compares ZeRO stages, on one and several processes, with plain torch and each other."""
import math
import re

import pytest
import torch
from conftest import tiny_gemma
from launching import assert_equal, flags, launch, launch_all, losses, state

import fusedit
from fusedit_lib import pretrained
from fusedit_lib.export import export
from fusedit_lib.data.batches import Batches
from fusedit_lib.train import zero
from fusedit_lib.train.config import model_config
from fusedit_lib.train.flags import parse_run

# ------------------------------------------------------------------------------ EMA, sharded

SIZES = {f"layer_{i}": n for i, n in enumerate([100, 90, 60, 40, 40, 30, 20, 10, 5, 5])}


def model_of(names):
    """A module with a weight for each name, of SIZES[name] elements with the value SIZES[name]."""
    model = torch.nn.Module()
    for name in names:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.full((SIZES[name],), float(SIZES[name])))
        model.add_module(name, layer)
    return model


def owners(names, world):
    """{parameter name: rank}. Checks that each rank has exactly the EMA tensors that it owns."""
    model = model_of(names)
    shards = [zero.shard_ema(model, None, rank, world) for rank in range(world)]
    owner, _ = shards[0]
    for rank, (owner_here, ema) in enumerate(shards):
        assert owner_here == owner
        assert ema.keys() == {name for name in owner if owner[name] == rank}
        for tensor in ema.values():
            assert (tensor == len(tensor)).all()
    return owner


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_of_the_ema_are_even_and_the_same_on_all_ranks(world):
    owner = owners(SIZES, world)
    assert len(owner) == len(SIZES)
    load = [0] * world
    for name, rank in owner.items():
        load[rank] += SIZES[name.removesuffix(".weight")]
    assert max(load) <= sum(load) / world + max(SIZES.values())
    assert owner == owners(reversed(SIZES), world)         # in any order


def test_an_offloaded_ema_is_the_same(gemma, data, tmp_path):
    for name, more in (("on", []), ("off", ["--ema-offload"])):
        for steps in ("2", "4"):
            launch(flags(gemma, data, tmp_path / name, "--steps", steps, "--ema-every", "1",
                         "--sample-every", "9", *more))
    assert_equal(state(tmp_path / "on", 4), state(tmp_path / "off", 4))


WATCH_EMA = """
from fusedit_lib.train import zero
shard = zero.shard_ema
def watched(*args):
    print("EMA in CPU memory:", args[-1])
    return shard(*args)
zero.shard_ema = watched
"""


def test_zero_with_offload_keeps_the_ema_in_cpu_memory(gemma, data, tmp_path):
    for zero, offloaded in (("1", False), ("1-offload", True)):
        done = launch(flags(gemma, data, tmp_path / zero, "--steps", "1", "--zero", zero,
                            "--dtype", "bf16", "--sample-every", "9"), WATCH_EMA)
        assert f"EMA in CPU memory: {offloaded}" in done.stdout


# ------------------------------------------------------------------------------ plain torch

STEPS = 30
PARITY = ("--steps", f"{STEPS}", "--caption-drop", "0.3", "--sample-every", "15", "--ema-every",
          "3", "--warmup-steps", "5", "--lr-schedule", "cosine")


def cosine_lr(run, step):
    if step < 5:
        return run.lr * (step + 1) / 5
    return run.lr * (1 + math.cos(math.pi * (step - 5) / 25)) / 2


def plain_torch(argv):
    """(losses, EMA weights) of a run with the flags PARITY, in plain torch without DeepSpeed."""
    run = parse_run(argv, "")
    torch.manual_seed(run.seed)
    model = pretrained.build_model(model_config(run))
    source = Batches(run, model.config, model.tokenizer, run.batch)
    adam = torch.optim.AdamW(model.dit.parameters(), weight_decay=run.weight_decay)
    ema = {name: p.detach().clone() for name, p in model.dit.named_parameters()}
    found = []
    for step in range(run.steps):
        # loss
        batch = source[step]
        x = batch["pixels"] / 127.5 - 1
        eps = batch["noise"][:, 0]
        sigma = fusedit.logit_normal_sigma(batch["normal"], model.config.shift)
        s = sigma[:, None, None, None]
        text = model.encode_ids(batch["ids"], batch["mask"])
        v = model.dit((1 - s) * x + s * eps, sigma, text)
        loss = torch.nn.functional.mse_loss(v, eps - x)
        found.append(loss.item())

        # optimizer
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.dit.parameters(), run.max_grad_norm)
        adam.param_groups[0]["lr"] = cosine_lr(run, step)
        adam.step()

        # EMA
        n, rest = divmod(step + 1, 3)
        if rest == 0:
            for name, p in model.dit.named_parameters():
                ema[name].lerp_(p.detach(), 1 - min(0.99, n / (9 + n)))
    return found, ema


@pytest.fixture(scope="module")
def plain(gemma, data):
    return plain_torch(flags(gemma, data, "nowhere", *PARITY))


def check_parity(tmp_path, gemma, data, plain, single, pairs):
    """Check that runs with the flags PARITY match plain torch.

    single, pairs: {name: additional flags} of runs with one process and with two.
    """
    def jobs(runs):
        return [flags(gemma, data, tmp_path / name, *PARITY, *more) for name, more in runs.items()]
    launch_all(jobs(single))
    launch_all(jobs(pairs), n=2)
    known, ema = plain
    assert len(known) == STEPS and known[-1] < known[0]
    for name in single | pairs:
        assert losses(tmp_path / name) == pytest.approx(known, rel=1e-5), name

    # two ranks generate the same image grid as one
    one = next(iter(single))
    grids = {(tmp_path / name / "samples" / "step-0000015.png").read_bytes()
             for name in [one, *pairs]}
    assert len(grids) == 1

    # each rank wrote its half of the EMA
    for name in pairs:
        folder = tmp_path / name / f"step-{STEPS:07d}"
        sizes = [path.stat().st_size for path in folder.glob("model-*-of-00002.safetensors")]
        assert len(sizes) == 2
        assert max(sizes) < 1.2 * min(sizes)
        assert_equal(pretrained.load_model(tmp_path / name).dit.state_dict(), ema, atol=1e-5)


def test_deepspeed_matches_plain_torch(gemma, data, tmp_path, plain):
    check_parity(
        tmp_path, gemma, data, plain,
        single={"one": ["--zero", "0"], "remat": ["--remat", "--micro-batch", "2"]},
        pairs={"two": ["--zero", "2"], "three": ["--zero", "3", "--micro-batch", "1"]})


@pytest.mark.slow
def test_every_stage_and_split_matches_plain_torch(gemma, data, tmp_path, plain):
    """ZeRO 0 to 3 on two processes, with 1 and 4 micro-batches per step; Adam on the CPU."""
    single = {"plain4": ["--zero", "0", "--micro-batch", "2"]}
    for zero_stage in "123":
        single[f"offload{zero_stage}"] = ["--zero", f"{zero_stage}-offload"]
    pairs = {}
    for zero_stage in "0123":
        for micro_batch in (4, 1):
            name = f"z{zero_stage}x{4 // micro_batch}"
            pairs[name] = ["--zero", zero_stage, "--micro-batch", str(micro_batch)]
    check_parity(tmp_path, gemma, data, plain, single, pairs)


# ------------------------------------------------------------------------------ variants

COUNTERS = """
import atexit
def print_counters():
    found = torch._dynamo.utils.counters
    print("breaks", sum(found["graph_break"].values()), "graphs", found["stats"]["unique_graphs"])
atexit.register(print_counters)
"""


def counters(done):
    """(graph breaks, graphs) from the output of a launcher with COUNTERS."""
    breaks, graphs = re.search(r"breaks (\d+) graphs (\d+)", done.stdout).groups()
    return int(breaks), int(graphs)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(gemma, data, tmp_path):
    """Without graph breaks, even under ZeRO 3. A deeper model does not need more graphs."""
    tiny_gemma(tmp_path / "deep", num_hidden_layers=4)

    def job(name, *more, base=gemma):
        return flags(base, data, tmp_path / name, "--steps", "6", "--sample-every", "9", *more)
    _, one, three, deep = launch_all([
        job("plain"), (job("one", "--zero", "1", "--compile"), COUNTERS),
        (job("three", "--zero", "3", "--compile", "--remat"), COUNTERS),
        (job("four", "--zero", "1", "--compile", base=tmp_path / "deep"), COUNTERS)])
    launch(job("budget", "--zero", "2", "--compile", "--memory-budget", "0.5"))
    for name in ("one", "three", "budget"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    for done in (one, three, deep):
        breaks, graphs = counters(done)
        assert breaks == 0 and graphs > 0
    assert counters(one) == counters(deep)


@pytest.mark.slow
def test_float8_trains_nearly_the_same_and_resumes(gemma, data, tmp_path):
    """Float8 is emulated, at ZeRO 2 and 3. Resuming from a checkpoint is exact."""
    pytest.importorskip("torchao")

    def job(name, steps, zero_stage, *more):
        return flags(gemma, data, tmp_path / name, "--steps", str(steps), "--zero", zero_stage,
                     "--sample-every", "9", *more)
    launch_all([job("plain", 4, "2"), job("two", 4, "2", "--float8"),
                job("three", 4, "3", "--float8"), job("resumed", 2, "2", "--float8"),
                job("resumed", 4, "2", "--float8")])
    plain = losses(tmp_path / "plain")
    two = losses(tmp_path / "two")
    three = losses(tmp_path / "three")
    assert two == pytest.approx(plain, rel=0.01)
    assert two[-1] != plain[-1]             # the first prediction is 0 in both
    assert three == pytest.approx(two, rel=1e-3)
    assert_equal(state(tmp_path / "resumed", 4), state(tmp_path / "two", 4))


def test_gemma_can_be_trained(gemma, data, tmp_path):
    out = tmp_path / "run"
    more = ("--train-llm", "--ema-every", "1")
    launch_all([
        flags(gemma, data, out, "--steps", "4", *more),
        flags(gemma, data, tmp_path / "three", "--steps", "4", *more, "--zero", "3"),
        flags(gemma, data, out, "--steps", "6", *more),
        flags(gemma, data, tmp_path / "never", "--steps", "6", *more)])
    assert losses(tmp_path / "three") == pytest.approx(losses(out)[:4], rel=1e-5)
    assert_equal(state(out, 6), state(tmp_path / "never", 6))

    model = pretrained.load_model(out)
    base = pretrained.build_model(model.config).llm.state_dict()
    changed = {name for name, tensor in model.llm.state_dict().items()
               if not torch.equal(tensor, base[name])}
    assert {"embed_tokens.weight", "layers.0.mlp.up_proj.weight",
            "layers.1.self_attn.k_proj.weight"} <= changed

    export(model, tmp_path / "whole")
    exported = pretrained.load_model(tmp_path / "whole").llm.state_dict()
    for name, tensor in model.llm.state_dict().items():
        assert torch.equal(tensor, exported[name])

"""What train_tpu.py needs beside torch_xla, in plain torch: rules, stacks, the step, pieces."""
import pytest
import torch
from conftest import assert_near, tiny_gemma
from launching import finish, ranks
from torch.utils._pytree import tree_map

from fusedit import LayerStack, FuseDiTConfig, FuseDiTError, preset
from fusedit_lib import files, pretrained
from fusedit_lib.train import costs, plan, sharding, xla

SIZES = dict(fsdp=4, tensor=2)


# ------------------------------------------------------------------------------ which axis

@pytest.mark.parametrize("text, n, shape", [
    ("-1,1", 8, (8, 1)), ("4,2", 8, (4, 2)), ("4,-1", 8, (4, 2)), ("2x4", 8, (2, 4)),
    ("1", 1, (1, 1)), ("-1", 8, (8, 1)), ("3,1", 8, None), ("3,-1", 8, None), ("-1,-1", 8, None),
    ("a", 8, None), ("0,8", 8, None), ("", 8, None)])
def test_mesh_shapes(text, n, shape):
    if shape:
        assert sharding.mesh_shape(text, n) == shape
    else:
        with pytest.raises(FuseDiTError, match="does not make up 8 devices"):
            sharding.mesh_shape(text, n)


def test_heads_and_mlp_lie_along_tensor():
    for name, shape, spec in [
            ("dit.layers.block.self_attn.q_proj.weight", (3, 8, 8), (None, "tensor", "fsdp")),
            ("dit.layers.3.self_attn.text_k_proj.weight", (8, 8), ("tensor", "fsdp")),
            ("dit.layers.block.self_attn.o_proj.weight", (3, 8, 8), (None, "fsdp", "tensor")),
            ("llm.layers.block.mlp.down_proj.weight", (3, 8, 8), (None, "fsdp", "tensor")),
            ("llm.layers.block.input_layernorm.weight", (4, 8), (None, None)),
            ("llm.layers.block.mlp.up_proj.weight", (3, 7, 8), (None, None, "fsdp")),
            ("llm.layers.block.mlp.up_proj.weight", (3, 8, 6), (None, "tensor", None)),
            ("dit.patch_embed.proj.weight", (8, 16, 2, 2), ("fsdp", None, None, None)),
            ("dit.proj_out.bias", (64,), (None,)),
            ("dit.proj_out.weight", (64, 8), ("fsdp", "tensor")),
            ("llm.embed_tokens.weight", (256, 8), ("tensor", "fsdp"))]:
        assert sharding.spec(name, shape, SIZES) == spec, name


@pytest.mark.parametrize("name", ["fusedit", "fusedit/baseline", "fusedit/adaln-single",
                                  "baselinedit/cross-attention", "fusedit/paligemma"])
def test_what_stays_whole_is_small(name):
    """Of every tensor of the paper's models on 64 x 4 chips, a 256th; norms and biases aside."""
    sizes, whole, total = dict(fsdp=64, tensor=4), 0, 0
    for key, p in costs.abstract_model(preset(name)).named_parameters():
        total += p.numel()
        if plan.chip(key, p.shape, sizes) * 256 != p.numel():
            whole += p.numel()
            assert p.dim() == 1 or "patch_embed" in key or "proj_out" in key, key
    assert whole < 0.001 * total


# ------------------------------------------------------------------------------ which block

def plain_scan(step, carry, rows):
    """What torch_xla's scan is to compute."""
    outs, n = [], len(next(iter(rows[0].values())))
    for i in range(n):
        carry, out = step(carry, tree_map(lambda t, i=i: t[i], rows))
        outs.append(out)
    return carry, outs[0] and tuple(torch.stack(o) for o in zip(*outs, strict=True))


POINTS = [dict(), dict(timestep_conditioning="adaln-single", pos_embed="m-rope"),
          dict(attention="cross", timestep_conditioning="addition", pos_embed="ape"),
          dict(fusion="shallow", timestep_conditioning="adaln-zero", sandwich_norm=False),
          dict(shared_attention_layers=[0, 1, 3]), dict(shared_attention_layers=[3])]


@pytest.mark.parametrize("changes", POINTS, ids=str)
@pytest.mark.parametrize("train_llm", [False, True])
def test_a_stack_is_its_blocks(gemma_folder, changes, train_llm, float64):
    """Values, and gradients of every weight, by their names in checkpoints."""
    config = FuseDiTConfig.from_dict(dict(
        base=str(gemma_folder), pos_embed="2d-rope", sandwich_norm=True, in_channels=3, vae=None,
        timestep_conditioning=None) | changes)
    model = pretrained.build_model(config, dtype=torch.float64)
    for p in model.dit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.llm.requires_grad_(train_llm)
    ids, mask = torch.randint(4, 20, (2, 9)), torch.arange(9) < torch.tensor([[9], [5]])
    x_t, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])

    def run():
        model.zero_grad()
        v = model(x_t, sigma, (ids, mask))
        v.square().sum().backward()
        grads = {}
        for name, p in model.named_parameters():
            if p.grad is not None:
                names = sharding.stored_names(name, p)
                grads |= zip(names, p.grad if ".block." in name else [p.grad], strict=True)
        return v, grads
    want, grads = run()
    marked = []
    for tower in (model.dit, model.llm):
        tower.layers = xla.Stack(tower.layers, plain_scan,
                                  lambda t, name="": marked.append(name) or t)
    got, same = run()
    assert want.abs().max() > 0.1
    assert_near(got, want, 1e-9)
    assert {"", "mlp.up_proj.weight"} <= set(marked)
    assert not any(isinstance(m, Blocks) for m in model.modules())
    for name, grad in grads.items():
        assert_near(same[name], grad, 1e-9)
    assert all(not same[name].any() for name in same.keys() - grads.keys())
    with torch.no_grad():                   # the graph of a step is kept, but not for learning
        assert torch.equal(model(x_t, sigma, (ids, mask)), got)
    assert len(model.dit.layers.steps) == 2
    assert torch.equal(run()[0], got)


# ------------------------------------------------------------------------------ which step

@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_the_step_is_torchs_own(max_norm, float64):
    """AdamW with clipping; one with a gradient that is not finite changes nothing at all."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 7, 2)]
                    for _ in range(2))
    kinds = dict(betas=(0.8, 0.99), weight_decay=0.1)
    adam = torch.optim.AdamW(ours, **kinds)
    adam.defaults["capturable"] = False     # that takes a GPU or TPU
    plain = torch.optim.AdamW(theirs, **kinds)
    state = []
    for p in ours:
        adam.state[p] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p),
                             exp_avg_sq=torch.zeros_like(p))
        state.append((p.detach().clone(), p, *list(adam.state[p].values())[1:]))
    average = [p.detach().clone() for p in theirs]
    for step in range(6):
        grads = [torch.randn(len(p)) for p in ours]
        if step == 3:
            grads[1][4] = [float("nan"), float("inf")][max_norm > 0]
        for p, q, g in zip(ours[:2], theirs, grads, strict=False):         # the third has none
            p.grad, q.grad = g.clone(), g.clone()
        lr, rate = torch.tensor([0.1 / (1 + step), step % 2 * 0.3])
        before = [t.clone() for row in state for t in row[1:]]
        norm = xla.adam_step(adam, state, lr, rate, max_norm)
        if step == 3:
            assert not norm.isfinite()
            assert all(a.equal(b) for a, b in zip(before, (t for row in state for t in row[1:]),
                                                  strict=True))
        else:
            want = torch.cat([q.grad for q in theirs[:2]]).norm()
            assert norm == pytest.approx(want.item(), rel=1e-5)
            if max_norm:
                torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            plain.param_groups[0]["lr"] = float(lr)
            plain.step()
        for a, q in zip(average, theirs, strict=True):
            a.lerp_(q.detach(), float(rate))
    for (mean, p, *_), a, q in zip(state, average, theirs, strict=True):
        assert_near(p, q, 1e-9)
        assert_near(mean, a, 1e-9)
    assert [int(adam.state[p]["step"]) for p in ours] == [5, 5, 0]


# ------------------------------------------------------------------------------ which piece

def shards_of(t, cuts):
    """The shards of a tensor on a mesh, one device after the other: [(slices, values)]."""
    found = [()]
    for n, parts in zip(t.shape, cuts, strict=True):
        step = -(-n // parts)
        found = [(*where, slice(i * step, min((i + 1) * step, n))) for where in found
                 for i in range(parts)]
    return [(where, t[where].clone()) for where in found]


HOSTS = {                                   # the devices of each host, of 2 x 4
    "one": [range(8)], "rows": [range(4), range(4, 8)], "columns": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "scattered": [[0, 3, 5], [1, 2, 4, 6, 7]], "one each": [[i] for i in range(8)]}


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_write_what_one_reads(tmp_path, name):
    """SlicedTensor of a stack and of a single tensor, in as many files as hosts; whole with one host."""
    stack, single, small = torch.randn(3, 6, 8), torch.randn(4, 8), torch.randn(5)
    hosts = HOSTS[name]
    for host, devices in enumerate(hosts):
        found = {}
        for where, t, cuts in (("a.block.w", stack, (1, 2, 4)), ("b", single, (2, 4)),
                               ("one.block.w", single[None], (1, 2, 4))):
            shards = shards_of(t, cuts)
            found |= sharding.pieces("", where, [shards[d] for d in devices], t.shape)
        padded = torch.cat([small, torch.zeros(3)])
        found |= sharding.pieces("", "c", [([slice(0, 5)], padded)] if host == 0 else [], (5,))
        stem = f"model-{host + 1:05d}-of-{len(hosts):05d}" if len(hosts) > 1 else "model"
        files.save_file(found, tmp_path / f"{stem}.safetensors", {"config": "{}"})
        if name != "scattered":             # neighbours become one piece
            assert len(found) == 5 + (host == 0)
    if len(hosts) > 1:
        index = {f"x{i}": f"model-{i + 1:05d}-of-{len(hosts):05d}.safetensors"
                 for i in range(len(hosts))}
        (tmp_path / "model.safetensors.index.json").write_text(
            '{"weight_map": %s}' % str(index).replace("'", '"'))
    read = files.open_tensors(tmp_path)
    want = {"a.0.w": stack[0], "a.1.w": stack[1], "a.2.w": stack[2], "b": single, "c": small,
            "one.0.w": single}
    assert read.keys() == want.keys()
    for key, t in want.items():
        file, stored = read[key]
        assert torch.equal(file.get_tensor(stored), t)
        assert tuple(file.get_slice(stored).get_shape()) == tuple(t.shape)
        assert file.metadata() == {"config": "{}"}


def test_a_missing_piece_is_named(tmp_path):
    shards = shards_of(torch.randn(4, 8), (2, 4))
    files.save_file(sharding.pieces("", "b", shards[:2] + shards[3:], (4, 8)),
                      tmp_path / "model.safetensors", {})
    file, stored = files.open_tensors(tmp_path)["b"]
    with pytest.raises(FuseDiTError, match="b lacks some of its pieces"):
        file.get_tensor(stored)


# Two hosts of 2 x 2 devices, each with its half of every tensor, save together.
TWO = """
import sys, torch, torch.distributed as dist
from fusedit_lib.train import checkpoints, sharding
from fusedit_lib.train.config import model_config, parse_run
from test_sharding import shards_of
dist.init_process_group("gloo")
rank, run = dist.get_rank(), parse_run(sys.argv[1:], "", "tpu")
whole = torch.arange(4 * 6 * 8.).view(4, 6, 8)
def share():
    name = "dit.layers.block.w"
    mine = shards_of(whole, (1, 2, 2))[2 * rank:2 * rank + 2]
    state = {}
    for key in ("weight.", "exp_avg.", "exp_avg_sq."):
        state |= sharding.pieces(key, name, mine, whole.shape)
    return sharding.pieces("", name, mine, whole.shape), state
saver = checkpoints.CheckpointWriter(run, model_config(run), None, "data")
saver.save(3, share, dict(adam_step=3, seen=0, skipped=0, skipped_steps=0))
assert saver.close(3, 0) == 0
dist.barrier()
dist.destroy_process_group()
"""


def test_two_hosts_save_together(tmp_path):
    from fusedit_lib.train import checkpoints
    tiny_gemma(tmp_path / "gemma", num_hidden_layers=2)
    done = finish(ranks(["-c", TWO, "--out", tmp_path / "run", "--base", tmp_path / "gemma"], 2))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run" / "step-0000003"
    assert checkpoints.damage(folder) is None
    saved, whole = checkpoints.load_checkpoint(folder), torch.arange(4 * 6 * 8.).view(4, 6, 8)
    stack = torch.nn.Parameter(whole)
    for t in sharding.first_state(saved, "dit.layers.block.w", stack):
        assert torch.equal(t, whole)
    assert sorted(p.name for p in folder.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json"]

"""--cache-text: Gemma encodes each distinct caption once, and nothing else changes."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_near, tiny_clip
from launching import assert_equal, flags, launch, launch_all, losses, state
from tiny_shards import index, scene, tiny_batches, write_shard

from fusedit import FuseDiTError, TextFeatures
from fusedit_lib import pretrained
from fusedit_lib.data.batches import to_device
from fusedit_lib.files import say_once
from fusedit_lib.train import costs, plan, text_cache
from fusedit_lib.train.config import check_run, check_settings, model_config
from fusedit_lib.train.flags import parse_run
from fusedit_lib.train.text_cache import TextCache, distinct_captions, make_text_cache

# Several captions a line, one that is too long, and the same caption in two samples.
CAPTIONS = [
    {"synthetic_caption.txt": "a red circle\na large red circle above the small star",
     "original_caption.txt": "red"},
    {"synthetic_caption.txt": "a red circle", "original_caption.txt": "circle of a star\n\nstar"},
    {"synthetic_caption.txt": "a small star\nred star"},
    {"synthetic_caption.txt": "the large blue circle above a small red square and the star"},
]
RATES = ("--original-caption-rate", "0.5", "--caption-drop", "0.2")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder with two shards of samples with several captions, and one without a caption."""
    folder = tmp_path_factory.mktemp("several")
    none = {"synthetic_caption.txt": None, "original_caption.txt": None}
    scenes = [scene(f"n{i}", **none | files) for i, files in enumerate([*CAPTIONS, {}])]
    write_shard(folder / "s-0.tar", scenes[:2])
    write_shard(folder / "s-1.tar", scenes[2:])
    index(folder)
    return folder


def build(source):
    """The FuseDiT of a Batches, with a DiT whose output layer is random as well."""
    model = pretrained.build_model(source.config)
    torch.nn.init.normal_(model.dit.proj_out.weight, generator=torch.Generator().manual_seed(0))
    return model


def ignore(found):
    """Stands for the check of memory."""


# ------------------------------------------------------------------------------ captions

@pytest.mark.parametrize("more", [
    RATES, (*RATES, "--caption-pick", "first"), (*RATES, "--caption-pick", "whole"),
    ("--original-caption-rate", "1"), ("--original-caption-rate", "0")])
def test_exactly_the_captions_that_training_draws_are_encoded(gemma, several, more):
    source = tiny_batches(gemma, several, "--max-skipped", "1", *more)
    drawn = {(2,)}                                         # <bos> alone: the empty caption
    for m in range(80):
        batch = source[m]
        for ids, mask in zip(batch["ids"], batch["mask"], strict=True):
            drawn.add(tuple(ids[mask].tolist()))
    found = distinct_captions(source, ignore)
    assert set(found) == drawn
    assert found == sorted(found, key=lambda ids: (len(ids), ids))


def test_an_unreadable_sample_has_no_caption(gemma, tmp_path):
    """A shard may even have no caption at all."""
    write_shard(tmp_path / "s-0.tar", [scene("a", **{"synthetic_caption.txt": None,
                                                     "original_caption.txt": None})])
    write_shard(tmp_path / "s-1.tar", [scene("b")])
    index(tmp_path)
    found = distinct_captions(tiny_batches(gemma, tmp_path), ignore)
    assert [len(ids) for ids in found] == [1, 4]           # empty; <bos> a red square


# ------------------------------------------------------------------------------ features

@pytest.mark.parametrize("shape", [
    ("fusion=deep",), ("fusion=shallow",), ("attention=cross",),
    ("fusion=shallow", "text_states=uniform"), ("fusion=shallow", "text_states=joint"),
    ("dit_num_hidden_layers=2", "shared_attention_layers=[1]")])
def test_features_equal_those_of_encode_ids(gemma, several, monkeypatch, shape):
    """In batches of a few captions, and whatever fusion reads. The padding is not compared."""
    monkeypatch.setattr(text_cache, "BATCH_TOKENS", 12)
    source = tiny_batches(gemma, several, "--max-skipped", "1", "--set", *shape, *RATES)
    model = build(source)
    cache = TextCache(model, source)
    for m in range(10):
        loaded = source[m]
        batch = to_device(loaded, torch.device("cpu"), cut_text=True)
        got = cache.features(loaded, batch.mask)
        want = model.encode_ids(batch.ids, batch.mask)
        assert torch.equal(got.mask, want.mask)
        pairs = list(zip(got.keys + got.values, want.keys + want.values, strict=True))
        for a, b in pairs:
            assert (a is None) == (b is None)
            if a is not None:
                assert_near(a.mT[batch.mask[:, None, None].expand_as(a.mT)],
                            b.mT[batch.mask[:, None, None].expand_as(b.mT)], 1e-6)
        if want.hidden is not None:
            assert_near(got.hidden[batch.mask], want.hidden[batch.mask], 1e-6)
        x = torch.randn(4, 3, 16, 16)
        assert_near(model.dit(x, torch.full((4,), 0.5), got),
                    model.dit(x, torch.full((4,), 0.5), want), 1e-5)


@pytest.mark.parametrize("shape", [
    ("fusion=deep",), ("fusion=shallow",), ("fusion=shallow", "text_states=uniform"),
    ("fusion=shallow", "text_states=static")])
def test_gemma_runs_without_padding_and_once_per_caption(gemma, several, monkeypatch, shape):
    """The features of a caption take token_bytes for each token."""
    monkeypatch.setattr(text_cache, "BATCH_TOKENS", 12)
    source = tiny_batches(gemma, several, "--max-skipped", "1", "--set", *shape, *RATES)
    model = build(source)
    encoded = []
    encode_ids = model.encode_ids

    def record(ids, mask):
        assert mask.all()
        assert len(ids) == 1 or ids.numel() <= 12
        encoded.extend(map(tuple, ids.tolist()))
        return encode_ids(ids, mask)

    model.encode_ids = record
    cache = TextCache(model, source)
    captions = distinct_captions(source, ignore)
    assert encoded == captions
    flat = (*cache.flat.keys, *cache.flat.values, cache.flat.hidden)
    size = sum(map(len, captions)) * text_cache.token_bytes(model, torch.float32)
    assert sum(tensor.nbytes for tensor in flat if tensor is not None) == size


def test_gemma_encodes_batches_with_captions_not_in_the_cache(gemma, several, data, capsys):
    """But not if ZeRO 3 has sharded Gemma, which it marks with ds_id."""
    say_once.cache_clear()
    source = tiny_batches(gemma, several, "--max-skipped", "1")
    model = build(source)
    cache = TextCache(model, source)
    loaded = tiny_batches(gemma, data, "--caption-drop", "0")[0]
    batch = to_device(loaded, torch.device("cpu"), cut_text=True)
    pooled = torch.zeros(4, 8)
    got = cache.features(loaded, batch.mask, pooled)
    want = model.encode_ids(batch.ids, batch.mask, pooled)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert "Gemma encodes their batches" in capsys.readouterr().err

    model.llm.embed_tokens.weight.ds_id = 0
    with pytest.raises(FuseDiTError, match="does not know the caption 'a .* square'"):
        cache.features(loaded, batch.mask)


def test_forward_takes_features_only_with_the_flag(gemma, data):
    """Without the flag there is no cache, and forward still encodes."""
    source = tiny_batches(gemma, data, "--cache-text", micro_batch=2)
    model = build(source)
    loaded = source[0]
    x = torch.randn(2, 3, 16, 16)
    sigma = torch.full((2,), 0.5)
    tokens = loaded["ids"], loaded["mask"]
    assert make_text_cache(SimpleNamespace(cache_text=False), model, source) is None
    want = model(x, sigma, tokens)
    cache = make_text_cache(source.run, model, source)
    features = cache.features(loaded, loaded["mask"])
    assert isinstance(features, TextFeatures)
    assert_near(model(x, sigma, features), want, 1e-5)


# ------------------------------------------------------------------------------ runs

def test_a_run_has_the_same_losses_and_resumes_to_the_bit(gemma, several, tmp_path):
    """At ZeRO 1 and 3, with image grids and validation, which encode other prompts."""
    def job(name, steps, zero, *more):
        return flags(gemma, several, tmp_path / name, "--steps", str(steps), "--zero", zero,
                     "--ema-every", "1", "--sample-every", "2", "--max-skipped", "1",
                     "--val-data", str(several), "--val-samples", "4", *RATES, *more)
    cached = "--cache-text"
    launch_all([job("without", 4, "1"), job("a", 4, "1", cached), job("b", 2, "1", cached),
                job("b", 4, "1", cached), job("a3", 4, "3", cached)])
    assert_equal(state(tmp_path / "a", 4), state(tmp_path / "b", 4))
    for name in ("a", "a3"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_clip_modulation_is_computed_in_each_step(gemma, several, tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    more = ("--set", f"clip={clip}", "text_modulation_embeds_dim=24",
            "timestep_conditioning=addition", "--steps", "2", "--sample-every", "9",
            "--max-skipped", "1", "--lr", "0.1")
    launch_all([flags(gemma, several, tmp_path / "without", *more),
                flags(gemma, several, tmp_path / "with", "--cache-text", *more)])
    with_cache = losses(tmp_path / "with")
    assert with_cache == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


# ------------------------------------------------------------------------------ refusals, plan

def test_too_many_captions_for_the_memory_are_refused(gemma, data, tmp_path):
    small = "from fusedit_lib.train import text_cache\ntext_cache.free_memory = lambda device: 5000"
    done = launch(flags(gemma, data, tmp_path / "run", "--cache-text"), small, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    # 1 + 3 x 4 tokens, each with 2 x 2 keys and values of 2 x 16 float32 numbers
    needed = "--cache-text needs 6.66e-06 GB or more for 4 distinct captions (13 tokens)"
    assert needed in done.stderr
    assert "leave it out" in done.stderr


def test_it_is_refused_with_train_llm():
    with pytest.raises(FuseDiTError, match="--cache-text needs a frozen Gemma.*--train-llm"):
        check_run(parse_run(["--cache-text", "--train-llm"], ""))


def test_shards_in_a_bucket_are_refused(several):
    run = parse_run(["--cache-text", "--data", str(several), "gs://bucket/shards/"], "")
    with pytest.raises(FuseDiTError, match="--data must not be URLs: copy the shards"):
        check_settings(run)
    check_settings(replace(run, data=[str(several)]))


def test_train_tpu_does_not_have_it(capsys):
    with pytest.raises(SystemExit):
        parse_run(["--cache-text"], "", "tpu")
    assert "unrecognized arguments: --cache-text" in capsys.readouterr().err


def test_the_plan_counts_no_gemma_and_says_what_a_token_takes(capsys):
    run = parse_run(["--preset", "demo", "--plan", "1xH100", "--cache-text"], "")
    config = model_config(run)
    plan.show(run, config)
    text = capsys.readouterr().out
    model = costs.abstract_model(config)
    size = text_cache.token_bytes(model, torch.bfloat16)
    assert f"--cache-text is not counted: {size / 1e3:.3g} kB for each token" in text
    forward = costs.flops(model, config)
    assert f"training on an image: {3 * forward.dit / 1e12:.3g} TFLOP" in text
    useful = costs.useful_flops(config, False, False)
    cached = costs.useful_flops(config, False, False, cache_text=True)
    assert 0 < cached.per_token < useful.per_token

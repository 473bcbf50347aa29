"""The table that comes last, made of what the parts wrote in OUT. It needs no torch."""
import json
from pathlib import Path


def rows(path):
    """The JSON lines of a file; of a line that was cut by a kill, nothing."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def newest(out):
    """{kind: rows} of results.jsonl; where a thing was measured twice, the last time counts."""
    found = {}
    for row in rows(out / "results.jsonl"):
        key = tuple(row.get(k) for k in ("name", "text", "batch"))
        found.setdefault(row["kind"], {})[key] = row
    return {kind: [*of.values()] for kind, of in found.items()}


def lines(out):
    """The table's lines, of a folder OUT; what cannot be told is named, and the rest is."""
    out = Path(out)
    found = newest(out)
    yield "=" * 40 + " SUMMARY " + "=" * 40
    for section in (machine, ceilings, attention, parts, variants, benchmarks, runs, ends):
        try:
            yield from section(found, out)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            yield f"{section.__name__}: cannot be told: {type(e).__name__} {e}"


def machine(found, _):
    for row in found.get("environment", []):
        names = ("gpu", "memory_gb", "smi", "torch", "cudnn", "nccl", "triton", "transformers",
                 "deepspeed", "python", "cores")
        yield ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)


def ceilings(found, _):
    for row in found.get("product", []):
        if "error" in row:
            yield f"  {row['name']:<34} {row['error'][:100]}"
        else:
            yield f"  {row['name']:<34}{row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s"
    for row in found.get("copy", []):
        yield f"  copy on the device, read and written: {row['tb_s']:.2f} TB/s"
    for row in found.get("transfer", []):
        yield f"  {row['name']}: {row['gb_s']:.1f} GB/s"
    for row in found.get("launch", []):
        yield f"  one tiny kernel after the other: {row['us']:.2f} us each"


def attention(found, _):
    for row in found.get("choice", []):
        yield (f"attention, {row['text']} tokens of text: with a mask PyTorch takes "
               f"{row['added']}, without one {row['none']}")
    absent = {}
    for row in found.get("attention", []):
        if "error" in row:
            absent.setdefault(row["error"][:70], []).append(f"{row['name']} ({row['text']})")
            continue
        wrong = "" if row["off"] < 0.03 else "  <-- WRONG"
        yield (f"  {row['text']:>4} {row['name']:<28}{row['ms']:8.3f} ms {row['tflops']:5.0f} "
               f"TFLOP/s, both {row['both_ms']:8.3f} ms, backward {row['backward_tflops']:5.0f} "
               f"TFLOP/s, off {row['off']:.0e}{wrong}")
    for error, names in absent.items():
        yield f"  not here: {', '.join(names)}: {error}"
    for kind in ("extremes", "attention of the Gemma", "attention of the VAE"):
        said = [f"{r['name']} " + (f"{r['ms']:.3f} ms" if "ms" in r else
                                   f"{r['bad']} not finite" if "bad" in r else "not here")
                for r in found.get(kind, [])]
        if said:
            yield f"  {kind}: {'; '.join(said)}"


def parts(found, _):
    for row in found.get("parts", []):
        yield f"a step of {row['batch']} pictures, compiled (warm after {row['compile_s']:.0f} s):"
        for name, ms in row["ms"].items():
            rate = row["tflops"].get(name)
            yield (f"  {name:<28}{ms:9.2f} ms {ms / row['batch']:8.2f} a picture"
                   + (f" {rate:7.0f} TFLOP/s useful" if rate else ""))
        speeds = ", ".join(f"{k} {v:.1f}" for k, v in row["images_per_s"].items())
        yield (f"  pictures a second, with AdamW after 512: {speeds}; activations and gradients "
               f"{row['held_gb']:.1f} GB")
    for row in found.get("profile", []):
        for kind, ms in sorted(row["kinds"].items(), key=lambda item: -item[1]):
            yield f"  {ms:9.2f} ms {ms / row['ms']:6.1%} of the kernels' time: {kind}"


def variants(found, _):
    for row in found.get("variant", []):
        name = f"{row['name']}:{row['batch']}"
        if "error" in row:
            yield f"  {name:<16} {row['error'][:110]}"
        else:
            yield (f"  {name:<16}{row['ms']:9.2f} ms {row['ms'] / row['batch']:8.2f} a picture "
                   f"{row['tflops']:6.0f} TFLOP/s useful, held {row['held_gb']:5.1f} GB")
    for row in found.get("VAE", []):
        yield f"  VAE, {row['name']:<40}{row['ms']:9.2f} ms of {row['batch']}"
    for row in found.get("graphs", []):
        took = f"{row['ms']:9.3f} ms of {row['batch']}" if "ms" in row else row["error"][:80]
        yield f"  {row['name']:<56}{took}"


def benchmarks(found, out):
    """train.json and sample.json, of benchmarks/train.py and benchmarks/sample.py."""
    made = {}
    if (out / "train.json").exists():
        made["train.py"] = json.loads((out / "train.json").read_text())
    if (out / "sample.json").exists():
        for n, result in json.loads((out / "sample.json").read_text()).items():
            made[f"sample.py, {n}"] = result
    for name, result in made.items():
        for way in ("two phases", "joint mask"):
            row = result[way]
            yield (f"  {name}, {way}: {1000 * row['seconds']:.0f} ms, {row['images_per_s']:.2f} "
                   f"images/s, {row['utilisation']:.1%} of {result['matrix_rate'] / 1e12:.0f} "
                   f"TFLOP/s, {(row['peak_bytes'] or 0) / 1e9:.1f} GB")
        shares = ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in result["shares"].items())
        yield f"  {name}: {result['ratio']:.2f} times as fast; {shares}"
    for row in found.get("exact", []):
        for way, far in row["exactness"].items():
            yield f"  {row['name']}, {way}: " + ", ".join(f"{k} {v:.1e}" for k, v in far.items())


def runs(found, _):
    for row in found.get("demo", []):
        yield (f"  demo: {row['steps']} steps, loss {row['first_loss']:.3f} to "
               f"{row['last_loss']:.3f}, {row['images_per_s']:,.0f} images/s, "
               f"{row['memory_gb']:.1f} GB, saved {row['saved']}")
    for row in found.get("score", []):
        yield f"  score of {row['model']}: {row['overall']}"
    for row in found.get("large", []):
        if "error" in row:
            yield f"  train_gpu.py, 2B, {row['name']}: {row['error']}"
        else:
            use = f", {row['utilisation']:.1%} of peak" if row["utilisation"] else ""
            yield (f"  train_gpu.py, 2B, {row['name']}: {row['images_per_s']:.1f} images/s{use}, "
                   f"{row['memory_gb']:.1f} GB, losses {[round(x, 2) for x in row['losses']]}")
    smoke = found.get("smoke", [])
    if smoke:
        bad = [f"{r['name']} ({r['problem'][:100]})" for r in smoke if r["problem"]]
        yield f"  smoke: {len(smoke) - len(bad)} of {len(smoke)} right {'; '.join(bad)}"
    apart = found.get("apart", [])
    if apart:
        far = max(apart, key=lambda r: r["apart"])
        yield f"  smoke: losses are at most {far['apart']:.1e} apart ({far['name']})"


def ends(found, _):
    """How the parts ended."""
    said = []
    ends_as = {0: "ok", -1: "not begun", 124: "too slow", 130: "stopped"}
    for row in found.get("part", []):
        end = ends_as.get(row["code"], f"FAILED with {row['code']}")
        said.append(f"{row['name']} {end} {row['seconds']:.0f} s")
    if said:
        yield "parts: " + "; ".join(said)

"""Makes the table that is printed last from the files in OUT, without importing torch."""
import json
from pathlib import Path

TOLERANCE = 0.03                            # for attention, as in attn.py


def rows(path):
    """The JSON lines of a file, if it exists. A line truncated by a kill is skipped."""
    found = []
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def newest(out):
    """{kind: rows} of results.jsonl. If something was measured twice, the last result counts."""
    found = {}
    for row in rows(out / "results.jsonl"):
        key = (row.get("name"), row.get("text"), row.get("batch"))
        found.setdefault(row["kind"], {})[key] = row
    return {kind: list(by_key.values()) for kind, by_key in found.items()}


def lines(out):
    """The lines of the table. For a section that cannot be shown, a line gives the reason."""
    out = Path(out)
    found = newest(out)
    yield "=" * 40 + " SUMMARY " + "=" * 40
    sections = (machine, ceilings, attention, other_attentions, parts, profile, variants,
                benchmarks, runs, smoke, ends)
    for section in sections:
        try:
            yield from section(found, out)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            yield f"{section.__name__}: cannot be shown: {type(e).__name__} {e}"


# Each section yields lines. found: {kind: rows}; out: the folder OUT.

def machine(found, _):
    names = ("gpu", "memory_gb", "smi", "torch", "cudnn", "nccl", "triton", "transformers",
             "deepspeed", "python", "cores")
    for row in found.get("environment", []):
        yield ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)


def ceilings(found, _):
    for row in found.get("product", []):
        if "error" in row:
            yield f"  {row['name']:<34} {row['error'][:100]}"
        else:
            yield f"  {row['name']:<34}{row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s"
    for row in found.get("copy", []):
        yield f"  copy on the device, reads and writes together: {row['tb_s']:.2f} TB/s"
    for row in found.get("transfer", []):
        yield f"  {row['name']}: {row['gb_s']:.1f} GB/s"
    for row in found.get("launch", []):
        yield f"  tiny kernels launched in sequence: {row['us']:.2f} us each"


def attention(found, _):
    for row in found.get("choice", []):
        yield (f"attention, {row['text']} text tokens: with a mask PyTorch chooses "
               f"{row['added']}, without one {row['none']}")
    missing = {}                            # error -> names
    for row in found.get("attention", []):
        if "error" in row:
            error = row["error"][:70]
            missing.setdefault(error, []).append(f"{row['name']} ({row['text']})")
            continue
        warning = ""
        if not row["off"] < TOLERANCE:
            warning = "  <-- WRONG"
        yield (f"  {row['text']:>4} {row['name']:<28}{row['ms']:8.3f} ms {row['tflops']:5.0f} "
               f"TFLOP/s, with backward {row['both_ms']:8.3f} ms, backward alone "
               f"{row['backward_tflops']:5.0f} TFLOP/s, off by {row['off']:.0e}{warning}")
    for error, names in missing.items():
        yield f"  not available: {', '.join(names)}: {error}"


def other_attentions(found, _):
    for kind in ("extremes", "attention of the Gemma", "attention of the VAE"):
        results = [f"{row['name']} {_attention_result(row)}" for row in found.get(kind, [])]
        if results:
            yield f"  {kind}: {'; '.join(results)}"


def _attention_result(row):
    if "ms" in row:
        return f"{row['ms']:.3f} ms"
    if "bad" in row:
        return f"{row['bad']} not finite"
    return "not available"


def parts(found, _):
    for row in found.get("parts", []):
        batch = row["batch"]
        yield f"a step of {batch} images, compiled (ready after {row['compile_s']:.0f} s):"
        for name, ms in row["ms"].items():
            rate = ""
            if row["tflops"].get(name):
                rate = f" {row['tflops'][name]:7.0f} TFLOP/s useful"
            yield f"  {name:<28}{ms:9.2f} ms {ms / batch:8.2f} per image{rate}"
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in row["images_per_s"].items())
        yield (f"  images per second, with AdamW after 512: {speeds}; activations and gradients "
               f"{row['held_gb']:.1f} GB")


def profile(found, _):
    for row in found.get("profile", []):
        for kind, ms in sorted(row["kinds"].items(), key=lambda item: -item[1]):
            yield f"  {ms:9.2f} ms {ms / row['ms']:6.1%} of the kernels' time: {kind}"


def variants(found, _):
    for row in found.get("variant", []):
        name = f"{row['name']}:{row['batch']}"
        if "error" in row:
            yield f"  {name:<16} {row['error'][:110]}"
        else:
            yield (f"  {name:<16}{row['ms']:9.2f} ms {row['ms'] / row['batch']:8.2f} per image "
                   f"{row['tflops']:6.0f} TFLOP/s useful, held {row['held_gb']:5.1f} GB")
    for row in found.get("VAE", []):
        yield f"  VAE, {row['name']:<40}{row['ms']:9.2f} ms for {row['batch']} images"
    for row in found.get("graphs", []):
        if "ms" in row:
            yield f"  {row['name']:<56}{row['ms']:9.3f} ms for {row['batch']} images"
        else:
            yield f"  {row['name']:<56}{row['error'][:80]}"


def benchmarks(found, out):
    """The results in train.json and sample.json, from benchmarks/train.py and sample.py."""
    results = {}
    if (out / "train.json").exists():
        results["train.py"] = json.loads((out / "train.json").read_text())
    if (out / "sample.json").exists():
        for batch, result in json.loads((out / "sample.json").read_text()).items():
            results[f"sample.py, {batch}"] = result
    for name, result in results.items():
        for formulation in ("two phases", "joint mask"):
            row = result[formulation]
            peak_gb = (row["peak_bytes"] or 0) / 1e9
            yield (f"  {name}, {formulation}: {1000 * row['seconds']:.0f} ms, "
                   f"{row['images_per_s']:.2f} images/s, {row['utilisation']:.1%} of "
                   f"{result['matrix_rate'] / 1e12:.0f} TFLOP/s, {peak_gb:.1f} GB")
        shares = ", ".join(f"{kind} {1000 * s:.1f} ms" for kind, s in result["shares"].items())
        yield f"  {name}: {result['ratio']:.2f} times as fast; {shares}"
    for row in found.get("exact", []):
        for formulation, distances in row["exactness"].items():
            shown = ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
            yield f"  {row['name']}, {formulation}: {shown}"


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
            continue
        mfu = ""
        if row["utilisation"]:
            mfu = f", {row['utilisation']:.1%} of peak"
        losses = [round(loss, 2) for loss in row["losses"]]
        yield (f"  train_gpu.py, 2B, {row['name']}: {row['images_per_s']:.1f} images/s{mfu}, "
               f"{row['memory_gb']:.1f} GB, losses {losses}")


def smoke(found, _):
    results = found.get("smoke", [])
    if results:
        bad = [f"{row['name']} ({row['problem'][:100]})" for row in results if row["problem"]]
        right = len(results) - len(bad)
        yield f"  smoke: {right} of {len(results)} passed {'; '.join(bad)}"
    apart = found.get("apart", [])
    if apart:
        most = max(apart, key=lambda row: row["apart"])
        yield f"  smoke: losses differ by at most {most['apart']:.1e} ({most['name']})"


def ends(found, _):
    """The outcome of each part."""
    names = {0: "ok", -1: "not started", 124: "timed out", 130: "stopped"}
    results = []
    for row in found.get("part", []):
        end = names.get(row["code"], f"FAILED with {row['code']}")
        results.append(f"{row['name']} {end} {row['seconds']:.0f} s")
    if results:
        yield "parts: " + "; ".join(results)

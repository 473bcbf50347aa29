"""TODO."""
import hashlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from fusedit import FuseDiTError
from fusedit_lib import backend, cli
from fusedit_lib.evaluation.benchmarks import parse, read
from fusedit_lib.files import atomic_write
from fusedit_lib.sampling import draw, notes


def begun_dtype(top):
    """--dtype of the pictures that are there already, which may be another machine's, or auto."""
    for path in top.glob("*/run.json"):
        return cli.dtype(parse(path, read(path), "the file").get("dtype", "auto"))
    return "auto"


def identity(model):
    """A short name of a model's weights: of some 64 values of every tensor, to the bit."""
    whole = hashlib.sha256()
    for name, tensor in model.named_parameters():
        some = tensor.detach().flatten()[::max(1, tensor.numel() // 64)].float().cpu()
        whole.update(name.encode() + some.numpy().tobytes())
    return whole.hexdigest()[:16]


def claim(args, work, model):
    """The settings, written to OUT/run.json, or found there the same; raises FuseDiTError."""
    prompts = hashlib.sha256(json.dumps([work.prompts, work.files]).encode()).hexdigest()[:16]
    said = dict(benchmark=args.name, model=args.model, weights=identity(model), prompts=prompts,
                images=work.images, size=model.config.image_size, seed=args.seed, steps=args.steps,
                guidance=args.guidance, dtype=str(next(model.dit.parameters()).dtype)[6:])
    if [*args.guidance_span] != [0, 1]:
        said |= dict(guidance_span=args.guidance_span)
    path = args.out / "run.json"            # looked for last: another process may just write it
    taken = args.out.exists() and any(p.name[0] != "." for p in args.out.iterdir())
    if path.exists():
        before = parse(path, read(path), "the file")
        other = [f"{k} {before.get(k)}, now {v}" for k, v in said.items()
                 if k != "model" and before.get(k) != v]           # it may have moved
        if other:
            raise FuseDiTError(f"{args.out} holds pictures drawn otherwise ({'; '.join(other)}): "
                               "give another --out, or delete it")
        return before
    if taken:
        raise FuseDiTError(f"{args.out} is not empty and has no run.json: give another --out")
    write(path, (json.dumps(said, indent=1) + "\n").encode())
    return said


def picture_seed(seed, prompt, image):
    """The seed of a picture's noise, which sample.py --seed takes, too."""
    return int(np.random.SeedSequence((seed, prompt, image)).generate_state(1)[0])


def paint(args, work, model, vae, device, settings):
    """Draw what is missing in OUT/images of this process's share; is all there now, by its doing?

    A batch is always of the same pictures, whoever draws it and whatever of it is there, since sums
    of other batches may differ in their last bit, and a picture then by a level. So of a batch that
    was cut short all is drawn again; the files that are there stay.
    """
    rank, world = backend.rank_and_world()
    paths = [[args.out / "images" / file for file in files] for files in work.files]
    each, size = max(1, args.batch_size // work.images), args.batch_size
    share = [range(len(paths))[i:i + each] for i in range(0, len(paths), each)][rank::world]
    clean({path for group in share for k in group for path in paths[k]} | set(
        () if rank else [args.out / "run.json", *(args.out / "images" / f for f in work.texts)]),
        args.out)
    for name, text in work.texts.items() if rank == 0 else ():
        if not (args.out / "images" / name).exists():
            write(args.out / "images" / name, text.encode())
    batches, done = [], 0
    for group in share:
        places = [(k, i) for k in group for i in range(work.images)]
        for part in [places[at:at + size] for at in range(0, len(places), size)]:
            if all(paths[k][i % len(paths[k])].exists() for k, i in part):
                done += len(part)
            else:
                batches.append(part)
    jobs = [[(work.prompts[k], picture_seed(args.seed, k, i)) for k, i in part] for part in batches]
    side, begin = model.config.image_size // (vae.factor if vae else 1), time.monotonic()
    drawn = draw(jobs, model, vae, (side, side), args, device, done, quiet=rank > 0)
    places = [place for part in batches for place in part]
    with ThreadPoolExecutor(4) as pool:     # a PNG takes as long as some steps of a GPU
        saved, row, seeds = [], [], []      # the last two: of a grid, so far
        for (k, i), (prompt, seed, picture, _) in zip(places, drawn, strict=True):
            saved = [job for job in saved if not job.done() or job.result()]   # raises its error
            if len(paths[k]) == work.images:
                saved.append(pool.submit(save, picture, paths[k][i], notes(prompt, seed, args)))
                continue
            row, seeds = [*row, picture], [*seeds, str(seed)]
            if len(row) == work.images:
                info = notes(prompt, " ".join(seeds), args)
                saved.append(pool.submit(save, two_rows(row), paths[k][0], info))
                row, seeds = [], []
        for job in saved:
            job.result()
    if batches and not done and world == 1:                # else it is no speed of the whole
        speed = round(sum(map(len, batches)) / (time.monotonic() - begin), 3)
        settings |= dict(images_per_s=speed, device=str(device))
        write(args.out / "run.json", (json.dumps(settings, indent=1) + "\n").encode())
    return bool(batches or rank == 0) and all(path.exists() for part in paths for path in part)


def clean(paths, out):
    """Delete what a killed run had half written of these."""
    for half in out.rglob(".*.tmp"):
        if half.with_name(half.name[1:].rsplit(".", 2)[0]) in paths:
            half.unlink()


def two_rows(pictures):
    """Four pictures on one, in reading order, as DPG-Bench's scorer cuts them out again."""
    w, h = pictures[0].size
    page = Image.new("RGB", (2 * w, 2 * h))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % 2 * w, i // 2 * h))
    return page


def save(picture, path, info):
    """As a PNG with its notes, or a JPEG that loses little; a file that is there is left alone."""
    if not path.exists():
        data, png = io.BytesIO(), path.suffix == ".png"
        picture.save(data, **dict(format="PNG", pnginfo=info) if png else dict(
            format="JPEG", quality=95, subsampling=0))
        write(path, data.getvalue())


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        tmp.write_bytes(data)

"""Scores images: shapes with the pixel detector, emoji by real images, folders by distance."""
import random

from tqdm import tqdm

from fusedit_lib.data.images import read_image, read_square
from fusedit_lib.evaluation import (
    emoji,
    emoji_copies,
    emoji_features,
    emoji_scorer,
    figures,
    metrics,
    results,
)
from fusedit_lib.evaluation.emoji_gallery import Gallery
from fusedit_lib.evaluation.unseen_words import UNSEEN_WORDS
from fusedit_lib.files import atomic_write, file_stem
from fusedit_lib.shapes import detector, render, scenes


def score_shapes(folder, n, seed, settings):
    """Score the images of the shapes benchmark in folder/images; writes shapes.json and shapes.png.

    Existing files are overwritten, since both are determined by the images.
    """
    images = []
    for k in range(n):
        images.append(read_image((folder / "images" / f"{k:05}.png").read_bytes()))
    rows = judge_shapes(images, n, seed)
    result = results.make_result("shapes", rows, settings)
    results.print_result(result)
    results.write(result, folder / "shapes.json", overwrite=True)
    with atomic_write(folder / "shapes.png") as tmp:
        figures.verdict_grid(scenes.CATEGORIES, rows, images).save(tmp, "PNG")


def judge_shapes(images, n, seed):
    """The rows of a result of the shapes benchmark, from an image for each of its n prompts."""
    rows = []
    prompts = scenes.evaluation_prompts(n, seed)
    for (category, described, prompt), image in zip(prompts, images, strict=True):
        mistake = detector.mismatch(described, detector.detect(image))
        rows.append(dict(category=category, prompt=prompt, right=int(not mistake), why=mistake))
    return rows


def score_detector(n, seed):
    """Print the detector's own score on n exact renders of scenes of every kind."""
    wrong = 0
    for i in tqdm(range(n), unit="image", desc="detecting", disable=None):
        rng = random.Random(f"ground truth {seed} {i}")
        scene = scenes.random_scene(rng)
        image = render.render(scene, scenes.layout(scene, rng))
        mistake = detector.mismatch(scene, detector.detect(image))
        if mistake:
            wrong += 1
            tqdm.write(f"wrong: {mistake}; rendered: {scenes.caption(scene, rng)}")
    print(f"detector: {n - wrong} of {n} ground-truth renders detected correctly "
          f"({1 - wrong / n:.2%})")


def score_emoji(folder, gallery, seed, settings, nearest=None):
    """Score the images of the emoji benchmark in folder/images; writes emoji.json.

    gallery: see open_gallery. nearest: a PNG to show images beside training images in.
    """
    prompts = emoji.choose_prompts(gallery.images, UNSEEN_WORDS, seed)
    prompts = prompts[:settings["prompts_drawn"]]
    drawn = read_drawn(folder, prompts, settings["height"])
    result = emoji.make_result(emoji.judge(prompts, drawn, gallery),
                               settings | dict(gallery=gallery.digest))
    emoji.print_result(result)
    rows = result["prompts"]
    emoji_copies.add_ratios(rows, drawn, gallery)
    emoji_copies.print_copies(rows, gallery)
    results.write(result, folder / "emoji.json", overwrite=True)
    if nearest is not None:
        emoji_copies.draw_nearest(rows, drawn, gallery, nearest)


def score_emoji_scorer(data, size, n, seed, device):
    """Score the scorer of the emoji benchmark on n changed real images of size x size pixels."""
    emoji_scorer.score(open_gallery(data, size, device), n or emoji_scorer.IMAGES, seed)


def open_gallery(data, size, device):
    """The Gallery of the shards in the folder `data`, at size x size pixels. Raises FuseDiTError.

    The first time, this computes the features of all real images and stores them in the folder.
    """
    return Gallery(data, size, emoji_features.load_extractor(device), device)


def read_drawn(folder, prompts, size):
    """The images of the emoji benchmark, uint8 [3,size,size]."""
    images = folder / "images"
    return [read_square((images / f"{k:05}.png").read_bytes(), size) for k in range(len(prompts))]


def score_distance(real, fake, extractor, device, batch_size, workers, out=None):
    """Write the Frechet and kernel distances between two folders of images.

    out: by default fid.json, or fd-NAME.json with another network, beside the folder `fake`.
    """
    real_paths = metrics.image_files(real)
    fake_paths = metrics.image_files(fake)
    x = metrics.extract_features(real_paths, extractor, device, batch_size, workers)
    y = metrics.extract_features(fake_paths, extractor, device, batch_size, workers)
    distance = metrics.frechet(x, y)
    kid = metrics.kid(x, y)

    label = extractor.label
    print(f"{label:<26}{distance:10.4f}   {len(x)} real, {len(y)} drawn: compare only distances "
          "with the same numbers of images")
    print(f"{'KID x 1000':<26}{1000 * kid:10.4f}   unbiased: comparable for any number of images")
    result = dict(benchmark="distance", label=label, distance=distance, kid=kid, real=len(x),
                  fake=len(y), folders=[str(real), str(fake)])
    if out is None:
        out = fake.parent / f"{file_stem(label, 200)}.json"
    results.write(result, out)

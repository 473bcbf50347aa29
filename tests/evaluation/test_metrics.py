"""Distances, compared with closed forms and SciPy; uncertainty; networks; the fid command."""
import importlib.util

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from test_evaluate import command, read_json

from fusedit import FuseDiTError
from fusedit_lib.evaluation import metrics

CPU = torch.device("cpu")


def normal(*shape, seed=0):
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def constant(value, d):
    return torch.full((d,), value, dtype=torch.float64)


def gaussian(mean, covariance, n, seed=0):
    """n samples with exactly this mean and covariance (with the factor 1 / (n - 1))."""
    x = normal(n, len(mean), seed=seed)
    x -= x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (n - 1))
    white = torch.linalg.solve_triangular(root, x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def random_covariance(d, seed):
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def frechet_by_scipy(x, y):
    """The textbook formula, with a matrix root."""
    cov_x = np.cov(x.numpy(), rowvar=False)
    cov_y = np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    return shift + np.trace(cov_x + cov_y - 2 * root)


# ------------------------------------------------------------------------------ distances

def test_frechet_of_two_gaussians():
    """(m1 - m2)^2 + (s1 - s2)^2 in one dimension; the sum of these if the covariances commute."""
    one = torch.ones(1, 1, dtype=torch.float64)
    x = gaussian(one[0] * 3, one * 4, 50)
    y = gaussian(one[0], one * 25, 70, 1)
    expected = 2**2 + (2 - 5) ** 2
    assert metrics.frechet(x, y) == pytest.approx(expected, rel=1e-9)

    q = torch.linalg.qr(random_covariance(6, 0)).Q
    a = torch.arange(1., 7).double()
    b = torch.tensor([3., 1, 4, 1, 5, 9]).double()
    x = gaussian(constant(0, 6), q @ a.diag() @ q.T, 200)
    y = gaussian(constant(1, 6), q @ b.diag() @ q.T, 300, 1)
    spread = (a.sqrt() - b.sqrt()).square().sum()
    expected = 6 + float(spread)
    assert metrics.frechet(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d, n, m", [(5, 40, 60), (64, 500, 300), (200, 1000, 1200)])
def test_frechet_against_scipys_matrix_root(d, n, m):
    x = gaussian(constant(0, d), random_covariance(d, 1), n)
    y = gaussian(constant(0.1, d), random_covariance(d, 2), m, 1)
    assert metrics.frechet(x, y) == pytest.approx(frechet_by_scipy(x, y), rel=1e-6)


def test_frechet_with_fewer_images_than_features():
    """Embedding in more dimensions makes the covariances singular but changes no distance."""
    x = gaussian(constant(0, 8), random_covariance(8, 1), 30)
    y = gaussian(constant(1, 8), random_covariance(8, 2), 40, 1)
    embed = torch.linalg.qr(normal(300, 8)).Q.T                        # [8,300]
    expected = frechet_by_scipy(x, y)
    assert metrics.frechet(x @ embed, y @ embed) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_set_with_itself_shifted_and_scaled():
    x = normal(20, 300)
    assert abs(metrics.frechet(x, x)) < 1e-6
    assert abs(metrics.frechet(x, x.flip(0))) < 1e-6       # the order does not matter
    assert metrics.frechet(x, x + 2) == pytest.approx(4 * 300, rel=1e-9)
    shift = float((2 * x.mean(0)).square().sum())
    spread = float(4 * x.var(0).sum())      # (3 s - s)^2
    assert metrics.frechet(x, 3 * x) == pytest.approx(shift + spread, rel=1e-9)


def mean_kernel(a, b, same=False):
    """The mean kernel over pairs of rows, by definition; same: only pairs of different rows."""
    values = []
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            if not (same and i == j):
                values.append(float((p @ q / a.shape[1] + 1) ** 3))
    return sum(values) / len(values)


def test_kid_matches_its_definition():
    x = normal(23, 7, seed=23)
    y = normal(31, 7, seed=31)
    within = mean_kernel(x, x, True) + mean_kernel(y, y, True)
    expected = within - 2 * mean_kernel(x, y)
    for block in (1, 5, 2048):
        assert metrics.kid(x, y, block) == pytest.approx(expected, rel=1e-9)

    a, b = normal(2, 1, 7)                  # all images of a set are equal
    within = mean_kernel(a, a) + mean_kernel(b, b)
    expected = within - 2 * mean_kernel(a, b)
    distance = metrics.kid(a.expand(5, 7), b.expand(9, 7))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_kid_is_unbiased_and_frechet_is_not():
    generator = torch.Generator().manual_seed(0)
    kids = []
    frechets = []
    for _ in range(400):                    # two sets of 20 from the same distribution
        x = torch.randn(20, 16, dtype=torch.float64, generator=generator)
        y = torch.randn(20, 16, dtype=torch.float64, generator=generator)
        kids.append(metrics.kid(x, y))
        frechets.append(metrics.frechet(x, y))
    assert abs(np.mean(kids)) < 4 * np.std(kids) / 20
    assert min(kids) < 0
    assert np.mean(frechets) > 5


# ------------------------------------------------------------------------------ uncertainty

@pytest.mark.slow
def test_bootstrap_intervals_cover_the_truth_in_95_percent():
    rng = np.random.default_rng(0)
    overall_hits = 0
    b_hits = 0
    for _ in range(200):
        groups = {"a": rng.random(60) < 0.3, "b": rng.random(60) < 0.98}
        intervals = metrics.intervals(groups)
        low, high = intervals["overall"]
        overall_hits += low <= 0.64 <= high
        low, high = intervals["b"]
        b_hits += low <= 0.98 <= high
    assert 180 <= overall_hits <= 198
    assert b_hits >= 180


def test_bootstrap_intervals_have_the_expected_width():
    """The width of a mean's interval is 2 x 1.96 sd / sqrt(n)."""
    values = np.random.default_rng(0).random(400)
    low, high = metrics.intervals(dict(a=values))["a"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert low < values.mean() < high
    low, high = metrics.intervals(dict(a=[1] * 100))["a"]  # not [1, 1]: Jeffreys, Beta(100.5, 0.5)
    assert low == pytest.approx(0.9753, abs=0.002)
    assert high > 0.999


@pytest.mark.slow
def test_the_paired_test_has_the_stated_false_positive_rate():
    """p is below 0.05 in 5 % of comparisons of equal models."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        groups = {"a": rng.integers(-1, 2, 50), "b": rng.integers(-1, 2, 50)}
        wrong += metrics.paired_test(groups).p < 0.05
    assert 5 <= wrong <= 27


def test_a_real_difference_is_found():
    test = metrics.paired_test(dict(a=[1] * 30 + [0] * 60, b=[0] * 90))
    low, high = test.interval
    assert test.mean == pytest.approx(1 / 6)
    assert 0 < low < test.mean < high
    assert test.p < 0.001
    assert metrics.paired_test(dict(a=[0] * 50)).p == 1
    # Four better, none worse: all signs are equal in 2 of 16 cases, the p of the sign test.
    assert metrics.paired_test(dict(a=[1] * 4)).p == pytest.approx(2 / 16, abs=0.015)


# ------------------------------------------------------------------------------ images

@pytest.fixture
def folders(tmp_path):
    """Folders a and b with 20 random images each in subfolders, and blurred, with those of a."""
    rng = np.random.default_rng(0)
    (tmp_path / "blurred").mkdir()
    for k in range(40):
        pixels = rng.integers(0, 256, (6, 9, 3), np.uint8)
        image = Image.fromarray(pixels).resize((48, 32))
        path = tmp_path / "ab"[k % 2] / str(k % 3) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if k % 2 == 0:
            blurred = image.filter(ImageFilter.GaussianBlur(3))
            blurred.save(tmp_path / "blurred" / f"{k}.webp", lossless=True)
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    return tmp_path


def fid(folders, fake, *more):
    """Run `evaluate.py fid` on folder a and another folder, with EfficientNet's features."""
    command("fid", "--real", folders / "a", "--fake", folders / fake, "--features",
            "efficientnet-lite0", "--device", "cpu", *more)


def test_fid_as_a_command(folders, capsys):
    fid(folders, "b", "--batch-size", 7)
    near = read_json(folders / "fd-efficientnet-lite0.json")
    output = capsys.readouterr().out
    assert "FD (efficientnet-lite0)" in output
    assert "FID" not in output
    assert "20 real, 20 drawn" in output

    fid(folders, "blurred", "--out", folders / "far.json")
    far = read_json(folders / "far.json")
    assert far["label"] == "FD (efficientnet-lite0)"
    assert far["fake"] == 20
    assert far["distance"] > near["distance"] > 0
    assert far["kid"] > near["kid"]

    fid(folders, "a", "--out", folders / "same.json")
    assert abs(read_json(folders / "same.json")["distance"]) < 1e-4


def test_efficientnet_images_are_prepared_as_in_training():
    """(x - 127) / 128 at 224 pixels, as for the TensorFlow Lite models."""
    extractor = metrics.load_extractor("efficientnet-lite0", CPU)
    for value, number in ((127, 0), (255, 1), (0, -127 / 128)):
        x = extractor.prepare(Image.new("RGB", (30, 20), (value,) * 3))
        assert x.shape == (3, 224, 224)
        assert (x == number).all()
    assert extractor.network(x[None]).shape == (1, 1280)


class Layers(torch.nn.Module):
    """Replaces Inception's layers: 2048 numbers that distinguish images."""

    def forward(self, x):                   # [B,3,299,299] -> [B,2048]
        return torch.nn.functional.adaptive_avg_pool2d(x, 27).flatten(1)[:, :2048]


class Inception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


def prepare_like_clean_fid(path):
    """Read an image file as [3,299,299]: bicubic, channel by channel in float, clipped."""
    pixels = np.asarray(Image.open(path), np.float32)
    planes = []
    for channel in range(3):
        plane = Image.fromarray(pixels[..., channel], "F")
        planes.append(np.asarray(plane.resize((299, 299), Image.BICUBIC)))
    return torch.from_numpy(np.stack(planes).clip(0, 255))


def test_fid_prepares_images_as_clean_fid_does(folders):
    """Inception then receives (x - 128) / 128. Its own weights are not available here."""
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid")
    torch.jit.script(Inception()).save(folders / metrics.INCEPTION)
    extractor = metrics.load_extractor("inception", CPU, folders)
    paths = metrics.image_files(folders / "a")
    features = metrics.extract_features(paths, extractor, CPU, 7, 2)
    images = torch.stack([prepare_like_clean_fid(path) for path in paths])
    expected = Layers()((images - 128) / 128)
    assert extractor.label == "FID"
    assert features.shape == (20, 2048)
    assert torch.allclose(features.float(), expected, atol=1e-5)

    command("fid", "--real", folders / "a", "--fake", folders / "b", "--inception", folders,
            "--device", "cpu")
    result = read_json(folders / "fid.json")
    assert result["label"] == "FID"
    assert result["distance"] > 0


def test_a_vision_model_of_transformers(folders):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                          image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folders / "dino")
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folders / "dino")
    command("fid", "--real", folders / "a", "--fake", folders / "b", "--features",
            folders / "dino", "--device", "cpu")
    assert read_json(folders / "fd-dino.json")["label"] == "FD (dino)"


def test_errors_say_what_is_wrong(folders):
    words = ["fid", "--real", folders / "a", "--device", "cpu", "--features"]
    with pytest.raises(FuseDiTError, match="nor a vision model that transformers can load"):
        command(*words, folders / "nothing", "--fake", folders / "b")
    with pytest.raises(FuseDiTError, match="contains no images"):
        command(*words, "efficientnet-lite0", "--fake", folders / "nothing")
    (folders / metrics.INCEPTION).write_bytes(b"half of it")
    if importlib.util.find_spec("cleanfid"):
        with pytest.raises(FuseDiTError, match="is damaged .*download it again"):
            command(*words, "inception", "--fake", folders / "b", "--inception", folders)
    (folders / metrics.INCEPTION).unlink()
    (folders / "b" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0cut")
    with pytest.raises(FuseDiTError, match="cannot read .*cut.jpg"):
        command(*words, "efficientnet-lite0", "--fake", folders / "b")
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid")
    with pytest.raises(FuseDiTError, match="wget -P .*inception-2015-12-05.pt"):
        command(*words, "inception", "--fake", folders / "b", "--inception", folders)

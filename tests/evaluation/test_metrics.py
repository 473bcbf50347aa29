"""Distances against closed forms and SciPy; how sure scores are; extractors; fid as a command."""
import importlib.util
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from test_evaluate import command

from fusedit import FuseDiTError
from fusedit_lib.evaluation import metrics


def gaussian(mean, covariance, n, seed=0):
    """n samples of exactly this mean and (n - 1) covariance."""
    rng, root = torch.Generator().manual_seed(seed), torch.linalg.cholesky
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=rng)
    x -= x.mean(0)
    white = torch.linalg.solve_triangular(root(x.T @ x / (n - 1)), x.T, upper=False)
    return (root(covariance) @ white).T + mean


def covariance(d, seed):
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def by_scipy(x, y):
    sx, sy = (np.cov(f.numpy(), rowvar=False) for f in (x, y))
    root = scipy.linalg.sqrtm(sx @ sy).real
    return float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(sx + sy - 2 * root)


# ------------------------------------------------------------------------------ distances

def test_frechet_of_two_gaussians():
    """On a line: (m1 - m2)^2 + (s1 - s2)^2; with commuting covariances the same a dimension."""
    one = torch.ones(1, 1, dtype=torch.float64)
    x, y = gaussian(one[0] * 3, one * 4, 50), gaussian(one[0], one * 25, 70, 1)
    assert metrics.frechet(x, y) == pytest.approx(2**2 + (2 - 5) ** 2, rel=1e-9)
    q = torch.linalg.qr(covariance(6, 0)).Q
    a, b = torch.arange(1., 7).double(), torch.tensor([3., 1, 4, 1, 5, 9]).double()
    x = gaussian(torch.zeros(6).double(), q @ a.diag() @ q.T, 200)
    y = gaussian(torch.ones(6).double(), q @ b.diag() @ q.T, 300, 1)
    want = 6 + float((a.sqrt() - b.sqrt()).square().sum())
    assert metrics.frechet(x, y) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("d, n, m", [(5, 40, 60), (64, 500, 300), (200, 1000, 1200)])
def test_frechet_against_scipys_matrix_root(d, n, m):
    x = gaussian(torch.zeros(d).double(), covariance(d, 1), n)
    y = gaussian(torch.full([d], 0.1).double(), covariance(d, 2), m, 1)
    assert metrics.frechet(x, y) == pytest.approx(by_scipy(x, y), rel=1e-6)


def test_frechet_with_fewer_pictures_than_features():
    """Turned into more dimensions, which changes no distance, covariances become singular."""
    x = gaussian(torch.zeros(8).double(), covariance(8, 1), 30)
    y = gaussian(torch.ones(8).double(), covariance(8, 2), 40, 1)
    turn = torch.linalg.qr(torch.randn(300, 8, dtype=torch.float64)).Q.T       # [8, 300]
    want = by_scipy(x, y)
    assert metrics.frechet(x @ turn, y @ turn) == pytest.approx(want, rel=1e-6)
    x = torch.randn(20, 300, dtype=torch.float64)
    assert abs(metrics.frechet(x, x)) < 1e-6               # equal sets, in any order, and shifted
    assert abs(metrics.frechet(x, x.flip(0))) < 1e-6
    assert metrics.frechet(x, x + 2) == pytest.approx(4 * 300, rel=1e-9)
    assert metrics.frechet(x, 3 * x) == pytest.approx(
        4 * float(x.var(0).sum() + x.mean(0).square().sum()), rel=1e-9)


def test_kid_is_its_definition():
    x, y = (torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            for n in (23, 31))
    k = [[[float((p @ q / 7 + 1) ** 3) for q in b] for p in a] for a, b in ((x, x), (y, y), (x, y))]
    within = [sum(sum(row) - row[i] for i, row in enumerate(k[j])) / (n * (n - 1))
              for j, n in ((0, 23), (1, 31))]
    want = sum(within) - 2 * sum(map(sum, k[2])) / (23 * 31)
    for block in (1, 5, 2048):
        assert metrics.kid(x, y, block) == pytest.approx(want, rel=1e-9)
    a, b = torch.randn(2, 7, dtype=torch.float64)          # all pictures alike, in either set
    want = sum(float(p @ q / 7 + 1) ** 3 * s for p, q, s in ((a, a, 1), (b, b, 1), (a, b, -2)))
    assert metrics.kid(a.expand(5, 7), b.expand(9, 7)) == pytest.approx(want, rel=1e-6)


def test_kid_has_no_bias_where_frechets_distance_has():
    def draw(n):
        return torch.randn(n, 16, dtype=torch.float64, generator=rng)
    rng = torch.Generator().manual_seed(0)
    kids, frechets = zip(*((metrics.kid(x, y), metrics.frechet(x, y)) for x, y in (
        (draw(20), draw(20)) for _ in range(400))), strict=True)
    assert abs(np.mean(kids)) < 4 * np.std(kids) / 20 and min(kids) < 0
    assert np.mean(frechets) > 5            # of equal distributions


# ------------------------------------------------------------------------------ how sure

@pytest.mark.slow
def test_bootstrap_intervals_hold_the_truth_nineteen_times_of_twenty():
    rng, hits, sure = np.random.default_rng(0), 0, 0
    for _ in range(200):
        found = metrics.intervals({c: rng.random(60) < p for c, p in (("a", 0.3), ("b", 0.98))})
        hits += found["overall"][0] <= 0.64 <= found["overall"][1]
        sure += found["b"][0] <= 0.98 <= found["b"][1]
    assert 180 <= hits <= 198 and sure >= 180


def test_bootstrap_intervals_have_their_width():
    """Of a mean 2 x 1.96 sd / sqrt(n)."""
    rng = np.random.default_rng(0)
    values = rng.random(400)
    low, high = metrics.intervals(dict(a=values))["a"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert low < values.mean() < high
    low, high = metrics.intervals(dict(a=[1] * 100))["a"]  # not [1, 1]: Jeffreys, Beta(100.5, 0.5)
    assert low == pytest.approx(0.9753, abs=0.002) and high > 0.999


@pytest.mark.slow
def test_the_paired_test_is_as_often_wrong_as_it_says():
    """Of equal models 5 % come out below 0.05."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        wrong += metrics.paired({c: rng.integers(-1, 2, 50) for c in "ab"})[2] < 0.05
    assert 5 <= wrong <= 27


def test_a_difference_that_is_there_is_found():
    mean, (low, high), p = metrics.paired(dict(a=[1] * 30 + [0] * 60, b=[0] * 90))
    assert mean == pytest.approx(1 / 6) and 0 < low < mean < high and p < 0.001
    assert metrics.paired(dict(a=[0] * 50))[2] == 1
    # Four better, none worse: all signs alike come in 2 of 16, the sign test's p.
    assert metrics.paired(dict(a=[1] * 4))[2] == pytest.approx(2 / 16, abs=0.015)


# ------------------------------------------------------------------------------ pictures

@pytest.fixture
def folders(tmp_path):
    """Two sets of drawn pictures, below each other in folders, and the first one blurred."""
    rng = np.random.default_rng(0)
    for k in range(40):
        base = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((48, 32))
        path = tmp_path / "ab"[k % 2] / str(k % 3) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        base.save(path)
        if k % 2 == 0:
            (tmp_path / "blurred").mkdir(exist_ok=True)
            base.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "blurred" / f"{k}.webp",
                                                          lossless=True)
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    return tmp_path


def test_fid_as_a_command(folders, capsys):
    command("fid", "--real", folders / "a", "--fake", folders / "b", "--features",
            "efficientnet-lite0", "--device", "cpu", "--batch-size", 7)
    near = json.loads((folders / "fd-efficientnet-lite0.json").read_text())
    said = capsys.readouterr().out
    assert "FD (efficientnet-lite0)" in said and "FID" not in said and "20 real, 20 drawn" in said
    command("fid", "--real", folders / "a", "--fake", folders / "blurred", "--features",
            "efficientnet-lite0", "--out", folders / "far.json", "--device", "cpu")
    far = json.loads((folders / "far.json").read_text())
    assert far["label"] == "FD (efficientnet-lite0)" and far["fake"] == 20
    assert far["distance"] > near["distance"] > 0 and far["kid"] > near["kid"]
    command("fid", "--real", folders / "a", "--fake", folders / "a", "--features",
            "efficientnet-lite0", "--out", folders / "same.json", "--device", "cpu")
    assert abs(json.loads((folders / "same.json").read_text())["distance"]) < 1e-4


def test_lite0_gets_what_it_was_trained_on():
    """(x - 127) / 128 at 224 pixels, of the TensorFlow lite models."""
    _, prepare, network = metrics.extractor("efficientnet-lite0", torch.device("cpu"))
    for value, number in ((127, 0), (255, 1), (0, -127 / 128)):
        x = prepare(Image.new("RGB", (30, 20), (value,) * 3))
        assert x.shape == (3, 224, 224) and (x == number).all()
    assert network(x[None]).shape == (1, 1280)


class Layers(torch.nn.Module):
    def forward(self, x):                   # [B,3,299,299] -> 2048 numbers that tell pictures apart
        return torch.nn.functional.adaptive_avg_pool2d(x, 27).flatten(1)[:, :2048]


class Inception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


def test_fid_prepares_pictures_as_clean_fid_does(folders):
    """Bicubic a channel in float, clipped, (x - 128) / 128; Inception itself is not at hand."""
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid")
    torch.jit.script(Inception()).save(folders / metrics.INCEPTION)
    label, prepare, network = metrics.extractor("inception", torch.device("cpu"), folders)
    paths = metrics.pictures(folders / "a")
    found = metrics.features(paths, prepare, network, torch.device("cpu"), 7, 2)
    want = []
    for path in paths:
        pixels = np.asarray(Image.open(path), np.float32)
        planes = [np.asarray(Image.fromarray(pixels[..., c], "F").resize((299, 299), Image.BICUBIC))
                  for c in range(3)]
        want.append(torch.from_numpy(np.stack(planes).clip(0, 255)))
    want = Layers()((torch.stack(want) - 128) / 128)
    assert label == "FID" and found.shape == (20, 2048)
    assert torch.allclose(found.float(), want, atol=1e-5)
    command("fid", "--real", folders / "a", "--fake", folders / "b", "--inception", folders,
            "--device", "cpu")
    result = json.loads((folders / "fid.json").read_text())
    assert result["label"] == "FID" and result["distance"] > 0


def test_a_vision_model_of_transformers(folders, capsys):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             image_size=28, patch_size=14)).save_pretrained(folders / "dino")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
                      ).save_pretrained(folders / "dino")
    command("fid", "--real", folders / "a", "--fake", folders / "b", "--features",
            folders / "dino", "--device", "cpu")
    assert json.loads((folders / "fd-dino.json").read_text())["label"] == "FD (dino)"


def test_what_is_wrong_is_said(folders):
    words = ["fid", "--real", folders / "a", "--device", "cpu", "--features"]
    with pytest.raises(FuseDiTError, match="no vision model of transformers"):
        command(*words, folders / "nothing", "--fake", folders / "b")
    with pytest.raises(FuseDiTError, match="holds no pictures"):
        command(*words, "efficientnet-lite0", "--fake", folders / "nothing")
    (folders / metrics.INCEPTION).write_bytes(b"half of it")
    if importlib.util.find_spec("cleanfid"):
        with pytest.raises(FuseDiTError, match="is damaged .*fetch it again"):
            command(*words, "inception", "--fake", folders / "b", "--inception", folders)
    (folders / metrics.INCEPTION).unlink()
    (folders / "b" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0cut")
    with pytest.raises(FuseDiTError, match="cannot read .*cut.jpg"):
        command(*words, "efficientnet-lite0", "--fake", folders / "b")
    pytest.importorskip("cleanfid", reason="pip install --no-deps clean-fid")
    with pytest.raises(FuseDiTError, match="wget -P .*inception-2015-12-05.pt"):
        command(*words, "inception", "--fake", folders / "b", "--inception", folders)

"""The measures that results are reported in, on sets whose answers are known."""

import math

import numpy as np
import pytest
import torch
from conftest import cloud
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gmgan_mnist
import mmd_gan
import sgan_mnist
import sinkhorn_gan
from mmd_gan import frechet_distance, load_images, precision_recall


def test_frechet_distance_of_known_sets():
    """Equal ones, and features that never fire."""
    x = cloud(200, 5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x.float(), x.float()) == pytest.approx(0, abs=1e-4)
    flat = x * torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    assert frechet_distance(flat, flat + 1) == pytest.approx(5, rel=1e-6)


def test_frechet_distance_against_matrix_square_root():
    """Heusel et al. 2017, eq. 6, with the root of the product taken by eigenvalues of a symmetric matrix."""
    x, y = (cloud(300, 6, s) @ cloud(6, 6, s + 2) + s for s in (0, 1))
    (mean_x, cov_x), (mean_y, cov_y) = ((v.numpy().mean(0), np.cov(v.numpy(), rowvar=False)) for v in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root_x = vectors * np.sqrt(values) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root_x @ cov_y @ root_x)).sum()
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-8)


def brute_share(points, others, k):
    """Of Kynkaanniemi et al. 2019, eq. 1-3, a pair at a time: the share of points near others."""
    inside = 0
    points, others = points.tolist(), others.tolist()
    for p in points:
        reaches = [sorted(math.dist(q, r) for r in others)[k] for q in others]  # the nearest is q itself
        inside += any(math.dist(p, q) <= reach for q, reach in zip(others, reaches))
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_a_loop(k):
    real, fake = cloud(30, 3), 0.7 * cloud(25, 3, 1) + 1
    expected = [brute_share(fake, real, k), brute_share(real, fake, k)]
    assert all(0 < v < 1 for v in expected)
    assert precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-6)


def test_metrics_of_almost_nothing():
    """None where there is no number."""
    x = cloud(8, 4)
    for pair in ((x[:1], x), (x, x[:1]), (x * math.nan, x)):
        assert frechet_distance(*pair) is None
    assert frechet_distance(x[:2], x[2:4]) >= 0
    for few in (x[:1], x[:3]):
        assert precision_recall(few, x) == precision_recall(x, few) == [None, None]
    assert precision_recall(x[:4], x[:4]) == [1, 1]


def test_image_metrics_of_class_shares():
    """Of a classifier that finds the brightest of the first ten pixels."""
    judge = nn.Sequential(nn.Flatten(), nn.Linear(784, 16, bias=False), nn.Linear(16, 10, bias=False))
    for layer in judge[1:]:
        nn.init.eye_(layer.weight).requires_grad_(False)
    real = torch.randint(250, (100, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    fake = real.clone()
    fake[range(100), 0, torch.arange(100) % 5] = 255  # only half of the classes
    metrics = mmd_gan.image_metrics(fake, real, judge)
    assert metrics["class_shares"] == pytest.approx([0.2] * 5 + [0.0] * 5)
    assert {"fid", "precision", "recall"} < metrics.keys()
    same = mmd_gan.image_metrics(mmd_gan.to_float(fake), fake, judge)
    assert same["precision"] == same["recall"] == 1 and same["fid"] == pytest.approx(0, abs=1e-4)
    more = mmd_gan.image_metrics(torch.cat((real, 255 - real)), real, judge)  # of more samples than images
    assert more["precision"] == more["recall"] == 1 and more["fid"] > 0.01


def test_classifier_is_made_once_for_its_images(tmp_path, capsys):
    images, labels, _, _ = load_images("digits", "", "test")
    args = mmd_gan.Args(dataset="digits", run_dir=tmp_path)
    first = mmd_gan.load_classifier(args, images[:500], labels[:500])
    assert "training the classifier" in capsys.readouterr().out and not first.training
    found = first(mmd_gan.to_float(images[500:])).argmax(1)
    assert (found == labels[500:]).float().mean() > 0.8
    again = mmd_gan.load_classifier(args, images[:500], labels[:500])
    assert all(map(torch.equal, again.parameters(), first.parameters())) and capsys.readouterr().out == ""
    for other in (images[500:600], labels[500:600]), (images[500:600], labels[500:600].flip(0)):
        mmd_gan.load_classifier(args, *other)
    assert len(list(tmp_path.glob("classifier__*.pt"))) == 3


def test_cluster_metrics():
    """Ten clusters are matched to one class each; of more, each counts as its commonest class."""
    labels = torch.arange(10).repeat_interleave(10)
    same = gmgan_mnist.cluster_metrics(labels, 9 - labels)
    assert same == {"cluster_accuracy": 1.0, "cluster_nmi": pytest.approx(1)}
    assert gmgan_mnist.cluster_metrics(labels, labels // 2)["cluster_accuracy"] == 0.5
    finer = 2 * labels + torch.arange(100) % 2
    assert gmgan_mnist.cluster_metrics(labels, finer)["cluster_accuracy"] == 1.0
    assert gmgan_mnist.cluster_metrics(labels, torch.zeros_like(labels))["cluster_nmi"] == pytest.approx(0)


@pytest.mark.parametrize("count", [8, 100, 512])
def test_strata_and_sobol_latents_are_even(count):
    """A point of each cell, and Gaussian latents, whose mean and spread hardly vary."""
    points = sinkhorn_gan.kd_order(torch.randn(8200, 2, generator=torch.Generator().manual_seed(0)))
    assert len(points) == 8192 and len(points.unique(dim=0)) == len(points)
    torch.manual_seed(0)
    means = torch.stack([sinkhorn_gan.draw_strata(points, count).mean(0) for _ in range(50)])
    assert means.std(0).max() < 0.7 * count**-0.5
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(count)
    latents = torch.stack([sinkhorn_gan.draw_sobol(sobol) for _ in range(50)])
    assert latents.shape == (50, count, 2) and latents.isfinite().all()
    assert latents.mean(1).std(0).max() < 0.7 * count**-0.5
    assert abs(latents.std() - 1) < 0.1


@pytest.mark.parametrize("dataset, std", [("ring", 0.01), ("grid", 0.05)])
def test_toys(dataset, std):
    """The modes of the papers, points around them with their spread, and metrics of known samples."""
    angles = torch.arange(8) * (math.pi / 4)
    modes = torch.tensor([(a, b) for a in (-4.0, -2, 0, 2, 4) for b in (-4.0, -2, 0, 2, 4)])
    if dataset == "ring":
        modes = torch.stack((angles.cos(), angles.sin()), 1)
    k = len(modes)
    samples, measure = mmd_gan.load_toy(dataset)
    assert torch.equal(samples, mmd_gan.load_toy(dataset)[0]) and samples.shape == (100_000, 2)
    nearest = torch.cdist(samples, modes).argmin(1)
    shares = nearest.bincount(minlength=k) / len(samples)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / k), atol=0.005, rtol=0)
    noise = samples - modes[nearest]
    torch.testing.assert_close(noise.std(0), torch.full((2,), std), rtol=0.02, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), atol=std / 50, rtol=0)
    one = measure(modes[3].expand(500, 2))
    assert one == {"modes": 1, "high_quality": 1.0, "mode_kl": pytest.approx(math.log(k), rel=1e-6)}
    # 3 std of a 2-D Gaussian hold 1 - exp(-9/2) of it
    real = measure(samples[:50_000])
    assert real["modes"] == k and real["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    assert 0 <= real["mode_kl"] < 1e-3
    step = torch.tensor([std, 0.0])
    beside = measure(torch.cat((modes + 2.9 * step, modes + 3.1 * step)))
    assert beside == {"modes": k, "high_quality": 0.5, "mode_kl": pytest.approx(0, abs=1e-12)}
    assert measure(modes + 4 * step)["modes"] == 0


def test_average_against_a_hand_computation():
    """The first update copies; update i + 1 keeps min(0.999, (1 + i) / (10 + i)) of the average."""
    model = nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(model, multi_avg_fn=sgan_mnist.move_average)
    expected = 0.0
    for i, value in enumerate([3.0, 1.0, -2.0, 5.0, 0.5]):
        nn.init.constant_(model.weight, value)
        averaged.update_parameters(model)
        keep = (1 + i) / (10 + i) if i else 0.0
        expected = keep * expected + (1 - keep) * value
        assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-6)
    averages = [torch.zeros(1)]
    sgan_mnist.move_average(averages, [torch.ones(1)], torch.tensor(10**6))
    assert averages[0].item() == pytest.approx(0.001)


def test_digits_split():
    """1,437 images to train and 360 others to compare with, the same ones every time."""
    x, y, x_eval, y_eval = parts = load_images("digits", "", "test")
    assert x.shape == (1437, 28, 28) and x_eval.shape == (360, 28, 28) and x.dtype == torch.uint8
    assert y.shape == (1437,) and y_eval.shape == (360,) and y.dtype == torch.int64
    assert all(map(torch.equal, parts, load_images("digits", "", "test")))
    assert len(torch.cat((x, x_eval)).unique(dim=0)) == 1797
    assert y.bincount().min() > 120 and y_eval.bincount().min() > 20
    assert x.max() == 255 and x.min() == 0
    batch = mmd_gan.to_float(x)
    assert batch.shape == (1437, 1, 28, 28) and batch.max() == 1 and batch.min() == -1
    assert mmd_gan.to_float(batch) is batch


@pytest.mark.parametrize("dataset", ["mnist", "digits"])
def test_validation_leaves_the_test_images_out(dataset, tiny_mnist):
    """The last sixth of the training images takes the test images' place."""
    x, y, *_ = load_images(dataset, str(tiny_mnist), "test")
    x_train, y_train, x_eval, y_eval = load_images(dataset, str(tiny_mnist), "validation")
    assert len(x_train) == len(x) * 5 // 6
    assert torch.equal(torch.cat((x_train, x_eval)), x) and torch.equal(torch.cat((y_train, y_eval)), y)


def test_idx_files_are_read_as_they_were_written(tiny_mnist):
    sets = [load_images(name, str(tiny_mnist), "test") for name in ("mnist", "fashion-mnist", "kmnist")]
    for x, y, x_eval, y_eval in sets:
        assert len(x) == 240 and len(x_eval) == 60
        for images, labels in ((x, y), (x_eval, y_eval)):
            bands = [band.double().mean((1, 2)) for band in images.tensor_split(10, 1)]
            assert torch.equal(torch.stack(bands).argmax(0), labels)
    assert not torch.equal(sets[0][0], sets[1][0])

"""The short losses, of sgan_mnist.py, gmgan_mnist.py and cyclegan_mnist_usps.py, and changes of images."""

import math

import pytest
import torch
from torch.testing import assert_close

import cyclegan_mnist_usps as cyclegan
import gmgan_mnist as gmgan
import sgan_mnist


def numbers(*shape, seed=0):
    """Normal numbers in float64, with standard deviation 2."""
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# sgan_mnist.py


def test_discriminator_loss_by_its_definition():
    """Of p(fake) in a softmax over K + 1 logits, of which the last is 0."""
    real, fake = numbers(5, 4), numbers(7, 4, seed=1)
    of_real, of_fake = (1 / (1 + v.exp().sum(1)) for v in (real, fake))
    expected = -(1 - of_real).log().mean() - of_fake.log().mean()
    assert_close(sgan_mnist.discriminator_loss(real, fake), expected)
    large = torch.full((2, 4), 1e4)
    assert sgan_mnist.discriminator_loss(large, -large) == 0
    assert sgan_mnist.discriminator_loss(-large, large).isfinite()
    points = real.requires_grad_(), fake.requires_grad_()
    assert torch.autograd.gradcheck(sgan_mnist.discriminator_loss, points)


def test_feature_matching_loss():
    x, y = numbers(5, 3), numbers(4, 3, seed=1)
    expected = sum((x[:, k].sum() / 5 - y[:, k].sum() / 4) ** 2 for k in range(3))
    assert_close(sgan_mnist.feature_matching_loss(x, y), expected)


def test_align():
    """Divided by the shares and normalised; equal shares change nothing."""
    p = numbers(6, 4).softmax(1)
    assert_close(sgan_mnist.align(p, torch.full((4,), 0.25)), p)
    shares = [0.4, 0.3, 0.2, 0.1]
    for row, found in zip(p.tolist(), sgan_mnist.align(p, torch.tensor(shares)).tolist()):
        scaled = [v / s for v, s in zip(row, shares)]
        assert found == pytest.approx([v / sum(scaled) for v in scaled], rel=1e-6)


def test_pseudo_label_loss():
    """Only sure rows count, and the mean is over all."""
    logits = numbers(3, 4)
    p = torch.tensor([[0.9, 0.1, 0, 0], [0.4, 0.3, 0.2, 0.1], [0, 0, 0.2, 0.8]])
    expected = -(logits.softmax(1)[0, 0] * logits.softmax(1)[2, 3]).log() / 3
    assert_close(sgan_mnist.pseudo_label_loss(logits, p, 0.8), expected)
    assert sgan_mnist.pseudo_label_loss(logits, p, 0.95) == 0


def test_split_labels():
    """Balanced, disjoint, nested, by the seed alone; what cannot be is refused."""
    labels = torch.arange(200) % 10
    few, rest = sgan_mnist.split_labels(labels, 20, 3)
    assert (labels[few].bincount(minlength=10) == 2).all()
    assert sorted([*few.tolist(), *rest.tolist()]) == list(range(200))
    more, _ = sgan_mnist.split_labels(labels, 50, 3)
    assert {*few.tolist()} < {*more.tolist()}
    assert not torch.equal(few, sgan_mnist.split_labels(labels, 20, 4)[0])
    assert len(sgan_mnist.split_labels(labels, 200, 3)[1]) == 0
    for count in (15, 210, 5):
        with pytest.raises(sgan_mnist.UserError, match=f"multiple of 10, up to 200, not {count}"):
            sgan_mnist.split_labels(labels, count, 3)


def test_augment():
    """Images move a little, their border stays black, and gradients pass."""
    images = -torch.ones(50, 1, 28, 28)
    images[:, :, 10:18, 10:18] = 1
    images.requires_grad_()
    torch.manual_seed(0)
    moved = sgan_mnist.augment(images)
    assert moved.shape == images.shape and moved.abs().max() <= 1.001
    assert (moved[:, :, :3] < -0.99).all() and not torch.allclose(moved[0], moved[1])
    mass = ((moved + 1) / 2).sum((1, 2, 3))
    assert mass.min() > 45 and mass.mean() < 75 and mass.max() < 90
    moved.sum().backward()
    assert images.grad.abs().sum() > 0


def test_paste_patches():
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert torch.equal(sgan_mnist.paste_patches(images, 0.0), images)
    assert (sgan_mnist.paste_patches(images, 1.0) >= images).all()
    changed = (sgan_mnist.paste_patches(images, 0.5) != images).squeeze(1)
    changed = changed[changed.any((1, 2))]
    assert 0.35 < len(changed) / 200 < 0.65
    for image in changed:  # a rectangle of at most 8 pixels a side
        assert (image.nonzero().amax(0) - image.nonzero().amin(0)).max() < 8


# gmgan_mnist.py


def test_losses_of_pairs_and_of_each():
    """Minus the logarithm of the probability that real ones, or for the generator fake ones, seem real."""
    x, y = numbers(6), numbers(6, seed=1)
    expected = -(x - y).sigmoid().log().mean(), -(y - x).sigmoid().log().mean()
    assert_close(gmgan.relativistic_losses(x, y), expected)
    expected = -x.sigmoid().log().mean() - (1 - y.sigmoid()).log().mean(), -y.sigmoid().log().mean()
    assert_close(gmgan.non_saturating_losses(x, y), expected)


def test_squared_slope():
    """Of a quadratic form, whose gradient is known, and with a gradient in the weights."""
    x = numbers(5, 2, 3).requires_grad_()
    weight = numbers(2, 3, seed=1).requires_grad_()
    value = gmgan.squared_slope((weight * x.square()).sum((1, 2)), x)
    expected = (2 * weight * x).square().sum((1, 2)).mean()
    assert_close(value, expected)
    assert_close(torch.autograd.grad(value, weight), torch.autograd.grad(expected, weight))


def test_information_loss():
    """By its terms, of two clusterings; least where confident, balanced and the same of augmented images."""
    logits, other = numbers(6, 2, 3), numbers(6, 2, 3, seed=1)
    p, q = logits.softmax(2), other.softmax(2)
    terms = (p * p.log()).sum(2).mean(0), (p.mean(0) * p.mean(0).log()).sum(1), (p * q.log()).sum(2).mean(0)
    assert_close(gmgan.information_loss(logits, other, 2.0, 0.5), -terms[0] + 2 * terms[1] - 0.5 * terms[2])
    best = 50 * torch.eye(3).repeat(2, 1)[:, None]
    assert gmgan.information_loss(best, best, 1.0, 1.0).item() == pytest.approx(-math.log(3), abs=1e-6)
    one = gmgan.information_loss(best[:1], best[:1], 1.0, 1.0)
    assert gmgan.information_loss(best, best.roll(1, 0), 1.0, 1.0) > one > -1e-6
    empty = (1e3 * best[:1]).requires_grad_()  # all in one cluster, and none in the others
    (grad,) = torch.autograd.grad(gmgan.information_loss(empty, empty, 2.0, 1.0).sum(), empty)
    assert grad.isfinite().all()


def test_the_best_clustering_names_the_components():
    discriminator = gmgan.Discriminator(3, 4)
    discriminator.head_losses.copy_(torch.tensor([0.0, -2.0, -1.0]))
    logits, clusterings = discriminator(numbers(5, 1, 28, 28).float())
    assert logits.shape == (5,) and clusterings.shape == (5, 3, 4)
    assert torch.equal(discriminator.best(clusterings), clusterings[:, 1])


@pytest.mark.parametrize("trained", [True, False])
def test_mixture(trained):
    torch.manual_seed(0)
    mixture = gmgan.Mixture(3, 4, 2.0, 0.5, trained)
    assert mixture.means.shape == (3, 4) and mixture.means.abs().max() <= 2
    components, noise = torch.tensor([2, 0]), torch.randn(2, 4)
    latents = mixture(components, noise)
    assert_close(latents, mixture.means[components] + 0.5 * noise)
    assert latents.requires_grad == trained


# cyclegan_mnist_usps.py


def test_losses_of_translations():
    x, y = numbers(2, 1, 3, 3), numbers(2, 1, 3, 3, seed=1)
    for target in (0, 1):
        assert_close(cyclegan.least_squares_loss(x, target), ((x - target) ** 2).sum() / 18)
    assert_close(cyclegan.cycle_loss(x, y), (x - y).abs().sum() / 18)
    logits, translated = numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1).requires_grad_()
    loss = cyclegan.semantic_loss(logits, translated)
    found = translated.softmax(1)[range(4), logits.argmax(1)]
    assert_close(loss, -found.log().mean())
    loss.backward()
    assert logits.grad is None and translated.grad.abs().sum() > 0


def test_a_new_translator_changes_little():
    images = numbers(3, 1, 28, 28).float().tanh()
    assert_close(cyclegan.Translator(4)(images), 0.97 * images, atol=1e-5, rtol=0)


def test_exchange():
    """Each image comes out or an earlier one in its place, and none is lost."""
    torch.manual_seed(0)
    buffer = torch.arange(50.0).view(50, 1, 1, 1).clone()
    swapped = 0
    for start in range(100, 200, 10):
        images = torch.arange(start, start + 10.0).view(10, 1, 1, 1)
        before = torch.cat((buffer, images))
        out = cyclegan.exchange(buffer, images)
        assert torch.equal(before.sort(0).values, torch.cat((buffer, out)).sort(0).values)
        swapped += (out != images).sum().item()
    assert 30 < swapped < 70


def test_center_digits():
    """20 x 20 pixels, their centre of mass in the middle, wherever the digit was."""
    images = torch.zeros(3, 16, 16, dtype=torch.uint8)
    images[0, 6:10, 6:10] = 200
    images[1, 3:7, 8:12] = 200
    images[2, 4:12, 5:9] = 100
    found = cyclegan.center_digits(images)
    assert found.shape == (3, 28, 28) and found.dtype == torch.uint8
    mass = found.double()
    for dim in (1, 2):
        center = (mass.sum(3 - dim) * torch.arange(28)).sum(1) / mass.sum((1, 2))
        assert (center - 14).abs().max() <= 0.51
    ratio = mass.sum((1, 2)) / images.double().sum((1, 2))
    assert ((ratio - (20 / 16) ** 2).abs() < 0.1).all()
    assert cyclegan.center_digits(torch.zeros(1, 16, 16, dtype=torch.uint8)).sum() == 0

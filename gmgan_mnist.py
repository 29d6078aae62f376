# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26", "tqdm>=4.66",
#     "matplotlib>=3.8", "scikit-learn>=1.4",
# ]
# ///
"""Gaussian-mixture GAN: the latent is a mixture of K Gaussians, and a component becomes a kind of image.

A GAN maps one Gaussian to the data and has to tear it apart where the data are. Here the latent is
z = mu_k + L_k eps with k uniform and eps ~ N(0, I): means and covariances stay as drawn (--latent static) or
train with the generator (--latent dynamic); --latent normal is the GAN of 2014 in the networks of DCGAN. A
classifier trained on generated pairs (x, k) then clusters real images without a label. Read it beside
    Goodfellow et al. 2014         Generative Adversarial Networks: the non-saturating loss   1406.2661
    Radford et al. 2016            DCGAN: the convolutional networks                          1511.06434
    Ben-Yosef and Weinshall 2018   Gaussian mixture GAN: static and dynamic latents           1808.10356
    Azadi et al. 2019              discriminator rejection sampling: --drs                    1810.06758
    Huang et al. 2024              R3GAN: the relativistic loss and its penalties             2501.05441

    python gmgan_mnist.py                                                  # MNIST, 20 trained components
    python gmgan_mnist.py --dataset digits                                 # no download
    python gmgan_mnist.py --latent normal --loss non-saturating --gamma 0  # DCGAN
    python gmgan_mnist.py --init-from runs/<run>                           # a mixture after a plain GAN
    python gmgan_mnist.py --resume runs/<run>                              # goes on as if never stopped
    python gmgan_mnist.py --generate 10000 --checkpoint runs/<run>/checkpoint.pt --out samples/ --drs

The default reaches a fid of 2.17 on MNIST, 2.3 times that of real images, precision 0.73 and recall 0.80, in
19 minutes on one CPU core: means of three seeds.
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SCRIPT = "gmgan_mnist"
STEPS = {"digits": 1500}  # other data sets: 5,000
HELD_OUT = 30  # one in so many training images is kept from the networks; --drs is judged by them
CLUSTER_STEPS = 1000  # updates of the classifier that clusters
MOST_DRAWS = 100  # rejection sampling gives up after so many draws per sample


@dataclasses.dataclass
class Args:
    exp_name: str = SCRIPT
    """first part of the run folder's name"""
    seed: int = 1
    """seed of every random number of the run"""
    torch_deterministic: bool = True
    """ask torch for deterministic algorithms where it has them"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to train; auto takes CUDA, then MPS, then the CPU"""
    compile: bool = False
    """on CUDA: record a training step as a CUDA graph and replay it; elsewhere nothing"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "minimal-gans"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user; by default your own"""

    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits"] = "mnist"
    """images; digits needs no download"""
    data_dir: str = "data"
    """folder of the image files in torchvision's layout; missing files are downloaded to it"""
    eval_split: Literal["test", "validation"] = "test"
    """what samples are compared with; validation takes the last sixth of the training images out for it"""

    latent: Literal["normal", "static", "dynamic"] = "dynamic"
    """one standard Gaussian, a mixture that stays as drawn, or one whose means and covariances train"""
    num_components: int = 20
    """Gaussians in the mixture, K"""
    latent_range: float = 1.0
    """c: the means are drawn uniformly from [-c, c]^d"""
    sigma: float = 1.5
    """standard deviation of each component, at first if it trains"""
    covariance: Literal["scalar", "diagonal", "full"] = "diagonal"
    """form of a trained component's covariance"""
    init_from: str | None = None
    """run folder whose networks, not its latent, this run starts from"""

    num_steps: int | None = None
    """generator updates (default: 5,000; 1,500 for digits)"""
    batch_size: int = 64
    """real and fake samples in a batch"""
    latent_dim: int = 32
    """size of the generator's input, d"""
    arch: Literal["dcgan", "mlp"] = "dcgan"
    """convolutional networks, or fully connected ones with hidden layers of 16 x channels"""
    channels: int = 32
    """channels of the image networks' 14 x 14 maps; those of 7 x 7 have twice, of 28 x 28 half as many"""
    loss: Literal["relativistic", "non-saturating"] = "relativistic"
    """logits of real and fake samples compared in pairs, or each with zero"""
    gamma: float = 0.2
    """half of it weighs the squared gradients of the discriminator at real samples, half at fake ones"""
    lr_generator: float = 2e-3
    """Adam's learning rate for the generator and the mixture, where it trains"""
    lr_discriminator: float = 2e-3
    """Adam's learning rate for the discriminator"""
    beta1: float = 0.0
    """Adam's decay of the first moment"""
    lr_decay: float = 0.7
    """last share of the run, over which the learning rates fall to zero"""
    ema_decay: float = 0.999
    """decay per step of the averaged generator and mixture, which draw the samples"""

    num_eval_samples: int = 10_000
    """samples drawn for an evaluation; 0 switches evaluation off, and clustering"""
    eval_every: int | None = None
    """steps between evaluations, pictures and checkpoints (default: a fifth of the run)"""
    log_every: int = 100
    """steps between lines of metrics.jsonl"""
    run_dir: str = "runs"
    """folder in which run folders are made"""
    resume: str | None = None
    """run folder to go on with"""

    generate: int = 0
    """draw this many samples from --checkpoint into the new folder --out, instead of training"""
    checkpoint: str | None = None
    """a run's checkpoint.pt, for --generate"""
    out: str | None = None
    """folder for --generate"""
    truncation: float = 1.0
    """factor on the components' standard deviations, for --generate"""
    component: int | None = None
    """draw from this component alone, 0 to K - 1, for --generate"""
    drs: bool = False
    """reject samples that the discriminator, calibrated for minutes, finds too likely fake, for --generate"""
    drs_percentile: float = 50.0
    """share in percent of the samples whose chance to be accepted is below a half, for --drs"""
    measure: bool = False
    """measure the samples of --generate on the run's evaluation images, into metrics.json beside them"""

    def __post_init__(self) -> None:
        if self.resume is None:  # else what was not given is taken from the run
            self.num_steps = STEPS.get(self.dataset, 5000) if self.num_steps is None else self.num_steps
            self.eval_every = math.ceil(self.num_steps / 5) if self.eval_every is None else self.eval_every
        positive = "num_components num_steps latent_dim channels sigma lr_generator lr_discriminator"
        for names, wanted, fits in (
            (f"{positive} eval_every log_every", "positive", lambda v: 0 < v < math.inf),
            ("batch_size", "at least 2", lambda v: v >= 2),
            ("latent_range gamma generate truncation component", "in [0, inf)", lambda v: 0 <= v < math.inf),
            ("num_eval_samples", "0 or at least 10", lambda v: v == 0 or 10 <= v < math.inf),
            ("ema_decay lr_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("beta1", "in [0, 1)", lambda v: 0 <= v < 1),
            ("drs_percentile", "in [0, 100]", lambda v: 0 <= v <= 100),
            ("seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
        sampling = "truncation component drs drs_percentile measure"
        idle = {} if self.generate else dict.fromkeys(sampling.split(), "--generate")
        idle |= {} if self.drs or not self.generate else {"drs_percentile": "--drs"}
        if self.resume is None and self.latent != "dynamic":
            idle["covariance"] = "--latent dynamic"
        if self.resume is None and self.latent == "normal":
            idle |= dict.fromkeys(("num_components", "latent_range", "sigma"), "--latent static or dynamic")
        for name, use in idle.items():
            if getattr(self, name) != getattr(Args, name):
                raise ValueError(f"--{name.replace('_', '-')} is for {use}: give that as well")
        if self.drs and self.component is not None:
            raise ValueError("--drs is calibrated on samples of all components: leave --component away")
        for name in ("latent", "num_components", "latent_range", "sigma", "covariance", "init_from"):
            if self.generate and getattr(self, name) != getattr(Args, name):
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is of the run in --checkpoint: leave it away with --generate")
        if self.measure and min(self.generate, self.num_eval_samples) < 10:
            few = f"--generate {self.generate} and --num-eval-samples {self.num_eval_samples}"
            raise ValueError(f"--measure needs at least 10 samples, not {few}")
        if not bool(self.generate) == bool(self.checkpoint) == bool(self.out):
            raise ValueError("--generate, --checkpoint <run>/checkpoint.pt and --out <folder> go together")


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong and what to do about it, and leave with exit code 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------
# Data


def load_images(dataset: str, data_dir: str, eval_split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and evaluation images (n, 28, 28) uint8 and labels (n,) int64: x, y, x_eval, y_eval.

    `digits` is scikit-learn's 1,797 digits of 8 x 8, enlarged; the others are read in torchvision's layout,
    and downloaded if they are not there. With eval_split "validation" the last sixth of the training images
    is the evaluation part, and the test images are not touched.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
        images = F.interpolate(images, size=28, mode="bilinear").squeeze(1).round().to(torch.uint8)
        # The file is in the order of its writers; mix them, always in the same way.
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
        images, labels = images[order], torch.from_numpy(labels).long()[order]
        x, y, x_eval, y_eval = images[:1437], labels[:1437], images[1437:], labels[1437:]
    else:
        from torchvision import datasets

        name = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[dataset]
        try:
            sets = [getattr(datasets, name)(data_dir, train, download=True) for train in (True, False)]
            for s in sets:
                if s.data.shape != (len(s.targets), 28, 28) or not 0 <= s.targets.max() <= 9:
                    raise ValueError(f"images {tuple(s.data.shape)}, labels {tuple(s.targets.shape)}")
        except Exception as error:
            where = f"{dataset} is missing or damaged in {Path(data_dir) / name / 'raw'} ({error!r:.200})"
            other = "name another folder with --data-dir, or take --dataset digits, which needs no download"
            fail(f"{where}; delete damaged files there to download it again, {other}")
        x, y, x_eval, y_eval = (v for s in sets for v in (s.data, s.targets))
    if eval_split == "validation":
        n = len(x) * 5 // 6
        x, y, x_eval, y_eval = x[:n], y[:n], x[n:], y[n:]
    return x, y, x_eval, y_eval


def to_float(images: Tensor) -> Tensor:
    """uint8 images (n, 28, 28) as floats (n, 1, 28, 28) in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def draw_batch(data: Tensor, batch_size: int) -> Tensor:
    """A batch drawn with replacement: images (b, 1, 28, 28) in [-1, 1], or points (b, 2)."""
    batch = data[torch.randint(len(data), (batch_size,), device=data.device)]
    return to_float(batch) if batch.dtype == torch.uint8 else batch


# ---------------------------------------------------------------------------------------------------------
# Networks


def make_generator(latent_dim: int, channels: int, toy: bool) -> nn.Sequential:
    """Latent (b, latent_dim) to image (b, 1, 28, 28) in [-1, 1], or to point (b, 2)."""
    if toy:
        return nn.Sequential(
            *(nn.Linear(latent_dim, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU()),
            nn.Linear(128, 2),
        )
    c, half = channels, max(1, channels // 2)
    return nn.Sequential(
        *(nn.Linear(latent_dim, 2 * c * 49, bias=False), nn.Unflatten(1, (2 * c, 7, 7))),
        *(nn.BatchNorm2d(2 * c), nn.ReLU()),
        *(nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()),
        *(nn.ConvTranspose2d(c, half, 4, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        *(nn.Conv2d(half, 1, 3, 1, 1), nn.Tanh()),
    ).to(memory_format=torch.channels_last)  # half the time of a step on a CPU


class Affine(nn.Module):
    """factor * x + shift, with two constants."""

    def __init__(self, factor: float, shift: float = 0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.shift


def make_critic(feature_dim: int, channels: int, toy: bool, spectral_norm: bool, scale: float) -> nn.Module:
    """Image (b, 1, 28, 28) or point (b, 2) to features (b, feature_dim)."""
    sn = nn.utils.parametrizations.spectral_norm if spectral_norm else nn.Identity()
    c, act = channels, nn.LeakyReLU(0.2)
    if toy:
        return nn.Sequential(
            *(sn(nn.Linear(2, 128)), act),
            *(sn(nn.Linear(128, 128)), act),
            *(sn(nn.Linear(128, 128)), act),
            *(sn(nn.Linear(128, feature_dim)), Affine(scale)),
        )
    return nn.Sequential(
        Affine(1.0, 1.0),  # black becomes the 0 with which convolutions pad; or else they see a grey frame
        *(sn(nn.Conv2d(1, c, 4, 2, 1)), act),
        *(sn(nn.Conv2d(c, 2 * c, 4, 2, 1)), act),
        *(sn(nn.Conv2d(2 * c, 2 * c, 3, 1, 1)), act),
        *(nn.Flatten(), sn(nn.Linear(2 * c * 49, feature_dim)), Affine(scale)),
    ).to(memory_format=torch.channels_last)


def make_networks(args) -> tuple[nn.Sequential, nn.Sequential]:
    """Generator, latents (b, latent_dim) to images (b, 1, 28, 28), and discriminator, images to (b, 1)."""
    if args.arch == "dcgan":
        generator = make_generator(args.latent_dim, args.channels, False)
        return generator, make_critic(1, args.channels, False, False, 1.0)
    width = 16 * args.channels
    generator = nn.Sequential(
        *(nn.Linear(args.latent_dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))),
    )
    discriminator = nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, width), nn.LeakyReLU(0.2)),
        *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)),
    )
    return generator, discriminator


class Mixture(nn.Module):
    """K Gaussians of equal weight with means (K, d), at first with covariances sigma^2 I.

    The scales are kept as logarithms, so that no step makes one negative: one for a component ("scalar"), one
    for each of its coordinates ("diagonal"), or those on the diagonal of a lower triangle ("full").
    """

    def __init__(self, means: Tensor, sigma: float, covariance: str, trained: bool):
        super().__init__()
        k, d = means.shape
        shape = {"scalar": (k, 1), "diagonal": (k, d), "full": (k, d, d)}[covariance]
        log_scales = torch.full(shape, math.log(sigma))
        log_scales = log_scales.tril().triu() if covariance == "full" else log_scales
        for name, value in (("means", means), ("log_scales", log_scales)):
            if trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, components: Tensor, noise: Tensor) -> Tensor:
        """Latents (b, d) of components (b,), from noise (b, d)."""
        scales = self.log_scales
        if scales.dim() == 3:
            scales = scales.tril(-1) + scales.diagonal(dim1=1, dim2=2).exp().diag_embed()
        else:
            scales = scales.exp()
        return mixture_latents(self.means, scales, components, noise)


def make_mixture(args) -> Mixture:
    """The latent distribution of a run; the normal one is a mixture of one, which stays as it is."""
    if args.latent == "normal":
        return Mixture(torch.zeros(1, args.latent_dim), 1.0, "scalar", False)
    means = args.latent_range * (2 * torch.rand(args.num_components, args.latent_dim) - 1)
    return Mixture(means, args.sigma, args.covariance, args.latent == "dynamic")


def average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model and its buffers, with a shorter memory in the first steps."""
    device = next(iter(model.state_dict().values())).device  # the count's too: a graph would take it as it is
    averaged = AveragedModel(model, device, use_buffers=True)

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        pairs = zip(averaged.module.state_dict().values(), model.state_dict().values())
        averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))  # no counters
        # At update n what is kept is min(decay, (1 + n) / (10 + n)), and at the first one nothing.
        n = averaged.n_averaged
        weight = (torch.full_like(n, 9) / (n + 10)).clamp(min=1 - decay).masked_fill(n == 0, 1)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        n += 1

    averaged.update_parameters = update  # torch's own reads the count, for which the host would wait
    return averaged


# ---------------------------------------------------------------------------------------------------------
# Loss


def mixture_latents(means: Tensor, scales: Tensor, components: Tensor, noise: Tensor) -> Tensor:
    """Latents z = mu_k + L_k eps (b, d) of a Gaussian mixture, differentiable in means and scales.

    The latent of Ben-Yosef and Weinshall 2018. means are mu (K, d); scales are L, of shape (K, 1) for
    covariances s_k^2 I, (K, d) for diagonal ones, (K, d, d) for L_k L_k^T; components are k (b,), uniform;
    noise is eps (b, d), standard normal. Raises ValueError for shapes that do not fit.
    """
    (k, d), (b, _) = means.shape, noise.shape
    if noise.shape != (b, d) or components.shape != (b,) or scales.shape not in ((k, 1), (k, d), (k, d, d)):
        shapes = ", ".join(str(tuple(v.shape)) for v in (means, scales, components, noise))
        raise ValueError(f"means, scales, components and noise do not fit: {shapes}")
    scale = scales[components]
    moved = (scale @ noise.unsqueeze(2)).squeeze(2) if scale.dim() == 3 else scale * noise
    return means[components] + moved


def non_saturating_losses(l_real: Tensor, l_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of discriminator and generator, scalars, for logits (b,) of real and of fake samples.

    Goodfellow et al. 2014, eq. 1, with D = sigmoid(l): the discriminator minimises -log D(x) and
    -log(1 - D(G(z))); the generator -log D(G(z)), which keeps its gradient where the discriminator wins.
    Raises ValueError for logits of two shapes.
    """
    check_logits(l_real, l_fake)
    return F.softplus(-l_real).mean() + F.softplus(l_fake).mean(), F.softplus(-l_fake).mean()


def relativistic_losses(l_real: Tensor, l_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of discriminator and generator, scalars, for logits (b,) of real and of fake samples in pairs.

    Huang et al. 2024, section 2: softplus(l_fake - l_real) for the discriminator, softplus(l_real - l_fake)
    for the generator. Only differences count: a logit by itself means nothing.
    Raises ValueError for logits of two shapes.
    """
    check_logits(l_real, l_fake)
    return F.softplus(l_fake - l_real).mean(), F.softplus(l_real - l_fake).mean()


def check_logits(l_real: Tensor, l_fake: Tensor) -> None:
    """Raise ValueError unless both are (b,) with one b: (b,) and (b, 1) would make b x b pairs."""
    if l_real.dim() != 1 or l_real.shape != l_fake.shape:
        shapes = f"{tuple(l_real.shape)} and {tuple(l_fake.shape)}"
        raise ValueError(f"logits of real and fake samples must both be (b,), not {shapes}")


def penalised_backward(
    discriminator: nn.Sequential,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    weight: float,
    affine: tuple[type[nn.Module], ...] = (),
) -> tuple[Tensor, Tensor]:
    """Write the gradients of  loss(D(x)) + weight mean_i |grad D(x_i)|^2  to the .grad of D's parameters.

    x are (b, ...), D(x) logits (b, 1), which loss gets as (b,); returns its value and |grad D(x_i)|^2 (b,),
    whose mean over real samples is R1, over fake ones R2 (Huang et al. 2024, section 2). There is no second
    derivative: with affine layers and leaky ReLUs D is affine near x_i, and for c_i = dloss/dD(x_i) and
    u_i = 2 weight/b grad D(x_i), both constants, the gradient is that of
        sum_i c_i D(x_i) + <u_i, grad D(x_i)>,
    which is what D makes of c_i x_i + u_i with biases times c_i and each unit's slope as at x_i. So a layer's
    gradient follows from its input in that pass and from dD/d(its output), which grad D has made already:
    four passes, where autograd needs six. affine are classes of affine layers beside torch's own. Raises
    TypeError for layers of other kinds or in place: batch normalisation, for one, would make a logit depend
    on other samples.
    """
    bent = (nn.ReLU, nn.LeakyReLU)
    known = (nn.Linear, nn.Conv2d, nn.Flatten, *affine, *bent)
    for layer in discriminator:
        if type(layer) not in known or getattr(layer, "inplace", False):
            raise TypeError(f"layers must be {', '.join(k.__name__ for k in known)}, not in place: {layer}")
    points, outputs = x.detach().requires_grad_(), []
    for layer in discriminator:
        outputs.append(layer(outputs[-1] if outputs else points))
    logits = outputs[-1].detach().squeeze(1).requires_grad_()
    value = loss(logits)
    (c,) = torch.autograd.grad(value, logits)
    trained = [i for i, layer in enumerate(discriminator) if [*layer.parameters()]]
    wanted = [points, *(outputs[i] for i in trained)]
    g, *deltas = torch.autograd.grad(outputs[-1].sum(), wanted, retain_graph=True)
    deltas = dict(zip(trained, deltas))

    def each(v: Tensor, dim: int) -> Tensor:  # numbers (b,) so that they multiply samples (b, ...)
        return v.view(-1, *[1] * (dim - 1))

    h = torch.add(each(c, x.dim()) * x.detach(), g, alpha=2 * weight / len(x))
    for i, layer in enumerate(discriminator):
        if isinstance(layer, bent):
            (h,) = torch.autograd.grad(outputs[i], outputs[i - 1], h, retain_graph=True)
            continue
        shift = layer(torch.zeros_like(h[:1]))  # the biases
        moved = torch.addcmul(layer(h), each(c - 1, shift.dim()), shift)
        if i in deltas:
            parameters = [*layer.parameters()]
            for p, grad in zip(parameters, torch.autograd.grad(moved, parameters, deltas[i])):
                p.grad = grad
        h = moved.detach()
    return value.detach(), g.flatten(1).square().sum(1)


def drs_scores(logits: Tensor, top: float, eps: float = 1e-8) -> Tensor:
    """F(x) = l - l_max - log(1 - exp(l - l_max - eps)) (n,) for logits l (n,), without its constant gamma.

    Azadi et al. 2019, section 3.2. If l = log p_data(x) / p_g(x) then sigmoid(F) = exp(l - l_max), with which
    rejection turns p_g into p_data. top is l_max, the largest logit so far; eps keeps F finite there. Raises
    ValueError for a logit above top.
    """
    if bool((logits > top).any()):
        raise ValueError(f"a logit of {logits.max().item()} exceeds the largest one, {top}")
    return logits - top - (-torch.expm1(logits - top - eps)).log()


def drs_acceptance(logits: Tensor, top: float, gamma: float = 0.0, eps: float = 1e-8) -> Tensor:
    """Chances sigmoid(F(x) - gamma) (n,) that samples with these logits (n,) are accepted.

    Azadi et al. 2019, section 3.2; arguments and errors as in drs_scores. A lower gamma accepts more of them.
    """
    return torch.sigmoid(drs_scores(logits, top, eps) - gamma)


# ---------------------------------------------------------------------------------------------------------
# Evaluation


def make_judge() -> nn.Sequential:
    """Images (b, 1, 28, 28) to class logits (b, 10). Compared are the 128 inputs of the last layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 5, 2, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def train_judge(images: Tensor, labels: Tensor, epochs: int = 4, batch_size: int = 128) -> nn.Sequential:
    """A judge trained on images (n, 28, 28) uint8 and labels (n,), from seed 0; leaves torch's alone."""
    with torch.random.fork_rng([images.device] * images.is_cuda):
        torch.manual_seed(0)
        judge = make_judge().to(images.device)
        optimizer = torch.optim.Adam(judge.parameters())
        steps = epochs * math.ceil(len(images) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(epochs):
            for index in torch.randperm(len(images), device=images.device).split(batch_size):
                loss = F.cross_entropy(judge(to_float(images[index])), labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return judge.eval().requires_grad_(False)


def load_judge(args, images: Tensor, labels: Tensor) -> tuple[nn.Sequential, str]:
    """The judge of these training images, from --run-dir if it is there, and the hash of its weights."""
    data = hashlib.sha256(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()[:12]
    path = Path(args.run_dir) / f"judge__{args.dataset}__{data}.pt"
    judge = make_judge().to(images.device).eval().requires_grad_(False)
    try:
        judge.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
    except Exception:  # not there yet, or damaged
        print(f"training the judge of the images, once; it is kept in {path}", flush=True)
        judge = train_judge(images, labels)
        write_file(path, partial(torch.save, judge.state_dict()))
    weights = b"".join(v.cpu().numpy().tobytes() for v in judge.state_dict().values())
    return judge, hashlib.sha256(weights).hexdigest()[:12]


def judge_images(judge: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of images, uint8 (n, 28, 28) or float (n, 1, 28, 28), in blocks of 1,000."""
    blocks = [judge[:-1](to_float(b) if b.dtype == torch.uint8 else b) for b in images.split(1000)]
    return torch.cat(blocks), torch.cat([judge[-1](features) for features in blocks])


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features x (n, d) and y (m, d) (Heusel et al. 2017, eq. 6)."""
    x, y = x.cpu().double(), y.cpu().double()  # MPS has no float64
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan  # some LAPACKs crash on it
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()  # trace of (cov_x cov_y)^(1/2)
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features fake (m, d) for real (n, d) (Kynkaanniemi et al. 2019, eq. 1-3): the
    share of each set in reach of the other, where a point reaches as far as its k-th neighbour in its set."""

    def share_within(points: Tensor, others: Tensor) -> float:
        reach = torch.cat([torch.cdist(b, others).kthvalue(k + 1).values for b in others.split(1000)])
        within = [(torch.cdist(b, others) <= reach).any(1) for b in points.split(1000)]
        return torch.cat(within).float().mean().item()

    return share_within(fake, real), share_within(real, fake)


def image_metrics(judge: nn.Sequential, fake: Tensor, real: Tensor, labels: Tensor) -> dict:
    """Metrics of images fake (m, ...) against real (n, 28, 28) and the classes labels (l,), by the judge."""
    f_fake, logits = judge_images(judge, fake)
    f_real, _ = judge_images(judge, real)
    precision, recall = precision_recall(f_real, f_fake)
    shares, target = (c.cpu().bincount(minlength=10) / len(c) for c in (logits.argmax(1), labels))
    kl = torch.xlogy(shares, shares / target).sum().item()
    metrics = {"fid": frechet_distance(f_real, f_fake), "precision": precision, "recall": recall}
    return metrics | {"class_kl": kl, "class_shares": [round(s, 4) for s in shares.tolist()]}


class ImageEvaluation:
    """Measures generated images by the judge against images that are held out.

    `data` are the training images, `held` their labels and the images (n, 28, 28) and labels of the other
    part.
    """

    def __init__(self, args, data: Tensor, held: list[Tensor]):
        self.count, self.split = min(args.num_eval_samples, len(held[1])), args.eval_split
        if self.count:
            labels, x, self.labels = held
            self.judge, self.judge_hash = load_judge(args, data, labels)
            self.images, self.known = x[: self.count], data[: self.count]

    @cached_property
    def facts(self) -> dict:
        """What results.json says of the judge, with its metrics for training images: the floor."""
        if not self.count:
            return {}
        hits = judge_images(self.judge, self.images)[1].argmax(1) == self.labels[: self.count]
        facts = {"judge": self.judge_hash, "judge_accuracy": hits.float().mean().item()}
        floor = image_metrics(self.judge, self.known, self.images, self.labels)
        print(f"floor of fid, training against {self.split} images: {floor['fid']:.3f}", flush=True)
        return facts | {"num_eval": self.count} | {f"floor_{name}": v for name, v in floor.items()}

    def __call__(self, samples: Tensor) -> dict:
        """Metrics of images (n, ...), of which the first num_eval_samples count."""
        if not self.count:
            return {}
        _ = self.facts  # says the floor, once
        return image_metrics(self.judge, samples[: self.count], self.images, self.labels)


@torch.no_grad()
def draw_mixture_samples(
    generator: nn.Module,
    mixture: AveragedModel,
    count: int,
    rng: torch.Generator,
    truncation: float = 1.0,
    component: int | None = None,
) -> Tensor:
    """Samples (count, 1, 28, 28) of a generator in evaluation mode, of one component or all of them.

    The latents come from rng, on the CPU; truncation is a factor on their distance to the means.
    """
    (k, d), device = mixture.module.means.shape, mixture.module.means.device
    components = torch.randint(k, (count,), generator=rng)
    components = components if component is None else torch.full_like(components, component)
    noise = truncation * torch.randn(count, d, generator=rng)
    latents = mixture(components.to(device), noise.to(device))
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


def save_components(path: Path, generator: nn.Module, mixture: AveragedModel, seed: int) -> None:
    """A PNG with a row of ten samples for each component; the images of a column share their noise."""
    draw = partial(draw_mixture_samples, generator, mixture, 10)
    rngs = [torch.Generator().manual_seed(seed) for _ in mixture.module.means]
    save_images(path, torch.cat([draw(rng, component=k) for k, rng in enumerate(rngs)]))


def cluster_images(
    generator: nn.Module, mixture: AveragedModel, images: Tensor, seed: int, batch_size: int = 128
) -> Tensor:
    """Components (n,) of images (n, 28, 28) uint8, by a classifier trained on generated pairs (x, k).

    Ben-Yosef and Weinshall 2018; no label is seen. Leaves torch's random state alone.
    """
    (k, d), device = mixture.module.means.shape, images.device
    with torch.random.fork_rng([images.device] * images.is_cuda):
        torch.manual_seed(seed)
        classifier = make_judge()
        classifier[-1] = nn.Linear(128, k)
        optimizer = torch.optim.Adam(classifier.to(device).parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, CLUSTER_STEPS)
        for _ in range(CLUSTER_STEPS):
            components = torch.randint(k, (batch_size,), device=device)
            with torch.no_grad():
                x = generator.eval()(mixture(components, torch.randn(batch_size, d, device=device)))
            loss = F.cross_entropy(classifier(x), components)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge_images(classifier.eval().requires_grad_(False), images)[1].argmax(1)


def cluster_scores(labels: Tensor, found: Tensor) -> tuple[float, float]:
    """Accuracy of clusters found (n,) for labels (n,) after the best matching of clusters to classes, and
    their normalised mutual information 2 I(y; k) / (H(y) + H(k)).

    Up to as many clusters as classes are matched to one class each, and no two to the same. Of more clusters
    each is matched to its commonest class, which flatters a large number of them.
    """
    from scipy.optimize import linear_sum_assignment

    labels, found = labels.cpu(), found.cpu()
    c, k = int(labels.max()) + 1, int(found.max()) + 1
    table = (labels * k + found).bincount(minlength=c * k).view(c, k).double() / len(labels)
    best = table.amax(0) if k > c else table[linear_sum_assignment(table, maximize=True)]
    matched = best.sum().item()
    entropy_y, entropy_k, entropy = (-torch.xlogy(p, p).sum() for p in (table.sum(1), table.sum(0), table))
    total = (entropy_y + entropy_k).item()
    return matched, (2 * (total - entropy) / total).item() if total else 1.0


def calibrate(
    discriminator: nn.Sequential, real: Tensor, held: Tensor, draw: Callable, seed: int, steps: int = 3000
) -> nn.Sequential:
    """The discriminator with logits (n, 1) that estimate log p_data / p_g, as rejection needs them.

    Logits of a relativistic loss mean nothing by themselves, and the generator has fooled those of any loss.
    So a copy goes on to learn, by logistic regression, real images (n, 28, 28) uint8 from samples draw(b) ->
    (b, 1, 28, 28), and is taken from where it did best on the images held (m, 28, 28), which no network has
    seen, and as many samples. Azadi et al. 2019, section 3.3, train the discriminator further likewise.
    """
    model = copy.deepcopy(discriminator).requires_grad_()
    last = [layer for layer in model if isinstance(layer, nn.Linear)][-1]
    rng, batch = torch.Generator().manual_seed(seed), 64
    both = torch.cat((to_float(held), draw(len(held))))
    targets = (torch.arange(len(both), device=both.device) < len(held)).float()[:, None]

    @torch.no_grad()
    def measure() -> tuple[float, float]:
        logits = torch.cat([model(b) for b in both.split(1000)])
        return logits.mean().item(), F.binary_cross_entropy_with_logits(logits, targets).item()

    with torch.no_grad():
        last.bias -= measure()[0]  # the constant that means nothing
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, steps)
    best = measure()[1], copy.deepcopy(model)
    for step in tqdm(range(steps), desc="calibrating the discriminator", disable=None):
        index = torch.randint(len(real), (batch,), generator=rng).to(real.device)
        l_real, l_fake = model(torch.cat((to_float(real[index]), draw(batch)))).chunk(2)
        loss = F.softplus(-l_real).mean() + F.softplus(l_fake).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            best = min(best, (measure()[1], copy.deepcopy(model)), key=lambda pair: pair[0])
    print(f"calibrated discriminator: cross-entropy {best[0]:.3f} on held-out images, 0.693 is chance")
    return best[1]


@torch.no_grad()
def reject_samples(
    draw: Callable, discriminator: nn.Module, count: int, percentile: float, rng: torch.Generator
) -> tuple[Tensor, float]:
    """Samples (count, ...) of draw(n) -> (n, ...) that rejection accepts, and the share of those it accepts.

    Azadi et al. 2019, algorithm 1: l_max is the largest logit so far, of a first thousand samples to begin
    with, and gamma a percentile of F over each batch. Leaves with one line after MOST_DRAWS * count draws.
    """
    batch, kept, accepted, drawn = 1000, [], 0, 0
    top = discriminator(draw(batch)).max().item()
    while accepted < count:
        if drawn >= max(MOST_DRAWS * count, batch):
            fail(f"--drs accepted {accepted} samples of {drawn}, not {count}; lower --drs-percentile")
        samples = draw(batch)
        logits = discriminator(samples).squeeze(1).cpu().double()
        top = max(top, logits.max().item())
        gamma = torch.quantile(drs_scores(logits, top), percentile / 100)
        accept = torch.rand(batch, generator=rng) < drs_acceptance(logits, top, gamma)
        kept.append(samples[accept.to(samples.device)])
        accepted, drawn = accepted + int(accept.sum()), drawn + batch
    return torch.cat(kept)[:count], accepted / drawn


# ---------------------------------------------------------------------------------------------------------
# Run folder and tracking


def write_file(path: Path, content: str | Callable) -> None:
    """Write text, or what content(file) writes, beside the file and rename: nobody sees half a file."""
    buffer, beside = io.BytesIO(), path.with_name(path.name + ".tmp")
    buffer.write(content.encode()) if isinstance(content, str) else content(buffer)
    beside.write_bytes(buffer.getbuffer())  # at once: on a full disk torch.save would not say what is wrong
    os.replace(beside, path)


@contextlib.contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """A new folder of that name, which appears when it is full: nobody sees half of it."""
    out = Path(name)
    if out.exists():
        fail(f"--out {out} exists; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        (folder := Path(beside, out.name)).mkdir()
        yield folder
        os.replace(folder, out)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of this script, on the CPU. Code in it is not run; what is wrong is said in one line."""
    if not path.is_file():
        fail(f"there is no checkpoint {path}; a run folder that was saved holds a checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        origin, options = state["script"], state["args"].keys()
    except Exception as error:
        fail(f"checkpoint {path} is damaged, not a run's, or holds code, which is never run ({error!r:.80})")
    if origin != SCRIPT:
        fail(f"checkpoint {path} comes from {origin}, not from {SCRIPT}")
    unknown = sorted(options - Args.__dataclass_fields__.keys())
    if unknown or "rows" not in state:
        fail(f"checkpoint {path} is of another version of {SCRIPT}, with {', '.join(unknown) or 'no rows'}")
    return state


def resumed_args(args, saved: dict):
    """The saved arguments, updated by the options that were given and that a resumed run may change."""
    free = "num_steps eval_every log_every num_eval_samples device compile track data_dir run_dir resume"
    default = {field.name: field.default for field in dataclasses.fields(args)}
    typed = {a.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for a in sys.argv[1:]}
    given = {k: v for k, v in vars(args).items() if v != default[k] or k in typed}
    for name in given.keys() - {*free.split(), "wandb_project_name", "wandb_entity"}:
        if given[name] != saved[name]:
            fail(f"--{name.replace('_', '-')} {given[name]}: the run has {saved[name]}, and must keep it")
    near = str(Path(args.resume).resolve().parent)  # a run may have been moved
    return type(args)(**{**saved, "track": False, "device": "auto", "run_dir": near, **given})


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the best there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in there if there[d]) if name == "auto" else name
    if not there[name]:
        fail(f"--device {name}: torch {torch.__version__} finds no such device; use --device cpu or auto")
    return torch.device(name)


def start_wandb(args, name: str, run_id: str | None):
    """A W&B run, going on with run_id if given; without a login it leaves with one line."""
    try:
        import wandb
    except ImportError:
        fail("--track needs wandb: pip install wandb")
    online = os.environ.get("WANDB_MODE", wandb.setup().settings.mode) == "online"
    if online and not wandb.login(prompt=False, verify=False):
        fail("--track: you are not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")
    options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name, "id": run_id}
    options |= {"resume": "allow", "config": vars(args), "dir": args.run_dir}
    Path(args.run_dir).mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(**options)
    except Exception as error:
        offline = "logging offline, `wandb sync` sends it later"
        print(f"W&B is out of reach ({error!s:.200}); {offline}", file=sys.stderr)
        return wandb.init(**options, mode="offline")


def plot_curves(folder: Path, rows: list[dict]) -> None:
    """curves.png: every scalar of the rows of metrics.jsonl against the step; of no rows, nothing."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list))
    if names.pop("step", ...) is ...:
        return
    height = math.ceil(len(names) / 4)
    figure = Figure(figsize=(14, 2.6 * height))
    # By hand: a layout engine would draw all of it twice.
    figure.subplots_adjust(0.05, 0.2 / height, 0.99, 1 - 0.12 / height, 0.25, 0.5)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(height, 4, place, title=name, xlabel="step")
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), marker="o" if len(points) < 20 else None, markersize=3)
        axes.grid(alpha=0.3)
    write_file(folder / "curves.png", partial(figure.savefig, format="png", dpi=70))


def save_images(path: Path, images: Tensor) -> None:
    """A PNG of images (n, 1, 28, 28) in [-1, 1], ten in a row."""
    from torchvision.utils import save_image

    write_file(path, partial(save_image, (images + 1) / 2, format="png", nrow=10))


def run_facts(device: torch.device) -> dict:
    """What results.json says of the machine: peak memory (of the process, on a CPU), device, versions."""
    peak, name = 0, f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
    elif os.name == "posix":  # Windows does not say
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB, on macOS in bytes
        peak *= 1 if sys.platform == "darwin" else 1024
    versions = {"torch": torch.__version__, "torchvision": version("torchvision")}
    versions["python"] = sys.version.split()[0]
    return {"peak_memory_mb": round(peak / 1e6), "device": name, "versions": versions}


class Run:
    """A run: its folder, its steps, its checkpoints, and its twin at W&B."""

    quiet = None  # a bar where there is a terminal; with True there is none
    agree: Callable[[int], int] = int  # where several processes run: the signal that came to any of them
    evaluate: Callable[[], dict]  # measures the networks as they are, and draws samples.png: set by train

    def __init__(self, args, checkpoint: dict | None, device: torch.device):
        self.args, self.checkpoint, self.device = args, checkpoint or {}, device
        self.step = self.last_saved = self.checkpoint.get("step", 0)
        self.rows, self.signal, self.stopped = self.checkpoint.get("rows", []), 0, 0
        self.metrics = self.checkpoint.get("metrics", {})  # the latest; None where they are yet to be taken
        name = f"{args.exp_name}__{args.dataset}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.run_dir) / name if args.resume is None else Path(args.resume)
        # With no step left, the metrics of the last must be there or still to be taken, and results.json not.
        last, results = self.rows[-1] if self.rows else {"step": 0}, self.folder / "results.json"
        ended = results.exists() and json.loads(results.read_text())["steps"] == self.step
        ended |= last["step"] < self.step or not (self.metrics or {}).keys() <= last.keys()
        if self.step > args.num_steps or (self.step == args.num_steps and ended):
            fail(f"{args.resume} has done its {self.step} steps; give more of them with --num-steps")
        wandb_id, name = self.checkpoint.get("wandb_id"), self.folder.resolve().name
        self.wandb_run = start_wandb(args, name, wandb_id) if args.track else None
        self.wandb_id = self.wandb_run.id if self.wandb_run else wandb_id
        self.folder.mkdir(parents=True, exist_ok=bool(checkpoint))
        write_file(self.folder / "args.json", json.dumps(vars(args), indent=2))
        # What an interrupted run has logged after its last checkpoint will be logged again.
        done = self.rows if self.metrics is not None else self.rows[:-1]
        write_file(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in done))

    def hold(self, **parts) -> None:
        """Networks and optimizers that a checkpoint holds; a resumed run's take their state from it."""
        self.parts = parts
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint[name])
            torch.set_rng_state(self.checkpoint["rng"])
            if self.device.type == "cuda" and self.checkpoint["rng_cuda"] is not None:
                torch.cuda.set_rng_state(self.checkpoint["rng_cuda"], self.device)

    def save(self) -> None:
        """Write checkpoint.pt."""
        rng_cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"script": SCRIPT, "args": vars(self.args), "step": self.step, "rows": self.rows}
        state |= {"metrics": self.metrics, "seconds": time.time() - self.start, "paused": self.paused}
        state |= {"rng": torch.get_rng_state(), "rng_cuda": rng_cuda, "wandb_id": self.wandb_id}
        write_file(self.folder / "checkpoint.pt", partial(torch.save, state))
        self.last_saved = self.step

    def train_seconds(self) -> float:
        """Seconds of training up to now, before a resume too; evaluations do not count."""
        return time.time() - self.start - self.paused

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is to be done now."""
        return self.step % every == 0 or self.step == self.args.num_steps

    def stop(self, number: int, _) -> None:
        """Take a signal: the step at hand is the last one, and a second signal breaks it off."""
        self.signal = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sends every signal again
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.default_int_handler)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do. After Ctrl-C or SIGTERM the step at hand is the last, and saved."""
        handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start = time.time() - self.checkpoint.get("seconds", 0.0)  # as if it had never been stopped
        total, self.paused = self.args.num_steps, self.checkpoint.get("paused", 0.0)
        self.bar = tqdm(total=total, initial=self.step, desc=SCRIPT, disable=self.quiet, dynamic_ncols=True)
        try:
            if self.metrics is None:  # the run was broken off while it was evaluated
                self.write_row()
                self.save()
            while self.step < total and not self.stopped:
                self.step += 1
                yield self.step
                self.bar.update()
                self.stopped = self.agree(self.signal)
                if self.stopped or self.due(self.args.eval_every):
                    self.save()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def log(self, scalars: dict[str, Tensor | float]) -> None:
        """Log a step's scalars and, when it is due, the metrics and the samples.png of evaluate()."""
        scalars = {name: torch.as_tensor(value).item() for name, value in scalars.items()}
        evaluated, finite = self.due(self.args.eval_every), all(map(math.isfinite, scalars.values()))
        if evaluated:
            modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
            finite &= all(bool(v.isfinite().all()) for part in modules for v in part.state_dict().values())
        if not finite:
            why = f"the loss is not finite at step {self.step}: {scalars}; try lower learning rates"
            saved = f"{self.folder / 'checkpoint.pt'} of step {self.last_saved}"
            fail(f"{why}; last good checkpoint: {saved if self.last_saved else 'none yet'}")
        speed = {"steps_per_second": self.step / self.train_seconds()}
        self.rows.append({"step": self.step} | scalars | speed)
        if evaluated:
            self.metrics = None
            self.save()  # a run that is broken off in an evaluation goes on with it
        self.write_row()

    def write_row(self) -> None:
        """Write the last row to metrics.jsonl, W&B and the bar, with the metrics if they are to be taken."""
        row, evaluated = self.rows[-1], self.metrics is None
        if evaluated:
            pause = time.time()
            self.metrics = self.evaluate()
            self.paused += time.time() - pause
            row |= self.metrics
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.log_wandb(row, evaluated)
        plain = {name: value for name, value in self.metrics.items() if not isinstance(value, list)}
        shown = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in plain.items()}
        self.bar.set_postfix(loss=f"{list(row.values())[1]:.4f}", **shown, refresh=False)
        if evaluated and shown:
            self.bar.write(f"step {self.step}: " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def log_wandb(self, row: dict, evaluated: bool) -> None:
        """Send a row and, if there is a new one, samples.png to W&B, whose failures never cost a model; or,
        without a row, that this is the end."""
        if self.wandb_run is None:
            return
        try:
            import wandb

            if not row:
                return self.wandb_run.finish()
            pictures = {"samples": wandb.Image(str(self.folder / "samples.png"))} if evaluated else {}
            self.wandb_run.log({k: v for k, v in row.items() if k != "step"} | pictures, step=row["step"])
        except Exception as error:
            print(f"W&B failed ({error!s:.200}); the run goes on in {self.folder}", file=sys.stderr)
            self.wandb_run = None

    def finish(self, facts: Callable[[], dict]) -> Path:
        """Draw the curves; of a run that is done write results.json, with facts in it; returns the folder."""
        plot_curves(self.folder, self.rows)
        self.log_wandb({}, False)
        if self.step < self.args.num_steps:
            go_on = f"go on with: python {SCRIPT}.py --resume {self.folder}"
            print(f"stopped after step {self.step}; {go_on}", file=sys.stderr)
            raise SystemExit(128 + self.stopped)
        results = self.metrics | facts() | {"steps": self.step, "seconds": round(time.time() - self.start)}
        results |= {"steps_per_second": round(self.rows[-1]["steps_per_second"], 2)} | run_facts(self.device)
        write_file(self.folder / "results.json", json.dumps(results, indent=2))
        print("\n".join(f"{name:>20}  {value}" for name, value in results.items()))
        print("\n".join(f"{self.folder / name}" for name in ("samples.png", "curves.png", "checkpoint.pt")))
        return self.folder


# ---------------------------------------------------------------------------------------------------------
# Training


class Recorded:
    """A training step that is recorded as a CUDA graph and replayed: one launch in place of hundreds.

    What differs from step to step is in tensors, or in the kind with which it is called: each kind has its
    graph, whose scalars are always the same tensors. Where that is not enabled the step runs as it is.
    """

    warmup = 3  # plain steps of a kind come first: libraries load their kernels, Adam makes its state

    def __init__(self, step: Callable[..., dict], device: torch.device, enabled: bool, *optimizers):
        cuda = device.type == "cuda"
        self.step, self.enabled = step, cuda and enabled
        self.calls, self.graphs, self.scalars = {}, {}, {}
        self.stream = torch.cuda.Stream(device) if self.enabled else None
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            # A graph reads the rate from a tensor. A checkpoint may have been written on another device.
            group |= {"capturable": cuda, "lr": torch.zeros((), device=device) if cuda else 0.0}

    def __call__(self, *kind) -> dict[str, Tensor]:
        """Do a step of that kind; returns its scalars."""
        if not self.enabled:
            return self.step(*kind)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls[kind] <= self.warmup:
                scalars = self.step(*kind)
            else:
                if kind not in self.graphs:
                    self.record(kind)
                self.graphs[kind].replay()
                scalars = self.scalars[kind]
        torch.cuda.current_stream().wait_stream(self.stream)
        return scalars

    def record(self, kind: tuple) -> None:
        """Record a step of that kind without doing it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                scalars = self.step(*kind)
        except Exception as error:  # on leaving the graph another one follows the first
            why = error.__context__ or error
            fail(f"--compile: the training step cannot be recorded ({why!r:.200}); leave --compile away")
        self.graphs[kind] = graph
        self.scalars[kind] = {name: value.detach() for name, value in scalars.items()}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of an optimizer, in place where a graph reads it."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def load_networks(args: Args, generator: nn.Module, averaged: nn.Module, discriminator: nn.Module) -> None:
    """Give the networks the weights of the run --init-from, of the same kind, trained on the same images."""
    start = load_checkpoint(Path(args.init_from) / "checkpoint.pt")
    for name in ("dataset", "eval_split", "arch", "latent_dim", "channels"):
        if (theirs := start["args"][name]) != getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            fail(f"--init-from {args.init_from} has {option} {theirs}, and this run {getattr(args, name)}")
    for name, part in {"generator": generator, "averaged": averaged, "discriminator": discriminator}.items():
        part.load_state_dict(start[name])
    averaged.n_averaged.zero_()  # it forgets as fast as the average of the mixture, which starts anew


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run folder."""
    checkpoint = None if args.resume is None else load_checkpoint(Path(args.resume) / "checkpoint.pt")
    args = resumed_args(args, checkpoint["args"]) if checkpoint else args
    device = pick_device(args.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch.manual_seed(args.seed)
    parts = load_images(args.dataset, args.data_dir, args.eval_split)
    x, y, x_eval, y_eval = (part.to(device) for part in parts)
    data = x[len(x) // HELD_OUT :]
    if args.batch_size > len(data):
        fail(f"--batch-size {args.batch_size} exceeds the {len(data)} training samples of {args.dataset}")
    generator, discriminator = (network.to(device) for network in make_networks(args))
    averaged = average(generator, args.ema_decay)
    mixture = make_mixture(args).to(device)
    averaged_mixture = average(mixture, args.ema_decay)
    if args.init_from is not None and not checkpoint:
        load_networks(args, generator, averaged, discriminator)
    run = Run(args, checkpoint, device)
    evaluation = ImageEvaluation(args, x, [y, x_eval, y_eval])

    adam = partial(torch.optim.Adam, betas=(args.beta1, 0.99), fused=True)
    opt_generator = adam([*generator.parameters(), *mixture.parameters()])
    opt_discriminator = adam(discriminator.parameters())
    networks = {"generator": generator, "averaged": averaged, "discriminator": discriminator}
    networks |= {"mixture": mixture, "averaged_mixture": averaged_mixture}
    run.hold(**networks, opt_generator=opt_generator, opt_discriminator=opt_discriminator)
    losses = {"relativistic": relativistic_losses, "non-saturating": non_saturating_losses}[args.loss]

    def of_pairs(logits: Tensor) -> Tensor:  # the discriminator's loss, real samples before fake ones
        return losses(*logits.chunk(2))[0]

    def update(optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()

    def evaluate() -> dict:
        rng = torch.Generator().manual_seed(args.seed)
        samples = draw_mixture_samples(averaged, averaged_mixture, max(evaluation.count, 100), rng)
        for name in (f"samples_{run.step:06d}.png", "samples.png"):
            save_images(run.folder / name, samples[:100])
        if args.latent != "normal":
            save_components(run.folder / "components.png", averaged, averaged_mixture, args.seed)
        return evaluation(samples)

    def step() -> dict[str, Tensor]:
        real = draw_batch(data, args.batch_size)
        components = torch.randint(len(mixture.means), (args.batch_size,), device=device)
        noise = torch.randn(args.batch_size, args.latent_dim, device=device)
        fake = generator(mixture(components, noise))

        # The discriminator tells real from fake, and keeps its slope low at both.
        both, scalars = torch.cat((real, fake.detach())), {}
        if args.gamma:
            options = {"loss": of_pairs, "weight": args.gamma, "affine": (Affine,)}
            loss_discriminator, slopes = penalised_backward(discriminator, both, **options)
            opt_discriminator.step()
            scalars = {"r1": slopes[: len(real)].mean(), "r2": slopes[len(real) :].mean()}
        else:
            loss_discriminator = of_pairs(discriminator(both).squeeze(1))
            update(opt_discriminator, loss_discriminator)

        # Generator and mixture turn the same fake samples against the new discriminator.
        with torch.no_grad():
            l_real = discriminator(real).squeeze(1)
        l_fake = discriminator(fake).squeeze(1)
        loss_generator = losses(l_real, l_fake)[1]
        update(opt_generator, loss_generator)
        averaged.update_parameters(generator)
        averaged_mixture.update_parameters(mixture)
        scalars |= {"logit_real": l_real.mean(), "logit_fake": l_fake.mean()}
        return {"loss_discriminator": loss_discriminator, "loss_generator": loss_generator} | scalars

    recorded = Recorded(step, device, args.compile, opt_generator, opt_discriminator)
    run.evaluate = evaluate
    for _ in run.steps():
        # Learning rates stay, and in the last part of the run fall linearly to zero.
        rate = min(1.0, (args.num_steps + 1 - run.step) / max(1.0, args.lr_decay * args.num_steps))
        set_rate(opt_generator, args.lr_generator * rate)
        set_rate(opt_discriminator, args.lr_discriminator * rate)
        scalars = recorded()
        if run.due(args.log_every) or run.due(args.eval_every):
            run.log(scalars)

    def facts() -> dict:
        if args.latent == "normal" or not evaluation.count:
            return evaluation.facts
        found = cluster_images(averaged, averaged_mixture, x_eval, args.seed)
        accuracy, nmi = cluster_scores(y_eval, found)
        return evaluation.facts | {"cluster_accuracy": accuracy, "cluster_nmi": nmi}

    return run.finish(facts)


def generate_from_mixture(args: Args) -> Path:
    """Samples of a checkpoint as a folder of PNG files, with their metrics.json if asked for; returns it."""
    checkpoint = load_checkpoint(Path(args.checkpoint))
    device, made = pick_device(args.device), Args(**checkpoint["args"])
    generator, discriminator = make_networks(made)
    averaged, mixture = (average(part, made.ema_decay) for part in (generator, make_mixture(made)))
    if args.component is not None and args.component >= (k := len(mixture.module.means)):
        fail(f"--component {args.component}: the components of {args.checkpoint} are 0 to {k - 1}")
    parts = {"averaged": averaged, "averaged_mixture": mixture, "discriminator": discriminator}
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
        part.to(device)
    if args.drs or args.measure:
        data_dir = made.data_dir if args.data_dir == "data" else args.data_dir
        x, *held = (v.to(device) for v in load_images(made.dataset, data_dir, made.eval_split))
    if args.measure:
        near = Path(args.checkpoint).resolve().parent.parent if args.run_dir == "runs" else Path(args.run_dir)
        options = {"run_dir": str(near), "num_eval_samples": min(args.num_eval_samples, args.generate)}
        near.mkdir(parents=True, exist_ok=True)
        evaluation = ImageEvaluation(dataclasses.replace(made, **options), x, held)

    rng, how = torch.Generator().manual_seed(args.seed), {"truncation": args.truncation}
    how |= {"component": args.component, "drs": args.drs}
    options = {"rng": rng, "truncation": args.truncation, "component": args.component}

    def draw(count: int) -> Tensor:  # as the files will hold them: unrounded pixels would give samples away
        samples = draw_mixture_samples(averaged, mixture, count, **options)
        return to_float(((samples.squeeze(1) + 1) * 127.5).round().to(torch.uint8))

    with new_folder(args.out) as folder:
        if args.drs:
            left_out = max(2, len(x) // HELD_OUT)
            calibrated = calibrate(discriminator, x[left_out:], x[:left_out], draw, args.seed)
            samples, share = reject_samples(draw, calibrated, args.generate, args.drs_percentile, rng)
            how |= {"drs_percentile": args.drs_percentile, "drs_accepted": share}
        else:
            samples = draw(args.generate)
        pixels = ((samples.squeeze(1) + 1) * 127.5).round().to(torch.uint8)
        if args.measure:
            metrics = evaluation(pixels) | evaluation.facts | how
            print("\n".join(f"{name:>20}  {value}" for name, value in metrics.items()))
            write_file(folder / "metrics.json", json.dumps(metrics, indent=2))
        for i, image in enumerate(tqdm(pixels.cpu().numpy(), desc=args.out, disable=None)):
            Image.fromarray(image).save(folder / f"{i:06d}.png")
    print(f"{args.generate} samples in {args.out}")
    return Path(args.out)


def main(args: Args) -> Path:
    """Train, or sample with --generate; returns the folder that was written."""
    try:
        return generate_from_mixture(args) if args.generate else train(args)
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        places = "make room, or name other places with --run-dir and --out"
        fail(f"cannot read or write: {error}; {places}; a run that has saved goes on with --resume")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        print("interrupted; a run that has saved a checkpoint.pt goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None

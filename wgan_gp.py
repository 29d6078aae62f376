# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26", "tqdm>=4.66",
#     "matplotlib>=3.8", "scikit-learn>=1.4",
# ]
# ///
"""Wasserstein GAN: a critic that measures the way from samples to data, a generator that shortens it.

The critic f is kept 1-Lipschitz, so that max E f(x) - E f(y), for x real and y fake, is the Wasserstein-1
distance of the two (Kantorovich-Rubinstein duality); the generator lowers it. What keeps f Lipschitz is the
choice that matters: a penalty on its slope between real and fake samples, or weights clipped to a box. Read
it beside
    Arjovsky et al. 2017         Wasserstein GAN: duality, weight clipping           1701.07875
    Gulrajani et al. 2017        Improved training of WGANs: the gradient penalty    1704.00028
    Petzka et al. 2018           the one-sided penalty                               1709.08894
    Karras et al. 2020           the lazy penalty                                    1912.04958

    python wgan_gp.py                                                      # MNIST, gradient penalty
    python wgan_gp.py --dataset digits                                     # no download
    python wgan_gp.py --dataset grid                                       # 25 Gaussians, with the exact W1
    python wgan_gp.py --lipschitz clip                                     # the first WGAN
    python wgan_gp.py --resume runs/<run>                                  # goes on as if never stopped
    python wgan_gp.py --generate 10000 --checkpoint runs/<run>/checkpoint.pt --out samples/

The default reaches a fid of 2.41 on MNIST, 2.6 times that of real images, precision 0.72 and recall 0.79, in
23 minutes on one CPU core: means of three seeds.
"""

import contextlib
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

SCRIPT = "wgan_gp"
TOYS = ("ring", "grid")
TOY = {"num_steps": 20_000, "batch_size": 256, "latent_dim": 2, "lr_decay": 0.4}
TOY |= {"penalty_weight": 1.0, "clip": 0.3}
IMAGES = {"num_steps": 7000, "batch_size": 64, "latent_dim": 32, "lr_decay": 0.7}
IMAGES |= {"penalty_weight": 10.0, "clip": 0.03}
W1_SAMPLES = 1000  # points between which the exact Wasserstein distance of the toys is taken
DEFAULTS = {"digits": IMAGES | {"num_steps": 1500}, "ring": TOY | {"num_steps": 10_000}, "grid": TOY}


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

    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits", "ring", "grid"] = "mnist"
    """images; digits needs no download; ring (8 Gaussians) and grid (25 Gaussians) are 2-D toys"""
    data_dir: str = "data"
    """folder of the image files in torchvision's layout; missing files are downloaded to it"""
    eval_split: Literal["test", "validation"] = "test"
    """what samples are compared with; validation takes the last sixth of the training images out for it"""

    num_steps: int | None = None
    """generator updates (default: by data set)"""
    batch_size: int | None = None
    """real and fake samples in a batch (default: 64 images, 256 points)"""
    latent_dim: int | None = None
    """size of the generator's Gaussian input (default: 32 for images, 2 for toys)"""
    channels: int = 32
    """channels of the image networks' 14 x 14 maps; those of 7 x 7 have twice, of 28 x 28 half as many"""
    lipschitz: Literal["gp", "clip"] = "gp"
    """what bounds the critic's slope: the gradient penalty, or weights clipped to [-clip, clip]"""
    penalty_weight: float | None = None
    """factor lambda of the gradient penalty (default: 10 for images, 1 for toys)"""
    one_sided: bool = False
    """penalise slopes above 1 only"""
    penalty_every: int = 1
    """critic updates from one penalty to the next, which then weighs as many times more (lazy penalty)"""
    clip: float | None = None
    """bound on the critic's weights, for --lipschitz clip (default: 0.03 for images, 0.3 for toys)"""
    critic_steps: int = 1
    """critic updates per generator update"""
    lr_generator: float = 2e-3
    """Adam's learning rate for the generator"""
    lr_critic: float = 2e-3
    """Adam's learning rate for the critic"""
    beta1: float = 0.0
    """Adam's decay of the first moment; with 0 it is RMSprop with its bias taken out"""
    beta2: float = 0.9
    """Adam's decay of the second moment"""
    lr_decay: float | None = None
    """last share of the run, over which the learning rates fall to zero (default: 0.7 images, 0.4 toys)"""
    ema_decay: float = 0.999
    """decay per step of the averaged generator, which draws the samples"""

    num_eval_samples: int = 10_000
    """samples drawn for an evaluation; 0 switches evaluation off"""
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

    def __post_init__(self) -> None:
        if self.resume is None:  # else what was not given is taken from the run
            for name, value in DEFAULTS.get(self.dataset, IMAGES).items():
                setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
            self.eval_every = math.ceil(self.num_steps / 5) if self.eval_every is None else self.eval_every
        positive = "num_steps batch_size latent_dim channels critic_steps penalty_every eval_every log_every"
        for names, wanted, fits in (
            (f"{positive} clip lr_generator lr_critic", "positive", lambda v: 0 < v < math.inf),
            ("penalty_weight generate", "in [0, inf)", lambda v: 0 <= v < math.inf),
            ("num_eval_samples", "0 or at least 10", lambda v: v == 0 or 10 <= v < math.inf),
            ("ema_decay lr_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("beta1 beta2", "in [0, 1)", lambda v: 0 <= v < 1),
            ("seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
        defaults = DEFAULTS.get(self.dataset, IMAGES)
        weighted, clipped = (getattr(self, k) not in (None, defaults[k]) for k in ("penalty_weight", "clip"))
        if self.lipschitz == "clip" and (self.one_sided or self.penalty_every > 1 or weighted):
            raise ValueError("--lipschitz clip has no gradient penalty: leave its options away")
        if self.lipschitz == "gp" and clipped and not self.resume:
            raise ValueError(f"--clip {self.clip} is for --lipschitz clip: give that as well")
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


def toy_modes(dataset: str) -> tuple[Tensor, float]:
    """Means (k, 2) and standard deviation of a 2-D mixture, as in VEEGAN (2017) and PacGAN (2018)."""
    if dataset == "ring":
        angle = torch.arange(8) * (math.pi / 4)
        return torch.stack((angle.cos(), angle.sin()), 1), 0.01
    axis = torch.arange(-4.0, 5.0, 2.0)
    return torch.cartesian_prod(axis, axis), 0.05


def load_toy(dataset: str, num_samples: int = 100_000) -> Tensor:
    """Samples (num_samples, 2) of a 2-D mixture with equal weights, the same ones in every run."""
    modes, std = toy_modes(dataset)
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(len(modes), (num_samples,), generator=rng)
    return modes[index] + std * torch.randn(num_samples, 2, generator=rng)


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


def wasserstein_estimate(f_real: Tensor, f_fake: Tensor) -> Tensor:
    """The critic's estimate of W1, mean f(x) - mean f(y), of its values f_real and f_fake (b,): a scalar.

    Arjovsky et al. 2017, eq. 2 and 3. A lower bound of K times the distance of the two batches, if the
    critic's slope is nowhere above K. Values may be (b, 1), and as many of y as one likes. Raises ValueError
    for other shapes.
    """
    if not all(f.dim() and f.numel() == len(f) > 0 for f in (f_real, f_fake)):
        shapes = f"{tuple(f_real.shape)} and {tuple(f_fake.shape)}"
        raise ValueError(f"there must be one value per sample, not {shapes}")
    return f_real.mean() - f_fake.mean()


def between(real: Tensor, fake: Tensor) -> Tensor:
    """Points on the lines from real to fake samples, both (b, ...), uniform on each, which take a gradient.

    Gulrajani et al. 2017, section 4, "Sampling distribution". Raises ValueError for two shapes.
    """
    if real.shape != fake.shape or not real.dim():
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"real and fake samples must have one shape (b, ...), not {shapes}")
    u = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    return torch.lerp(real, fake, u).requires_grad_()


def slope_penalty(critic: nn.Module, points: Tensor, one_sided: bool = False) -> tuple[Tensor, Tensor]:
    """Mean of (|grad f(t)| - 1)^2 over points t (b, ...) that take a gradient, and the mean slope: scalars.

    Gulrajani et al. 2017, eq. 3; with one_sided of max(0, |grad f(t)| - 1)^2 (section 4, and Petzka et al.
    2018, eq. 8). The critic's value at a point must not depend on the others: no batch normalisation. Real
    and fake samples keep out of this pass, as only it is differentiated twice. Raises ValueError for points
    without gradient and for a critic with more than a value per point.
    """
    if points.dim() < 2 or not points.requires_grad:
        state = f"{tuple(points.shape)} ({points.requires_grad=})"
        raise ValueError(f"points must be (b, ...) with requires_grad, not {state}")
    values = critic(points)
    if values.numel() != len(points):
        raise ValueError(f"the critic must give {len(points)} points a value each, not {tuple(values.shape)}")
    (grad,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    slope = grad.flatten(1).norm(dim=1)
    excess = (slope - 1).clamp(min=0) if one_sided else slope - 1
    return excess.square().mean(), slope.detach().mean()


@torch.no_grad()
def clip_weights(critic: nn.Module, clip: float) -> None:
    """Bring every parameter of the critic back to [-clip, clip], in place (Arjovsky et al. 2017, Alg. 1).

    Raises ValueError for a bound that is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, not {clip}")
    torch._foreach_clamp_max_(list(critic.parameters()), clip)
    torch._foreach_clamp_min_(list(critic.parameters()), -clip)


def exact_wasserstein(x: Tensor, y: Tensor) -> float:
    """Wasserstein-1 distance of two samples x and y of one shape (n, d), by an optimal assignment.

    The mean of |x_i - y_s(i)| under the best permutation s, from SciPy's solver: n^3 steps, so that n = 1000
    is a second's work. Raises ValueError for other shapes.
    """
    from scipy.optimize import linear_sum_assignment

    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must have one shape (n, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    cost = torch.cdist(x.double(), y.double()).cpu().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


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


def toy_metrics(samples: Tensor, modes: Tensor, std: float) -> dict:
    """Of samples (n, 2) and a mixture's modes (k, 2): modes covered, share of samples of high quality (within
    3 std of the nearest mode), and the KL divergence of the modes' shares, by nearest mode, from uniform."""
    distance, nearest = torch.cdist(samples, modes).min(1)
    good = distance <= 3 * std
    shares = nearest.bincount(minlength=len(modes)) / len(samples)
    kl = torch.xlogy(shares, shares * len(modes)).sum().item()
    return {"modes": len(nearest[good].unique()), "high_quality": good.float().mean().item(), "mode_kl": kl}


class Evaluation:
    """Measures samples: points by a toy's modes, images by the judge against images that are held out.

    `data` are the training samples, `held` their labels and the images (n, 28, 28) and labels of the other
    part.
    """

    def __init__(self, args, data: Tensor, held: list[Tensor]):
        self.modes = toy_modes(args.dataset) if not held else None
        self.count, self.split = args.num_eval_samples, args.eval_split
        if held and self.count:
            labels, x, self.labels = held
            self.count = min(self.count, len(x))
            self.judge, self.judge_hash = load_judge(args, data, labels)
            self.images, self.known = x[: self.count], data[: self.count]

    @cached_property
    def facts(self) -> dict:
        """What results.json says of the judge, with its metrics for training images: the floor."""
        if self.modes or not self.count:
            return {}
        hits = judge_images(self.judge, self.images)[1].argmax(1) == self.labels[: self.count]
        facts = {"judge": self.judge_hash, "judge_accuracy": hits.float().mean().item()}
        floor = image_metrics(self.judge, self.known, self.images, self.labels)
        print(f"floor of fid, training against {self.split} images: {floor['fid']:.3f}", flush=True)
        return facts | {"num_eval": self.count} | {f"floor_{name}": v for name, v in floor.items()}

    def __call__(self, samples: Tensor) -> dict:
        """Metrics of images (n, ...) or points (n, 2), of which the first num_eval_samples count."""
        if not self.count:
            return {}
        if self.modes:
            return toy_metrics(samples[: self.count].cpu(), *self.modes)
        _ = self.facts  # says the floor, once
        return image_metrics(self.judge, samples[: self.count], self.images, self.labels)


@torch.no_grad()
def draw_samples(generator: nn.Module, latent_dim: int, count: int, seed: int, device) -> Tensor:
    """Samples (count, ...) of a generator in evaluation mode; the latents have a seed of their own."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, latent_dim, generator=rng).to(device)
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


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


def save_points(path: Path, samples: Tensor, data: Tensor) -> None:
    """A PNG of 2,500 points (n, 2) over as many of the data (m, 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    for points, name in ((data, "data"), (samples, "samples")):
        axes.scatter(*points[:2500].cpu().T, s=3, alpha=0.4, label=name)
    axes.legend(loc="upper right")
    write_file(path, partial(figure.savefig, format="png", dpi=70))


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


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run folder."""
    checkpoint = None if args.resume is None else load_checkpoint(Path(args.resume) / "checkpoint.pt")
    args = resumed_args(args, checkpoint["args"]) if checkpoint else args
    device = pick_device(args.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch.manual_seed(args.seed)
    toy = args.dataset in TOYS
    parts = [load_toy(args.dataset)] if toy else load_images(args.dataset, args.data_dir, args.eval_split)
    data, *held = (part.to(device) for part in parts)
    if args.batch_size > len(data):
        fail(f"--batch-size {args.batch_size} exceeds the {len(data)} training samples of {args.dataset}")
    run = Run(args, checkpoint, device)
    evaluation = Evaluation(args, data, held)

    generator = make_generator(args.latent_dim, args.channels, toy).to(device)
    averaged = average(generator, args.ema_decay)
    critic = make_critic(1, args.channels, toy, spectral_norm=False, scale=1.0).to(device)
    adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
    optimizers = {
        "opt_generator": adam(generator.parameters(), args.lr_generator),
        "opt_critic": adam(critic.parameters(), args.lr_critic),
    }
    run.hold(generator=generator, averaged=averaged, critic=critic, **optimizers)

    def latent() -> Tensor:
        return torch.randn(args.batch_size, args.latent_dim, device=device)

    def update(name: str, loss: Tensor) -> None:
        (group,) = optimizers[name].param_groups
        optimizers[name].zero_grad()
        loss.backward(inputs=group["params"])  # the generator's loss leaves the critic's weights alone
        optimizers[name].step()

    def distances(samples: Tensor) -> dict:
        # What the critic estimates is W1 times its slope, which is 1 by the penalty and free under clipping:
        # critic_slope, the mean from data to samples. And the exact distance; between data it is w1_floor.
        real, others = data[: len(samples)], data[-len(samples) :]
        on_the_way = torch.linspace(0, 1, len(samples), device=device)[:, None]
        slope = slope_penalty(critic, torch.lerp(real, samples, on_the_way).requires_grad_())[1]
        with torch.no_grad():
            w1 = {"w1_critic": wasserstein_estimate(critic(data[:10_000]), critic(samples)).item()}
        w1 |= {"critic_slope": slope.item(), "w1_exact": exact_wasserstein(real, samples)}
        return w1 | {"w1_floor": exact_wasserstein(real, others)}

    def evaluate() -> dict:
        count = max(evaluation.count, 2500 if toy else 100)
        samples = draw_samples(averaged, args.latent_dim, count, args.seed, device)
        for name in (f"samples_{run.step:06d}.png", "samples.png"):
            path = run.folder / name
            save_points(path, samples, data) if toy else save_images(path, samples[:100])
        metrics = evaluation(samples)
        if toy and evaluation.count:
            metrics |= distances(samples[: min(evaluation.count, W1_SAMPLES)])
        return metrics

    def step(*penalised: bool) -> dict[str, Tensor]:
        # The critic maximises  E f(x) - E f(y)  under its bound on the slope.
        scalars = {}
        for with_penalty in penalised:  # one update each
            real = draw_batch(data, args.batch_size)
            with torch.no_grad():
                fake = generator(latent())
            f_real, f_fake = critic(torch.cat((real, fake))).chunk(2)
            w1 = scalars["w1_batch"] = wasserstein_estimate(f_real, f_fake)
            loss = -w1
            if with_penalty:
                penalty, slope = slope_penalty(critic, between(real, fake), args.one_sided)
                loss = loss + args.penalty_weight * args.penalty_every * penalty
                scalars |= {"gradient_penalty": penalty, "slope": slope}
            update("opt_critic", loss)
            if args.lipschitz == "clip":
                clip_weights(critic, args.clip)

        # The generator minimises it: -E f(y).
        loss = -critic(generator(latent())).mean()
        update("opt_generator", loss)
        averaged.update_parameters(generator)
        return {"loss_generator": loss} | scalars

    lrs = {"opt_generator": args.lr_generator, "opt_critic": args.lr_critic}
    recorded = Recorded(step, device, args.compile, *optimizers.values())
    run.evaluate = evaluate
    for _ in run.steps():
        # Learning rates stay, and in the last part of the run fall linearly to zero.
        rate = min(1.0, (args.num_steps + 1 - run.step) / max(1.0, args.lr_decay * args.num_steps))
        for name, optimizer in optimizers.items():
            set_rate(optimizer, lrs[name] * rate)
        updates = range((run.step - 1) * args.critic_steps, run.step * args.critic_steps)
        # The last of so many updates has the lazy penalty: a logged step does if its number is a multiple.
        every = args.penalty_every
        scalars = recorded(*(args.lipschitz == "gp" and i % every == every - 1 for i in updates))
        if run.due(args.log_every) or run.due(args.eval_every):
            run.log(scalars)
    return run.finish(lambda: evaluation.facts)


def generate(args: Args) -> Path:
    """Samples of a checkpoint, as a folder of PNG files or, for a toy, of samples.npy (n, 2); returns it."""
    checkpoint = load_checkpoint(Path(args.checkpoint))
    device, made = pick_device(args.device), Args(**checkpoint["args"])
    averaged = average(make_generator(made.latent_dim, made.channels, made.dataset in TOYS), made.ema_decay)
    averaged.load_state_dict(checkpoint["averaged"])
    with new_folder(args.out) as folder:
        samples = draw_samples(averaged.to(device), made.latent_dim, args.generate, args.seed, device).cpu()
        if samples.dim() == 2:
            np.save(folder / "samples.npy", samples.numpy())
        else:
            pixels = ((samples.squeeze(1) + 1) * 127.5).round().to(torch.uint8).numpy()
            for i, image in enumerate(tqdm(pixels, desc=args.out, disable=None)):
                Image.fromarray(image).save(folder / f"{i:06d}.png")
    print(f"{args.generate} samples in {args.out}")
    return Path(args.out)


def main(args: Args) -> Path:
    """Train, or sample with --generate; returns the folder that was written."""
    try:
        return generate(args) if args.generate else train(args)
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

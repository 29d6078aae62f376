# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26",
#                 "tqdm>=4.66", "matplotlib>=3.8", "scikit-learn>=1.4"]
# ///
"""MMD-GAN: a generator that matches the data in the eyes of a kernel, and a critic that sharpens the kernel.

The critic maps samples to features. The generator minimises the squared maximum mean discrepancy of real and
fake features, MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), x real and y fake; the critic spreads the real
features out, or widens the discrepancy.
    Gretton et al. 2012          A Kernel Two-Sample Test: MMD and its estimators    JMLR 13
    Li et al. 2015 and 2017      moment matching networks and MMD-GAN                1502.02761, 1705.08584
    Binkowski et al. 2018        Demystifying MMD GANs: rational quadratic kernel    1801.01401
    Wang et al. 2019             the repulsive loss                                  1812.09916

    python mmd_gan.py                                      # MNIST, repulsive loss, spectral norm
    python mmd_gan.py --track                              # and log to Weights & Biases
    python mmd_gan.py --dataset digits                     # no download
    python mmd_gan.py --dataset grid                       # 25 Gaussians, no critic
    python mmd_gan.py --loss attractive --no-spectral-norm --penalty-weight 1
    python mmd_gan.py --resume runs/<run>                  # go on where it stopped
    python mmd_gan.py --resume runs/<run> --generate 1000  # draw samples
    torchrun --nproc-per-node 2 mmd_gan.py                 # share every batch among processes or GPUs

The default run takes 16 minutes on one shared CPU core: fid 1.93, 2.2 times that of real images, precision
0.73 and recall 0.85 (means of 3 seeds; results/mmd_gan.md has the rest).
"""

import json
import math
import numbers
import os
import shlex
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

SCRIPT = "mmd_gan"
TOYS = ("ring", "grid")
TOY = {"batch_size": 256, "latent_dim": 2, "encoder": "none", "kernel": "gaussian"}
# Without an encoder the kernel sees the data: widths from that of a mode to that of the whole
PRESETS = {
    "digits": {"num_steps": 1500, "eval_every": 500},
    "ring": TOY
    | {"num_steps": 20_000, "eval_every": 4000, "bandwidths": tuple(0.01 * 2**i for i in range(8))},
    "grid": TOY
    | {"num_steps": 45_000, "eval_every": 9000, "bandwidths": tuple(0.05 * 2**i for i in range(7))},
}
MAY_BE_ZERO = ("seed", "generate", "num_eval_samples", "penalty_weight")


@dataclass(init=False)
class Args:
    exp_name: str = SCRIPT
    """first part of the run folder's name"""
    seed: int = 1
    """seed of the run"""
    torch_deterministic: bool = True
    """use deterministic algorithms where torch has them"""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """where to train, as torch names it: cpu, cuda:1, mps"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project_name: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT", "minimal-gans"))
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits", "ring", "grid"] = "mnist"
    """images of 28 x 28 (digits needs no download), or points of 8 or 25 Gaussians"""
    data_dir: str = "data"
    """folder of the image files, in torchvision's layout; missing ones are downloaded to it"""
    eval_split: Literal["test", "validation"] = "test"
    """evaluate on the test images, or on the last sixth of the training images instead of training on it"""
    run_dir: str = "runs"
    """folder of the run folders"""
    resume: str | None = None
    """run folder to go on with; its options hold, but for those that are given"""
    generate: int = 0
    """instead of training, draw so many samples of the run --resume into its folder generated/"""
    log_every: int = 100
    """steps between lines of metrics.jsonl"""
    eval_every: int = 2400
    """steps between evaluations, each with a picture and a checkpoint"""
    num_eval_samples: int = 10_000
    """samples drawn for an evaluation; 0: none"""

    num_steps: int = 12_000
    """updates of the generator"""
    batch_size: int = 64
    """samples in a batch"""
    latent_dim: int = 32
    """size of the generator's Gaussian input"""
    encoder: Literal["learned", "none"] = "learned"
    """none: no critic, the kernel acts on the data itself, as in a moment matching network"""
    kernel: Literal["rational_quadratic", "gaussian"] = "rational_quadratic"
    """a mixture of rational quadratics, whose slope never vanishes, or of Gaussians"""
    bandwidths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """the mixture: widths of Gaussians, or exponents of rational quadratics"""
    loss: Literal["repulsive", "attractive"] = "repulsive"
    """the critic's loss: k_xx - k_yy, or -MMD^2"""
    penalty_weight: float = 0.0
    """weight of the penalty on the gradient of the witness function"""
    spectral_norm: bool = True
    """divide the critic's weight matrices by their spectral norms"""
    lr_generator: float = 3e-3
    """learning rate of the generator, which falls to zero in the last part of the run"""
    lr_critic: float = 2e-3
    """learning rate of the critic, likewise"""

    def __init__(self, **options):
        """Take the options, then those of the resumed run or the data set's preset, then the defaults."""
        base = PRESETS.get(options.get("dataset"), {})
        if options.get("resume") and len(options) < len(fields(self)):
            base = load_checkpoint(options["resume"])["args"]
            del base["device"]  # another machine may go on
        fill_args(self, base | options)
        if self.generate and not self.resume:
            raise UserError("--generate needs --resume, the folder of the run that draws the samples")
        if not all(isinstance(b, numbers.Real) and 0 < b < math.inf for b in self.bandwidths or [0]):
            raise UserError(f"bandwidths must be positive numbers, not {self.bandwidths}")
        if self.encoder == "none" and self.penalty_weight:
            raise UserError("--penalty-weight needs a critic: it does not go with --encoder none")
        if self.batch_size < 2:
            raise UserError("batch_size must be at least 2: a kernel mean is one over pairs")


class UserError(ValueError):
    """A mistake that the user can mend; the command line shows nothing but its message."""


def fill_args(args, options: dict) -> None:
    """Set the fields of args to the options or else to their defaults. Raises UserError for a bad value."""
    for name in options.keys() - {f.name for f in fields(args)}:
        raise UserError(f"there is no option {name}")
    for f in fields(args):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = options.get(f.name, default)
        if isinstance(value, str | os.PathLike):
            value = os.path.expanduser(value)
        if f.type in (int, float):
            number = numbers.Integral if f.type is int else numbers.Real
            fits = isinstance(value, number) and not isinstance(value, bool) and 0 <= value < math.inf
            fits = fits and (value > 0 or f.name in MAY_BE_ZERO)
            value = f.type(value) if fits else value
            wanted = f"{f.type.__name__}, {'not negative' if f.name in MAY_BE_ZERO else 'positive'}"
        elif get_origin(f.type) is Literal:
            fits = value in get_args(f.type)
            wanted = "one of " + ", ".join(map(repr, get_args(f.type)))
        else:
            fits = isinstance(value, get_origin(f.type) if get_origin(f.type) is tuple else f.type)
            wanted = str(f.type)
        if not fits:
            raise UserError(f"{f.name} must be {wanted}, not {value!r}")
        setattr(args, f.name, value)


# ---------------------------------------------------------------------------------------------------------
# Data


def load_images(dataset: str, data_dir: str, eval_split: str) -> list[Tensor]:
    """Return training images (n, 28, 28) uint8, labels (n,), and those for evaluation. Raises UserError."""
    if dataset == "digits":  # scikit-learn's 1,797 digits of 8 x 8, enlarged
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))  # they come writer by writer
        images = torch.from_numpy(pixels[order]).float().view(-1, 1, 8, 8) * (255 / 16)
        images = F.interpolate(images, size=28, mode="bilinear").squeeze(1).round().to(torch.uint8)
        labels = torch.from_numpy(labels[order]).long()
        parts = [images[:1437], labels[:1437], images[1437:], labels[1437:]]
    else:
        name = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[dataset]
        load = partial(getattr(torchvision.datasets, name), data_dir, download=True)
        try:
            train, test = load(train=True), load(train=False)
            parts = [train.data, train.targets, test.data, test.targets]
            if not all(x.shape == (len(y), 28, 28) and y.max() < 10 for x, y in (parts[:2], parts[2:])):
                raise ValueError(f"28 x 28 images of classes 0 to 9 are needed, not {train.data.shape}")
        except Exception as error:
            where = f"{Path(data_dir, name, 'raw')}: {error!r:.200}"
            raise UserError(
                f"no {dataset} in {where}; try another --data-dir, or --dataset digits"
            ) from error
    if eval_split == "validation":
        n = len(parts[0]) * 5 // 6
        parts = [parts[0][:n], parts[1][:n], parts[0][n:], parts[1][n:]]
    return parts


def toy_modes(dataset: str) -> tuple[Tensor, float]:
    """Return means (k, 2) and standard deviation of a 2-D mixture, as in VEEGAN (2017) and PacGAN (2018)."""
    if dataset == "ring":
        angle = torch.arange(8) * (math.pi / 4)
        return torch.stack((angle.cos(), angle.sin()), 1), 0.01
    axis = torch.arange(-4.0, 5.0, 2.0)
    return torch.cartesian_prod(axis, axis), 0.05


def load_data(args) -> tuple[Tensor, Callable[[Tensor], dict]]:
    """Return the training samples, on the device, and the function that evaluates generated ones."""
    if args.dataset in TOYS:
        modes, std = toy_modes(args.dataset)
        rng = torch.Generator().manual_seed(0)  # the same points in every run
        points = modes[torch.randint(len(modes), (100_000,), generator=rng)]
        points += std * torch.randn(points.shape, generator=rng)
        return points.to(args.device), partial(toy_metrics, modes=modes, std=std)
    parts = load_images(args.dataset, args.data_dir, args.eval_split)
    images, labels, real, _ = (part.to(args.device) for part in parts)
    if args.num_eval_samples == 0:
        return images, lambda samples: {}
    classifier = load_classifier(args, images, labels)
    return images, partial(image_metrics, classifier=classifier, real=real[: args.num_eval_samples])


def to_float(batch: Tensor) -> Tensor:
    """Return uint8 images (b, 28, 28) as floats (b, 1, 28, 28) in [-1, 1], and any floats as they are."""
    return batch.unsqueeze(1).float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch


# ---------------------------------------------------------------------------------------------------------
# Evaluation


def load_classifier(args, images: Tensor, labels: Tensor) -> nn.Sequential:
    """Return the classifier of these images (n, 28, 28), trained once and then kept in args.run_dir."""
    checksum = zlib.crc32(labels.cpu().numpy(), zlib.crc32(images.cpu().numpy()))
    path = Path(args.run_dir, f"classifier__{args.dataset}__{checksum:08x}.pt")
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        classifier = nn.Sequential(
            block(nn.Conv2d(1, 32, 5, 2, 2, bias=False), 32),
            block(nn.Conv2d(32, 64, 5, 2, 2, bias=False), 64),
            nn.Flatten(),
            nn.Linear(64 * 49, 128),
            nn.ReLU(),  # the features (b, 128)
            nn.Linear(128, 10),
        ).to(images.device)
        if not path.exists():
            print(f"training the classifier that evaluates samples, once, for {path}", flush=True)
            optimizer = torch.optim.Adam(classifier.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 4 * math.ceil(len(images) / 128))
            for _ in range(4):
                for index in torch.randperm(len(images), device=images.device).split(128):
                    logits = classifier(to_float(images[index]))
                    optimizer.zero_grad()
                    F.cross_entropy(logits, labels[index], label_smoothing=0.05).backward()
                    optimizer.step()
                    schedule.step()
            replace_file(path, partial(torch.save, classifier.state_dict()))
    classifier.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
    return classifier.eval().requires_grad_(False)


def image_metrics(samples: Tensor, classifier: nn.Sequential, real: Tensor) -> dict:
    """Return metrics of the first n samples against real images (n, ...), by the classifier's features."""
    features = []
    for images in (real, samples[: len(real)]):
        features.append(torch.cat([classifier[:-1](to_float(block)) for block in images.split(1000)]))
    precision, recall = precision_recall(*features)
    shares = classifier[-1](features[1]).argmax(1).bincount(minlength=10) / len(features[1])
    fid = frechet_distance(*features)
    return {"fid": fid, "precision": precision, "recall": recall, "class_shares": shares.tolist()}


def frechet_distance(x: Tensor, y: Tensor) -> float | None:
    """Return the Fréchet distance of features (n, d) and (m, d) (Heusel et al. 2017, eq. 6); None for one."""
    x, y = x.cpu().double(), y.cpu().double()
    if min(len(x), len(y)) < 2 or not (x.isfinite().all() and y.isfinite().all()):
        return None
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> list[float | None]:
    """Return the shares of features fake (m, d) within reach of the real (n, d), and of real of the fake.

    A point reaches as far as its k-th neighbour in its own set (Kynkäänniemi et al. 2019, eq. 1 to 3).
    """
    shares = []
    for points, others in ((fake, real), (real, fake)):
        if len(others) <= k:
            return [None, None]
        reach = torch.cat([torch.cdist(b, others).kthvalue(k + 1).values for b in others.split(1000)])
        inside = torch.cat([(torch.cdist(b, others) <= reach).any(1) for b in points.split(1000)])
        shares.append(inside.float().mean().item())
    return shares


def toy_metrics(samples: Tensor, modes: Tensor, std: float) -> dict:
    """Return modes covered, share of samples (n, 2) within 3 std of a mode, and the modes' KL to uniform."""
    distance, nearest = torch.cdist(samples.cpu(), modes).min(1)
    good = distance <= 3 * std
    shares = nearest.bincount(minlength=len(modes)) / len(samples)
    kl = torch.xlogy(shares, shares * len(modes)).sum().item()
    return {"modes": len(nearest[good].unique()), "high_quality": good.float().mean().item(), "mode_kl": kl}


# ---------------------------------------------------------------------------------------------------------
# Run folder


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let write make a file beside path, then move it there: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_stem(f"{path.stem}.{os.getpid()}-{threading.get_ident()}")
    write(beside)
    for _ in range(5):
        with suppress(PermissionError):  # on Windows, while a viewer has it open
            return os.replace(beside, path)
        time.sleep(0.2)
    warnings.warn(f"{path} is open elsewhere and stays; the new one is {beside}", stacklevel=2)


def load_checkpoint(run: str | os.PathLike) -> dict:
    """Return the checkpoint of a run folder, without running code in it. Raises UserError."""
    try:
        path = Path(run, "checkpoint.pt").expanduser()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except Exception as error:
        raise UserError(f"{run}/checkpoint.pt is missing, damaged or not a run's: {error!r:.80}") from error
    if script != SCRIPT:
        raise UserError(f"{path} belongs to {script}.py, not to {SCRIPT}.py")
    return checkpoint


def save_samples(path: Path, samples: Tensor, data: Tensor) -> None:
    """Draw 100 images (n, 1, 28, 28), or 2,500 points (n, 2) over as many of the data."""
    if samples.dim() == 4:
        images = (samples[:100] + 1) / 2
        return replace_file(path, lambda path: torchvision.utils.save_image(images, path, nrow=10))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot(aspect="equal")
    for points in (data, samples):
        axes.scatter(*points[:2500].cpu().T, s=3, alpha=0.4)
    replace_file(path, partial(figure.savefig, dpi=70))


def save_curves(folder: Path) -> None:
    """Draw each number of metrics.jsonl against the step, in curves.png."""
    from matplotlib.figure import Figure

    curves = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in row.keys() - {"step", "class_shares"}:
            curves[name].append((row["step"], math.nan if row[name] is None else row[name]))
    height = max(1, math.ceil(len(curves) / 4))
    figure = Figure(figsize=(14, 3 * height), layout="tight")
    for place, name in enumerate(sorted(curves), 1):
        axes = figure.add_subplot(height, 4, place, title=name, xlabel="step")
        axes.plot(*zip(*curves[name]), marker="." if len(curves[name]) < 20 else None)
    replace_file(folder / "curves.png", partial(figure.savefig, dpi=70))


# ---------------------------------------------------------------------------------------------------------
# Networks


def block(layer: nn.Module, channels: int) -> nn.Sequential:
    """Return a layer followed by batch normalisation and ReLU."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


def make_mlp(inputs: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    """Return a network from points (b, inputs) to (b, outputs), for the 2-D mixtures."""
    layers = [nn.Linear(inputs, 128), activation]
    for _ in range(2):
        layers += [nn.Linear(128, 128), activation]
    return nn.Sequential(*layers, nn.Linear(128, outputs))


def make_generator(latent_dim: int) -> nn.Sequential:
    """Return a network from latents (b, latent_dim) to images (b, 1, 28, 28) in [-1, 1]."""
    network = nn.Sequential(
        nn.Linear(latent_dim, 64 * 49, bias=False),
        block(nn.Unflatten(1, (64, 7, 7)), 64),
        block(nn.Conv2d(64, 64, 3, 1, 1, bias=False), 64),
        block(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), 32),  # (b, 32, 14, 14)
        block(nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), 16),  # (b, 16, 28, 28)
        nn.Conv2d(16, 1, 3, 1, 1),
        nn.Tanh(),
    )
    return network.to(memory_format=torch.channels_last)  # half the time of a step on a CPU


def make_critic(toy: bool, spectral_norm: bool) -> nn.Sequential:
    """Return a network from images (b, 1, 28, 28) or points (b, 2) to features (b, 16)."""
    features = make_mlp(2, 16, nn.LeakyReLU(0.2))
    if not toy:
        features = nn.Sequential(
            nn.ConstantPad2d(1, -1.0),  # black: a frame of grey, which is 0, would be seen
            nn.Conv2d(1, 32, 4, 2),  # (b, 32, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1),  # (b, 64, 7, 7)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(64 * 49, 16),
        )
    if spectral_norm:
        for layer in features:
            if hasattr(layer, "weight"):
                nn.utils.parametrizations.spectral_norm(layer)
        # The norms bound the features' distances by those of the images: too close for the kernel to tell.
        features[-1].register_forward_hook(lambda layer, inputs, output: 4 * output)
    return features.to(memory_format=torch.channels_last)


@torch.no_grad()
def draw_samples(generator: nn.Module, args, count: int) -> Tensor:
    """Return samples (count, ...) of a generator in evaluation mode; the latents have a seed of their own."""
    rng = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(count, args.latent_dim, generator=rng).to(args.device)
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


# ---------------------------------------------------------------------------------------------------------
# Loss

TILE = 512  # points a side: a tile of float32 pairs is 1 MB, which a core's cache holds for all bandwidths
TINY = -96.0  # the least exponent of 2: numbers below 2^-126 would take a CPU 10 to 100 times as long


def kernel_means(
    x: Tensor,
    y: Tensor,
    bandwidths: float | Sequence[float] | Tensor,
    kernel: str = "gaussian",
    unbiased: bool = True,
    weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means that every MMD loss is made of: k_xx, k_yy and k_xy, scalars with gradients.

    Args:
        x, y: points (n, d) and (m, d), both float32 or both float64, on one device.
        bandwidths: the mixture, (s,) positive numbers or one; a tensor gets gradients (a learned kernel).
        kernel: "gaussian", sum_s w_s exp(-|a - b|^2 / 2 s^2), or "rational_quadratic", sum_s w_s
            (1 + |a - b|^2 / 2 s)^-s (Binkowski et al. 2018, section 2.1).
        unbiased: leave the pairs of a point with itself out (Gretton et al. 2012, eq. 3), or not (eq. 5).
        weights: (s,) weights w of the mixture, 1 by default; a tensor gets gradients.

    Raises ValueError for other shapes, dtypes, devices, kernels or bandwidths, for fewer than two points in
    an unbiased mean, and for points that are not finite (on CUDA, where a look would wait, means are NaN).
    """
    if isinstance(bandwidths, int | float):
        bandwidths = (bandwidths,)
    if weights is None:
        weights = (1.0,) * len(bandwidths)
    check_points(x, y, at_least=2 if unbiased else 1)
    check_kernel(kernel)
    if len(bandwidths) == 0 or len(bandwidths) != len(weights):
        raise ValueError(f"{len(bandwidths)} bandwidths and {len(weights)} weights")
    learned = isinstance(bandwidths, Tensor) or isinstance(weights, Tensor)
    if not isinstance(bandwidths, Tensor) and not all(0 < s < math.inf for s in bandwidths):
        raise ValueError(f"bandwidths must be positive and finite, not {bandwidths}")
    with torch.autocast(x.device.type, enabled=False):
        if learned or torch.compiler.is_compiling():
            return dense_means(x, y, bandwidths, weights, kernel, unbiased)
        return FusedMeans.apply(x, y, tuple(bandwidths), tuple(weights), kernel, unbiased)


def mmd2(x: Tensor, y: Tensor, bandwidths: float | Sequence[float] | Tensor, **options) -> Tensor:
    """Return the squared maximum mean discrepancy k_xx + k_yy - 2 k_xy of x (n, d) and y (m, d): a scalar.

    Gretton et al. 2012, Lemma 6. Arguments and errors are those of kernel_means.
    """
    k_xx, k_yy, k_xy = kernel_means(x, y, bandwidths, **options)
    return k_xx + k_yy - 2 * k_xy


def critic_loss(k_xx: Tensor, k_yy: Tensor, k_xy: Tensor, repulsion: float) -> Tensor:
    """Return the critic's loss  lambda k_xx - (lambda - 1) k_xy - k_yy  (Wang et al. 2019, section 3.2).

    x is real, y fake. lambda, the repulsion, is -1 in the attractive loss -MMD^2 (Li et al. 2017), and 1 in
    the repulsive one, k_xx - k_yy, in which the critic spreads real samples instead of gathering them.
    """
    return repulsion * k_xx - (repulsion - 1) * k_xy - k_yy


def witness(t: Tensor, x: Tensor, y: Tensor, bandwidths, kernel: str = "gaussian", weights=None) -> Tensor:
    """Return the witness function mean_i k(x_i, t) - mean_j k(y_j, t) at points t (l, d): (l,).

    Gretton et al. 2012, section 2.3, for x (n, d) and y (m, d). Arguments are those of kernel_means.
    """
    bandwidths = (bandwidths,) if isinstance(bandwidths, int | float) else bandwidths
    weights = (1.0,) * len(bandwidths) if weights is None else weights
    check_kernel(kernel)
    k_x = mixture(squared_distances(t, x), bandwidths, weights, kernel)
    k_y = mixture(squared_distances(t, y), bandwidths, weights, kernel)
    return k_x.mean(1) - k_y.mean(1)


def check_kernel(kernel: str) -> None:
    """Raise ValueError for an unknown kernel."""
    if kernel not in ("gaussian", "rational_quadratic"):
        raise ValueError(f"kernel must be gaussian or rational_quadratic, not {kernel!r}")


def check_points(x: Tensor, y: Tensor, at_least: int) -> None:
    """Raise ValueError unless x and y are finite points of one size, dtype and device."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device or x.dtype not in (torch.float32, torch.float64):
        found = f"{x.dtype} on {x.device} and {y.dtype} on {y.device}"
        raise ValueError(f"x and y must both be float32 or both float64, on one device, not {found}")
    if min(len(x), len(y)) < at_least:
        raise ValueError(f"{len(x)} and {len(y)} points are too few: at least {at_least} of each are needed")
    waits = x.device.type != "cpu" or torch.compiler.is_compiling()  # for a look at the values
    if not waits and not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x or y is not finite")


# Plain torch, for learned kernels, second derivatives and torch.compile


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 (n, m) of x (n, d) and y (m, d): not negative, with derivatives of every order."""
    center = x.detach().mean(0)  # far from the origin digits would be lost
    x, y = x - center, y - center
    t = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return t + (t.clamp(min=0) - t).detach()  # clamps the value alone


def mixture(t: Tensor, bandwidths, weights, kernel: str) -> Tensor:
    """Return the kernel at squared distances t, in their shape."""
    k = 0
    for s, w in zip(bandwidths, weights):
        exponent = -t / (2 * s * s) if kernel == "gaussian" else -s * (1 + t / (2 * s)).log()
        k = k + w * exponent.clamp(min=TINY * math.log(2)).exp()
    return k


def dense_means(x, y, bandwidths, weights, kernel, unbiased) -> tuple[Tensor, Tensor, Tensor]:
    """Return kernel_means by whole matrices of pairs and autograd."""
    means = []
    for z in (x, y):
        n = len(z)
        k = mixture(squared_distances(z, z), bandwidths, weights, kernel)
        total = k.masked_fill(torch.eye(n, dtype=torch.bool, device=z.device), 0).sum()
        means.append(total / (n * (n - 1)) if unbiased else (total + n * sum(weights)) / n**2)
    return *means, mixture(squared_distances(x, y), bandwidths, weights, kernel).mean()


# One pass over the pairs makes the sums of k and their gradients, and keeps no matrix. With W = -2 dk/dt at
# the squared distance t_ij, the gradient of k(a_i, b_j) in a_i is W_ij (b_j - a_i), and that in b_j the
# opposite. A point has no pair with itself there: in float32 W_ii a_i - W_ii a_i is not zero.


class FusedMeans(torch.autograd.Function):
    """kernel_means by pair_sums, or by triton_sums for float32 on CUDA."""

    @staticmethod
    def forward(ctx, x, y, bandwidths, weights, kernel, unbiased):
        ctx.options = bandwidths, weights, kernel, unbiased
        n, m = len(x), len(y)
        sums = triton_sums if x.is_cuda and x.dtype == torch.float32 and find_spec("triton") else torch_sums
        (k_xx, k_yy, k_xy), (d_xx, d_yy, d_xy, d_yx) = sums(x, y, bandwidths, weights, kernel)
        pairs_x, pairs_y = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
        ctx.save_for_backward(
            x, y, d_xx * (2 / pairs_x), d_yy * (2 / pairs_y), d_xy / (n * m), d_yx / (n * m)
        )
        own = 0.0 if unbiased else sum(weights)
        means = (k_xx + n * own) / pairs_x, (k_yy + m * own) / pairs_y, k_xy / (n * m)
        return tuple(mean.to(x.dtype) for mean in means)

    @staticmethod
    def backward(ctx, g_xx, g_yy, g_xy):
        x, y, d_xx, d_yy, d_xy, d_yx = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: someone wants second derivatives
            with torch.autocast(x.device.type, enabled=False):
                k_xx, k_yy, k_xy = dense_means(x, y, *ctx.options)
                inputs = [v for v in (x, y) if v.requires_grad]
                total = g_xx * k_xx + g_yy * k_yy + g_xy * k_xy
                grads = iter(torch.autograd.grad(total, inputs, create_graph=True))
            return *(next(grads) if v.requires_grad else None for v in (x, y)), None, None, None, None
        return g_xx * d_xx + g_xy * d_xy, g_yy * d_yy + g_xy * d_yx, None, None, None, None


def torch_sums(x: Tensor, y: Tensor, bandwidths, weights, kernel: str) -> tuple[tuple, tuple]:
    """Return the sums of k over the pairs (x, x), (y, y) and (x, y), and their gradients in a point."""
    mix = sorted(zip(bandwidths, weights), reverse=True), kernel
    x, y, y_own = x - x.mean(0), y - x.mean(0), y - y.mean(0)  # centred, as in squared_distances
    if len(x) == len(y) <= TILE // 2:  # all at once: calls are what takes time here
        k, d_a, d_b = pair_sums(torch.stack((x, y_own, x)), torch.stack((x, y_own, y)), 2, *mix)
        return k.unbind(), (*d_a.unbind(), d_b[2])
    k_xx, d_xx, _ = pair_sums(x[None], x[None], 1, *mix)
    k_yy, d_yy, _ = pair_sums(y_own[None], y_own[None], 1, *mix)
    k_xy, d_xy, d_yx = pair_sums(x[None], y[None], 0, *mix)
    return (k_xx[0], k_yy[0], k_xy[0]), (d_xx[0], d_yy[0], d_xy[0], d_yx[0])


def pair_sums(a: Tensor, b: Tensor, own: int, parts: list, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of k(a_i, b_j) (B,) of a (B, n, d) and b (B, m, d), and the gradients in a and in b.

    The first `own` of the B problems are those of points with themselves, and leave out i = j.
    """
    symmetric = own == len(a)  # tiles below the diagonal are those above
    a1 = F.pad(a, (0, 1), value=1.0)
    b1 = F.pad(b, (0, 1), value=1.0)
    # A row of left times one of right is a squared distance.
    left = torch.cat((-2 * a, a.square().sum(2, keepdim=True), a1[:, :, -1:]), 2)
    right = torch.cat((b1, b.square().sum(2, keepdim=True)), 2)
    total = a.new_zeros(len(a), dtype=torch.float64)
    d_a, d_b = torch.zeros_like(a1), torch.zeros_like(b1)  # sum_j W_ij (b_j, 1), sum_i W_ij (a_i, 1)
    buffers = a.new_empty(
        3, len(a) * min(TILE, a.shape[1]) * min(TILE, b.shape[1])
    )  # once, not for each tile
    for i in range(0, a.shape[1], TILE):
        for j in range(i if symmetric else 0, b.shape[1], TILE):
            rows, cols = slice(i, i + TILE), slice(j, j + TILE)
            size = len(a), len(a[0, rows]), len(b[0, cols])
            t, p, slope = (buffer[: math.prod(size)].view(size) for buffer in buffers)
            for q in range(len(a)):  # torch.bmm takes longer
                torch.mm(left[q, rows], right[q, cols].T, out=t[q])
            farthest = t.clamp_(min=0).max().item()
            if i == j:
                t[:own].diagonal(dim1=1, dim2=2).fill_(math.inf)
            k = tile_profile(t, p, slope, parts, kernel, farthest)
            mirrored = symmetric and i != j
            total += 2 * k if mirrored else k
            for q in range(len(a)):
                d_a[q, rows].addmm_(slope[q], b1[q, cols])
                if mirrored or q >= own:
                    d_b[q, cols].addmm_(slope[q].T, a1[q, rows])
    if symmetric:
        d_a += d_b
    return total, d_a[:, :, :-1] - d_a[:, :, -1:] * a, d_b[:, :, :-1] - d_b[:, :, -1:] * b


def tile_profile(t: Tensor, p: Tensor, slope: Tensor, parts: list, kernel: str, farthest: float) -> Tensor:
    """Return the sums (B,) of k over squared distances t (B, r, c), and put W in slope; p is a buffer."""
    total = t.new_zeros(len(t))
    slope.zero_()
    wider = None
    for s, w in parts:
        if kernel == "rational_quadratic":
            base = torch.add(1, t, alpha=1 / (2 * s))
            torch.log2(base, out=p).mul_(-s).clamp_(min=TINY).exp2_()
            slope.addcdiv_(p, base, value=w)
        else:
            rate = -0.5 / (s * s * math.log(2))
            if wider == 2 * s:  # exp(-t / 2 s^2) is the fourth power of the one before
                if rate * farthest < TINY:
                    p.clamp_(min=2 ** (TINY / 4))
                p.square_().square_()
            else:
                torch.mul(t, rate, out=p).clamp_(min=TINY).exp2_()
            slope.add_(p, alpha=w / (s * s))
            wider = s
        total.add_(p.sum((1, 2)), alpha=w)
    return total


def triton_sums(x: Tensor, y: Tensor, bandwidths, weights, kernel: str) -> tuple[tuple, tuple]:
    """Return what torch_sums does, by one Triton kernel."""
    n, d = x.shape
    z = torch.cat((x, y))
    z = torch.stack((z - x.mean(0), z - y.mean(0)))  # for the rows of x, of y
    parts = parts_table(bandwidths, weights, x.device)
    k = z.new_empty(z.shape[:2])  # over the columns of x, of y
    grads = torch.empty_like(z)
    sizes = {"BLOCK": 32, "BLOCK_D": 32, "OUT_D": min(64, max(16, 2 ** (d - 1).bit_length()))}
    grid = (-(-n // 32) + -(-len(y) // 32), 2, -(-d // sizes["OUT_D"]))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        launch = mmd_kernel()[grid]
        sizes |= {"num_warps": 8, "num_stages": 2}  # so all stays in registers (tests/test_triton.py)
        launch(z, parts, k, grads, n, len(y), d, kernel == "gaussian", len(parts), **sizes)
    sums = k[0, :n].sum(), k[1, n:].sum(), k[1, :n].sum()
    return sums, (grads[0, :n], grads[1, n:], grads[1, :n], grads[0, n:])


@cache
def parts_table(bandwidths: tuple, weights: tuple, device: torch.device) -> Tensor:
    """Return the mixture (s, 2) on the device, copied once: a copy in each step would wait for the device."""
    return torch.tensor(list(zip(bandwidths, weights)), dtype=torch.float32, device=device)


@cache
def mmd_kernel():
    """Return the Triton kernel of triton_sums, made at its first use: nothing else needs Triton."""
    global tl  # where a kernel looks names up
    import triton
    import triton.language as tl

    # Rows and columns are z = (x, y). A program takes BLOCK rows, goes along all columns of one side, and
    # makes OUT_D coordinates of the gradients:
    #             side 0: x   side 1: y
    #   rows  x [   k_xx    |   k_xy    ]       k[side, i] = sum_j k(z_i, z_j)
    #         y [   k_xy    |   k_yy    ]       grads[side, i] = sum_j W_ij (z_j - z_i)
    @triton.jit
    def pair_kernel(
        z, parts, k_out, grads, n, m, D: tl.constexpr, GAUSSIAN: tl.constexpr, PARTS: tl.constexpr,
        BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
    ):  # fmt: skip
        strip, side, out = tl.program_id(0), tl.program_id(1), tl.program_id(2) * OUT_D
        in_y = strip >= tl.cdiv(n, BLOCK)
        first = tl.where(in_y, n + (strip - tl.cdiv(n, BLOCK)) * BLOCK, strip * BLOCK)
        rows = first.to(tl.int64) + tl.arange(0, BLOCK)
        row_inside = rows < tl.where(in_y, n + m, n)
        z += tl.where(in_y, 1, 0).to(tl.int64) * (n + m) * D  # centred on the mean of the rows' cloud
        at, at_out = tl.arange(0, BLOCK_D), out + tl.arange(0, OUT_D)
        k_sum, w_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        pull = tl.zeros((BLOCK, OUT_D), tl.float32)
        for col in range(side * n, n + side * m, BLOCK):
            cols = col + tl.arange(0, BLOCK).to(tl.int64)
            col_inside = cols < n + side * m
            # Squared distances t (BLOCK, BLOCK), from BLOCK_D coordinates at a time
            dot = tl.zeros((BLOCK, BLOCK), tl.float32)
            a2, b2 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for d in range(0, D, BLOCK_D):
                there = (d + at < D)[None, :]
                a = tl.load(z + rows[:, None] * D + d + at[None, :], row_inside[:, None] & there, 0.0)
                b = tl.load(z + cols[:, None] * D + d + at[None, :], col_inside[:, None] & there, 0.0)
                dot = tl.dot(a, tl.trans(b), dot, input_precision="tf32x3")
                a2 += tl.sum(a * a, 1)
                b2 += tl.sum(b * b, 1)
            t = tl.maximum(a2[:, None] + b2[None, :] - 2 * dot, 0.0)
            # The kernel k and its slope W, of pairs that are there and not of a point with itself
            k, w = tl.zeros_like(t), tl.zeros_like(t)
            for part in tl.static_range(PARTS):
                s, weight = tl.load(parts + 2 * part), tl.load(parts + 2 * part + 1)
                if GAUSSIAN:
                    value = weight * tl.exp(-t / (2 * s * s))
                    w += value / (s * s)
                else:
                    base = 1 + t / (2 * s)
                    value = weight * tl.exp(-s * tl.log(base))
                    w += value / base
                k += value
            pair = row_inside[:, None] & col_inside[None, :] & (rows[:, None] != cols[None, :])
            k, w = tl.where(pair, k, 0.0), tl.where(pair, w, 0.0)
            k_sum += tl.sum(k, 1)
            w_sum += tl.sum(w, 1)
            # The gradient: sum_j W_ij z_j
            mask = col_inside[:, None] & (at_out < D)[None, :]
            b = tl.load(z + cols[:, None] * D + at_out[None, :], mask, 0.0)
            pull = tl.dot(w, b, pull, input_precision="tf32x3")
        mask = row_inside[:, None] & (at_out < D)[None, :]
        a = tl.load(z + rows[:, None] * D + at_out[None, :], mask, 0.0)
        place = side.to(tl.int64) * (n + m) + rows
        tl.store(grads + place[:, None] * D + at_out[None, :], pull - w_sum[:, None] * a, mask)
        tl.store(k_out + place, k_sum, row_inside & (out == 0))

    return pair_kernel


def gradient_penalty(f: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Return the mean of (|grad f(t)| - 1)^2 at random points t between real and fake (b, ...): a scalar.

    Gulrajani et al. 2017, eq. 3. f returns a value per sample, (b,) or (b, 1), that depends on no other
    sample: no batch normalisation. Raises ValueError for other shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real {tuple(real.shape)} and fake {tuple(fake.shape)} must have one shape")
    u = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    t = torch.lerp(real.detach(), fake.detach(), u).requires_grad_()
    values = f(t)
    if values.numel() != len(t):
        raise ValueError(f"f must return a value per sample, ({len(t)},), not {tuple(values.shape)}")
    (grad,) = torch.autograd.grad(values.sum(), t, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


# ---------------------------------------------------------------------------------------------------------
# Training


def any_rank(signals: list[int]) -> bool:
    """Return whether any process has caught a signal."""
    flag = torch.tensor(len(signals))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class Gather(torch.autograd.Function):
    """The global batch, of all processes, from this one's part (b, d)."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        parts = [torch.empty_like(h) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, h.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(h: Tensor) -> Tensor:
    """Return the global batch under torchrun, else the batch (b, d) as it is."""
    return Gather.apply(h) if dist.is_initialized() else h


def average_gradients(network: nn.Module) -> None:
    """Replace the gradients by their mean over the processes."""
    for p in network.parameters() if dist.is_initialized() else ():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def train(args: Args) -> Path:
    """Train, evaluate and save; return the run folder. With args.generate draw samples of a run instead.

    Raises UserError for what the user can mend. After Ctrl-C or SIGTERM it saves and raises SystemExit.
    """
    toy = args.dataset in TOYS
    with ExitStack() as stack:
        # Torch's random numbers and switches, which the stack puts back at the end
        try:
            device = torch.empty(0, device=args.device).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {args.device} cannot be used, try cpu: {error!s:.60}") from error
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn" if args.torch_deterministic else "default")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic
        torch.manual_seed(args.seed)

        # torchrun starts several processes: each has a part of every batch, and the first one writes
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1:
            if args.batch_size % world_size:
                raise UserError(f"--batch-size {args.batch_size} is no multiple of {world_size} processes")
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            stack.callback(dist.destroy_process_group)
            if rank > 0:
                dist.barrier()  # the first one downloads, and trains the classifier
        data, measure = load_data(args)
        if world_size > 1 and rank == 0:
            dist.barrier()
        batch_size = args.batch_size // world_size

        generator = make_mlp(args.latent_dim, 2, nn.ReLU()) if toy else make_generator(args.latent_dim)
        critic = make_critic(toy, args.spectral_norm) if args.encoder == "learned" else nn.Flatten()
        generator.to(device)
        critic.to(device)
        ema_decay = min(0.999, 1 - 10 / max(10, args.num_steps))  # a short run has a short memory
        averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
        optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.999), fused=True)
        parts = {"generator": generator, "averaged": averaged, "optimizer_g": optimizer_g}
        if args.encoder == "learned":
            optimizer_c = torch.optim.Adam(critic.parameters(), betas=(0.5, 0.999), fused=True)
            parts |= {"critic": critic, "optimizer_c": optimizer_c}

        def f(t: Tensor, h_real: Tensor, h_fake: Tensor) -> Tensor:
            return witness(critic(t), h_real, h_fake, args.bandwidths, args.kernel)

        # A new run folder, or that of the run to go on with, whose log is cut at its checkpoint
        step, seconds, run_id = 0, 0.0, None
        if args.resume:
            folder = Path(args.resume)
            checkpoint = load_checkpoint(folder)
            try:
                for name, part in parts.items():
                    part.load_state_dict(checkpoint[name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(f"the options do not fit the networks of {folder}: {error!s:.100}") from error
            torch.set_rng_state(checkpoint["rng"])
            if device.type == "cuda" and checkpoint["rng_cuda"] is not None:
                torch.cuda.set_rng_state(checkpoint["rng_cuda"], device)
            step, seconds, run_id = checkpoint["progress"]
        if rank > 0:
            torch.manual_seed(args.seed + 1000 * rank + step)  # other samples than the first one's
        if args.generate:
            return save_generated(folder, draw_samples(averaged, args, args.generate))
        if not args.resume:
            folder = Path(args.run_dir, f"{args.exp_name}__{args.dataset}__{args.seed}__{time.time_ns()}")
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=bool(args.resume))
            path = folder / "metrics.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        wandb_run = None
        if rank == 0 and args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_id}
            names["name"] = os.environ.get("WANDB_NAME", folder.name)
            wandb_run = wandb.init(**names, resume="allow", config=vars(args), dir=args.run_dir)
            run_id = stack.enter_context(wandb_run).id  # finished at the end, or failed by an error

        def log(row: dict) -> None:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | row) + "\n")
            if wandb_run:
                wandb_run.log(row, step=step)

        def save() -> None:
            if not all(p.isfinite().all() for p in averaged.parameters()):
                raise UserError(f"weights are not finite at step {step}: lower the learning rate")
            checkpoint = {name: part.state_dict() for name, part in parts.items()}
            checkpoint |= {"script": SCRIPT, "args": vars(args), "progress": (step, seconds, run_id)}
            rng_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            checkpoint |= {"rng": torch.get_rng_state(), "rng_cuda": rng_cuda}
            replace_file(folder / "checkpoint.pt", partial(torch.save, checkpoint))

        def evaluate() -> dict:
            samples = draw_samples(averaged, args, max(args.num_eval_samples, 2500 if toy else 100))
            save_samples(folder / f"samples_{step:06d}.png", samples, data)
            save_samples(folder / "samples.png", samples, data)
            metrics = measure(samples)
            log(metrics)
            if wandb_run:
                wandb_run.log({"samples": wandb.Image(str(folder / "samples.png"))}, step=step)
            tqdm.write(f"step {step}: {metrics}")
            return metrics

        signals: list[int] = []  # Ctrl-C or SIGTERM, which end the loop; no other thread can catch them
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, lambda number, frame: signals.append(number))
                stack.callback(signal.signal, number, before)

        quiet = True if rank else None

        def explain(kind, error, trace) -> None:
            if kind is ValueError:
                raise UserError(f"step {step}: {error}; lower the learning rates") from error

        stack.push(explain)
        bar = stack.enter_context(tqdm(total=args.num_steps, initial=step, desc=SCRIPT, disable=quiet))
        clock, logged_step = time.perf_counter(), step
        while step < args.num_steps and not any_rank(signals):
            step += 1
            # Learning rates are constant at first, then fall linearly to zero.
            rate = min(1.0, (args.num_steps - step + 1) / ((0.4 if toy else 0.7) * args.num_steps))

            # The critic minimises  k_xx - k_yy,  or  -MMD^2.
            if args.encoder == "learned":
                real = to_float(data[torch.randint(len(data), (batch_size,), device=device)])
                with torch.no_grad():
                    fake = generator(torch.randn(batch_size, args.latent_dim, device=device))
                h_real, h_fake = (gather(h) for h in critic(torch.cat((real, fake))).chunk(2))
                means = kernel_means(h_real, h_fake, args.bandwidths, args.kernel)
                loss_c = critic_loss(*means, repulsion=1.0 if args.loss == "repulsive" else -1.0)
                if args.penalty_weight:
                    penalty = gradient_penalty(partial(f, h_real=h_real, h_fake=h_fake), real, fake)
                    loss_c = loss_c + args.penalty_weight * penalty
                optimizer_c.param_groups[0]["lr"] = rate * args.lr_critic
                optimizer_c.zero_grad()
                loss_c.backward()
                average_gradients(critic)
                optimizer_c.step()

            # The generator minimises  MMD^2 = k_xx + k_yy - 2 k_xy.
            real = to_float(data[torch.randint(len(data), (batch_size,), device=device)])
            with torch.no_grad():
                h_real = gather(critic(real))
            h_fake = gather(critic(generator(torch.randn(batch_size, args.latent_dim, device=device))))
            k_xx, k_yy, k_xy = kernel_means(h_real, h_fake, args.bandwidths, args.kernel)
            loss_g = k_xx + k_yy - 2 * k_xy
            optimizer_g.param_groups[0]["lr"] = rate * args.lr_generator
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            average_gradients(generator)
            optimizer_g.step()
            averaged.update_parameters(generator)

            bar.update()
            if step % args.log_every == 0 or step == args.num_steps:
                scalars = {"mmd2": loss_g, "k_xx": k_xx, "k_yy": k_yy, "k_xy": k_xy}
                if args.encoder == "learned":
                    scalars["loss_c"] = loss_c
                k = torch.stack((k_xx, k_yy, k_xy)) / len(args.bandwidths)
                if k.max() < 1e-3 or k.min() > 1 - 1e-3:
                    tqdm.write(f"step {step}: the kernel is blind, all points are far apart or all the same")
                scalars = {name: value.item() for name, value in scalars.items()}
                if not all(map(math.isfinite, scalars.values())):
                    raise UserError(f"not finite at step {step}: {scalars}; lower the learning rates")
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                if rank == 0:
                    log(scalars | {"steps_per_second": (step - logged_step) / elapsed})
                clock, logged_step = time.perf_counter(), step
            if rank == 0 and step % args.eval_every == 0 and step < args.num_steps:
                save()
                evaluate()
                clock, logged_step = time.perf_counter(), step

        if rank > 0:
            return folder
        save()
        if step < args.num_steps:
            save_curves(folder)
            command = shlex.join(["python", f"{SCRIPT}.py", f"--resume={folder}"])
            tqdm.write(f"stopped after step {step}; go on with: {command}")
            raise SystemExit(128 + signals[0] if signals else 1)
        metrics = evaluate() | {"real": measure(data)}
        save_curves(folder)
        facts = {"steps": step, "seconds": seconds, "device": args.device, "torch": torch.__version__}
        results = json.dumps(metrics | facts | {"args": vars(args)}, indent=2)
        replace_file(folder / "results.json", lambda path: path.write_text(results))
        print(folder)
        return folder


def save_generated(folder: Path, samples: Tensor) -> Path:
    """Save samples in the new folder generated/ of a run: images as PNG files, points as samples.npy."""
    out = folder / "generated"
    if out.exists():
        raise UserError(f"{out} is there already: move it away first")
    beside = folder / f"generated.{os.getpid()}"
    beside.mkdir()
    if samples.dim() == 2:
        np.save(beside / "samples.npy", samples.cpu().numpy())
    else:
        for i, image in enumerate(samples):
            torchvision.utils.save_image((image + 1) / 2, beside / f"{i:06d}.png")
    return beside.rename(out)


def parse_args(argv: list[str] | None = None) -> Args:
    """Return the command line's options, over those of the resumed run or the data set's preset."""
    typed = tyro.cli(Args, args=argv)
    default = Args(resume=typed.resume) if typed.resume else Args(dataset=typed.dataset)
    return tyro.cli(Args, args=argv, default=default)


if __name__ == "__main__":
    try:
        train(parse_args())
    except UserError as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

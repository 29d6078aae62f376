# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""Gaussian-mixture GAN: the latent is a mixture of K Gaussians, and a component becomes a kind of image.

A GAN maps one Gaussian to the data and has to tear it apart where the data are. Here the latent is
z = mu_k + s_k eps with k uniform and eps ~ N(0, I): means and scales stay as drawn (--latent static) or train
with the generator (--latent dynamic); --latent normal is the plain GAN. Heads of the discriminator cluster
real images without a label; the generator makes images of component k for cluster k of the best head.
    Radford et al. 2016            DCGAN: the convolutional networks                     1511.06434
    Chen et al. 2016               InfoGAN: a head that reads the latent                 1606.03657
    Hu et al. 2017                 IMSAT: confident, balanced, invariant clusters        1702.08720
    Ben-Yosef and Weinshall 2018   Gaussian-mixture GAN: static and dynamic latents      1808.10356
    Huang et al. 2024              R3GAN: the relativistic loss and its penalties        2501.05441

    python gmgan_mnist.py --track                              # MNIST, logged to Weights & Biases
    python gmgan_mnist.py --latent normal --loss non-saturating --gamma 0  # DCGAN
    python gmgan_mnist.py --resume runs/<run> --generate 1000  # draw samples
    python gmgan_mnist.py --resume runs/<run> --generate 100 --component 3 --truncation 0.7

The default run takes 25 minutes on a shared CPU core: fid 1.7, 1.9 times that of real images, precision 0.84
and recall 0.66; 98.5% of the test images fall to the cluster of their digit, 97.7% with the worst of three
seeds (results/gmgan_mnist.md).
"""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
import tyro
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

SCRIPT = "gmgan_mnist"
PRESETS = {"digits": {"num_steps": 1500, "eval_every": 500}}


class UserError(ValueError):
    """A mistake that the user can fix; the command line shows nothing but its message."""


class Args(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    exp_name: str = SCRIPT  # first part of the run folder's name
    seed: int = Field(1, ge=0)  # seed of the run
    torch_deterministic: bool = True  # use deterministic algorithms where torch has them
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # as torch names it: cpu, cuda:1, mps
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = ""  # W&B project; by default WANDB_PROJECT, or minimal-gans
    wandb_entity: str = ""  # W&B team or user; by default WANDB_ENTITY, or you
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits"] = "mnist"  # digits needs no download
    data_dir: str = "data"  # folder of the images, in torchvision's layout; downloaded if missing
    eval_split: Literal["test", "validation"] = "test"  # validation: the last sixth of the training images
    run_dir: str = "runs"  # folder of the run folders
    resume: str = ""  # run folder to resume; its options apply unless given again
    generate: int = Field(0, ge=0)  # write so many samples of the run in --resume to its generated/, then end
    component: tuple[int, ...] = ()  # with --generate: draw from these alone, of 0 to K - 1
    truncation: float = Field(1.0, ge=0)  # with --generate: factor on the standard deviations
    log_every: int = Field(100, gt=0)  # steps between lines of metrics.jsonl, each with a checkpoint
    eval_every: int = Field(1000, gt=0)  # steps between evaluations, each with pictures
    num_eval_samples: int = Field(10_000, ge=0)  # samples drawn for an evaluation; 0: none
    num_steps: int = Field(5000, gt=0)  # updates of the generator
    batch_size: int = Field(64, gt=0)  # samples in a batch
    latent: Literal["normal", "static", "dynamic"] = "dynamic"  # one Gaussian, a fixed or a trained mixture
    latent_dim: int = Field(32, gt=0)  # size of the generator's input, d
    num_components: int = Field(10, gt=0)  # Gaussians in the mixture, K
    latent_range: float = Field(1.0, gt=0)  # c: the means are drawn uniformly from [-c, c]^d
    sigma: float = Field(1.5, gt=0)  # standard deviation of a component, at first if it trains
    loss: Literal["relativistic", "non-saturating"] = "relativistic"  # logits compared in pairs, or with zero
    # half of it weighs each penalty on the discriminator's slope, at real and at fake
    gamma: float = Field(0.2, ge=0)
    cluster_weight: float = Field(1.0, ge=0)  # weight of the discriminator's heads, which cluster real images
    balance: float = Field(2.0, ge=0)  # therein, weight of clusters having one size
    invariance: float = Field(1.0, ge=0)  # therein, weight of images keeping their cluster when augmented
    num_heads: int = Field(5, gt=0)  # clusterings, of which one is chosen early
    naming_weight: float = Field(0.1, ge=0)  # weight of images being of their component's cluster
    learning_rate: float = Field(2e-3, gt=0)  # of both networks; it falls to zero in the last part of the run

    def __init__(self, **options):
        for name, value in options.items():
            if isinstance(value, str | os.PathLike):
                options[name] = os.path.expanduser(value)
        # The command line gives every option, of a resumed run those of the run that were not typed.
        if options.get("resume") and len(options) < len(Args.model_fields):
            saved = load_checkpoint(options["resume"])["args"]
            del saved["device"]  # another machine may go on
            options = saved | options
        options = PRESETS.get(str(options.get("dataset")), {}) | options
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError("; ".join(wrong)) from None
        if self.generate and not self.resume:
            raise UserError("--generate needs --resume, the folder of the run that draws the samples")
        k = 1 if self.latent == "normal" else self.num_components
        if not all(0 <= i < k for i in self.component):
            raise UserError(f"component must be of 0 to {k - 1}, not {self.component}")


# ---- Data -----------------------------------------------------------------------------------------------
def load_images(dataset: str, data_dir: str, eval_split: str) -> list[Tensor]:
    """Return training images (n, 28, 28) uint8, labels (n,), and those for evaluation. Raises UserError."""
    if dataset == "digits":  # scikit-learn's 1,797 digits of 8 x 8, enlarged
        from sklearn.datasets import load_digits

        pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
        images = F.interpolate(pixels.float().view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear")
        images = images.squeeze(1).round().to(torch.uint8)
        order = np.random.default_rng(0).permutation(len(labels))  # they come writer by writer
        parts = [v[order[i]] for i in (slice(1437), slice(1437, None)) for v in (images, labels)]
    else:
        name = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[dataset]
        parts = []
        try:
            for train in (True, False):
                part = getattr(torchvision.datasets, name)(data_dir, train=train, download=True)
                if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                    raise ValueError(f"expected 28 x 28 images of classes 0 to 9, not {part.data.shape}")
                parts += [part.data, part.targets]
        except Exception as error:
            where = f"{Path(data_dir, name, 'raw')}, see --data-dir"
            raise UserError(f"no {dataset} in {where}: {error!r:.200}") from error
    if eval_split == "validation":
        n = len(parts[0]) * 5 // 6
        parts = [parts[0][:n], parts[1][:n], parts[0][n:], parts[1][n:]]
    return parts


def to_float(batch: Tensor) -> Tensor:
    """Return uint8 images (b, 28, 28) as floats (b, 1, 28, 28) in [-1, 1], and any floats as they are."""
    return batch.unsqueeze(1).float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Return images (b, 1, 28, 28) in [-1, 1], each turned, sheared, scaled and shifted at random.

    Their border is black. Generated images have gradients through it.
    """
    # Strength times 7.5 degrees, a shear of 0.1 and a scale of 0.07 at most, and a shift of 1.5 of 28 pixels
    limits = torch.tensor((math.pi / 24, 0.1, 0.07, 0.07, 1.5 / 14, 1.5 / 14), device=images.device)
    limits[:4] *= strength
    draws = limits * (2 * torch.rand(len(images), 6, device=images.device) - 1)
    angle, shear, width, height, right, down = draws.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack((cos, shear * cos - sin), 1) * width.exp()[:, None]
    bottom = torch.stack((sin, shear * sin + cos), 1) * height.exp()[:, None]
    shift = torch.stack((right, down), 1)[..., None]
    theta = torch.cat((torch.stack((top, bottom), 1), shift), 2)  # (b, 2, 3), output to input places
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


# ---- Evaluation -----------------------------------------------------------------------------------------
def load_classifier(args, images: Tensor, labels: Tensor) -> nn.Sequential:
    """Return the classifier of these images (n, 28, 28), trained once and then kept in args.run_dir."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        block(nn.Conv2d(1, 32, 5, 2, 2, bias=False), 32),
        block(nn.Conv2d(32, 64, 5, 2, 2, bias=False), 64),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),  # the features (b, 128)
        nn.Linear(128, 10),
    ).to(images.device)
    mark = (images.sum((1, 2)) * (labels + 1)).sum().item()  # other images or labels have another one
    path = Path(args.run_dir, f"classifier__{args.dataset}__{mark}.pt")
    if not path.exists():
        print(f"training the classifier that evaluates samples, once, for {path}", flush=True)
        optimizer = torch.optim.Adam(classifier.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 4 * math.ceil(len(images) / 128))
        for _ in range(4):
            for index in torch.randperm(len(images), device=images.device).split(128):
                optimizer.zero_grad()
                logits = classifier(to_float(images[index]))
                F.cross_entropy(logits, labels[index], label_smoothing=0.05).backward()
                optimizer.step()
                schedule.step()
        replace_file(path, partial(torch.save, classifier.state_dict()))
    classifier.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
    return classifier.eval().requires_grad_(False)


def image_metrics(samples: Tensor, real: Tensor, classifier: nn.Sequential) -> dict:
    """Return metrics of samples against real images, (n, ...) and (m, ...), by the classifier's features."""
    y, x = (torch.cat([classifier[:-1](to_float(b)) for b in v.split(1000)]) for v in (samples, real))
    precision, recall = precision_recall(x, y[: len(x)])
    shares = (classifier[-1](y).argmax(1).bincount(minlength=10) / len(y)).tolist()
    return {"fid": frechet_distance(x, y), "precision": precision, "recall": recall, "class_shares": shares}


def frechet_distance(x: Tensor, y: Tensor) -> float | None:
    """Return the Fréchet distance of features (n, d) and (m, d) (Heusel et al. 2017, eq. 6), or None."""
    x, y = x.cpu().double(), y.cpu().double()
    if min(len(x), len(y)) < 2 or not (x.isfinite().all() and y.isfinite().all()):
        return None
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> list[float | None]:
    """Return the shares of fake (m, d) near real (n, d), and vice versa (Kynkäänniemi et al. 2019, eq. 1)."""
    if min(len(real), len(fake)) <= k:
        return [None, None]
    shares = []
    for points, others in ((fake, real), (real, fake)):
        # Near is within the distance of the other's k-th neighbour in its own set.
        reach = torch.cdist(others, others).topk(k + 1, largest=False).values[:, -1]
        near = (torch.cdist(points, others) <= reach).any(1)
        shares.append(near.float().mean().item())
    return shares


def cluster_metrics(labels: Tensor, found: Tensor) -> dict:
    """Return accuracy and normalised mutual information of clusters found (n,) for labels (n,).

    As many clusters as classes are matched to one class each; of more, each counts as its commonest class.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import normalized_mutual_info_score

    labels, found = labels.cpu().numpy(), found.cpu().numpy()
    table = np.zeros((10, max(10, found.max() + 1)), int)
    np.add.at(table, (labels, found), 1)
    best = table[linear_sum_assignment(-table)] if table.shape[1] == 10 else table.max(0)
    nmi = normalized_mutual_info_score(labels, found)
    return {"cluster_accuracy": best.sum().item() / len(labels), "cluster_nmi": nmi}


# ---- Run folder -----------------------------------------------------------------------------------------
def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside path and move it into place, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_stem(f"{path.stem}.{os.getpid()}-{threading.get_ident()}")
    write(beside)
    try:
        os.replace(beside, path)
    except PermissionError:  # on Windows, while a viewer has it open
        tqdm.write(f"warning: {path} is open elsewhere and stays; the new one is {beside}")


def load_checkpoint(run: str | os.PathLike) -> dict:
    """Return the checkpoint of a run folder, without running code in it. Raises UserError."""
    try:
        path = Path(run, "checkpoint.pt").expanduser()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"written by {checkpoint['script']}.py, not {SCRIPT}.py")
    except Exception as error:
        raise UserError(f"{run}/checkpoint.pt is missing, damaged or not a run's: {error!r:.80}") from error
    return checkpoint


def save_images(path: Path, images: Tensor) -> None:
    """Draw images (n, 1, 28, 28) in [-1, 1], ten in a row."""
    replace_file(path, partial(torchvision.utils.save_image, images / 2 + 0.5, nrow=10))


def save_curves(path: Path, rows: list[dict]) -> None:
    """Draw each number of the log against the step."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row} - {"step", "class_shares"})
    figure = Figure(figsize=(12, len(names) + 2), layout="tight")
    for place, name in enumerate(names, 1):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        figure.add_subplot(-(-len(names) // 3), 3, place, title=name).plot(*zip(*points), marker=".")
    replace_file(path, figure.savefig)


# ---- Networks -------------------------------------------------------------------------------------------
def block(layer: nn.Module, channels: int) -> nn.Sequential:
    """Return a layer followed by batch normalisation and ReLU."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


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


class Discriminator(nn.Module):
    """Images (b, 1, 28, 28) to logits (b,) of being real, and to those of h clusterings (b, h, K)."""

    def __init__(self, heads: int, num_clusters: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ConstantPad2d(1, -1.0),  # black: a frame of grey, which is 0, would be seen
            nn.Conv2d(1, 32, 4, 2),  # (b, 32, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1),  # (b, 64, 7, 7)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.last = nn.Linear(64 * 49, 1 + heads * num_clusters)
        self.register_buffer("head_losses", torch.zeros(heads))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.last(self.body(images))
        return outputs[:, 0], outputs[:, 1:].unflatten(1, (len(self.head_losses), -1))

    def best(self, clusterings: Tensor) -> Tensor:
        """Return logits (b, K) of the clustering whose loss was least, of all of them (b, h, K)."""
        return clusterings.index_select(1, self.head_losses.argmin().view(1)).squeeze(1)


class Mixture(nn.Module):
    """K Gaussians of equal weight in d dimensions: means uniform in [-c, c]^d, standard deviations sigma."""

    def __init__(self, num_components: int, dim: int, latent_range: float, sigma: float, trained: bool):
        super().__init__()
        means = latent_range * (2 * torch.rand(num_components, dim) - 1)
        self.means = nn.Parameter(means, requires_grad=trained)
        self.log_scales = nn.Parameter(torch.full_like(means, math.log(sigma)), requires_grad=trained)

    def forward(self, components: Tensor, noise: Tensor) -> Tensor:
        """Return latents mu_k + s_k eps (b, d) of components k (b,) and noise eps (b, d)."""
        return self.means[components] + self.log_scales[components].exp() * noise


@torch.no_grad()
def draw_components(model: nn.ModuleDict, components: Tensor, args, truncation: float = 1.0) -> Tensor:
    """Return samples (n, 1, 28, 28) of components (n,) in evaluation mode; their noise has its own seed."""
    rng = torch.Generator().manual_seed(args.seed)
    noise = truncation * torch.randn(len(components), args.latent_dim, generator=rng)
    latents = model["mixture"](components.to(args.device), noise.to(args.device))
    return torch.cat([model["generator"].eval()(z) for z in latents.split(1000)])


# ---- Loss -----------------------------------------------------------------------------------------------
def non_saturating_losses(l_real: Tensor, l_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of discriminator and generator, scalars, for logits (b,) of real and fake samples.

    Goodfellow et al. 2014, eq. 1, with D = sigmoid(l): -log D(x) - log(1 - D(G(z))) for the discriminator;
    -log D(G(z)) for the generator, which keeps its gradient where the discriminator wins.
    """
    return F.softplus(-l_real).mean() + F.softplus(l_fake).mean(), F.softplus(-l_fake).mean()


def relativistic_losses(l_real: Tensor, l_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of discriminator and generator, scalars, for logits (b,) of samples in pairs.

    Huang et al. 2024, section 2: softplus(l(G(z)) - l(x)) for the discriminator, softplus(l(x) - l(G(z))) for
    the generator.
    """
    return F.softplus(l_fake - l_real).mean(), F.softplus(l_real - l_fake).mean()


def squared_slope(logits: Tensor, samples: Tensor) -> Tensor:
    """Return mean_i |grad D(x_i)|^2 of logits (b,) of samples (b, ...): R1 of real ones, R2 of fake ones."""
    (grad,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    return grad.square().flatten(1).sum(1).mean()


def information_loss(logits: Tensor, logits_augmented: Tensor, balance: float, invariance: float) -> Tensor:
    """Return losses (h,) of h clusterings, which are to be confident, balanced and invariant.

    Hu et al. 2017, eqs. 5 and 7: E H(p) - balance H(E p) + invariance E CE(p, p of augmented images), of
    logits (n, h, K). With a balance of 1 all images may go into one cluster.
    """
    p = logits.softmax(2)
    mean = p.mean(0)
    confident = -(p * logits.log_softmax(2)).sum(2).mean(0)
    balanced = (mean * mean.clamp(min=1e-8).log()).sum(1)
    invariant = -(p.detach() * logits_augmented.log_softmax(2)).sum(2).mean(0)
    return confident + balance * balanced + invariance * invariant


# ---- Training -------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train, evaluate and save; return the run folder. With args.generate draw samples of a run instead.

    Raises UserError for what the user can fix. After Ctrl-C or SIGTERM it saves and raises SystemExit.
    """
    with ExitStack() as stack:  # puts back what a run changes in the process
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn" if args.torch_deterministic else "default")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic
        images = load_images(args.dataset, args.data_dir, args.eval_split)
        data, labels, x_eval, y_eval = (v.to(args.device) for v in images)
        n = args.num_eval_samples
        classifier = load_classifier(args, data, labels) if n else None
        torch.manual_seed(args.seed)
        generator = make_generator(args.latent_dim)
        if args.latent == "normal":
            mixture = Mixture(1, args.latent_dim, 0.0, 1.0, trained=False)
        else:
            shape = args.num_components, args.latent_dim
            mixture = Mixture(*shape, args.latent_range, args.sigma, trained=args.latent == "dynamic")
        k = len(mixture.means)
        model = nn.ModuleDict({"mixture": mixture, "generator": generator}).to(args.device)
        discriminator = Discriminator(args.num_heads, k).to(args.device)
        clustered = args.cluster_weight > 0 and k > 1
        warm_up = args.num_steps // 5  # steps in which the heads find their clusters, before one is chosen
        decay = min(0.999, 1 - 10 / max(10, args.num_steps))  # a short run averages over fewer steps
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer_g = torch.optim.Adam(trained, betas=(0.0, 0.99), fused=True)  # no momentum
        optimizer_d = torch.optim.Adam(discriminator.parameters(), betas=(0.0, 0.99), fused=True)
        parts = {"model": model, "averaged": averaged, "discriminator": discriminator}
        parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}

        # A new run folder, or that of the run to go on with
        name = f"{args.exp_name}__{args.dataset}__{args.seed}__{time.time_ns()}"
        folder = Path(args.resume or Path(args.run_dir, name))
        step, seconds, run_id, rows = 0, 0.0, None, []
        if args.resume:
            checkpoint = load_checkpoint(folder)
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
            torch.cuda.set_rng_state_all(checkpoint["rng_cuda"][: torch.cuda.device_count()])
            step, seconds, run_id, rows = checkpoint["progress"]
        if args.generate:
            rng = torch.Generator().manual_seed(args.seed)
            choice = torch.tensor(args.component or range(k))
            components = choice[torch.randint(len(choice), (args.generate,), generator=rng)]
            samples = draw_components(averaged.module, components, args, args.truncation).cpu().numpy()
            replace_file(folder / "generated" / "samples.npy", lambda path: np.save(path, samples))
            return folder / "generated"
        folder.mkdir(parents=True, exist_ok=bool(args.resume))
        wandb_run = None
        if args.track:
            import wandb

            project = args.wandb_project_name or os.environ.get("WANDB_PROJECT", "minimal-gans")
            names = {"project": project, "name": os.environ.get("WANDB_NAME", folder.name), "id": run_id}
            names["entity"] = args.wandb_entity or None
            wandb_run = wandb.init(**names, resume="allow", config=vars(args), dir=args.run_dir)
            stack.push(lambda kind, error, trace: wandb_run.finish(exit_code=int(kind is not None)))
            run_id = wandb_run.id
        signals: list[int] = []  # Ctrl-C or SIGTERM, which end the loop; no other thread can catch them
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, lambda number, frame: signals.append(number))
                stack.callback(signal.signal, number, before)

        @torch.no_grad()
        def evaluate() -> dict:
            rng = torch.Generator().manual_seed(args.seed)
            components = torch.randint(k, (max(n, 100),), generator=rng)
            samples = draw_components(averaged.module, components, args)
            rows_of_k = [draw_components(averaged.module, torch.full((100,), i), args) for i in range(k)]
            for name in (f"samples_{step:06d}.png", "samples.png"):
                save_images(folder / name, samples[:100])
            save_images(folder / "components.png", torch.cat([row[:10] for row in rows_of_k]))
            metrics = {}
            if n:
                metrics = image_metrics(samples[:n], x_eval[:n], classifier)
            if n and clustered:
                clusterings = [discriminator(to_float(b))[1] for b in x_eval.split(1000)]
                found = [discriminator.best(c).argmax(1) for c in clusterings]
                metrics |= cluster_metrics(y_eval, torch.cat(found))
                purity = [classifier(row).argmax(1).bincount().max().item() / 100 for row in rows_of_k]
                metrics |= {"row_purity": sum(purity) / k, "worst_row": min(purity)}
            if wandb_run:
                for name in ("samples", "components"):
                    wandb_run.log({name: wandb.Image(str(folder / f"{name}.png"))}, step=step)
            tqdm.write(f"step {step}: {metrics}")
            return metrics

        metrics, logged, clock = None, step, time.perf_counter()
        losses = {"relativistic": relativistic_losses, "non-saturating": non_saturating_losses}[args.loss]
        for step in tqdm(range(logged + 1, args.num_steps + 1), desc=SCRIPT, disable=None):
            # Learning rates are constant at first, then fall linearly to zero.
            rate = min(1.0, (args.num_steps - step + 1) / (0.7 * args.num_steps))
            optimizer_g.param_groups[0]["lr"] = rate * args.learning_rate
            optimizer_d.param_groups[0]["lr"] = rate * args.learning_rate
            real = to_float(data[torch.randint(len(data), (args.batch_size,), device=args.device)])
            components = torch.randint(k, (args.batch_size,), device=args.device)
            noise = torch.randn(args.batch_size, args.latent_dim, device=args.device)
            fake = generator(mixture(components, noise))

            # The discriminator minimises  softplus(l(G(z)) - l(x)) + gamma / 2 (R1 + R2) + the heads' losses.
            x = real.requires_grad_()
            y = fake.detach().requires_grad_()
            l_real, c_real = discriminator(x)
            l_fake, _ = discriminator(y)
            loss_d, _ = losses(l_real, l_fake)
            if args.gamma:
                r1, r2 = squared_slope(l_real, x), squared_slope(l_fake, y)
                loss_d = loss_d + args.gamma / 2 * (r1 + r2)
            if clustered:
                _, c_augmented = discriminator(augment(real.detach(), strength=2.0))
                head_losses = information_loss(c_real, c_augmented, args.balance, args.invariance)
                loss_d = loss_d + args.cluster_weight * head_losses.mean()
                if step <= warm_up:
                    discriminator.head_losses.lerp_(head_losses.detach(), 0.02)
            optimizer_d.zero_grad()
            loss_d.backward(inputs=list(discriminator.parameters()))
            optimizer_d.step()

            # Generator and mixture minimise  softplus(l(x) - l(G(z))) - v log p(cluster k | G(z)).
            with torch.no_grad():
                l_real, _ = discriminator(real)
            l_fake, c_fake = discriminator(fake)
            _, loss_g = losses(l_real, l_fake)
            if clustered and step > warm_up:
                named = F.cross_entropy(discriminator.best(c_fake), components)
                loss_g = loss_g + args.naming_weight * named
            optimizer_g.zero_grad()
            loss_g.backward(inputs=trained)
            optimizer_g.step()
            averaged.update_parameters(model)

            last = bool(signals) or step == args.num_steps
            if last or step % args.log_every == 0 or step % args.eval_every == 0:
                if not all(p.isfinite().all() for p in (loss_d, loss_g, *averaged.parameters())):
                    raise UserError(f"loss or weights are not finite at step {step}: lower the learning rate")
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                row = {"step": step, "steps_per_second": (step - logged) / elapsed}
                row |= {"loss_d": loss_d.item(), "loss_g": loss_g.item()}
                row["logit_std"] = torch.cat((l_real, l_fake)).std().item()
                if args.gamma:
                    row |= {"r1": r1.item(), "r2": r2.item()}
                if clustered:
                    row["head_loss"] = head_losses.min().item()
                if step % args.eval_every == 0 or step == args.num_steps:
                    metrics = evaluate()
                    row |= metrics
                rows.append(row)
                lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
                replace_file(folder / "metrics.jsonl", partial(Path.write_text, data=lines))
                if wandb_run:
                    wandb_run.log(row, step=step)
                checkpoint = {name: part.state_dict() for name, part in parts.items()}
                checkpoint |= {"script": SCRIPT, "args": vars(args)}
                checkpoint["progress"] = step, seconds, run_id, rows
                checkpoint |= {"rng": torch.get_rng_state(), "rng_cuda": torch.cuda.get_rng_state_all()}
                replace_file(folder / "checkpoint.pt", partial(torch.save, checkpoint))
                logged, clock = step, time.perf_counter()
            if last:
                break

        save_curves(folder / "curves.png", rows)
        if step < args.num_steps:
            command = shlex.join(["python", f"{SCRIPT}.py", f"--resume={folder}"])
            tqdm.write(f"stopped after step {step}; go on with: {command}")
            raise SystemExit(128 + signals[0])
        metrics = evaluate() if metrics is None else metrics  # None: the run was done already
        results = metrics | {"steps": step, "seconds": seconds}
        results["real"] = image_metrics(data[:n], x_eval[:n], classifier) if n else {}
        results |= {"device": args.device, "torch": torch.__version__, "args": vars(args)}
        replace_file(folder / "results.json", partial(Path.write_text, data=json.dumps(results, indent=2)))
        print(folder)
        return folder


def parse_args(argv: list[str] | None = None) -> Args:
    """Return the command line's options, over those of the resumed run or the data set's preset."""
    typed = tyro.cli(Args, args=argv)
    chosen = {name: value for name, value in vars(typed).items() if value in PRESETS}
    default = Args(resume=typed.resume) if typed.resume else Args(**chosen)
    return tyro.cli(Args, args=argv, default=default)


if __name__ == "__main__":
    try:
        train(parse_args())
    except UserError as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

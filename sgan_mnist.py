# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""Semi-supervised GAN: a classifier that learns from a few labels, and from telling real images from fake.

The discriminator is the classifier. Of K + 1 logits the last one, of "fake", is fixed to 0: the others give
the class, p(y | x) = softmax(l), and the probability that an image is real, D = Z / (Z + 1) with Z = sum_k
exp(l_k). Labelled images teach the classes, unlabelled and fake ones teach D, and the generator matches the
mean features of real images. Beyond the paper of 2016, an averaged classifier teaches the classes of images
to their augmentations.
    Salimans et al. 2016     Improved techniques for training GANs: K + 1 classes    1606.03498
    Tarvainen, Valpola 2017  the averaged classifier as a teacher                    1703.01780
    Berthelot et al. 2019    distribution alignment, in ReMixMatch                   1911.09785
    Sohn et al. 2020         FixMatch: confident classes teach augmented images      2001.07685

    python sgan_mnist.py                                    # MNIST, 100 labels
    python sgan_mnist.py --num-labels 20 --label-seed 3     # another draw of fewer labels
    python sgan_mnist.py --no-augment                       # feature matching alone, as in 2016
    python sgan_mnist.py --resume runs/<run> --generate 1000  # draw samples

The default run takes half an hour on one slow CPU core: 64 errors in the 10,000 test images of MNIST (one
seed; the first edition made 55 over five draws; results/sgan_mnist.md).
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
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SCRIPT = "sgan_mnist"
PRESETS = {"digits": {"num_steps": 1500, "eval_every": 300}}


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
    log_every: int = Field(100, gt=0)  # steps between lines of metrics.jsonl, each with a checkpoint
    eval_every: int = Field(600, gt=0)  # steps between evaluations, each with pictures
    num_steps: int = Field(6000, gt=0)  # updates of classifier and generator
    batch_size: int = Field(128, ge=4)  # unlabelled images in a batch; half as many are generated
    label_batch_size: int = Field(100, gt=0)  # labelled images in a batch
    num_labels: int = Field(100, gt=0)  # labels to learn from, equally many of each class
    label_seed: int = Field(0, ge=0)  # seed of the draw of the labelled images; 0: that of the run
    latent_dim: int = Field(32, gt=0)  # size of the generator's Gaussian input
    channels: int = Field(16, gt=0)  # of the classifier's largest feature maps
    lr_classifier: float = Field(3e-3, gt=0)  # learning rate, which falls to zero in the last part of the run
    lr_generator: float = Field(2e-3, gt=0)  # likewise
    gan_weight: float = Field(0.3, ge=0)  # weight of the real and fake terms; 0 trains no generator
    augment: bool = True  # turn, shear, scale and shift all images; without, the next four have no meaning
    consistency_weight: float = Field(1.0, ge=0)  # weight of the classes that the averaged classifier teaches
    threshold: float = Field(0.8, gt=0)  # probability from which on it is sure enough to teach
    # share of images with a patch of another at first; none after half of the run
    paste: float = Field(0.5, ge=0)
    eval_views: int = Field(8, ge=0)  # augmented views that count in an image's class beside the image itself

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


def split_labels(labels: Tensor, num_labels: int, label_seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of num_labels images, equally many of each class, and of all others. Raises UserError.

    The draw depends on labels (n,) and label_seed alone; a smaller one is part of every larger one.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(label_seed))
    if num_labels == len(labels):
        return order, order[:0]
    size = num_labels // 10
    by_class = [order[labels[order] == k] for k in range(10)]
    most = min(map(len, by_class))
    if num_labels % 10 or size > most:
        raise UserError(f"num_labels must be a multiple of 10, up to {10 * most}, not {num_labels}")
    return torch.cat([c[:size] for c in by_class]), torch.cat([c[size:] for c in by_class])


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


def paste_patches(images: Tensor, share: float) -> Tensor:
    """Return images (b, 1, h, w), of which that share shows a patch of another one: the lighter of both.

    A patch is a rectangle of 4 to 8 pixels a side. A stroke too many then does not change a class: a bar
    through a 7, which no labelled one has, would make it a 3, with all its likes.
    """
    b, _, height, width = images.shape
    patch = torch.rand(b, 1, 1, 1, device=images.device) < share
    for size, shape in ((height, (b, 1, height, 1)), (width, (b, 1, 1, width))):
        side = 4 + 4 * torch.rand(b, 1, device=images.device)
        start = torch.rand(b, 1, device=images.device) * (size - side)
        place = torch.arange(size, device=images.device)
        inside = (place >= start) & (place < start + side)  # (b, size)
        patch = patch & inside.view(shape)
    others = images[torch.randperm(b, device=images.device)]
    return torch.where(patch, torch.maximum(images, others), images)


# ---- Evaluation -----------------------------------------------------------------------------------------
@torch.no_grad()
def classify(network: nn.Module, images: Tensor, views: int) -> Tensor:
    """Return class probabilities (n, 10) of images (n, 28, 28) uint8, a mean with so many augmented views."""
    network.eval()
    total = torch.cat([network(to_float(b)).softmax(1) for b in images.split(1000)])
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        for _ in range(views):
            total += torch.cat([network(augment(to_float(b))).softmax(1) for b in images.split(1000)])
    return total / (views + 1)


def save_confusion(path: Path, labels: Tensor, found: Tensor) -> None:
    """Draw the matrix of true classes (n,) against those found (n,): counts, the errors in colour."""
    from matplotlib.figure import Figure

    counts = (10 * labels + found).cpu().bincount(minlength=100).view(10, 10)
    errors = counts - counts.diag().diag()
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="found", ylabel="true", xticks=range(10), yticks=range(10))
    axes.set_title(f"{errors.sum()} errors in {len(labels)}")
    axes.imshow(errors.numpy(), cmap="Oranges")
    for row, column in np.ndindex(10, 10):
        axes.text(column, row, counts[row, column].item(), ha="center", va="center")
    replace_file(path, figure.savefig)


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


def leaky_block(layer: nn.Module, norm: nn.Module) -> nn.Sequential:
    """Return a layer followed by batch normalisation and a leaky ReLU."""
    return nn.Sequential(layer, norm, nn.LeakyReLU(0.1))


def make_classifier(channels: int) -> nn.Sequential:
    """Return a network from images (b, 1, 28, 28) to logits (b, 10).

    Without its last two layers it leads to features (b, 4 c).
    """
    c = channels
    network = nn.Sequential(
        leaky_block(nn.Conv2d(1, c, 5, 2, 2, bias=False), nn.BatchNorm2d(c)),  # (b, c, 14, 14)
        leaky_block(nn.Conv2d(c, 2 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * c)),
        nn.MaxPool2d(2),  # (b, 2 c, 7, 7)
        nn.Dropout(),
        leaky_block(nn.Conv2d(2 * c, 4 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * c)),
        leaky_block(nn.Conv2d(4 * c, 4 * c, 3, bias=False), nn.BatchNorm2d(4 * c)),
        leaky_block(nn.Conv2d(4 * c, 4 * c, 3, bias=False), nn.BatchNorm2d(4 * c)),  # (b, 4 c, 3, 3)
        nn.Flatten(),
        leaky_block(nn.Linear(36 * c, 4 * c, bias=False), nn.BatchNorm1d(4 * c)),
        nn.Dropout(),
        nn.Linear(4 * c, 10),
    )
    # Black becomes 0: with -1 the first layer's means, which batch normalisation averages, would be large.
    network[0].register_forward_pre_hook(lambda layer, inputs: inputs[0] + 1)
    return network.to(memory_format=torch.channels_last)  # half the time of a step on a CPU


def set_momentum(network: nn.Module, momentum: float) -> None:
    """Set how far batch normalisation's running averages move with a batch."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = momentum


@torch.no_grad()
def move_average(averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
    """Move averages to values, with a decay of 0.999, and a shorter memory in the first steps."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, values, max(0.001, 9 / (count.item() + 10)))


@torch.no_grad()
def draw_samples(generator: nn.Module, args, count: int) -> Tensor:
    """Return samples (count, ...) of a generator in evaluation mode; the latents have a seed of their own."""
    rng = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(count, args.latent_dim, generator=rng).to(args.device)
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


# ---- Loss -----------------------------------------------------------------------------------------------
def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return -E log D(x) - E log(1 - D(G(z))) of logits (n, K) and (m, K): a scalar.

    Salimans et al. 2016, section 5. With D = Z / (Z + 1), Z = sum_k exp(l_k), these are -log D =
    softplus(-log Z) and -log(1 - D) = softplus(log Z).
    """
    return F.softplus(-real.logsumexp(1)).mean() + F.softplus(fake.logsumexp(1)).mean()


def feature_matching_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return |E f(x) - E f(G(z))|^2 of features (n, d) and (m, d) (Salimans et al. 2016, section 3.1)."""
    return (real.mean(0) - fake.mean(0)).square().sum()


def align(p: Tensor, shares: Tensor) -> Tensor:
    """Return probabilities (n, K) divided by the classes' mean shares (K,) so far, and normalised.

    Distribution alignment (Berthelot et al. 2019, section 3.1), with classes of equal size: without it the
    few clusters that found their class first draw in the others. A power of the shares aligns in part.
    """
    p = p / shares
    return p / p.sum(1, keepdim=True)


def pseudo_label_loss(logits: Tensor, p: Tensor, threshold: float) -> Tensor:
    """Return the cross-entropy of logits (n, K) with the classes that are likeliest in p (n, K).

    Sohn et al. 2020, equation 4: 0 where the largest of p is below the threshold; the mean is over all n.
    """
    sure, classes = p.max(1)
    return ((sure >= threshold) * F.cross_entropy(logits, classes, reduction="none")).mean()


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
        x, y, x_eval, y_eval = load_images(args.dataset, args.data_dir, args.eval_split)
        labelled, unlabelled = split_labels(y, args.num_labels, args.label_seed or args.seed)
        if len(unlabelled) < args.batch_size:
            raise UserError(f"batch_size must be at most {len(unlabelled)}, the images without a label")
        data = x[unlabelled].to(args.device)
        x, y, x_eval, y_eval = (v.to(args.device) for v in (x[labelled], y[labelled], x_eval, y_eval))
        torch.manual_seed(args.seed)
        generator = make_generator(args.latent_dim).to(args.device)
        classifier = make_classifier(args.channels).to(args.device)
        averaged = AveragedModel(generator, multi_avg_fn=move_average, use_buffers=True)
        teacher = AveragedModel(classifier, multi_avg_fn=move_average, use_buffers=True)
        teacher.register_buffer("shares", torch.full((10,), 0.1, device=args.device))
        optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.999), fused=True)
        optimizer_c = torch.optim.Adam(classifier.parameters(), betas=(0.5, 0.999), fused=True)
        parts = {"generator": generator, "averaged": averaged, "optimizer_g": optimizer_g}
        parts |= {"classifier": classifier, "teacher": teacher, "optimizer_c": optimizer_c}

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
            samples = draw_samples(averaged, args, args.generate).cpu().numpy()
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
            samples = draw_samples(averaged, args, 100)
            for name in (f"samples_{step:06d}.png", "samples.png"):
                picture = partial(torchvision.utils.save_image, samples / 2 + 0.5, nrow=10)
                replace_file(folder / name, picture)
            found = classify(teacher, x_eval, args.eval_views if args.augment else 0).argmax(1)
            errors = (found != y_eval).sum().item()
            save_confusion(folder / "confusion.png", y_eval, found)
            metrics = {"accuracy": 1 - errors / len(y_eval), "errors": errors}
            if wandb_run:
                wandb_run.log({"samples": wandb.Image(str(folder / "samples.png"))}, step=step)
            tqdm.write(f"step {step}: {metrics}")
            return metrics

        def distort(images: Tensor, share: float) -> Tensor:
            return paste_patches(augment(images), share) if args.augment else images

        metrics, logged, clock = None, step, time.perf_counter()
        for step in tqdm(range(logged + 1, args.num_steps + 1), desc=SCRIPT, disable=None):
            # Learning rates are constant at first, then fall linearly to zero.
            rate = min(1.0, (args.num_steps - step + 1) / (0.7 * args.num_steps))
            optimizer_c.param_groups[0]["lr"] = rate * args.lr_classifier
            optimizer_g.param_groups[0]["lr"] = rate * args.lr_generator
            early = max(0.0, 1 - 2 * step / args.num_steps)  # patches and alignment end at half of the run
            share = args.paste * early

            # The classifier minimises  E -log p(y | x)  over labelled images,
            #     + w E (-log D(x) - log(1 - D(G(z)))),  + v E -log p(class of the teacher | augmented x).
            index = torch.randint(len(x), (args.label_batch_size,), device=args.device)
            clean = to_float(data[torch.randint(len(data), (args.batch_size,), device=args.device)])
            images = distort(torch.cat((to_float(x[index]), clean)), share)
            real = images[-(args.batch_size // 2) :]
            set_momentum(classifier, 0.1)
            l_labelled, l_unlabelled = classifier(images).split((len(index), len(clean)))
            loss_labelled = F.cross_entropy(l_labelled, y[index])
            loss_c = loss_labelled
            # Batch normalisation sees real and fake images together, or else it would make them alike; its
            # running averages, with which images are classified, stay those of real images.
            set_momentum(classifier, 0.0)
            if args.gan_weight:
                fake = generator(torch.randn(len(real), args.latent_dim, device=args.device))
                l_real, l_fake = classifier(torch.cat((real, distort(fake.detach(), share)))).chunk(2)
                loss_gan = discriminator_loss(l_real, l_fake)
                loss_c = loss_c + args.gan_weight * loss_gan
            if args.augment and args.consistency_weight:
                with torch.no_grad():
                    p = teacher.eval()(clean).softmax(1)
                    teacher.shares.lerp_(p.mean(0), 0.01)
                    p = align(p, teacher.shares**early)
                loss_teacher = pseudo_label_loss(l_unlabelled, p, args.threshold)
                loss_c = loss_c + args.consistency_weight * loss_teacher
            optimizer_c.zero_grad()
            loss_c.backward(inputs=list(classifier.parameters()))
            optimizer_c.step()
            teacher.update_parameters(classifier)

            # The generator minimises  |E f(x) - E f(G(z))|^2.
            if args.gan_weight:
                h_real, h_fake = classifier[:-2](torch.cat((real, distort(fake, share)))).chunk(2)
                loss_g = feature_matching_loss(h_real, h_fake)
                optimizer_g.zero_grad()
                loss_g.backward(inputs=list(generator.parameters()))
                optimizer_g.step()
                averaged.update_parameters(generator)

            last = bool(signals) or step == args.num_steps
            if last or step % args.log_every == 0 or step % args.eval_every == 0:
                weights = *averaged.parameters(), *teacher.parameters()
                if not all(p.isfinite().all() for p in (loss_c, *weights)):
                    raise UserError(f"loss or weights are not finite at step {step}: lower the learning rate")
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                row = {"step": step, "steps_per_second": (step - logged) / elapsed, "loss_c": loss_c.item()}
                row["loss_labelled"] = loss_labelled.item()
                if args.gan_weight:
                    row |= {"loss_gan": loss_gan.item(), "loss_g": loss_g.item()}
                if args.augment and args.consistency_weight:
                    row |= {"loss_teacher": loss_teacher.item(), "least_share": teacher.shares.min().item()}
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

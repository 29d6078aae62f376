# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26", "tqdm>=4.66",
#     "matplotlib>=3.8", "scikit-learn>=1.4",
# ]
# ///
"""A convolutional classifier that learns from labels alone: the yardstick for sgan_mnist.py.

Both draw the same labelled images for the same --num-labels and --label-seed, and train the same network. The
default gets 90.0% of MNIST's test images right from 100 labels, in a minute on one CPU core; with --augment
95.1%, and 99.67% from all labels in 12 minutes.

    python baseline_cnn.py                                     # MNIST, 100 labels
    python baseline_cnn.py --num-labels 1000 --augment         # more labels, images turned and shifted
    python baseline_cnn.py --num-labels 60000 --augment        # all labels
    python baseline_cnn.py --dataset digits                    # no download
    python baseline_cnn.py --resume runs/<run>                 # goes on as if never stopped
"""

import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SCRIPT = "baseline_cnn"


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
    """what is classified; validation takes the last sixth of the training images out for it"""
    num_labels: int = 100
    """labels to learn from, equally many of each class, or all that there are"""
    label_seed: int | None = None
    """seed of the draw of the labelled images (default: --seed)"""
    augment: bool = False
    """turn, shear, scale and shift the images at random"""

    num_steps: int | None = None
    """updates of the network (default: 500, or ten times through the labels if that is more)"""
    batch_size: int = 64
    """images in a batch"""
    channels: int = 32
    """channels of the network's 14 x 14 feature maps"""
    lr: float = 3e-3
    """Adam's learning rate at the start, from which it falls linearly to zero"""
    ema_decay: float = 0.99
    """decay per step of the averaged network, which is the one that is evaluated"""

    eval_every: int | None = None
    """steps between evaluations, pictures and checkpoints (default: a fifth of the run)"""
    log_every: int = 20
    """steps between lines of metrics.jsonl"""
    run_dir: str = "runs"
    """folder in which run folders are made"""
    resume: str | None = None
    """run folder to go on with"""

    def __post_init__(self) -> None:
        if self.resume is None:  # else what was not given is taken from the run
            steps = max(500, math.ceil(10 * self.num_labels / max(1, self.batch_size)))
            self.num_steps = steps if self.num_steps is None else self.num_steps
            self.eval_every = math.ceil(self.num_steps / 5) if self.eval_every is None else self.eval_every
            self.label_seed = self.seed if self.label_seed is None else self.label_seed
        for names, wanted, fits in (
            ("num_labels num_steps channels lr eval_every log_every", "positive", lambda v: 0 < v < math.inf),
            ("batch_size", "at least 2", lambda v: v >= 2),  # batch normalisation compares images
            ("ema_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("seed label_seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


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


def split_labels(labels: Tensor, num_labels: int, label_seed: int) -> tuple[Tensor, Tensor]:
    """Indices of num_labels labelled images, equally many of each class, and of all the other images.

    The draw depends on labels (n,) and label_seed alone, and a smaller one is part of every larger one.
    With num_labels = n, which no balance would allow, all images are labelled.
    """
    classes = int(labels.max()) + 1
    smallest, n = int(labels.bincount().min()), len(labels)
    rng = torch.Generator().manual_seed(label_seed)
    order = torch.randperm(n, generator=rng)
    if num_labels == n:
        return order, order[:0]
    if num_labels > n:
        fail(f"--num-labels {num_labels} exceeds the {n} training images")
    if num_labels % classes:
        fail(f"--num-labels must be a multiple of the {classes} classes, not {num_labels}")
    if num_labels > classes * smallest:
        most = f"the smallest class has {smallest} images; give at most {classes * smallest}"
        fail(f"--num-labels {num_labels} cannot be balanced: {most}")
    by_class = [order[labels[order] == k] for k in range(classes)]
    size = num_labels // classes
    return torch.cat([c[:size] for c in by_class]), torch.cat([c[size:] for c in by_class])


def to_float(images: Tensor) -> Tensor:
    """uint8 images (n, 28, 28) as floats (n, 1, 28, 28) in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def augment(images: Tensor) -> Tensor:
    """Images (n, 1, 28, 28) in [-1, 1], each turned, sheared, scaled and shifted at random, its border black.

    Differentiable in the images, so that generated ones can go the same way as real ones. On CUDA gradients
    are sums in no fixed order: there a run repeats itself, or resumes, up to rounding.
    """
    # Up to 7.5 degrees, a shear of 0.1, a scale in [0.93, 1.07] and a shift of 1.5 of the 28 pixels.
    ranges = math.pi / 24, 0.1, 0.07, 0.07, 1.5 / 14, 1.5 / 14
    draws = (2 * torch.rand(len(images), 6, device=images.device) - 1).to(images.dtype).unbind(1)
    angle, shear, wide, high, right, down = (draw * limit for draw, limit in zip(draws, ranges))
    wide, high, cos, sin = wide.exp(), high.exp(), angle.cos(), angle.sin()
    rows = (wide * cos, wide * (shear * cos - sin), right), (high * sin, high * (shear * sin + cos), down)
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (n, 2, 3), output to input places
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


# ---------------------------------------------------------------------------------------------------------
# Networks


class Affine(nn.Module):
    """factor * x + shift, with two constants."""

    def __init__(self, factor: float, shift: float = 0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.shift


class Classifier(nn.Module):
    """A small convolutional network: images (b, 1, 28, 28) to features (b, 4 c) and logits (b, outputs)."""

    def __init__(self, channels: int, outputs: int = 10, dropout: float = 0.5):
        super().__init__()

        def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> tuple:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
            return conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1, inplace=True)

        c = channels
        body = nn.Sequential(
            Affine(1.0, 1.0),  # black becomes the 0 with which convolutions pad
            *layer(1, c, 5, 2, 2),  # (b, c, 14, 14)
            *layer(c, 2 * c, 3, 1, 1),
            *(nn.MaxPool2d(2), nn.Dropout(dropout)),  # (b, 2 c, 7, 7)
            *layer(2 * c, 4 * c, 3, 1, 1),
            *layer(4 * c, 4 * c, 3),
            *layer(4 * c, 4 * c, 3),  # (b, 4 c, 3, 3)
            *(nn.Flatten(), nn.Linear(36 * c, 4 * c, bias=False), nn.BatchNorm1d(4 * c), nn.LeakyReLU(0.1)),
        )
        self.body = body.to(memory_format=torch.channels_last)  # half the time of a step on a CPU
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(4 * c, outputs))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, 4 c) and logits (b, outputs) of images (b, 1, 28, 28) in [-1, 1]."""
        features = self.body(images)
        return features, self.head(features)


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
# Evaluation


@torch.no_grad()
def classify(classifier: nn.Module, images: Tensor, labels: Tensor, views: int = 0) -> tuple[dict, Tensor]:
    """Accuracy and errors on images (n, 28, 28) uint8, and the classes found (n,) among the first 10.

    Besides each image counts the mean probability over that many augmented views of it, from seed 0; if there
    are any, single_errors are those from the images as they are.
    """

    def probability(distort: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = [classifier(distort(to_float(b)))[1][:, :10].softmax(1) for b in images.split(1000)]
        return torch.cat(blocks)

    classifier.eval()
    with torch.random.fork_rng([images.device] * images.is_cuda):
        torch.manual_seed(0)
        single = probability(nn.Identity())
        found = sum([probability(augment) for _ in range(views)], single).argmax(1)
    errors = int((found != labels).sum())
    metrics = {"accuracy": 1 - errors / len(labels), "errors": errors}
    if views:
        metrics["single_errors"] = int((single.argmax(1) != labels).sum())
    return metrics, found


# ---------------------------------------------------------------------------------------------------------
# Run folder and tracking


def write_file(path: Path, content: str | Callable) -> None:
    """Write text, or what content(file) writes, beside the file and rename: nobody sees half a file."""
    buffer, beside = io.BytesIO(), path.with_name(path.name + ".tmp")
    buffer.write(content.encode()) if isinstance(content, str) else content(buffer)
    beside.write_bytes(buffer.getbuffer())  # at once: on a full disk torch.save would not say what is wrong
    os.replace(beside, path)


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


def plot_confusion(path: Path, labels: Tensor, found: Tensor) -> None:
    """A PNG of the confusion matrix of classes labels (n,) and found (n,): counts, errors coloured."""
    from matplotlib.figure import Figure

    counts = (10 * labels + found).cpu().bincount(minlength=100).view(10, 10)
    errors = counts - counts.diag().diag()
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="found", ylabel="true", xticks=range(10), yticks=range(10))
    axes.set_title(f"{int(errors.sum())} errors in {len(labels)}")
    axes.imshow(errors.numpy(), cmap="Oranges")
    for row, column in np.ndindex(10, 10):
        color = "white" if 2 * errors[row, column] > errors.max() else "black"
        axes.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=8, color=color)
    write_file(path, partial(figure.savefig, format="png", dpi=90))


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


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run folder."""
    checkpoint = None if args.resume is None else load_checkpoint(Path(args.resume) / "checkpoint.pt")
    args = resumed_args(args, checkpoint["args"]) if checkpoint else args
    device = pick_device(args.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch.manual_seed(args.seed)
    x, y, x_eval, y_eval = load_images(args.dataset, args.data_dir, args.eval_split)
    labelled, _ = split_labels(y, args.num_labels, args.label_seed)
    x, y, x_eval, y_eval = (part.to(device) for part in (x[labelled], y[labelled], x_eval, y_eval))
    run = Run(args, checkpoint, device)

    classifier = Classifier(args.channels).to(device)
    averaged = average(classifier, args.ema_decay)
    optimizer = torch.optim.Adam(classifier.parameters(), args.lr, fused=True)
    run.hold(classifier=classifier, averaged=averaged, optimizer=optimizer)

    def evaluate() -> dict:
        seconds = run.train_seconds()
        metrics, found = classify(averaged, x_eval, y_eval)
        plot_confusion(run.folder / "confusion.png", y_eval, found)
        wrong = x_eval[found != y_eval]
        for name in (f"samples_{run.step:06d}.png", "samples.png"):  # what it gets wrong
            save_images(run.folder / name, to_float(torch.cat((wrong, x_eval))[:100]))
        return metrics | {"train_seconds": seconds}

    def step() -> dict[str, Tensor]:
        index = torch.randint(len(x), (args.batch_size,), device=device)
        images = augment(to_float(x[index])) if args.augment else to_float(x[index])
        loss = F.cross_entropy(classifier.train()(images)[1], y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(classifier)
        return {"loss": loss}

    recorded = Recorded(step, device, args.compile, optimizer)
    run.evaluate = evaluate
    for _ in run.steps():
        set_rate(optimizer, args.lr * (args.num_steps + 1 - run.step) / args.num_steps)
        scalars = recorded()
        if run.due(args.log_every) or run.due(args.eval_every):
            run.log(scalars)
    return run.finish(lambda: {"num_labels": args.num_labels, "label_seed": args.label_seed})


def main(args: Args) -> Path:
    """Train; returns the run folder."""
    try:
        return train(args)
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

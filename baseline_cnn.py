# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""A convolutional classifier that learns from labels alone: the yardstick for sgan_mnist.py.

Both draw the same labelled images for the same --num-labels and --label-seed, and train the same network.

    python baseline_cnn.py                                  # MNIST, 100 labels
    python baseline_cnn.py --augment                        # images turned, sheared, scaled and shifted
    python baseline_cnn.py --num-labels 60000 --augment     # all labels
    python baseline_cnn.py --resume runs/<run>              # go on where it stopped

The default gets 90.0% of MNIST's test images right from 100 labels, in a minute on one CPU core, and 95.1%
with --augment (means of 5 draws; results/sgan_mnist.md).
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

SCRIPT = "baseline_cnn"
PRESETS = {}  # no data set has options of its own


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
    log_every: int = Field(100, gt=0)  # steps between lines of metrics.jsonl, each with a checkpoint
    eval_every: int = Field(0, ge=0)  # steps between evaluations; 0: a fifth of the run
    num_steps: int = Field(0, ge=0)  # updates of the network; 0: ten passes through the labels, at least 500
    batch_size: int = Field(64, ge=2)  # images in a batch
    # labels to learn from, equally many of each class, or all that there are
    num_labels: int = Field(100, gt=0)
    label_seed: int = Field(0, ge=0)  # seed of the draw of the labelled images; 0: that of the run
    augment: bool = False  # turn, shear, scale and shift the images at random
    channels: int = Field(32, gt=0)  # of the network's largest feature maps
    learning_rate: float = Field(3e-3, gt=0)  # it falls linearly to zero

    def __init__(self, **options):
        for name, value in options.items():
            if isinstance(value, str | os.PathLike):
                options[name] = os.path.expanduser(value)
        # The command line gives every option, of a resumed run those of the run that were not typed.
        if options.get("resume") and len(options) < len(Args.model_fields):
            saved = load_checkpoint(options["resume"])["args"]
            del saved["device"]  # another machine may go on
            options = saved | options
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError("; ".join(wrong)) from None


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


@torch.no_grad()
def move_average(averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
    """Move averages to values, with a decay of 0.999, and a shorter memory in the first steps."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, values, max(0.001, 9 / (count.item() + 10)))


# ---- Training -------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train, evaluate and save; return the run folder.

    Raises UserError for what the user can fix. After Ctrl-C or SIGTERM it saves and raises SystemExit.
    """
    with ExitStack() as stack:  # puts back what a run changes in the process
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn" if args.torch_deterministic else "default")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic
        x, y, x_eval, y_eval = load_images(args.dataset, args.data_dir, args.eval_split)
        labelled, _ = split_labels(y, args.num_labels, args.label_seed or args.seed)
        x, y, x_eval, y_eval = (v.to(args.device) for v in (x[labelled], y[labelled], x_eval, y_eval))
        torch.manual_seed(args.seed)
        network = make_classifier(args.channels).to(args.device)
        averaged = AveragedModel(network, multi_avg_fn=move_average, use_buffers=True)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        num_steps = args.num_steps or max(500, math.ceil(10 * args.num_labels / args.batch_size))
        eval_every = args.eval_every or math.ceil(num_steps / 5)
        parts = {"network": network, "averaged": averaged, "optimizer": optimizer}

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
            found = torch.cat([averaged.eval()(to_float(b)).argmax(1) for b in x_eval.split(1000)])
            wrong = found != y_eval
            errors = wrong.sum().item()
            picture = to_float(torch.cat((x_eval[wrong], x_eval))[:100]) / 2 + 0.5  # what it gets wrong
            for name in (f"samples_{step:06d}.png", "samples.png"):
                replace_file(folder / name, partial(torchvision.utils.save_image, picture, nrow=10))
            metrics = {"accuracy": 1 - errors / len(y_eval), "errors": errors}
            if wandb_run:
                wandb_run.log({"samples": wandb.Image(str(folder / "samples.png"))}, step=step)
            tqdm.write(f"step {step}: {metrics}")
            return metrics

        metrics, logged, clock = None, step, time.perf_counter()
        for step in tqdm(range(logged + 1, num_steps + 1), desc=SCRIPT, disable=None):
            index = torch.randint(len(x), (args.batch_size,), device=args.device)
            images = to_float(x[index])
            if args.augment:
                images = augment(images)
            loss = F.cross_entropy(network(images), y[index])
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / num_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update_parameters(network)

            last = bool(signals) or step == num_steps
            if last or step % args.log_every == 0 or step % eval_every == 0:
                if not all(p.isfinite().all() for p in (loss, *averaged.parameters())):
                    raise UserError(f"loss or weights are not finite at step {step}: lower the learning rate")
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                row = {"step": step, "steps_per_second": (step - logged) / elapsed, "loss": loss.item()}
                if step % eval_every == 0 or step == num_steps:
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
        if step < num_steps:
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

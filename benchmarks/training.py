"""Steps per second of wgan_gp.py and baseline_cnn.py, beside loops written the way that they are copied.

    python benchmarks/training.py --data-dir data

The copied loop has the script's networks, batch size, updates and losses, and for the rest does as
PyTorch-GAN (github.com/eriklindernoren/PyTorch-GAN) does: a DataLoader that takes each image through PIL,
contiguous networks, Adam as torch sets it, gradients of all weights, and each loss read and printed at every
step. Rounds of both take turns; the ratio is of the medians, its range that of the rounds.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torchvision
import tyro
from torch.nn import functional as F
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def copied_batches(args) -> Iterator[list[torch.Tensor]]:
    """Images (b, 1, 28, 28) in [-1, 1] and labels (b,), without end."""
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    data = torchvision.datasets.MNIST(args.data_dir, download=True, transform=steps)
    while True:
        yield from torch.utils.data.DataLoader(data, args.batch_size, shuffle=True, drop_last=True)


def copied_baseline_cnn(script, args) -> Iterator[None]:
    """A step of baseline_cnn.py for each item."""
    network = script.make_classifier(args.channels).to(args.device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate)
    for images, labels in copied_batches(args):
        loss = F.cross_entropy(network(images.to(args.device)), labels.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item()}")
        yield


def copied_wgan_gp(script, args) -> Iterator[None]:
    """A step of wgan_gp.py for each item."""
    networks = script.make_generator(args.latent_dim), script.make_critic()
    generator, critic = (v.to(args.device, memory_format=torch.contiguous_format) for v in networks)
    optimizers = [
        torch.optim.Adam(v.parameters(), args.learning_rate, (0.0, 0.9)) for v in (generator, critic)
    ]
    for real, _ in copied_batches(args):
        real = real.to(args.device)
        z = torch.as_tensor(np.random.normal(size=(len(real), args.latent_dim)), dtype=torch.float32)
        fake = generator(z.to(args.device))
        penalty = script.gradient_penalty(critic, real, fake)
        loss_c = critic(fake.detach()).mean() - critic(real).mean() + args.penalty_weight * penalty
        optimizers[1].zero_grad()
        loss_c.backward()
        optimizers[1].step()
        loss_g = -critic(fake).mean()
        optimizers[0].zero_grad()
        loss_g.backward()
        optimizers[0].step()
        print(f"loss_c {loss_c.item()} loss_g {loss_g.item()}")
        yield


def time_rounds(script, args, steps: int, copied: Iterator[None]) -> tuple[list[float], list[float]]:
    """Return steps per second in each round, of the script and of the copied loop."""
    speeds = [], []

    def take_turns(all_steps: range, **options):
        """Stand for tqdm in the script's loop: after each round of it comes one of the copied loop."""
        for step in all_steps:
            if step % steps == 1:
                start = time.perf_counter()
            yield step
            if step % steps == 0:
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                speeds[0].append(steps / (time.perf_counter() - start))
                start = time.perf_counter()
                for _ in range(steps):
                    next(copied)
                speeds[1].append(steps / (time.perf_counter() - start))

    take_turns.write = print
    script.tqdm, before = take_turns, script.tqdm
    try:
        script.train(args)
    finally:
        script.tqdm = before
    return speeds[0][1:], speeds[1][1:]  # without the first round, which warms up


def main(data_dir: str = "data", device: str = "cpu", steps: int = 25, rounds: int = 9) -> None:
    """Print the table."""
    print("| script | steps/s | copied | ratio | its range |\n| --- | --- | --- | --- | --- |")
    for name, copied in (("baseline_cnn", copied_baseline_cnn), ("wgan_gp", copied_wgan_gp)):
        script = import_module(name)
        options = {"num_eval_samples": 0} if name == "wgan_gp" else {}
        options |= {"num_steps": steps * (rounds + 1) + 1, "eval_every": 10**6, "log_every": 10**6}
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, redirect_stdout(null):
            args = script.Args(data_dir=data_dir, device=device, run_dir=folder, **options)
            ours, theirs = map(np.array, time_rounds(script, args, steps, copied(script, args)))
        ratio, each = np.median(ours) / np.median(theirs), ours / theirs
        cells = f"{np.median(ours):.1f} | {np.median(theirs):.1f} | {ratio:.2f}"
        print(f"| {name} | {cells} | {each.min():.2f} to {each.max():.2f} |", flush=True)
    print(f"\nMedians of {rounds} rounds of {steps} steps; torch {torch.__version__}, {device}.")


if __name__ == "__main__":
    tyro.cli(main)

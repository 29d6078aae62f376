"""Two processes with half of each batch, whose loss is that of the whole."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import environment

ROOT = Path(__file__).parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
SMALL = ["--device", "cpu", "--num-eval-samples", "0", "--log-every", "1", "--eval-every", "1000"]


def command(script: str, options: list[str]) -> list[str]:
    """A script and its options."""
    return [str(ROOT / script), *SMALL, *options]


def torchrun(script: str, folder: Path, options: list[str]) -> subprocess.Popen:
    """The script in two processes, as a user starts them."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line = [sys.executable, *launch, *command(script, options)]
    return subprocess.Popen(line, cwd=folder, env=environment(QUIET), **pipes)


def rank_environments(count: int) -> list[dict]:
    """What torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = QUIET | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": str(count)}
    return [env | {"RANK": str(n), "LOCAL_RANK": str(n)} if count > 1 else QUIET for n in range(count)]


def processes(script: str, folder: Path, options: list[str], count: int) -> list[forked.Command]:
    """The script in so many processes, with what torchrun tells them, sooner."""
    line, ranks = command(script, options), rank_environments(count)
    return [forked.Command(forked.run_script, *line, folder=folder, env=environment(rank)) for rank in ranks]


def outcome(folder: Path) -> tuple[list[dict], dict]:
    """Lines of metrics.jsonl and checkpoint of a run that ended well, the only one in its folder."""
    (run,) = (p for p in (folder / "runs").iterdir() if p.is_dir())
    assert (run / "results.json").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, torch.load(run / "checkpoint.pt", weights_only=True)


# Adam's first steps have the sign of the gradients, so that rounding decides where these are near zero. Hence
# small rates where some weights have no gradient to speak of; the gradients, which Adam keeps, are compared.
def test_torchrun_and_ctrl_c(tmp_path):
    """The signal reaches the other process alone: both stop, the first one saves, and the run resumes."""
    options = ["--dataset", "ring", "--batch-size", "16", "--num-steps", "1000000", "--eval-every", "1000000"]
    process = torchrun("sinkhorn_gan.py", tmp_path, options)
    end = time.monotonic() + 240
    while not any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    ranks = {}
    for child in children:
        text = Path(f"/proc/{child}/environ").read_text()
        ranks |= {int(n): int(child) for n in re.findall(r"\bRANK=(\d+)", text)}
    os.kill(ranks[1], signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    (folder,) = (p for p in (tmp_path / "runs").iterdir() if p.is_dir())
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"][0]
    assert step and f"stopped after step {step}" in out
    options = ["--resume", str(folder), "--num-steps", str(step + 2)]
    (resumed,) = processes("sinkhorn_gan.py", tmp_path, options, 1)
    assert resumed.finish().returncode == 0
    lines, _ = outcome(tmp_path)
    assert lines[-1]["step"] == step + 2


def test_the_loss_is_that_of_the_whole_batch():
    """Value and gradients, in each of two processes, of what one process makes of all samples."""
    code = """
        import os, sys
        import torch, torch.distributed as dist
        sys.path.insert(0, os.environ["ROOT"])
        import mmd_gan, sinkhorn_gan
        rank = int(os.environ["RANK"])
        rng = torch.Generator().manual_seed(0)
        x, y = (torch.randn(8, 3, generator=rng, dtype=torch.float64) for _ in range(2))
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2).double()
        def loss(x, y):
            h = [mmd_gan.gather(h) for h in network(torch.cat((x, y))).chunk(2)]
            loss = mmd_gan.mmd2(*h, (1.0, 2.0)) + sinkhorn_gan.sinkhorn_divergence(*h, 0.5, tol=1e-9)
            network.zero_grad()
            loss.backward()
            return [loss.detach(), *(p.grad.clone() for p in network.parameters())]
        want = loss(x, y)
        dist.init_process_group("gloo")
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
        for a, b in zip(want, loss(*(z.chunk(2)[rank] for z in (x, y)))):
            torch.testing.assert_close(a, b)
        assert want[1].abs().min() > 1e-6
        dist.destroy_process_group()
    """
    line = [forked.run_code, textwrap.dedent(code)]
    ranks = [environment(rank | {"ROOT": str(ROOT)}) for rank in rank_environments(2)]
    for one in [forked.Command(*line, folder=ROOT, env=env) for env in ranks]:
        result = one.finish()
        assert result.returncode == 0, result.stderr


REFUSED = [
    ("mmd_gan.py", ["--batch-size", "15"]),
    ("sinkhorn_gan.py", ["--batch-size", "18"]),
]


@pytest.mark.parametrize("script, options", REFUSED)
def test_what_two_processes_cannot_share(script, options, tmp_path):
    """One line in each of them, and no run folder."""
    for result in [one.finish() for one in processes(script, tmp_path, ["--dataset", "ring", *options], 2)]:
        assert result.returncode == 2 and "batch_size" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["mmd_gan", "sinkhorn_gan"])
def test_two_processes(script, tmp_path):
    """One of them writes, a line a step; both have other samples and the same weights."""
    code = f"""
        import os, sys
        import torch
        sys.path.insert(0, os.environ["ROOT"])
        import {script} as script
        made = []
        for name in ("make_generator", "make_encoder"):
            make = getattr(script, name)
            setattr(script, name, lambda *options, make=make: made.append(make(*options)) or made[-1])
        options = {{"batch_size": 8, "num_steps": 3, "num_eval_samples": 0, "log_every": 1, "device": "cpu"}}
        script.train(script.Args(dataset="digits", **options))
        torch.save([p for network in made for p in network.parameters()], os.environ["RANK"])
    """
    ranks = [environment(rank | {"ROOT": str(ROOT)}) for rank in rank_environments(2)]
    line = [forked.run_code, textwrap.dedent(code)]
    for one in [forked.Command(*line, folder=tmp_path, env=env) for env in ranks]:
        result = one.finish()
        assert result.returncode == 0, result.stdout + result.stderr
    lines, state = outcome(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3] and state["progress"][0] == 3
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    assert len(first) > 20 and all(map(torch.equal, first, second))

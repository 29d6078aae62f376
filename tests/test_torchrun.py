"""Two processes with half of each batch, whose loss is that of the whole."""

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
from conftest import ROOT
from test_gans import load, results, steps

QUIET = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
SMALL = ["--device", "cpu", "--num-eval-samples", "0", "--log-every", "1", "--dataset", "ring"]


def two(function, *args: str, folder: Path = ROOT, code: int = 0) -> list[str]:
    """What function(*args) prints to stderr in two processes, with what torchrun tells them, sooner."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = QUIET | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [env | {"RANK": n, "LOCAL_RANK": n} for n in "01"]
    commands = [forked.Command(function, *args, folder=folder, env=rank) for rank in ranks]
    results = [command.finish() for command in commands]
    assert [result.returncode for result in results] == [code, code], results
    return [result.stderr for result in results]


def test_torchrun_and_ctrl_c(tmp_path, run_cli):
    """The signal reaches the other process alone: both stop, the first one saves, and the run resumes."""
    launch = "-m torch.distributed.run --nproc-per-node 2 --master-port 0"
    launch += " --rdzv-backend c10d --rdzv-endpoint localhost:0"
    options = "--batch-size 16 --num-steps 1000000 --eval-every 1000000"
    command = [sys.executable, *launch.split(), str(ROOT / "sinkhorn_gan.py"), *SMALL, *options.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=forked.environment(QUIET), **pipes)
    end = time.monotonic() + 240
    while not any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    (other,) = (
        n for n in children.split() if re.search(r"\bRANK=1\b", Path(f"/proc/{n}/environ").read_text())
    )
    os.kill(int(other), signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    (folder,) = tmp_path.glob("runs/*__*")
    step = load(folder)["progress"][0]
    assert step and f"stopped after step {step}" in out
    resumed = run_cli("--resume", folder, "--num-steps", step + 2, script="sinkhorn_gan.py")
    assert resumed.returncode == 0, resumed.stderr
    assert steps(folder)[-1] == results(folder)["steps"] == step + 2


def test_the_loss_is_that_of_the_whole_batch():
    """Value and gradients, in each of two processes, of what one process makes of all samples."""
    code = """
        import os
        import torch, torch.distributed as dist
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
    two(forked.run_code, textwrap.dedent(code))


@pytest.mark.parametrize("script, batch_size", [("mmd_gan", "15"), ("sinkhorn_gan", "18")])
def test_what_two_processes_cannot_share(script, batch_size, tmp_path):
    """One line in each of them, and no run folder."""
    command = [str(ROOT / f"{script}.py"), *SMALL, "--batch-size", batch_size]
    for error in two(forked.run_script, *command, folder=tmp_path, code=2):
        assert "batch_size" in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["mmd_gan", "sinkhorn_gan"])
def test_two_processes(script, tmp_path):
    """One of them writes, a line a step; both have other samples and the same weights."""
    code = f"""
        import os
        import torch
        import {script} as script
        made = []
        for name in ("make_generator", "make_encoder"):
            make = getattr(script, name)
            setattr(script, name, lambda *options, make=make: made.append(make(*options)) or made[-1])
        options = {{"batch_size": 8, "num_steps": 3, "num_eval_samples": 0, "log_every": 1, "device": "cpu"}}
        script.train(script.Args(dataset="digits", **options))
        torch.save([p for network in made for p in network.parameters()], os.environ["RANK"])
    """
    two(forked.run_code, textwrap.dedent(code), folder=tmp_path)
    (folder,) = tmp_path.glob("runs/*__*")
    assert steps(folder) == [1, 2, 3] and results(folder)["steps"] == load(folder)["progress"][0] == 3
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    assert len(first) > 20 and all(map(torch.equal, first, second))

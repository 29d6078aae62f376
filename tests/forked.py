"""Scripts as commands, in processes that are forked from one with torch imported: seconds less for each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HARD = ("torch", "torchvision", "tyro", "numpy", "tqdm")  # what a script may import at its top
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*HARD])


def environment(changes: dict | None = None) -> dict:
    """This process's environment with changes; None takes a variable away."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}  # see no_slow_parts_and_no_gpu
    # A W&B service that this process has started writes to paths that are relative to this one's folder.
    env |= {"WANDB_SERVICE": None} | (changes or {})
    return {name: value for name, value in env.items() if value is not None}


def run_script(path: str, *args: str) -> None:
    """`python path args`, here."""
    sys.argv, sys.path[:0] = [path, *args], [str(Path(path).parent)]
    runpy.run_path(path, run_name="__main__")


def run_code(code: str) -> None:
    """`python -c code`, here, with the scripts as modules."""
    sys.path.insert(0, str(ROOT))
    exec(code, {"__name__": "__main__"})


def peak() -> None:
    """Print how many MB of memory this process had at most, on Linux."""
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)


def begin(function: Callable, args: tuple, folder: str, env: dict, outputs: list[str]) -> None:
    """What a new process does: function(*args) in a folder, under an environment, with files as outputs."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, (name, stream) in enumerate(zip(outputs, (sys.stdout, sys.stderr)), 1):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    function(*args)


class Command:
    """A process that does run_script or run_code with args, in a folder, with changes of the environment."""

    def __init__(self, function: Callable, *args: str, folder: Path = ROOT, env: dict | None = None):
        self.args, self.place = args, tempfile.TemporaryDirectory()
        self.outputs = [str(Path(self.place.name) / name) for name in ("stdout", "stderr")]
        begun = function, args, str(folder), environment(env), self.outputs
        self.process = context.Process(target=begin, args=begun)
        self.process.start()

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        with self.place:
            texts = [Path(name).read_text(encoding="utf-8") for name in self.outputs]
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *texts)

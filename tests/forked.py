"""Scripts as commands, in processes that are forked from one with torch imported: seconds less for each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HARD = ("torch", "torchvision", "tyro", "numpy", "tqdm")  # what a script may import at its top
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*HARD])


def run_script(path: str, *args: str) -> None:
    """`python path args`, here."""
    sys.argv, sys.path[:0] = [path, *args], [str(Path(path).parent)]
    runpy.run_path(path, run_name="__main__")


def run_code(code: str) -> None:
    """`python -c code`, here."""
    exec(code, {"__name__": "__main__"})


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
    """A process that does run_script or run_code with args, in a folder and under an environment."""

    def __init__(self, function: Callable, *args: str, folder: Path, env: dict):
        self.args, self.place = args, tempfile.TemporaryDirectory()
        self.outputs = [str(Path(self.place.name) / name) for name in ("stdout", "stderr")]
        self.process = context.Process(target=begin, args=(function, args, str(folder), env, self.outputs))
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

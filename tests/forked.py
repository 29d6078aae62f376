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


def start(
    function: Callable, *args, folder: Path, env: dict
) -> Callable[[float], subprocess.CompletedProcess]:
    """Start run_script or run_code in a process; returns what waits for it, so many seconds at most."""
    place = tempfile.TemporaryDirectory()
    outputs = [str(Path(place.name) / name) for name in ("stdout", "stderr")]
    process = context.Process(target=begin, args=(function, args, str(folder), env, outputs))
    process.start()

    def finish(timeout: float = 300) -> subprocess.CompletedProcess:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(args, timeout)
        with place:
            texts = [Path(name).read_text(encoding="utf-8") for name in outputs]
        return subprocess.CompletedProcess(args, process.exitcode, *texts)

    return finish

"""What holds for every script, and what the README says of the files."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT, environment

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
OWN = {"Args", "train"}  # definitions that differ from script to script


def python(*args, **options) -> subprocess.CompletedProcess:
    """This Python, in the repository's root."""
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment(None), capture_output=True, encoding="utf-8", **options
    )


def definitions(source: str) -> dict[str, str]:
    """The text of every function and class of a module, by name."""
    kinds = ast.FunctionDef, ast.ClassDef
    nodes = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    lines = source.splitlines()
    starts = {n.name: min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in nodes}
    return {n.name: "\n".join(lines[starts[n.name] - 1 : n.end_lineno]) for n in nodes}


def differing(sources: dict[str, str], own: set[str] = OWN) -> list[str]:
    """Names that stand in two of the sources with different texts, and may not."""
    seen, found = {}, []
    for file, source in sources.items():
        for name, text in definitions(source).items():
            first, same = seen.setdefault(name, (file, text))
            if name not in own and text != same:
                found.append(f"{name} differs between {first} and {file}")
    return found


# Scripts


def test_there_are_scripts():
    assert len(SCRIPTS) == 7


def test_definitions_of_one_name_are_one_text():
    assert differing({name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}) == []


def test_the_check_of_definitions_can_fail():
    one = "def f(x):\n    return x\n\n@a\ndef g():\n    pass\n\ndef train():\n    pass\n"
    assert differing({"a.py": one, "b.py": one.replace("train():\n    pass", "train():\n    f(1)")}) == []
    assert differing({"a.py": one, "b.py": one.replace("return x", "return  x")}) == [
        "f differs between a.py and b.py"
    ]
    assert differing({"a.py": one, "b.py": one.replace("@a\n", "")}) == ["g differs between a.py and b.py"]


def test_all_scripts_start_alike():
    ends = {(ROOT / name).read_text(encoding="utf-8").split("\ndef parse_args")[1] for name in SCRIPTS}
    assert len(ends) == 1


def metadata(name: str) -> str:
    """A script's PEP 723 block, as TOML."""
    (block,) = re.findall(
        r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", (ROOT / name).read_text(encoding="utf-8")
    )
    return re.sub(r"(?m)^# ?", "", block)


@pytest.mark.parametrize("name", SCRIPTS)
def test_pep_723_block_agrees_with_the_project(name):
    block = metadata(name)
    dependencies = ast.literal_eval(re.search(r"(?s)^dependencies = (\[.*?\])", block, re.M)[1])
    assert dependencies == (ROOT / "requirements.txt").read_text().split()
    python_needed = re.compile(r'(?m)^requires-python = "(.*)"$')
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert python_needed.findall(block) == python_needed.findall(project) != []


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_only_defines(name):
    """No output, no file, and none of the modules that only some runs need; torch may import triton."""
    before = sorted(ROOT.iterdir())
    code = f"""
import sys
import {", ".join(forked.HARD)}
sys.dont_write_bytecode = True
before = set(sys.modules)
import {name[:-3]}
roots = {{module.split(".")[0] for module in set(sys.modules) - before}}
sys.exit(" ".join(roots & {{"wandb", "matplotlib", "sklearn", "triton", "scipy"}}) or 0)
"""
    result = forked.Command(forked.run_code, code, folder=ROOT, env=environment(None)).finish()
    assert (result.returncode, result.stdout, result.stderr.strip()) == (0, "", "")
    assert [path for path in sorted(ROOT.iterdir()) if path not in before] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_everything_public_has_a_docstring(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    kinds = ast.FunctionDef, ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_") and node.name != "Args":
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_has_a_line_of_help(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [
        (node, after) for node, after in zip(args.body, args.body[1:]) if isinstance(node, ast.AnnAssign)
    ]
    assert len(fields) > 10
    # The help is a comment behind the field or above it.
    (help_text,) = re.findall(r"(?s)options ─.*", help_of(name))
    for field, _ in fields:
        option = "--" + field.target.id.replace("_", "-")
        line = next(line for line in help_text.splitlines() if re.search(rf"{option}(,| |$)", line))
        assert re.search(r"\w{2}", help_text[help_text.index(line) + len(line) :].split("--")[0] + line)
        source = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert "  # " in source[field.lineno - 1] or source[field.lineno - 2].startswith("    # "), option


@pytest.mark.parametrize("command", [("check", "."), ("format", "--check", ".")])
def test_ruff(command):
    pytest.importorskip("ruff")
    result = python("-m", "ruff", command[0], "--no-cache", *command[1:])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_loss_section_can_be_copied_away(name):
    """With the imports at the file's top, and nothing else, every name in it is known."""
    pytest.importorskip("ruff")
    text = (ROOT / name).read_text(encoding="utf-8")
    head, *parts = re.split(r"(?m)^# ---- (.*?) -+\n", text)
    imports = head[head.index("\nimport ") : head.index("\nSCRIPT = ")]
    losses = [section for title, section in zip(parts[::2], parts[1::2]) if title == "Loss"]
    assert len(losses) == (name != "baseline_cnn.py")  # whose loss is torch's
    command = ("-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", "-")
    result = python(*command, input=imports + "".join(losses))
    assert result.returncode == 0, result.stdout


# README

OUTPUTS = ["args.json", "metrics.jsonl", "samples.png", "curves.png", "checkpoint.pt", "results.json"]
OUTPUTS += ["samples.npy"]
PATH = re.compile(
    r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|md|txt|toml|json|csv|tsv|png|jpg|svg|yml|yaml|cu|sh)|/\w+)|[\w./-]+/"
)


@functools.cache
def readme() -> str:
    """README.md."""
    path = ROOT / "README.md"
    assert path.is_file(), "there is no README.md"
    return path.read_text(encoding="utf-8")


def ignored_folders() -> list[str]:
    """Folders that runs make: those that .gitignore names."""
    return [line for line in (ROOT / ".gitignore").read_text().split() if line.endswith("/")]


def code_lines(text: str) -> list[str]:
    """The lines of fenced blocks, a line that ends with a backslash joined to the next."""
    blocks = re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", text) + re.findall(r"(?m)^(?: {4}|\t)(.*)$", text)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def named_paths(text: str) -> set[str]:
    """Relative paths in links, in inline code and after `python`, but not those that a run makes."""
    text = re.sub(r"\[[^\]]*\]\(\w+:[^)]*\)", "", text)  # links out of the repository
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|href)="([^"#:]+)"', text)
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    inline = [s for s in re.findall(r"`([^`\n]+)`", prose) if PATH.fullmatch(s)]
    run = [s for line in code_lines(text) for s in re.findall(r"(?:python3?|uv run) ([\w./-]+\.py)", line)]
    run += re.findall(r"(?:python3?|uv run) ([\w./-]+\.py)", prose)

    def made(name):
        folders = ignored_folders()
        return Path(name).name in OUTPUTS or f"{name}/" in folders or name.startswith(tuple(folders))

    return {s for s in [*links, *inline, *run] if not made(s) and "<" not in s and "://" not in s}


def shown_options(text: str) -> set[tuple[str, str]]:
    """(script, --option) for every option that follows a script in a command, in a block or inline."""
    commands = code_lines(text) + re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^ *```.*?^ *```", "", text))
    found = set()
    for command in commands:
        for part in re.split(r"&&|;|\||\s#", command):
            script = re.search(r"([\w./-]+\.py)\b(.*)", part)
            if script:
                found |= {(script[1], option) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", script[2])}
    return found


def loose_options(text: str) -> set[str]:
    """Options that inline code names by themselves, as in `--dataset digits`."""
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    spans = [s for s in re.findall(r"`([^`\n]+)`", prose) if s.startswith("--")]
    return {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}


@functools.cache
def help_of(script: str) -> str:
    """What a script's --help prints."""
    command = [str(ROOT / script), "--help"]
    result = forked.Command(forked.run_script, *command, folder=ROOT, env=environment(None)).finish()
    assert result.returncode == 0, result.stderr
    return result.stdout


def help_options(script: str) -> set[str]:
    """The options in it."""
    return {*re.findall(r"--[a-z][\w-]*", help_of(script))}


def test_readme_names_files_that_exist():
    paths = named_paths(readme())
    assert "mmd_gan.py" in paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_readme_shows_options_that_exist():
    shown = shown_options(readme())
    assert ("mmd_gan.py", "--dataset") in shown
    assert sorted((s, o) for s, o in shown if o not in help_options(s)) == []
    known = set().union(*map(help_options, {*SCRIPTS, *(script for script, _ in shown)}))
    assert sorted(loose_options(readme()) - known) == []


def test_the_checks_of_the_readme_can_fail():
    text = (
        "See [design](docs/none.md), [`there.py`](https://example.org/there.py) and `lost/file.py`;\n"
        "`samples.png` and `runs/x/checkpoint.pt` are made; `--bogus 3` and `a, b` are said.\n"
        "```sh\npip install x && python mmd_gan.py --datset ring \\\n  --track # --not-this\n```\n"
    )
    assert named_paths(text) == {"docs/none.md", "lost/file.py", "mmd_gan.py"}
    assert shown_options(text) == {("mmd_gan.py", "--datset"), ("mmd_gan.py", "--track")}
    assert loose_options(text) == {"--bogus"}


def test_ci_runs_the_test_command_of_the_readme():
    """.ci/run takes exactly one line out of README.md: the one that installs and runs the tests."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"sed -n 's/\^\\\((.*)\\\)\$/\\1/p' README\.md", ci)[1]
    taken = [line for line in readme().splitlines() if re.fullmatch(pattern, line)]
    shown = [line for line in code_lines(readme()) if re.search(r"install.*&&.*\bpytest\b", line)]
    assert len(taken) == 1 and taken == shown
    assert "requirements-dev.txt" in taken[0] or "[dev]" in taken[0]


# Files

MACHINE_PATH = re.compile(r"(?<![\w.:/<>*-])/(?:home|root|Users|mnt|opt|work|tmp|private|scratch)/[\w.]")


def tracked_files() -> list[Path]:
    """The files of the repository: those that git knows, or, in a copy without git, those of its layout."""
    git = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode == 0 and git.stdout:
        return [ROOT / name for name in git.stdout.splitlines()]
    return [p for d in ("", "tests", "benchmarks", "results") for p in (ROOT / d).glob("*") if p.is_file()]


def test_no_paths_of_one_machine():
    assert MACHINE_PATH.search("in " + "/home" + "/me") and not MACHINE_PATH.search("example.org/home/me")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or deleted and not yet committed
            continue
        found += [f"{path.name}: {line.strip()}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert found == []


def test_results_are_readable():
    """Every JSON file under results/ parses."""
    for path in (ROOT / "results").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))

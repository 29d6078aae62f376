"""What holds for every script, and what the README says of the files."""

import ast
import functools
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


def test_definitions_of_one_name_are_one_text():
    assert differing({name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}) == []


def test_the_check_of_definitions_can_fail():
    one = "def f(x):\n    return x\n\n@a\ndef g():\n    pass\n\ndef train():\n    pass\n"
    assert differing({"a.py": one, "b.py": one.replace("train():\n    pass", "train():\n    f(1)")}) == []
    assert differing({"a.py": one, "b.py": one.replace("return x", "return  x")}) == [
        "f differs between a.py and b.py"
    ]
    assert differing({"a.py": one, "b.py": one.replace("@a\n", "")}) == ["g differs between a.py and b.py"]


# From the first words to the last ones, train has the same lines in every script.
BLOCKS = [
    ("with ExitStack()", "cuBLAS is not deterministic"),
    ("# A new run folder", 'checkpoint["progress"]'),
    ("import wandb", "run_id = wandb_run.id"),
    ("signals: list[int]", "stack.callback(signal.signal"),
    ("elapsed = time", "seconds += elapsed"),
    ("rows.append(row)", "logged, clock = step"),
    ("command = shlex.join", "stopped after step"),
    ('replace_file(folder / "results.json"', "return folder"),
    ("def parse_args", "raise SystemExit(2)"),
]


def test_all_scripts_keep_their_runs_alike():
    for first, last in BLOCKS:
        texts = set()
        for name in SCRIPTS:
            text = (ROOT / name).read_text(encoding="utf-8")
            start = text.index(first, text.index("def train("))
            texts.add(text[start : text.index("\n", text.index(last, start))])
        assert len(texts) == 1, texts


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
    assert dependencies == re.findall(r"(?m)^[\w-]+", (ROOT / "requirements.txt").read_text())
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
    """A comment behind the field or above it, as tyro shows them."""
    source = (ROOT / name).read_text(encoding="utf-8")
    (args,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 10
    lines = source.splitlines()
    for field in fields:
        assert "  # " in lines[field.lineno - 1] or lines[field.lineno - 2].startswith("    # "), (
            field.target.id
        )
        assert "--" + field.target.id.replace("_", "-") in help_of(name)


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

OUTPUTS = {"metrics.jsonl", "samples.png", "curves.png", "checkpoint.pt", "results.json", "samples.npy"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named_paths(text: str) -> set[str]:
    """Relative paths in links and in inline code, but not those that a run makes."""
    links = re.findall(r"\]\(([^)#:\s]+)\)", text)
    inline = re.findall(r"`([\w./-]+\.(?:py|md|txt|toml|json|png|yml|npy|pt|jsonl))`", text)
    return {s for s in [*links, *inline] if Path(s).name not in OUTPUTS}


def shown_options(text: str) -> set[tuple[str, str]]:
    """(script, --option) for every option that follows a script in a command."""
    found = set()
    for script, options in re.findall(r"([\w/]+\.py)((?: +[^\s#`&|]+)*)", text.replace("\\\n", " ")):
        found |= {(script, option) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", options)}
    return found


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
    paths = named_paths(README)
    assert "mmd_gan.py" in paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_readme_shows_options_that_exist():
    shown = shown_options(README)
    assert ("mmd_gan.py", "--dataset") in shown
    assert sorted((s, o) for s, o in shown if o not in help_options(s)) == []
    loose = set(re.findall(r"`(--[a-z][\w-]*)", README))
    assert sorted(loose - set().union(*map(help_options, SCRIPTS))) == []


def test_the_checks_of_the_readme_can_fail():
    text = (
        "See [design](docs/none.md), [there](https://example.org/a.py) and `lost/file.py`; `samples.png`\n"
        "```sh\npip install x && python mmd_gan.py --datset ring \\\n  --track # --not-this\n```\n"
    )
    assert named_paths(text) == {"docs/none.md", "lost/file.py"}
    assert shown_options(text) == {("mmd_gan.py", "--datset"), ("mmd_gan.py", "--track")}


def test_ci_runs_the_test_command_of_the_readme():
    """.ci/run takes exactly one line out of README.md: the one that installs and runs the tests."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"sed -n 's/\^\\\((.*)\\\)\$/\\1/p' README\.md", ci)[1]
    taken = [line for line in README.splitlines() if re.fullmatch(pattern, line)]
    assert len(taken) == 1 and re.search(r"install.*requirements-dev\.txt.*&&.*\bpytest\b", taken[0])


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

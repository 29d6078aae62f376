"""What holds for every script, and what the README says of the files."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
EACH = pytest.mark.parametrize("name", SOURCES)
OWN = {"Args", "train"}  # definitions that differ from script to script


def ruff(*options: str, **more) -> None:
    """`ruff options`, in the repository's root, finds nothing."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", **more)
    assert result.returncode == 0, result.stdout + result.stderr


def nodes(source: str) -> list[ast.stmt]:
    """The functions and classes of a module."""
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def differing(sources: dict[str, str]) -> list[str]:
    """Names that stand in two of the sources with different texts, and may not."""
    seen, found = {}, []
    for file, source in sources.items():
        for node in nodes(source):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = source.splitlines()[start - 1 : node.end_lineno]
            first, same = seen.setdefault(node.name, (file, text))
            if node.name not in OWN and text != same:
                found.append(f"{node.name} differs between {first} and {file}")
    return found


def test_definitions_of_one_name_are_one_text():
    assert differing(SOURCES) == []


def test_the_check_of_definitions_can_fail():
    one = "@a\ndef f(x):\n    return x\n\ndef train():\n    pass\n"
    assert differing({"a.py": one, "b.py": one.replace("train()", "train(x)")}) == []
    for other in (one.replace("@a\n", ""), one.replace("return x", "return  x")):
        assert differing({"a.py": one, "b.py": other}) == ["f differs between a.py and b.py"]


# From the first words to the last ones, Args and train have the same lines in every script.
BLOCKS = [
    ("with ExitStack()", "cuBLAS is not deterministic"),
    ("# A new run folder", 'checkpoint["progress"]'),
    ("import wandb", "run_id = wandb_run.id"),
    ("signals: list[int]", "stack.callback(signal.signal"),
    ("elapsed = time", "seconds += elapsed"),
    ("rows.append(row)", "logged, clock = step"),
    ("command = shlex.join", "stopped after step"),
    ('replace_file(folder / "results.json"', "return folder"),
    ("# The command line gives", "options = saved | options"),
    ("try:\n            super()", "from None"),
    ("def parse_args", "raise SystemExit(2)"),
]


@pytest.mark.parametrize("first, last", BLOCKS)
def test_all_scripts_keep_their_runs_alike(first, last):
    texts = set()
    for source in SOURCES.values():
        start = source.index(first, source.index("class Args("))
        texts.add(source[start : source.index("\n", source.index(last, start))])
    assert len(texts) == 1, texts


@EACH
def test_pep_723_block_agrees_with_the_project(name):
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", SOURCES[name])
    dependencies = ast.literal_eval(re.search(r"(?s)dependencies = (\[.*?\])", block.replace("\n#", "\n"))[1])
    assert dependencies == re.findall(r"(?m)^[\w-]+", (ROOT / "requirements.txt").read_text())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search('requires-python = ".*"', block)[0] in project


@EACH
def test_importing_a_script_only_defines(name):
    """No output, no file, and none of the modules that only some runs need; torch may import triton."""
    before = [*ROOT.iterdir(), ROOT / "__pycache__"]
    code = f"import sys; old = {{*sys.modules}}; import {name[:-3]}; print(*{{*sys.modules}} - old)"
    result = forked.Command(forked.run_code, code).finish()
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    loaded = {module.split(".")[0] for module in line.split()}
    assert name[:-3] in loaded and not loaded & {"wandb", "matplotlib", "sklearn", "triton", "scipy"}
    assert [path for path in ROOT.iterdir() if path not in before] == []


@EACH
def test_everything_is_described(name):
    """By a docstring; an option by a comment behind the field or above it, as tyro shows them."""
    assert ast.get_docstring(ast.parse(SOURCES[name]))
    for node in nodes(SOURCES[name]):
        assert ast.get_docstring(node) or node.name == "Args", f"{node.name} has no docstring"
    (args,) = (node for node in nodes(SOURCES[name]) if node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 10
    for field in fields:
        above, line = SOURCES[name].splitlines()[field.lineno - 2 : field.lineno]
        assert "  # " in line or above.startswith("    # "), line
        assert "--" + field.target.id.replace("_", "-") in help_options(name)


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    ruff(*command.split(), "--no-cache", ".")


@EACH
def test_the_loss_section_can_be_copied_away(name):
    """With the imports at the file's top, and nothing else, every name in it is known."""
    head, *parts = re.split(r"(?m)^# ---- (.*?) -+\n", SOURCES[name])
    imports = head[head.index("\nimport ") : head.index("\nSCRIPT = ")]
    losses = [section for title, section in zip(parts[::2], parts[1::2]) if title == "Loss"]
    assert len(losses) == (name != "baseline_cnn.py")  # whose loss is torch's
    ruff("check", "--isolated", "--no-cache", "--select", "F821", "-", input=imports + "".join(losses))


OUTPUTS = {"metrics.jsonl", "samples.png", "curves.png", "checkpoint.pt", "results.json", "samples.npy"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named_paths(text: str) -> set[str]:
    """Relative paths in links and in inline code, but not those that a run makes."""
    links = re.findall(r"\]\(([^)#:\s]+)\)", text)
    inline = re.findall(r"`([\w./-]+\.(?:py|md|txt|toml|json|png|yml|npy|pt|jsonl))`", text)
    return {s for s in [*links, *inline] if Path(s).name not in OUTPUTS}


def shown_options(text: str) -> set[tuple[str, str]]:
    """(script, --option) for every option that follows a script in a command."""
    commands = re.findall(r"([\w/]+\.py)((?: +[^\s#`&|]+)*)", text.replace("\\\n", " "))
    return {
        (script, word) for script, words in commands for word in re.findall(r"(?<!\S)--[a-z][\w-]*", words)
    }


@functools.cache
def help_options(script: str) -> set[str]:
    """The options that a script's --help shows."""
    result = forked.Command(forked.run_script, str(ROOT / script), "--help").finish()
    assert result.returncode == 0, result.stderr
    return {*re.findall(r"--[a-z][\w-]*", result.stdout)}


def test_readme_names_files_that_exist():
    assert "mmd_gan.py" in named_paths(README)
    assert [path for path in named_paths(README) if not (ROOT / path).exists()] == []


def test_readme_shows_options_that_exist():
    shown = shown_options(README)
    assert ("mmd_gan.py", "--dataset") in shown
    assert [(script, option) for script, option in shown if option not in help_options(script)] == []
    loose = set(re.findall(r"`(--[a-z][\w-]*)", README))
    assert loose <= set().union(*map(help_options, SOURCES))


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
    (taken,) = (line for line in README.splitlines() if re.fullmatch(pattern, line))
    assert re.search(r"install.*requirements-dev\.txt.*&&.*\bpytest\b", taken)


MACHINE_PATH = re.compile(r"(?<![\w.:/<>*-])/(?:home|root|Users|mnt|opt|work|tmp|private|scratch)/[\w.]")


def test_no_paths_of_one_machine():
    assert MACHINE_PATH.search("in " + "/home" + "/me") and not MACHINE_PATH.search("example.org/home/me")
    git = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = ROOT, ROOT / "tests", ROOT / "benchmarks", ROOT / "results"  # in a copy without git
    paths = [ROOT / name for name in names] or [path for folder in folders for path in folder.glob("*.*")]
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a picture, a folder, or deleted and not yet committed
            continue
        found += [f"{path.name}: {line.strip()}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert found == []

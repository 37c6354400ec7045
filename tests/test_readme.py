"""What the README shows is what the program takes: its commands parse, its Python compiles, its tree is whole."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from clipcap_rag import cli

ROOT = Path(__file__).parents[1]
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_ENDS_COMMAND = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>"}


@dataclass(frozen=True)
class Command:
    """One simple command of a shell block, without redirections and environment assignments."""

    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.words)}"


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(number of its first line, content) of the fenced blocks in a language, indented ones too."""
    found, lines = [], text.splitlines()
    inside, start, kept = None, 0, []
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*(```+)\s*(\w*)", line)
        if fence and inside is None:
            inside, start, kept = fence[2], number + 1, []
        elif fence and not fence[2]:
            if inside == language:
                found.append((start, "\n".join(kept)))
            inside = None
        elif inside is not None:
            kept.append(line)
    assert inside is None, f"the block before line {start} is never closed"
    return found


def commands(text: str) -> list[Command]:
    """The simple commands of all bash blocks: continued lines joined; prompts, comments, pipes understood."""
    found = []
    for start, content in blocks(text, "bash"):
        pending, first = "", start
        for number, line in enumerate(content.splitlines(), start):
            first = first if pending else number
            pending += line
            if pending.endswith("\\"):
                pending = pending[:-1] + " "
                continue
            found += [Command(first, words) for words in _simple_commands(pending)]
            pending = ""
        assert not pending, f"line {first} continues into nothing"
    return found


def _simple_commands(line: str) -> list[list[str]]:
    lexer = shlex.shlex(re.sub(r"^\s*\$ ", "", line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    simple, words, redirected = [], [], False
    for token in lexer:
        if token in _ENDS_COMMAND:
            redirected = token in (">", ">>", "<", "2>")
            if not redirected:
                simple.append(words)
                words = []
        elif redirected:
            redirected = False
        elif words or not _ASSIGNMENT.match(token):
            words.append(token)
    return [words for words in [*simple, words] if words]


def library_arguments(words: list[str]) -> list[str] | None:
    """The arguments for `cli.parse` of a command line of ours, None for other people's programs."""
    program = Path(words[0]).name
    if program == "clipcap-rag":
        return words[1:]
    if re.fullmatch(r"python(3(\.\d+)?)?", program) and len(words) > 1:
        if words[1:3] == ["-m", "clipcap_rag"]:
            return words[3:]
        if words[1].startswith("scripts/"):
            command = script_command(ROOT / words[1])
            return own_flags(ROOT / words[1], words[2:]) if command is None else command + words[2:]
    return None


def own_flags(script: Path, words: list[str]) -> None:
    """Checks the flags of a script that is no command of ours."""
    source = script.read_text(encoding="utf-8")
    unknown = [word for word in words if word.startswith("-") and f'"{word}"' not in source]
    assert not unknown, f"{script} knows no {unknown}"


def script_command(script: Path) -> list[str] | None:
    """The words that a thin script puts before its own arguments, None for a program of its own."""
    assert script.is_file(), f"{script} is not there"
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run" and node.args:
            return [part.value for part in node.args[0].elts if isinstance(part, ast.Constant)]
    return None


def check(command: Command) -> None:
    """Fails if a command of ours would be refused, or make has no such target."""
    if Path(command.words[0]).name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        asked = [word for word in command.words[1:] if not _ASSIGNMENT.match(word) and not word.startswith("-")]
        assert asked and set(asked) <= set(targets), f"{command}: make has no such target"
        return
    arguments = library_arguments(command.words)
    if arguments is None:
        return
    try:
        cli.parse(arguments)
    except SystemExit as ended:
        assert ended.code == 0, f"{command}: the command line refuses it"


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_accepted(readme):
    found = commands(readme)
    for command in found:
        check(command)
    shown = [arguments for command in found if (arguments := library_arguments(command.words)) is not None]
    kinds = {" ".join(arguments[:2]) if arguments[0] == "index" else arguments[0] for arguments in shown if arguments}
    assert {"index build", "extract", "train", "caption", "doctor"} <= kinds
    assert {"make demo", "make test"} <= {shlex.join(command.words) for command in found}


def test_every_python_block_compiles_and_imports_what_exists(readme):
    import importlib

    found = blocks(readme, "python")
    assert found
    for line, content in found:
        tree = compile(content, f"README.md line {line}", "exec", ast.PyCF_ONLY_AST)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipcap_rag"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"README.md line {line}: {node.module} has no {alias.name}"


def test_tree_names_every_module(readme):
    modules = {path.name for path in (ROOT / "clipcap_rag").glob("*.py") if not path.name.startswith("__")}
    scripts = {path.name for path in (ROOT / "scripts").rglob("*.py")}
    ours = re.sub(r"^## Coming from ClipCap$.*?(?=^## )", "", readme, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"\b\w+\.py\b", ours))
    assert modules | scripts <= named, f"not named: {sorted((modules | scripts) - named)}"
    gone = named - modules - scripts - {path.name for path in (ROOT / "tests").glob("*.py")}
    assert not gone, f"named but not there: {sorted(gone)}"


def test_relative_links_lead_somewhere(readme):
    links = re.findall(r"\]\(([^)#\s]+)", readme)
    broken = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not broken


# -- the reader of shell blocks itself


SAMPLE = r"""
```bash
# a comment
$ clipcap-rag caption "my photo.jpg" \
      --model runs/a --json | head -1
CLIPCAP_RAG_DATA=/data make demo && clipcap-rag doctor > report.txt
```
```text
clipcap-rag nonsense
```
"""


def test_commands_are_found():
    assert [command.words for command in commands(SAMPLE)] == [
        ["clipcap-rag", "caption", "my photo.jpg", "--model", "runs/a", "--json"],
        ["head", "-1"],
        ["make", "demo"],
        ["clipcap-rag", "doctor"],
    ]
    assert commands(SAMPLE)[0].line == 4
    for command in commands(SAMPLE):
        check(command)


@pytest.mark.parametrize(
    "line",
    [
        "clipcap-rag captoin a.jpg",
        "clipcap-rag caption a.jpg --model m --no-such-flag",
        "clipcap-rag caption --model m",
        "python scripts/caption.py a.jpg --no-such-flag --model m",
        "python scripts/no_such_script.py",
        "make no-such-target",
        "true && clipcap-rag train",
    ],
)
def test_wrong_commands_are_caught(line, capsys):
    with pytest.raises(AssertionError):
        for command in commands(f"```bash\n{line}\n```"):
            check(command)


def test_scripts_stand_for_their_commands():
    assert library_arguments(["python", "scripts/build_caption_index.py", "--out", "x"]) == [
        "index",
        "build",
        "--out",
        "x",
    ]

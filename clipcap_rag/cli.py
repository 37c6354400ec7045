"""The command line: finds the command, runs it, and turns every failure into one sentence and an exit status."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from clipcap_rag import __version__
from clipcap_rag.commands import COMMANDS
from clipcap_rag.errors import InputError
from clipcap_rag.flags import Parser
from clipcap_rag.output import NOTHING_DONE

_INTERRUPTED, _PIPE_CLOSED = 130, 141  # what a shell reports for SIGINT and SIGPIPE


def build_parser() -> Parser:
    """The parser of all commands in `COMMANDS`; a command of two words is a command of a group.

    One whose first word is a command itself, as `evaluate compare`, has a name of two words instead.
    """
    parser = Parser(prog="clipcap-rag", description="Caption photos with the help of captions found in an index.")
    parser.add_argument("--version", action="version", version=f"clipcap-rag {__version__}")
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for words, command in COMMANDS.items():
        group, _, name = ("", "", words) if _beside_a_command(words) else words.rpartition(" ")
        if group not in groups:
            members = [other.split()[-1] for other in COMMANDS if other.startswith(group + " ")]
            text = f"{', '.join(members)}: see clipcap-rag {group} --help"
            owner = groups[""].add_parser(group, help=text, description=f"The commands of clipcap-rag {group}.")
            groups[group] = owner.add_subparsers(title="commands", metavar="COMMAND", required=True)
        description = (command.run.__doc__ or "").strip()
        added = groups[group].add_parser(name, help=description.partition("\n")[0], description=description)
        command.add_flags(added)
        added.set_defaults(run=command.run, parser=added)
    return parser


def _beside_a_command(words: str) -> bool:
    return words in COMMANDS and words.rpartition(" ")[0] in COMMANDS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; a mistake ends the process with one sentence and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = " ".join(arguments[:2])
    if _beside_a_command(words):
        arguments = [words, *arguments[2:]]
    given, unknown = build_parser().parse_known_args(arguments)
    given.parser.refuse_unknown(unknown)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 some inputs failed, 2 nothing was done.

    With CLIPCAP_RAG_TRACEBACK=1 in the environment errors keep their traceback.
    """
    given = parse(arguments)
    try:
        status = given.run(given)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return _PIPE_CLOSED
    except Exception as error:
        if os.environ.get("CLIPCAP_RAG_TRACEBACK") == "1":
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return NOTHING_DONE


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command, that of this process unless `arguments` are given, and ends the process.

    Of the 5.7 s that one caption took, the garbage collector had 1 s while torch and transformers were imported, and
    their taking apart at the end another. So the collector comes rarely, and the process ends without ceremony once its
    output is written; 3.9 s are left.
    """
    gc.set_threshold(200_000, 50, 50)
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _sentence(error: Exception) -> str:
    """One line about a failure; one that we did not foresee says how to learn more."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch.OutOfMemoryError
        return f"out of memory ({_first_line(error)}); use a smaller --batch-size or --device cpu"
    more = "set CLIPCAP_RAG_TRACEBACK=1 and run the same command again to see where it came from"
    return f"{type(error).__name__}: {_first_line(error)}; {more}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no further word").splitlines()[0].rstrip(".")

"""Command-line flags made from the configuration dataclasses, and the flags that several commands share."""

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from typing import Any, NoReturn, TypeVar

from clipcap_rag.sources import SourceOptions

Configuration = TypeVar("Configuration")

CLIP_HELP = "CLIP model: starter (the one of the package), NAME, NAME:TAG, local-dir:PATH or a folder, hf-hub:ORG/NAME"
INDEX_HELP = (
    "a folder, a name looked up in $CLIPCAP_RAG_INDEX_DIR, ./index and the indexes of the package, or hf-hub:ORG/NAME"
)
MODEL_HELP = "a training run, a checkpoint, starter or hf-hub:ORG/NAME[@REVISION]"


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence instead of a page of usage."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Ends with an error that names the first unknown argument and the flags that look like it."""
        if not unknown:
            return
        flag = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(flag, [name for name in self._option_string_actions if name != "-h"], n=1)
        self.error(f"unknown argument {flag}" + (f"; did you mean {close[0]}?" if close else ""))


class _Help(argparse.HelpFormatter):
    """Help with the metavars close to the flags, so that the texts line up."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def flag_name(field: str) -> str:
    """`top_p` -> `--top-p`."""
    return "--" + field.replace("_", "-")


def add_config(parser: argparse.ArgumentParser, config: type, title: str, omit: tuple[str, ...] = ()) -> None:
    """Adds one flag per field of a configuration dataclass: its help, its choices, its default.

    Flags that are not given leave no trace in the parsed arguments, so that `make_config` can tell them from flags
    that repeat the default.

    Args:
        config: a dataclass whose fields are made by `config.option`.
        title: heading of these flags in the help.
        omit: fields that follow from something else and get no flag.
    """
    group = parser.add_argument_group(title)
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in omit:
            continue
        kind, text = _plain(kinds[field.name]), field.metadata["help"].replace("%", "%%")
        shown = text if field.default in (None, "", ()) else f"{text} (default: {_shown(field.default)})"
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": shown}
        if kind is bool:
            group.add_argument(flag_name(field.name), action=argparse.BooleanOptionalAction, **options)
            continue
        if kind is tuple:
            group.add_argument(flag_name(field.name), action="append", metavar="TEXT", **options)
            continue
        choices = field.metadata.get("choices")
        metavar = None if choices else {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(flag_name(field.name), type=kind, choices=choices, metavar=metavar, **options)


def given_fields(config: type, given: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration dataclass whose flags were given."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(given, name) for name in names if hasattr(given, name)}


def make_config(config: type[Configuration], given: argparse.Namespace) -> Configuration:
    """The configuration of what was given, with the defaults of the dataclass for the rest."""
    return config(**given_fields(config, given))


def _plain(kind: Any) -> type:
    """`str | None` -> `str`, `tuple[str, ...]` -> `tuple`."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return typing.get_origin(kind) or kind


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def add_compute(
    parser: argparse.ArgumentParser,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto, cpu, cuda or cuda:N",
) -> None:
    """Adds --device and --dtype, and --batch-size and --workers with the defaults given."""
    group = parser.add_argument_group("computing")
    group.add_argument("--device", default="auto", help=f"{device} (default: auto)")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    if batch_size:
        text = f"inputs encoded at a time (default: {batch_size})"
        group.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=text)
    if workers is not None:
        text = f"processes that decode photos; 0 decodes in this one (default: {workers})"
        group.add_argument("--workers", type=count, default=workers, metavar="N", help=text)


def add_captions(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --captions and what reading them needs."""
    text = "caption files or folders; .gz of any text is fine"
    parser.add_argument("--captions", nargs="+", required=required, metavar="PATH", help=text)
    add_config(parser, SourceOptions, "reading captions")
    text = "count and list bad lines instead of stopping at the first"
    parser.add_argument("--skip-bad", action="store_true", help=text)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds --out and --overwrite."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def add_json(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help=text)


def count(text: str) -> int:
    """The argument type of numbers from 0."""
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def positive(text: str) -> int:
    """The argument type of numbers from 1."""
    if not count(text):
        raise ValueError(text)
    return int(text)


count.__name__, positive.__name__ = "number from 0", "number from 1"  # argparse puts these into its sentence

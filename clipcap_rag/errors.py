"""The one exception that is meant for people: a sentence with the value and the remedy."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do.

    Commands print the message alone and exit with a non-zero status. Library callers may catch it as ValueError.
    """


def missing_extra(package: str, extra: str) -> InputError:
    """The error for an optional dependency that is not installed, with the command that installs it."""
    return InputError(f"{package} is not installed; run: pip install 'clipcap-rag[{extra}]'")

"""The names that the package offers at its top, each found without importing the others."""

import subprocess
import sys

import pytest

import clipcap_rag


@pytest.mark.parametrize("name", clipcap_rag.__all__)
def test_public_names_are_there(name):
    assert getattr(clipcap_rag, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Captoiner'"):
        clipcap_rag.Captoiner  # noqa: B018


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, clipcap_rag; sys.exit(bool({'torch', 'faiss', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

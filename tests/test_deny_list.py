"""Words that are never retrieved: whole, in order, whatever their case and marks."""

import pytest

from clipcap_rag.deny_list import DenyList
from clipcap_rag.errors import InputError
from clipcap_rag.sources import normalize_caption


@pytest.mark.parametrize(
    ("caption", "refused"),
    [
        ("A Kite over the hill.", True),
        ("two kites", False),
        ("an old red boat", False),
        ("the red, old boat!", True),
        ("red old", False),
        ("boat", False),
        ("", False),
    ],
)
def test_whole_words_in_order(caption, refused):
    assert DenyList(["KITE", "red old boat", " ... "]).refuses(normalize_caption(caption)) is refused


def test_a_file_of_entries(tmp_path):
    file = tmp_path / "deny.txt"
    file.write_text("\nkite\n\nA red boat.\n", encoding="utf-8")
    assert DenyList.read(file).refuses("a red boat at sea") and not DenyList.read(file).refuses("a boat")


@pytest.mark.parametrize(("content", "message"), [(b"\n!\n", "holds no word"), (b"kite\n\xff\n", "UTF-8")])
def test_what_is_no_list_is_refused(tmp_path, content, message):
    file = tmp_path / "deny.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        DenyList.read(file)
    with pytest.raises(InputError, match="cannot read"):
        DenyList.read(tmp_path / "none.txt")

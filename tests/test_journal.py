"""The journal: later lines of a row count, torn lines go, rows come back in order."""

import pytest

from clipcap_rag.errors import InputError
from clipcap_rag.journal import Journal


def entries(path, *more, **options):
    with open(path, "a+b") as file:
        journal = Journal(file, **options)
        for row, word in more:
            journal.add({"row": row, "word": word})
        return [(entry["row"], entry["word"]) for entry in journal.entries()], len(journal)


def test_entries_come_in_order_and_the_last_of_a_row_counts(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert entries(path, (9, "nine"), (2, "zwei"), (0, "nül"), (2, "two")) == ([(0, "nül"), (2, "two"), (9, "nine")], 3)
    assert entries(path, (4, "four"))[0] == [(0, "nül"), (2, "two"), (4, "four"), (9, "nine")]
    with open(path, "a+b") as file:
        journal = Journal(file)
        assert [row for row in range(20) if row in journal] == [0, 2, 4, 9]


def test_entries_and_new_lines_can_take_turns(tmp_path):
    with open(tmp_path / "journal.jsonl", "a+b") as file:
        journal = Journal(file)
        for row in (3, 1, 2):
            journal.add({"row": row})
            assert row in [entry["row"] for entry in journal.entries()]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3


def test_a_torn_line_is_removed_wherever_it_was_torn(tmp_path):
    path = tmp_path / "journal.jsonl"
    entries(path, (1, "one"))
    whole = path.read_bytes()
    second = b'{"row": 2, "word": "two"}'
    for end in range(1, len(second) + 1):
        path.write_bytes(whole + second[:end])
        assert entries(path, (3, "three"))[0] == [(1, "one"), (3, "three")]


def test_what_is_to_be_forgotten_is_made_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    entries(path, (1, "bad"), (2, "good"), (3, "bad"))
    again = {"forget": lambda entry: entry["word"] == "bad"}
    assert entries(path, (3, "good"), **again)[0] == [(2, "good"), (3, "good")]
    assert entries(path)[0] == [(1, "bad"), (2, "good"), (3, "good")]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"row": "1"}', "null", '{"row": -1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    entries(path, (1, "one"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"journal\.jsonl:2 is damaged"):
        entries(path)

"""The benchmark: it runs, checks both sides first, and leaves figures and a picture."""

import json

import pytest
from PIL import Image

from clipcap_rag import InputError
from clipcap_rag.bench import GROUPS, bench
from clipcap_rag.bench_protocol import Comparison, Disagreement, compare
from clipcap_rag.cli import main


def comparison(calls: list[str], **changes) -> Comparison:
    settings = {
        "name": "adding",
        "size": "two numbers",
        "fast": "once",
        "slow": "often",
        "target": 2.0,
        "run_fast": lambda: calls.append("fast"),
        "run_slow": lambda: [calls.append("slow"), sum(range(300_000))],
        "agree": lambda: "equal",
    }
    return Comparison(**(settings | changes))


def test_the_sides_alternate_and_the_median_counts():
    calls = []
    result = compare(comparison(calls), 5)
    assert calls == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert result.low <= result.ratio <= result.high and len(result.pairs) == 5
    assert result.met and result.ratio > 2 and result.agreement == "equal"
    assert result.memory_fast > 2**20 and result.memory_slow > 2**20


def test_a_part_of_the_slow_work_is_scaled():
    ratio = compare(comparison([], scale=1.0), 3).ratio
    assert compare(comparison([], scale=1000.0), 3).ratio > 20 * ratio


def test_sides_that_disagree_are_not_timed():
    def disagree() -> str:
        raise Disagreement("3 is not 4")

    calls = []
    with pytest.raises(Disagreement):
        compare(comparison(calls, agree=disagree))
    assert calls == []


def test_an_unknown_group_is_named(tmp_path):
    with pytest.raises(InputError, match="'speed'"):
        bench(tmp_path, groups=["speed"])


def test_the_command_runs_every_comparison(tmp_path, capsys):
    assert main(["bench", "--quick", "--json", "--device", "cpu", "--out", str(tmp_path / "bench")]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert written["comparisons"] == shown and written["failures"] == {}
    assert written["machine"]["threads"] >= 1 and written["seconds"] > 0
    names = [row["name"] for row in shown]
    assert len(names) == len(set(names)) >= 3 * len(GROUPS)
    for row in shown:
        assert row["seconds_fast"] > 0 and row["seconds_slow"] > 0 and row["agreement"]
    with Image.open(tmp_path / "bench" / "bench.png") as picture:
        assert picture.width > 500

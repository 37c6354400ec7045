"""Baselines: the nearest caption, the consensus, and NAME=CHECKPOINT."""

import numpy as np
import pytest

from clipcap_rag.baselines import consensus_captions, named_checkpoints, nearest_captions
from clipcap_rag.errors import InputError
from clipcap_rag.neighbor_conditions import of_rows


def test_the_consensus_is_what_most_neighbours_say(world):
    odd = world.other_index.captions([0])[0]
    neighbors = of_rows(world.index, np.array([[0, 1, 2], [4, -1, -1], [-1, -1, -1]]), np.eye(3, 24, dtype=np.float32))
    texts = [odd, "two dogs run on the beach", "two brown dogs run on the beach"]
    neighbors.captions[0][:] = texts
    neighbors.captions[1][:] = texts[:1]
    assert nearest_captions(neighbors) == [odd, odd, ""]
    found = consensus_captions(neighbors)
    assert found[0] in texts[1:] and found[1:] == [odd, ""]


def test_names_of_checkpoints():
    assert named_checkpoints(["a=runs/a", "b=runs/x=y"]) == {"a": "runs/a", "b": "runs/x=y"}
    for wrong in (["runs/a"], ["=runs/a"], ["a="], ["a=x", "a=y"], ["a/b=x"]):
        with pytest.raises(InputError, match="NAME=CHECKPOINT"):
            named_checkpoints(wrong)

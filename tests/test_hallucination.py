"""CHAIR: which objects a text names, and which of them are not in the photo."""

import json

import pytest

from clipcap_rag.bootstrap import estimates
from clipcap_rag.errors import InputError
from clipcap_rag.hallucination import Hallucinations, ObjectNames, read_instances, read_synonyms

CATEGORIES = ["person", "dog", "hot dog", "teddy bear", "bear", "knife", "bus", "skis", "mouse", "cherry"]


@pytest.mark.parametrize(
    "text, named",
    [
        ("Two dogs and a person.", ["dog", "person"]),
        ("A hot dog beside a dog", ["hot dog", "dog"]),
        ("teddy bears, a teddy-bear, teddybears and bears", ["teddy bear"] * 3 + ["bear"]),
        ("People with knives wait for buses", ["person", "knife", "bus"]),
        ("one ski, two mice, cherries", ["skis", "mouse", "cherry"]),
        ("the dog's bowl", ["dog"]),
        ("a dogged hotdog", ["hot dog"]),
        ("nothing of the kind", []),
        ("", []),
    ],
)
def test_names_plurals_and_compounds(text, named):
    assert ObjectNames(CATEGORIES).mentioned(text) == named


def test_synonyms_of_the_user_have_plurals_too():
    names = ObjectNames(CATEGORIES, {"person": ["man", "police officer"], "dog": ["puppy"]})
    assert names.mentioned("men and police officers with puppies") == ["person", "person", "dog"]
    with pytest.raises(InputError, match="'bear' is a name of 'bear' and of 'dog'"):
        ObjectNames(CATEGORIES, {"dog": ["bear"]})


def test_values_by_hand():
    judge = Hallucinations(ObjectNames(CATEGORIES), [{"dog"}, {"bus"}, set(), set()])
    references = [["a dog"], ["a bus, a person waits"], ["a street"], ["a street"]]
    captions = ["a dog and a bear and a bear", "a person at a bus", "", "a knife"]
    found = {name: estimate.value for name, estimate in estimates(judge(references, captions)).items()}
    assert found == pytest.approx({"CHAIR-s": 2 / 4, "CHAIR-i": 3 / 6})


def test_no_object_named_leaves_the_share_of_mentions_open():
    found = estimates(Hallucinations(ObjectNames(["dog"]), [set()])([["a street"]], ["a street"]))
    assert found["CHAIR-s"].value == 0 and found["CHAIR-i"].to_json()["value"] is None


def instances(**changes):
    document = {
        "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8}],
        "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 1}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    return document | changes


def test_instances_are_found_by_number_and_stem(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(instances()))
    categories, present = read_instances(path)
    assert categories == ["person", "dog"]
    assert present == {"7": {"person", "dog"}, "000000000007": {"person", "dog"}, "8": set()}


@pytest.mark.parametrize(
    "document, named",
    [
        ([], "needs the lists"),
        (instances(annotations=None), "needs the lists"),
        (instances(annotations=[{"image_id": 7, "category_id": 2}]), r"annotations\[0\] has a category_id"),
        (instances(annotations=[7]), "entry without category_id"),
        (instances(categories=[{"id": 1, "name": 3}]), "category without name"),
        (instances(images=[{"file_name": "a.jpg"}]), "entry without id"),
    ],
)
def test_other_files_are_refused(tmp_path, document, named):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=named):
        read_instances(path)


def test_synonyms_are_read_line_by_line(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("dog, puppy, hound\nperson, man\n")
    assert read_synonyms(path, ["person", "dog"]) == {"dog": ["puppy", "hound"], "person": ["man"]}
    path.write_text("dog, puppy\ncat, kitten\n")
    with pytest.raises(InputError, match=r"synonyms\.txt:2: 'cat' is no category"):
        read_synonyms(path, ["person", "dog"])

"""The doctor: every fault of an installation is named with its remedy, and a sound one has none."""

import json
import sys
import types

import pytest
from packaging.requirements import Requirement

from clipcap_rag import doctor
from clipcap_rag.artifact import write_json
from clipcap_rag.doctor import Diagnosis, Finding, faiss_finding, import_finding, index_findings, package_findings


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder; indexes are looked up there only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPCAP_RAG_INDEX_DIR", raising=False)
    monkeypatch.setattr(doctor, "index_homes", lambda: [tmp_path / "index"])
    return tmp_path


def test_examine_sees_this_machine(elsewhere):
    findings = {finding.topic: finding for finding in doctor.examine().findings}
    for topic in ("python", "clipcap-rag", "faiss", "device", "dtype", "memory", "threads", "index"):
        assert topic in findings
    assert sys.version.split()[0] in findings["python"].found
    assert findings["dtype"].found.split(":")[0] in ("float32", "bfloat16")
    assert float(findings["memory"].found.split()[0]) > 0


def test_examine_lists_what_the_package_requires(elsewhere, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy<2", "pillow", "peft; extra == 'train'"])
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.0")
    findings = {finding.topic: finding for finding in doctor.examine().findings}
    assert findings["numpy"].found == findings["pillow"].found == "1.0"
    assert not findings["numpy"].remedy


def test_a_package_that_is_not_installed():
    needed, optional = package_findings(
        [Requirement("no-such-package-x>=2"), Requirement("no-such-package-y; extra == 'train'")]
    )
    assert needed.remedy == "pip install 'no-such-package-x>=2'"
    assert optional.remedy is None and "clipcap-rag[train]" in optional.found


def test_a_version_that_does_not_fit():
    (finding,) = package_findings([Requirement("numpy<1")])
    assert "but numpy<1 is needed" in finding.found and finding.remedy == "pip install 'numpy<1'"


def test_requirements_of_other_systems_and_doubles_are_left_out():
    requirements = [
        Requirement("numpy; sys_platform == 'beos'"),
        Requirement("numpy"),
        Requirement("numpy; extra == 'eval'"),
    ]
    assert [finding.topic for finding in package_findings(requirements)] == ["numpy"]


@pytest.mark.parametrize(
    "message, remedy",
    [
        ("operator torchvision::nms does not exist", "pip install --force-reinstall torch torchvision"),
        ("undefined symbol", "pip install --force-reinstall brokenmodule"),
    ],
)
def test_a_package_that_cannot_be_imported(monkeypatch, tmp_path, message, remedy):
    (tmp_path / "brokenmodule.py").write_text(f"raise RuntimeError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    finding = import_finding("brokenmodule", "1.0")
    assert finding.remedy == remedy and message in finding.found


@pytest.mark.parametrize(
    "gpu_build, gpus, installed, cuda, found, remedy",
    [
        (True, 2, {"faiss-gpu"}, True, "GPU build is live, 2 GPUs", None),
        (True, 1, {"faiss-gpu", "faiss-cpu"}, True, "does no harm", None),
        (True, 0, {"faiss-gpu"}, False, "0 GPUs", None),
        (True, 0, {"faiss-gpu"}, True, "torch sees one", "driver"),
        (
            False,
            0,
            {"faiss-gpu", "faiss-cpu"},
            False,
            "written over faiss-gpu",
            "--force-reinstall --no-deps faiss-gpu",
        ),
        (False, 0, {"faiss-cpu"}, True, "though there is a GPU", "faiss-gpu"),
        (False, 0, {"faiss-cpu"}, False, "CPU build is live", None),
    ],
)
def test_which_faiss_is_live(gpu_build, gpus, installed, cuda, found, remedy):
    finding = faiss_finding(gpu_build, gpus, installed, cuda)
    assert found in finding.found
    assert (finding.remedy is None) == (remedy is None) and (remedy or "") in (finding.remedy or "")


def test_a_broken_torch_does_not_stop_the_report(elsewhere, monkeypatch):
    monkeypatch.setattr(doctor, "_device_findings", failing_device_findings)
    topics = {finding.topic: finding for finding in doctor.examine().findings}
    assert "no kernel image" in topics["failing"].found and topics["failing"].remedy
    assert "index" in topics


def failing_device_findings():
    raise RuntimeError("no kernel image")


def test_indexes_found_broken_and_missing(elsewhere, monkeypatch):
    (none,) = index_findings()
    assert "none found" in none.found and not none.remedy
    (elsewhere / "index" / "broken").mkdir(parents=True)
    write_json(elsewhere / "index" / "broken" / "index.json", {"kind": "feature set"})
    (broken,) = index_findings()
    assert "broken" in broken.found and "not a caption index" in broken.remedy
    files = types.SimpleNamespace(rows=7, manifest={"encoder": {"clip": "ViT-B-32:openai"}})
    monkeypatch.setattr(doctor, "open_files", lambda path: files)
    (sound,) = index_findings()
    assert "7 captions by ViT-B-32:openai" in sound.found and not sound.remedy
    monkeypatch.setenv("CLIPCAP_RAG_INDEX_DIR", str(elsewhere / "gone"))
    assert "gone is not a folder" in next(iter(index_findings())).found


def test_table_and_json_show_remedies():
    diagnosis = Diagnosis(
        [Finding("python", "3.11"), Finding("numpy", "2.1, but numpy<2 is needed", "pip install 'numpy<2'")]
    )
    table = diagnosis.table().splitlines()
    assert table[0] == "python  3.11" and table[2] == "        -> pip install 'numpy<2'"
    assert table[-1].startswith("1 problem")
    value = json.loads(json.dumps(diagnosis.to_json()))
    assert value["problems"] == 1 and value["findings"][1]["remedy"] == "pip install 'numpy<2'"
    assert Diagnosis([Finding("python", "3.11")]).table().splitlines()[-1] == "no problem found"

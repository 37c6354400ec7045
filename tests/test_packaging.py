"""The wheel: built offline, its only top level is clipcap_rag, and installed it works from any folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import clipcap_rag

ROOT = Path(__file__).parents[1]
SHIPPED = ("clipcap_rag", "pyproject.toml", "README.md", "LICENSE", "index/README.md", "index/starter")


def start(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a program without the variables that would show it this checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CLIPCAP_RAG"))}
    words = [str(part) for part in command]
    return subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


def run(*command: object, cwd: Path) -> str:
    """Runs a program that must succeed and returns what it prints."""
    done = start(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean, with the build backend that is installed."""
    folder = tmp_path_factory.mktemp("build")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", build, folder / "dist", cwd=folder)
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new environment that has the wheel and sees the packages of this one."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    bin_folder = home / ("Scripts" if os.name == "nt" else "bin")
    parents = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    site = Path(
        run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    )
    (site / "parent.pth").write_text("\n".join(parents) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", bin_folder / "python", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=home)
    return bin_folder


def test_clipcap_rag_is_the_only_top_level(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"clipcap_rag", f"clipcap_rag-{clipcap_rag.__version__}.dist-info"}


def test_every_module_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("clipcap_rag/") and name.endswith(".py")}
        assert "clipcap_rag/report.html" in archive.namelist()
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert packed == {f"clipcap_rag/{path.name}" for path in (ROOT / "clipcap_rag").glob("*.py")}
    assert licences


def test_the_starter_is_in_the_wheel_and_no_other_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    shipped = {"clipcap_rag/models/starter": ROOT / "clipcap_rag/models/starter"}
    shipped["clipcap_rag/indexes/starter"] = ROOT / "index/starter"
    for inside, folder in shipped.items():
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert files and files == {name[len(inside) + 1 :] for name in names if name.startswith(inside + "/")}
    assert {name.split("/")[2] for name in names if name.startswith("clipcap_rag/indexes/")} == {"starter"}


def test_the_installed_starter_captions_from_another_folder(installed, tmp_path):
    photo = Path(find_spec("matplotlib").origin).parent / "mpl-data/sample_data/grace_hopper.jpg"
    (result,) = map(json.loads, run(installed / "clipcap-rag", "caption", photo, "--json", cwd=tmp_path).splitlines())
    assert result["error"] is None and result["caption"]
    assert {neighbor["index"] for neighbor in result["neighbors"]} == {"starter"}
    off = run(installed / "clipcap-rag", "caption", photo, "--no-retrieval", "--json", cwd=tmp_path)
    assert json.loads(off)["neighbors"] == []


def test_it_runs_from_another_folder(installed, tmp_path):
    where = run(installed / "python", "-c", "import clipcap_rag; print(clipcap_rag.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed / "clipcap-rag", "--version", cwd=tmp_path).split()[1] == clipcap_rag.__version__
    assert "caption" in run(installed / "python", "-m", "clipcap_rag", "--help", cwd=tmp_path)


def test_the_installed_doctor_checks_its_requirements(installed, tmp_path):
    done = start(installed / "clipcap-rag", "doctor", "--json", cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr  # 1: it found something wrong with this machine
    topics = {finding["topic"]: finding["found"] for finding in json.loads(done.stdout)["findings"]}
    assert topics["clipcap-rag"] == clipcap_rag.__version__
    for name in ("torch", "open_clip_torch", "transformers", "numpy", "autofaiss", "pillow", "pyarrow", "peft"):
        assert name in topics


def test_the_public_names_import_from_another_folder(installed, tmp_path):
    code = (
        "from clipcap_rag import CaptionIndex, Captioner, build_caption_index\n"
        "print(Captioner.from_pretrained, CaptionIndex.open, build_caption_index)"
    )
    assert "from_pretrained" in run(installed / "python", "-c", code, cwd=tmp_path)


def test_promised_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.13"
    named = {line.split(";")[0].strip().split(">")[0].split("<")[0]: line for line in project["dependencies"]}
    for name in ("torch", "open_clip_torch", "transformers", "numpy", "faiss-gpu", "autofaiss", "pillow"):
        assert name in named
    assert "<2" in named["numpy"] and "<24" in named["pyarrow"]
    assert "x86_64" in named["faiss-gpu"] and "x86_64" in named["faiss-cpu"]


def test_no_second_package_beside_the_library():
    assert not list((ROOT / "index").rglob("*.py")) and not (ROOT / "tests" / "__init__.py").exists()

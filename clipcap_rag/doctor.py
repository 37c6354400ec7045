"""What this installation runs on, and what is wrong with it, each fault with its remedy."""

import dataclasses
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from clipcap_rag.errors import InputError
from clipcap_rag.index_names import index_homes
from clipcap_rag.index_store import MANIFEST, open_files

_MODULES = {"open_clip_torch": "open_clip", "pillow": "PIL", "faiss-gpu": "faiss", "faiss-cpu": "faiss"}
_INDEX_VARIABLE = "CLIPCAP_RAG_INDEX_DIR"


@dataclass(frozen=True)
class Finding:
    """One line of the report; with a remedy it is a fault."""

    topic: str
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which they are shown."""

    findings: list[Finding]

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.remedy]

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "problems": len(self.problems),
        }

    def table(self) -> str:
        """The findings as lines of text, each remedy below its finding."""
        width = max(len(finding.topic) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.topic:{width}}  {finding.found}")
            if finding.remedy:
                lines.append(f"{'':{width}}  -> {finding.remedy}")
        count = len(self.problems)
        lines.append("no problem found" if not count else f"{count} problem{'s' * (count > 1)}, see ->")
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Looks at the packages, the devices, the memory and the caption indexes of this machine."""
    findings = [Finding("python", _python())]
    try:
        requirements = [Requirement(line) for line in metadata.requires("clipcap-rag") or []]
        findings.append(Finding("clipcap-rag", metadata.version("clipcap-rag")))
        findings += package_findings(requirements)
    except metadata.PackageNotFoundError:
        findings.append(Finding("clipcap-rag", "not installed", "run in the project's folder: pip install -e ."))
    for look in (_faiss_findings, _device_findings):
        try:
            findings += look()
        except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not fit each other
            topic = look.__name__.strip("_").partition("_")[0]
            findings.append(Finding(topic, _words(error), "mend the packages above first"))
    return Diagnosis([*findings, *index_findings()])


def _python() -> str:
    import platform

    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def package_findings(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """For each requirement that applies here: its version, and whether it fits and can be imported.

    Packages of extras may be absent; then the finding says which extra installs them.
    """
    seen = set()
    for requirement in requirements:
        extra = next((name for name in ("", "train", "eval") if _applies(requirement, name)), None)
        if extra is None or requirement.name in seen:
            continue
        seen.add(requirement.name)
        plain = f"{requirement.name}{requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if extra:
                yield Finding(requirement.name, f"not installed; optional: pip install 'clipcap-rag[{extra}]'")
            else:
                yield Finding(requirement.name, "not installed", f"pip install '{plain}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, f"{version}, but {plain} is needed", f"pip install '{plain}'")
            continue
        yield import_finding(requirement.name, version)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def import_finding(distribution: str, version: str) -> Finding:
    """Whether an installed package can really be imported."""
    try:
        importlib.import_module(_MODULES.get(distribution, distribution))
    except Exception as error:  # a broken package may raise anything: this is what we are here to report
        together = "torch torchvision" if "torchvision" in str(error) else distribution
        remedy = f"pip install --force-reinstall {together}"
        return Finding(distribution, f"{version}, but its import fails: {_words(error)}", remedy)
    return Finding(distribution, version)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _faiss_findings() -> list[Finding]:
    faiss = importlib.import_module("faiss")
    torch = importlib.import_module("torch")
    installed = {name for name in ("faiss-gpu", "faiss-cpu") if _is_installed(name)}
    gpu_build = hasattr(faiss, "StandardGpuResources")
    return [faiss_finding(gpu_build, faiss.get_num_gpus() if gpu_build else 0, installed, torch.cuda.is_available())]


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def faiss_finding(gpu_build: bool, gpus: int, installed: set[str], cuda: bool) -> Finding:
    """Which faiss answers to `import faiss`: faiss-gpu and faiss-cpu, which autofaiss asks for, fill the same folder.

    Args:
        gpu_build: the live build knows GPUs.
        gpus: GPUs that it sees.
        installed: which of the two packages the installer has on record.
        cuda: torch sees a GPU.
    """
    if gpu_build:
        note = "; faiss-cpu is on record too, which does no harm" if "faiss-cpu" in installed else ""
        found = f"GPU build is live, {gpus} GPU{'s' * (gpus != 1)} seen{note}"
        if cuda and not gpus:
            return Finding(
                "faiss", f"{found}, though torch sees one", "update the NVIDIA driver or use --index-device cpu"
            )
        return Finding("faiss", found)
    if "faiss-gpu" in installed:
        found = "CPU build is live: faiss-cpu, which autofaiss asks for, was written over faiss-gpu"
        return Finding("faiss", found, "pip install --force-reinstall --no-deps faiss-gpu")
    if cuda:
        return Finding("faiss", "CPU build is live, though there is a GPU", "pip install --no-deps faiss-gpu")
    return Finding("faiss", "CPU build is live")


def _device_findings() -> Iterator[Finding]:
    from clipcap_rag.hardware import bfloat16_instructions, free_memory, pick_device, pick_dtype

    torch = importlib.import_module("torch")
    device = pick_device()
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        yield Finding("device", f"{device} of {torch.cuda.device_count()}: {name}")
        reason = "the GPU computes in it" if dtype == "bfloat16" else "the GPU has no bfloat16"
    else:
        yield Finding("device", "cpu: torch sees no GPU")
        reason = f"the processor has {bfloat16_instructions() or 'no fast instructions for bfloat16'}"
    yield Finding("dtype", f"{dtype}: {reason}")
    yield Finding("memory", f"{free_memory() / 2**30:.1f} GB free")
    yield Finding("threads", f"{torch.get_num_threads()} by torch, {os.cpu_count()} processors")


def index_findings() -> Iterator[Finding]:
    """The caption indexes that can be named without a path, each opened and checked."""
    given = os.environ.get(_INDEX_VARIABLE)
    if given and not os.path.isdir(os.path.expanduser(given)):
        yield Finding(_INDEX_VARIABLE, f"{given} is not a folder", f"create it, or unset {_INDEX_VARIABLE}")
    manifests = [file for home in index_homes() for file in sorted(home.glob(f"*/{MANIFEST}"))]
    paths = {file.parent.resolve(): file.parent for file in manifests}
    for path in paths.values():
        try:
            files = open_files(path)
        except InputError as error:
            yield Finding("index", f"{path} cannot be opened", str(error))
        else:
            yield Finding("index", f"{path}: {files.rows} captions by {files.manifest['encoder']['clip']}")
    if not paths:
        yield Finding("index", "none found by name; `clipcap-rag index build --out index/NAME` makes one")

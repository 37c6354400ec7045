"""The law of layers: who may import whom, and which heavy package is whose."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clipcap_rag"
LAYERS = {
    "__init__": 0,
    "errors": 0.1,
    "caption_template": 0.2,
    "progress": 0.2,
    "artifact": 0.3,
    "config": 0.3,
    "presets": 0.4,
    "shipped": 0.4,
    "safe_pickle": 0.5,
    "hub": 0.4,
    "hardware": 0.5,
    "output": 0.5,
    "lines": 0.5,
    "journal": 0.5,
    "downloads": 0.5,
    "encoder_record": 0.6,
    "images": 0.6,
    "json_documents": 0.7,
    "packed": 0.7,
    "text_tower": 0.6,
    "embeddings": 0.2,
    "image_loader": 0.8,
    "image_tower": 0.9,
    "clip_models": 0.9,
    "caption_formats": 0.8,
    "sources": 1,
    "photo_sources": 1.1,
    "gather": 1.2,
    "index_lock": 0.5,
    "index_segment": 0.5,
    "index_manifest": 0.6,
    "image_table": 0.5,
    "index_store": 1,
    "index_names": 1.1,
    "index_filter": 1.1,
    "deny_list": 1.1,
    "exact_search": 1.6,
    "image_route": 1.7,
    "index_commit": 1.2,
    "parquet_tables": 1.1,
    "foreign_indexes": 1.2,
    "ngrams": 1.2,
    "index_export": 1.5,
    "encoder": 1,
    "mapper": 1,
    "ptb_tokens": 0.2,
    "bootstrap": 0.2,
    "metrics": 1,
    "java_metrics": 1.1,
    "diversity": 1.2,
    "judging": 0.4,
    "predictions": 1.3,
    "clip_score": 3.5,
    "scored_files": 3.7,
    "score_table": 1,
    "hallucination": 1.2,
    "scoring": 1.5,
    "loss_plot": 1,
    "flat_search": 1.2,
    "search_structure": 1.6,
    "structure_reader": 1.5,
    "caption_index": 2,
    "features": 2,
    "model": 2,
    "flags": 2,
    "splits": 3,
    "index_check": 2.1,
    "optimizer": 3,
    "segment_encoding": 1.7,
    "index_entries": 1.8,
    "index_builder": 3,
    "clipcap_features": 3,
    "clipcap_pickle": 3,
    "index_editor": 3.1,
    "index_images": 3.2,
    "index_lint": 3.2,
    "index_import": 3.5,
    "tagging": 3.5,
    "caption_votes": 0.2,
    "vote_sums": 0.3,
    "neighbors": 2.5,
    "index_ngrams": 2.2,
    "retrievable": 2.2,
    "photo_votes": 2.3,
    "retriever": 3,
    "photo_neighbors": 3.1,
    "generation": 3,
    "rerank": 3.5,
    "checkpoint": 3,
    "clipcap_state": 1,
    "clipcap_weights": 3.2,
    "ngram_agreement": 0.4,
    "caption_photos": 2.5,
    "self_critical": 3.6,
    "stages": 3.8,
    "starting_model": 3.3,
    "objectives": 3.9,
    "batches": 3.5,
    "run_directory": 3.5,
    "validation": 3.7,
    "weight_average": 0.5,
    "training": 4,
    "prompt": 2.5,
    "token_bonus": 2.4,
    "word_bonus": 2.5,
    "past": 2.6,
    "beam": 2.7,
    "retrieved_text": 3.2,
    "prefix_words": 3,
    "caption_inputs": 3,
    "ranker": 4,
    "index_choice": 4,
    "evidence": 3.8,
    "abstention": 3.8,
    "risk_coverage": 1,
    "caption_result": 4,
    "writer": 4.5,
    "captioner": 5,
    "publication": 5,
    "many_devices": 6,
    "calibration": 6,
    "evaluated": 6,
    "neighbor_conditions": 5.5,
    "prediction_files": 6.1,
    "baselines": 6.2,
    "robustness": 6.2,
    "leak_audit": 6.2,
    "decoding_study": 6.2,
    "evaluation_studies": 6.4,
    "evaluation_table": 6,
    "evaluation": 6.5,
    "report_tables": 6,
    "report_page": 1,
    "report_gallery": 6.3,
    "report": 6.5,
    "sweep": 6.7,
    "doctor": 6,
    "bench_protocol": 5,
    "bench_report": 5.1,
    "bench_subjects": 5,
    "bench_encoding": 5.5,
    "bench_writing": 5.5,
    "bench_searching": 5.5,
    "bench_learning": 5.5,
    "bench_whole": 6,
    "bench": 6.5,
    "convert_commands": 7,
    "calibrate_commands": 7,
    "feature_commands": 7,
    "caption_commands": 7,
    "index_commands": 7,
    "training_commands": 7,
    "hub_commands": 7,
    "prepare_commands": 7,
    "index_edit_commands": 7,
    "index_transfer_commands": 7,
    "tag_commands": 7,
    "evaluate_commands": 7,
    "commands": 7.5,
    "cli": 8,
    "__main__": 9,
}
OWNERS = {
    "open_clip": {"clip_models"},
    "faiss": {"bench_searching", "exact_search", "flat_search", "search_structure", "structure_reader"},
    "autofaiss": {"search_structure"},
}
LIGHT = {
    "config": {"torch", "faiss", "numpy", "pyarrow", "transformers"},
    "images": {"torch", "faiss"},
    "sources": {"torch", "faiss"},
    "index_store": {"torch", "faiss"},
    "index_commit": {"torch", "faiss"},
    "index_filter": {"torch", "faiss"},
    "index_export": {"torch", "faiss"},
    "foreign_indexes": {"torch", "faiss"},
    "ngrams": {"torch", "faiss"},
}
MODULES = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.glob("*.py"))}


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported, inside functions too; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inside = node.module == "clipcap_rag"
            found |= {f"{node.module}.{alias.name}" if inside else node.module for alias in node.names}
    return found


def own_imports(tree: ast.AST) -> set[str]:
    """Names of our modules that a module imports."""
    parts = [name.split(".") for name in imports_of(tree)]
    return {
        name[1] if len(name) > 1 and name[1] in MODULES else "__init__" for name in parts if name[0] == "clipcap_rag"
    }


def reached(module: str) -> set[str]:
    """A module and all of ours that importing it may load."""
    known, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in known:
            known.add(name)
            waiting += own_imports(MODULES[name])
    return known


def test_every_module_has_a_layer():
    assert set(MODULES) == set(LAYERS)


def test_package_is_flat():
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_from_lower_layers(module):
    too_high = {other for other in own_imports(MODULES[module]) if LAYERS[other] >= LAYERS[module]}
    assert not too_high, f"{module} (layer {LAYERS[module]}) imports {too_high}"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_heavy_packages_have_one_owner(package):
    importers = {
        module for module, tree in MODULES.items() if any(name.split(".")[0] == package for name in imports_of(tree))
    }
    assert importers == OWNERS[package]


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_stay_light(module):
    tops = {name.split(".")[0] for other in reached(module) for name in imports_of(MODULES[other])}
    assert not tops & LIGHT[module]


def test_modules_open_with_one_sentence():
    opening = {module: (ast.get_docstring(tree) or "").split("\n\n")[0] for module, tree in MODULES.items()}
    assert not [module for module, text in opening.items() if not text.endswith(".") or ". " in text]

"""The comparison of the whole job: a folder of photos to captions, against its stages run one after the other."""

from collections.abc import Iterator

import torch

from clipcap_rag.bench_protocol import Comparison, Disagreement
from clipcap_rag.bench_searching import write_index
from clipcap_rag.bench_subjects import Subjects
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.captioner import Captioner
from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import GenerationConfig, ModelConfig
from clipcap_rag.hardware import pick_dtype

_K, _BATCH = 8, 64


def comparisons(subjects: Subjects) -> Iterator[Comparison]:
    """Greedy, and sampled and reranked."""
    captioner, index = _captioner(subjects)
    for decoding, candidates in (("greedy", 1), ("sample", 16)):
        generation = GenerationConfig(decoding=decoding, candidates=candidates, max_new_tokens=subjects.sizes.tokens)
        yield _job(f"folder to captions, {decoding}", subjects, captioner, index, generation)


def _captioner(subjects: Subjects) -> tuple[Captioner, CaptionIndex]:
    dtype = pick_dtype("auto", subjects.device)
    encoder = subjects.float32 if dtype is torch.float32 else subjects.encoder(dtype)
    model = subjects.caption_model(torch.float32, mapper="retrieval")
    config = ModelConfig(mapper="retrieval", clip_dim=encoder.dim, lm_dim=model.language_model.config.n_embd)
    record = encoder.record()
    checkpoint = Checkpoint(model, subjects.tokenizer, config, record, "random weights", num_neighbors=_K)
    captioner = Captioner(checkpoint, device=str(subjects.device))
    captioner.__dict__["encoder"] = encoder
    folder = subjects.folder / "neighbors"
    seeds = encoder.encode_text(subjects.captions(subjects.sizes.captions)).vectors
    write_index(folder, seeds, 10_000, record)
    return captioner, CaptionIndex.open(folder, "cpu")


def _job(
    name: str, subjects: Subjects, captioner: Captioner, index: CaptionIndex, generation: GenerationConfig
) -> Comparison:
    files = subjects.photos
    retriever, _ = captioner.retriever(index, _K)

    def whole() -> list[str | None]:
        return [result.caption for result in captioner.stream(files, index=index, generation=generation, workers=1)]

    def stages() -> list[str | None]:
        encoded = captioner.encoder.encode_image(files, _BATCH, workers=1)
        captions: list[str | None] = []
        neighbors = retriever.search(encoded.embeddings.vectors, _K)
        written = captioner.write(encoded.embeddings, neighbors, encoded.digests, generation)
        captions += [candidates[0].caption for candidates in written]
        return captions

    def agree() -> str:
        one, other = whole(), stages()
        equal = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
        if equal < 0.9:
            raise Disagreement(f"only {100 * equal:.0f} percent of the captions are equal")
        return f"{100 * equal:.0f} percent of {len(one)} captions equal"

    size = f"{len(files)} photos, K = {_K}, {generation.candidates} candidates"
    return Comparison(
        name, size, "clipcap-rag caption", "encode all, then search all, then write all", 1 / 1.05, whole, stages, agree
    )

"""Mappers: retrieval off is K = 0, neighbours are a set, and the published parameter counts."""

import pytest
import torch

from clipcap_rag.mapper import LinearMapper, MLPMapper, RetrievalMapper, TransformerMapper

B, D, E, P, C, K = 3, 12, 16, 5, 4, 6


@pytest.fixture
def mapper():
    torch.manual_seed(0)
    mapper = RetrievalMapper(D, E, P, C, layers=2, heads=4).eval()
    mapper.set_statistics(torch.randn(50, D), torch.rand(50))
    return mapper


def neighbors():
    torch.manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(B, K, D), dim=-1)
    return embeddings, torch.rand(B, K), torch.tensor([[True] * K, [True, True] + [False] * 4, [False] * K])


def test_without_neighbors_it_is_the_transformer_mapper(mapper):
    plain = TransformerMapper(D, E, P, C, layers=2, heads=4).eval()
    plain.load_state_dict(mapper.state_dict(), strict=False)
    image = torch.randn(B, D)
    embeddings, scores, mask = neighbors()
    expected = plain(image)
    assert torch.equal(mapper(image), expected)
    assert torch.equal(mapper(image, embeddings[:, :0], scores[:, :0], mask[:, :0]), expected)


def test_all_false_mask_equals_no_neighbors(mapper):
    image = torch.randn(B, D)
    embeddings, scores, mask = neighbors()
    torch.testing.assert_close(
        mapper(image, embeddings, scores, torch.zeros_like(mask)), mapper(image), atol=1e-6, rtol=0
    )


def test_an_absent_neighbor_leaves_no_trace_even_if_it_is_not_a_number(mapper):
    image = torch.randn(B, D)
    embeddings, scores, mask = neighbors()
    spoiled = embeddings.masked_fill(~mask[..., None], float("nan"))
    torch.testing.assert_close(mapper(image, spoiled, scores, mask), mapper(image, embeddings, scores, mask))


def test_mixed_mask_equals_each_image_alone(mapper):
    image = torch.randn(B, D)
    embeddings, scores, mask = neighbors()
    together = mapper(image, embeddings, scores, mask)
    for row in range(B):
        present = mask[row].sum()
        alone = mapper(
            image[row : row + 1],
            embeddings[row : row + 1, :present],
            scores[row : row + 1, :present],
            mask[row : row + 1, :present],
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_order_of_neighbors_does_not_matter_but_they_do(mapper):
    image = torch.randn(B, D)
    embeddings, scores, mask = neighbors()
    prefix = mapper(image, embeddings, scores, mask)
    order = torch.randperm(K)
    shuffled = mapper(image, embeddings[:, order], scores[:, order], mask[:, order])
    torch.testing.assert_close(shuffled, prefix, atol=1e-5, rtol=0)
    assert (mapper(image)[0] - prefix[0]).abs().max() > 1e-3
    assert (mapper(image, embeddings, scores + 1, mask)[0] - prefix[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: MLPMapper(512, 768, 10), 31_468_800),
        (lambda: TransformerMapper(640, 768, 40, 40, layers=8, heads=8), 57_520_128),
        (lambda: TransformerMapper(640, 768, 10, 10, layers=8, heads=8), 42_728_448),
        (lambda: TransformerMapper(512, 768, 10, 10, layers=8, heads=8), 41_745_408),
    ],
)
def test_parameter_counts_are_the_published_ones(make, expected):
    with torch.device("meta"):
        mapper = make()
    assert sum(parameter.numel() for parameter in mapper.parameters()) == expected


@pytest.mark.parametrize("kind", [MLPMapper, LinearMapper])
def test_prefix_shape(kind):
    assert kind(D, E, P)(torch.randn(B, D)).shape == (B, P, E)

import torch

from src.ranking import best_rows, rank_of_best, similarities


def test_similarities_are_dot_products_and_equal_rows_are_equal():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(203, 37, generator=generator)
    queries = torch.randn(3, 37, generator=generator)
    gallery[[17, 101, 202]] = gallery[0].clone()
    result = similarities(queries, gallery)
    torch.testing.assert_close(result, queries @ gallery.T)
    assert (result[:, [17, 101, 202]] == result[:, :1]).all()
    # The rows need not be adjacent in memory.
    torch.testing.assert_close(similarities(queries[:, 5:], gallery[:, 5:]),
                               queries[:, 5:] @ gallery[:, 5:].T)


def test_the_best_rows_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for number in (1, 5, 300):
        scores = torch.randint(0, 20, (number,), generator=generator) / 7  # many are equal
        order = scores.argsort(descending=True, stable=True).tolist()
        for count in range(number + 3):
            assert best_rows(scores, count) == order[:count]
        for rows in ([0], [number - 1], list(range(0, number, 3)), list(range(number))[::-1]):
            expected = min(order.index(row) for row in rows) + 1
            assert rank_of_best(scores, rows) == expected

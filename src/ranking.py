"""The best of many photos or captions for a query, in little more time than it takes to read their
embeddings once."""
import numpy as np
import torch


def similarities(queries, gallery):
    """The dot products (Q, N) of a few queries (Q, D) with a gallery (N, D), float32 on the CPU.

    For one query this takes a third of the time of a matrix product. Equal rows of the gallery get
    equal results, whatever their positions."""
    gallery = gallery.numpy()
    rows = [np.vecdot(gallery, query) for query in queries.numpy()]
    return torch.from_numpy(np.stack(rows))


def best_rows(scores, count):
    """The rows of the `count` highest scores (N,), the best first, as a list. Of equal scores, the
    first row comes first."""
    if 0 < count < len(scores):
        lowest = scores.topk(count).values[-1]
        rows = (scores >= lowest).nonzero().flatten()  # more than `count` if there are ties
    else:
        rows = torch.arange(len(scores))
    order = scores[rows].argsort(descending=True, stable=True)
    return rows[order][:count].tolist()


def rank_of_best(scores, rows):
    """The rank, from 1, of the best of these rows in the order of `best_rows`."""
    rows = torch.tensor(rows)
    best = scores[rows].max()
    first = rows[scores[rows] == best].min()
    return 1 + int((scores > best).sum() + (scores[:first] == best).sum())

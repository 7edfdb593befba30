"""A student's shortlist put in order by a teacher, and what each teacher call buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.retrieval.search import Vectors, check_embeddings, normalize, topk


def rerank(shortlist: Sequence[int] | NDArray[np.int64], query: Vectors, items: Vectors) -> list[tuple[int, float]]:
    """The shortlist in the teacher's order: (id, cosine), best first, equal cosines by the smaller id.

    Args:
        shortlist: (S,) different ids.
        query: (D,) the teacher's vector of the query.
        items: (S, D) the teacher's vectors of the shortlist, in its order.

    Raises:
        UserError: bad embeddings, numbers that do not match, or an id twice.
    """
    asked = normalize(check_embeddings(query.reshape(1, -1), "query")).numpy()[0]
    vectors = normalize(check_embeddings(items, "shortlisted items", len(asked))).numpy()
    ids = np.asarray(shortlist, np.int64)
    if len(ids) != len(vectors) or len(np.unique(ids)) < len(ids):
        raise UserError(
            f"A shortlist of {len(ids)} ids, {len(np.unique(ids))} of them different, and {len(vectors)} vectors; "
            "give each id once, with one vector."
        )
    # Row by row in float64: a product of another shape could part equal vectors in the last bit.
    scores = (vectors.astype(np.float64) * asked.astype(np.float64)).sum(1)
    order = np.lexsort((ids, -scores))
    return list(zip(ids[order].tolist(), scores[order].tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class RerankFigures:
    """Quality of one way to search, means over queries.

    Attributes:
        calls: images the teacher encodes per query; 0 is the student alone, the gallery's size the teacher alone.
        hit: fraction of queries with a positive among the first k, by k.
        recall: fraction of the teacher's own first k that are among the first k, by k.
    """

    calls: int
    hit: dict[int, float]
    recall: dict[int, float]


def recall_by_calls(
    student: tuple[Vectors, Vectors],
    teacher: tuple[Vectors, Vectors],
    positives: Sequence[Sequence[int]],
    calls: Sequence[int],
    ks: Sequence[int] = (1, 10),
) -> list[RerankFigures]:
    """The student alone, its shortlists of each length re-ranked by the teacher, and the teacher alone.

    Only the shortlist is put in order: where it is shorter than k, the first k hold the shortlist.

    Args:
        student: its queries (Q, D) and gallery (G, D).
        teacher: its queries (Q, E) and gallery (G, E), the same items in the same order.
        positives: per query the ids of what it asks for.
        calls: lengths of shortlists, each 1 to G.
        ks: cut-offs; one beyond the gallery takes the whole gallery.

    Raises:
        UserError: bad embeddings, sizes that do not match, a length or a cut-off outside its range.
    """
    sizes = {(len(queries), len(gallery)) for queries, gallery in (student, teacher)}
    count, size = len(positives), len(student[1])
    if sizes != {(count, size)}:
        raise UserError(
            f"Student and teacher give (queries, items) of sizes {sorted(sizes)} and {count} have positives."
        )
    if any(not 1 <= n <= size for n in calls) or any(k < 1 for k in ks):
        raise UserError(f"Shortlists {tuple(calls)} and cut-offs {tuple(ks)}: 1 or more, shortlists at most {size}.")
    if not calls or not ks or not all(own and min(own) >= 0 and max(own) < size for own in positives):
        raise UserError(
            f"Shortlists {tuple(calls)}, cut-offs {tuple(ks)}: one or more of both, and a positive or more per query "
            f"among the items 0 to {size - 1}."
        )
    deepest = min(size, max([*calls, *ks]))
    short = topk(*student, deepest)[1].numpy()
    wanted = topk(*teacher, min(size, max(ks)))[1].numpy()
    queries, gallery = (normalize(check_embeddings(side, "teacher embeddings")) for side in teacher)
    rows = [_figures(0, short, wanted, positives, ks)]
    for n in sorted(set(calls)):
        found = [[number for number, _ in rerank(ids, queries[i], gallery[ids])] for i, ids in enumerate(short[:, :n])]
        rows.append(_figures(n, np.array(found), wanted, positives, ks))
    return [*rows, _figures(size, wanted, wanted, positives, ks)]


def _figures(
    calls: int,
    found: NDArray[np.int64],
    wanted: NDArray[np.int64],
    positives: Sequence[Sequence[int]],
    ks: Sequence[int],
) -> RerankFigures:
    hit, recall = {}, {}
    for k in ks:
        first, best = found[:, :k].tolist(), wanted[:, :k].tolist()
        hit[k] = float(np.mean([bool({*f} & {*p}) for f, p in zip(first, positives, strict=True)]))
        recall[k] = float(np.mean([len({*f} & {*b}) / len(b) for f, b in zip(first, best, strict=True)]))
    return RerankFigures(calls=calls, hit=hit, recall=recall)

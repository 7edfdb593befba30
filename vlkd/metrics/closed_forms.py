"""What a random order scores, exactly."""

from __future__ import annotations

import math

from vlkd.errors import UserError
from vlkd.metrics.checks import at_least_one


def random_hit_at_k(positives: int, gallery: int, k: int) -> float:
    """Expected hit@k of a random order: 1 - C(G - P, k) / C(G, k), hypergeometric.

    Args:
        positives: P, the query's positives in the gallery.
        gallery: G, the number of items.
        k: cut-off; beyond the gallery it takes the whole gallery.

    Raises:
        UserError: P outside 1 to G, or k below 1.
    """
    if not 1 <= positives <= gallery:
        raise UserError(f"{positives} positives in a gallery of {gallery}; expected from 1 to {gallery}.")
    if gallery - positives < at_least_one(k, "k"):
        return 1.0
    # The two numbers may be exchanged; sums of logarithms keep the digits of a small chance.
    few, many = sorted((positives, k))
    return -math.expm1(math.fsum(math.log1p(-many / (gallery - i)) for i in range(few)))

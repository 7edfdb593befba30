"""Active learning: which images of a pool a person should label next, from what a model says of them.

numpy only; N images, C classes, F features. Every choice is a list of row numbers in the order of choice, best first,
so that a person who labels only its beginning has still followed the strategy.
"""

from vlkd.active.k_centre import k_centre
from vlkd.active.pool_file import PoolFile, read_pool, write_pool
from vlkd.active.uncertainty import entropy, margin, most_uncertain, random_choice

__all__ = [
    "PoolFile",
    "entropy",
    "k_centre",
    "margin",
    "most_uncertain",
    "random_choice",
    "read_pool",
    "write_pool",
]

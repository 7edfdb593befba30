"""Changes between two encodings of the same items, against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.batch_sizes import largest_difference, prediction_changes, rank_changes


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def drawn(images=40, captions=3, noise=0.1, seed=0):
    """Two encodings (images, captions) that differ by noise, and the owner of each caption, in no order."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    image = rng.normal(size=(images, 8))
    text = image[owner] + rng.normal(size=(len(owner), 8))
    before = image, text
    after = tuple(3 * (table + noise * rng.normal(size=table.shape)) for table in before)
    return before, after, owner


def as_tensors(pair):
    return tuple(torch.from_numpy(table).float() for table in pair)


def best(scores, mine):
    """For each row the best score of its own, and which of the others lie above it."""
    own = np.where(mine, scores, -np.inf).max(axis=1)
    return own, ~mine & (scores > own[:, None])


def test_rank_changes_are_those_of_brute_force():
    before, after, owner = drawn()
    wanted = {}
    scores = [unit(image) @ unit(text).T for image, text in (before, after)]
    own = owner == np.arange(40)[:, None]
    for direction, tables, mine in (
        ("image_to_text", scores, own), ("text_to_image", [table.T for table in scores], own.T),
    ):  # fmt: skip
        (score, above), (_, above_after) = (best(table, mine) for table in tables)
        for query in np.flatnonzero(above.sum(1) != above_after.sum(1)):
            passed = above[query] ^ above_after[query]
            gap = np.abs(tables[0][query] - score[query])[passed].max()
            wanted[direction, query] = (1 + above[query].sum(), 1 + above_after[query].sum(), gap)
    found = rank_changes(as_tensors(before), as_tensors(after), owner)
    assert {(one.direction, one.query): (one.before, one.after) for one in found} == {
        key: value[:2] for key, value in wanted.items()
    }
    assert len(found) == len(wanted) > 20
    assert {one.direction for one in found} == {"image_to_text", "text_to_image"}
    np.testing.assert_allclose([one.gap for one in found], [value[2] for value in wanted.values()], atol=1e-6)


def test_prediction_changes_are_those_of_brute_force():
    before, after, _ = drawn(images=300, captions=1, noise=0.3)
    classes = np.random.default_rng(1).normal(size=(9, 8))
    scores, later = (unit(image) @ unit(classes).T for image in (before[0], after[0]))
    was, now = scores.argmax(1), later.argmax(1)
    rows = np.flatnonzero(was != now)
    found = prediction_changes(as_tensors((before[0], classes)), as_tensors((after[0], classes)))
    assert [(one.image, one.before, one.after) for one in found] == list(
        zip(rows.tolist(), was[rows].tolist(), now[rows].tolist(), strict=True)
    )
    assert len(found) > 10
    np.testing.assert_allclose([one.gap for one in found], scores[rows, was[rows]] - scores[rows, now[rows]], atol=1e-6)


def test_more_changes_than_are_looked_at_at_once(monkeypatch):
    before, after, owner = drawn()
    whole = rank_changes(as_tensors(before), as_tensors(after), owner)
    monkeypatch.setattr("vlkd.protocols.batch_sizes._QUERIES_AT_ONCE", 3)
    assert rank_changes(as_tensors(before), as_tensors(after), owner) == whole


def test_nothing_changes_by_length_alone():
    before, _, owner = drawn()
    longer = tuple(table * np.arange(1, len(table) + 1)[:, None] for table in before)
    assert rank_changes(as_tensors(before), as_tensors(longer), owner) == ()
    assert largest_difference(before[0], longer[0], "images") <= 1e-7


def test_the_largest_difference_is_of_unit_vectors():
    before, after, _ = drawn()
    wanted = np.abs(unit(before[0]) - unit(after[0])).max()
    assert largest_difference(before[0], after[0], "images") == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(UserError, match="images: 40 vectors before and 39 after"):
        largest_difference(before[0], after[0][:39], "images")
    with pytest.raises(UserError, match="images: row 3 holds NaN"):
        largest_difference(before[0], np.where(np.arange(40)[:, None] == 3, np.nan, after[0]), "images")

"""Terms say what they read; wrong ones are refused when they are written, not when they run."""

from __future__ import annotations

import pytest

from vlkd.distill.term import Term, wanted
from vlkd.errors import UserError
from vlkd.objectives import embedding_mse, info_nce, relational_kl

TERMS = (
    Term(name="c", objective=info_nce, features=("student.image.embed", "student.text.embed", "student.logit_scale")),
    Term(name="m", objective=embedding_mse, features=("projected.image.embed", "teacher.image.embed"), teacher="a"),
    Term(name="p", objective=embedding_mse, features=("student.image.pooled", "teacher.image.pooled"), teacher="b"),
    Term(
        name="r",
        objective=relational_kl,
        features=(
            "student.image.embed",
            "student.text.embed",
            "teacher.image.embed",
            "teacher.text.embed",
            "student.logit_scale",
            "teacher.logit_scale",
        ),
        teacher="b",
    ),
)


def test_what_each_source_must_give():
    assert wanted(TERMS, "student") == {"image.embed", "text.embed", "image.pooled", "logit_scale"}
    assert wanted(TERMS, "teacher", "a") == {"image.embed"}
    assert wanted(TERMS, "teacher", "b") == {"image.pooled", "image.embed", "text.embed", "logit_scale"}
    assert wanted(TERMS, "teacher", "c") == set()


def test_who_needs_captions_and_who_projects():
    assert [term.needs_caption for term in TERMS] == [True, False, False, True]
    assert [term.projects for term in TERMS] == [False, True, False, False]


@pytest.mark.parametrize(
    ("features", "teacher", "message"),
    [
        (("image.embed",), "", "must begin with one of student, projected, teacher"),
        (("pupil.image.embed",), "", "must begin with"),
        (("teacher.image.embed",), "", "names no teacher"),
        (("projected.image.embed",), "", "names no teacher"),
        (("projected.image.pooled",), "a", "exist for image.embed"),
    ],
)
def test_wrong_terms_are_refused(features, teacher, message):
    with pytest.raises(UserError, match=f"Term 'x'.*{message}"):
        Term(name="x", objective=embedding_mse, features=features, teacher=teacher)

"""Assignments change exactly the named setting; wrong ones are refused in a sentence that helps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from vlkd.config import differences, override, parse, to_json
from vlkd.engine.settings import Run
from vlkd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    maybe: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    seed: int = 0
    name: str = "x"
    on: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    paths: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=7", Outer(seed=7)),
        ("name=a=b", Outer(name="a=b")),
        ("name=", Outer(name="")),
        ("on=True", Outer(on=True)),
        ("pair=0.25,2", Outer(pair=(0.25, 2.0))),
        ("pair=(0.25, 2)", Outer(pair=(0.25, 2.0))),
        ("paths=p", Outer(paths=("p",))),
        ("paths=[p, q#val]", Outer(paths=("p", "q#val"))),
        ("paths=d/0[0-9]", Outer(paths=("d/0[0-9]",))),
        ("paths=", Outer()),
        ("inner.rate=1e-3", Outer(inner=Inner(rate=0.001))),
        ("inner.kind=b", Outer(inner=Inner(kind="b"))),
        ("inner.maybe=2", Outer(inner=Inner(maybe=2.0))),
    ],
)
def test_one_assignment_changes_one_setting(assignment, expected):
    found = override(Outer(), [assignment])
    assert found == expected
    assert json.dumps(to_json(found)) == json.dumps(to_json(expected))


def test_later_assignments_win_and_the_original_stays():
    original = Outer()
    found = override(original, ["seed=1", "inner.rate=2", "seed=3", "inner.maybe=4", "inner.maybe=none"])
    assert found == Outer(seed=3, inner=Inner(rate=2.0))
    assert original == Outer()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "expected key=value"),
        ("sead=1", "No setting is called 'sead'.*Did you mean 'seed'"),
        ("inner.rat=1", "No setting is called 'inner.rat'; here are rate, kind, maybe.*'rate'"),
        ("inner=1", "is a section; set one of inner.rate"),
        ("seed.deep=1", "goes too deep"),
        ("seed=1.5", "seed=1.5: expected a whole number"),
        ("seed=", "expected a whole number"),
        ("inner.rate=fast", "expected a number"),
        ("inner.rate=nan", "expected a number"),
        ("inner.rate=inf", "expected a number"),
        ("on=1", "expected true or false"),
        ("pair=1", "expected 2 values"),
        ("pair=1,b", "pair=b: expected a number"),
        ("inner.kind=c", "expected one of a, b"),
    ],
)
def test_wrong_assignments_are_refused(assignment, message):
    with pytest.raises(UserError, match=message):
        override(Outer(), [assignment])


def test_optional_values_take_none_only_where_allowed():
    assert parse("none", float | None, "k") is None
    assert parse("3", int | None, "k") == 3
    with pytest.raises(UserError):
        parse("none", float, "k")


def test_every_setting_of_a_run_survives_json_and_can_be_assigned_from_its_own_text():
    config = Run()
    plain = to_json(config)
    assert differences(json.loads(json.dumps(plain, allow_nan=False)), plain) == []

    def assignments(part: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for key, value in part.items():
            if isinstance(value, dict):
                found += assignments(value, f"{prefix}{key}.")
            else:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                found.append(f"{prefix}{key}={text}")
        return found

    texts = assignments(plain)
    assert len(texts) > 40
    assert override(config, texts) == config


def test_differences_name_what_changed():
    changed = override(Outer(), ["seed=1", "inner.rate=2", "paths=p"])
    expected = ["inner.rate: 0.5 -> 2.0", "paths: [] -> ['p']", "seed: 0 -> 1"]
    assert differences(to_json(Outer()), to_json(changed)) == expected
    older = to_json(Outer())
    del older["on"]
    assert differences(older, to_json(Outer())) == ["on: None -> False"]


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().seed = 1

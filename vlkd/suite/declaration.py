"""What a suite is: a TOML file that names data sets, says where each is expected, and which figures are averaged."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlkd.data.eval_types import KINDS, Kind
from vlkd.errors import UserError
from vlkd.recipes import folder

DEFAULT_PATHS = ("wds_{cleaned}", "{cleaned}", "{name}")
"""The names of CLIP_benchmark's hub first, then its own folders; `{cleaned}` is the name with "-" for "/"."""
PROTOCOLS = ("zero_shot", "classifier", "retrieval", "multilabel", "selection", "linear_probe", "knn")


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """A data set of a suite.

    Attributes:
        name: as users know it, such as `vtab/caltech101`.
        paths: where it may lie below the data root; the first that exists is taken.
        split: what is measured, as the data call it.
        train: the split that linear probe and k-NN learn from; "" for none.
        kind: what it must be; None for whatever it turns out to be.
        protocols: what is run; () for the usual ones of its kind (see `protocols_for`).
        main_metric: the figure that counts; "" for the protocol's own.
        random_score: what guessing gives in it; None where the declaration does not say.
        images: in `split`; None where the declaration does not say.
        bytes: of the whole download; None where the declaration does not say.
        templates: prompts in place of those that come with the data; () for those.
        classnames: class names in place of those that come with the data; () for those.
        prompts_file: below the data root, whole prompts by class name as JSON; "" for none.
        tags: by which aggregates choose.
        folds: equal parts over which retrieval is measured one by one as well, 0 for none.
    """

    name: str
    paths: tuple[str, ...] = ()
    split: str = "test"
    train: str = ""
    kind: Kind | None = None
    protocols: tuple[str, ...] = ()
    main_metric: str = ""
    random_score: float | None = None
    images: int | None = None
    bytes: int | None = None
    templates: tuple[str, ...] = ()
    classnames: tuple[str, ...] = ()
    prompts_file: str = ""
    tags: tuple[str, ...] = ()
    folds: int = 0

    def protocols_for(self, kind: Kind) -> tuple[str, ...]:
        """What is run once the kind is known: as declared, or the usual ones."""
        if self.protocols:
            return self.protocols
        if kind == "classification":
            return ("zero_shot", "linear_probe", "knn") if self.train else ("zero_shot",)
        return (kind,)


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """A plain mean of main metrics; `names` are those of its data sets, in the order of the suite."""

    name: str
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many data sets it needs."""
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Data sets and what is averaged over them."""

    name: str
    title: str
    entries: tuple[DataEntry, ...]
    aggregates: tuple[Aggregate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """An aggregate as the file has it: chosen by names or by any of some tags, by neither for all; `count` must fit."""

    name: str
    count: int
    names: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _File:
    """The top level of a suite's file."""

    title: str
    include: tuple[str, ...] = ()
    paths: tuple[str, ...] = DEFAULT_PATHS
    data: tuple[DataEntry, ...] = ()
    aggregate: tuple[_Sum, ...] = ()


def suite_names() -> list[str]:
    """The suites that come with vlkd, as the user types them: `vtab+` is `vtab_plus.toml`."""
    return sorted(_shown(path.stem) for path in (folder("eval") / "suites").glob("*.toml"))


def load_suite(ref: str) -> Suite:
    """Read a suite, by name or from the user's own file.

    Args:
        ref: one of `suite_names`, or the path of a `.toml` file.

    Raises:
        UserError: there is none; it is no TOML; a key is unknown, missing or of another type; a name stands twice; a
            path leaves the data root; an aggregate does not have the declared count.
    """
    path = _find(ref)
    content = _read(path)
    entries = tuple(_entries(path, content, ()))
    if not entries:
        raise UserError(f"{path.name}: the suite has no data set; add a [[data]] table or `include` another suite.")
    _refuse_twice(path, "data", [entry.name for entry in entries])
    _refuse_twice(path, "aggregate", [one.name for one in content.aggregate])
    aggregates = tuple(_aggregate(path, one, entries) for one in content.aggregate)
    return Suite(name=_shown(path.stem), title=content.title, entries=entries, aggregates=aggregates)


def _shown(stem: str) -> str:
    return f"{stem.removesuffix('_plus')}+" if stem.endswith("_plus") else stem


def _find(ref: str) -> Path:
    if ref.endswith(".toml"):
        if Path(ref).is_file():
            return Path(ref)
        raise UserError(f"There is no suite file {ref}; check the path, or name one of {', '.join(suite_names())}.")
    stem = ref.replace("+", "_plus")
    if _shown(stem) not in suite_names():
        close = difflib.get_close_matches(ref, suite_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"No suite is called {ref!r}; there are {', '.join(suite_names())}, or give a .toml file.{hint}"
        )
    return folder("eval") / "suites" / f"{stem}.toml"


def _read(path: Path) -> _File:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except ValueError as error:
        raise UserError(f"{path.name} is not TOML ({error}); mend that line.") from None
    read: _File = _record(table, _File, f"{path.name}: ")
    return read


def _entries(path: Path, content: _File, above: tuple[Path, ...]) -> Iterator[DataEntry]:
    """Those of the included suites, then the file's own."""
    if path.resolve() in above:
        raise UserError(f"{path.name}: include leads back to {path.name} itself; remove one of the two includes.")
    for ref in content.include:
        inner = _find(str(path.parent / ref) if ref.endswith(".toml") else ref)
        yield from _entries(inner, _read(inner), (*above, path.resolve()))
    for entry in content.data:
        cleaned = entry.name.replace("/", "-")
        forms = entry.paths or content.paths
        places = (form.replace("{cleaned}", cleaned).replace("{name}", entry.name) for form in forms)
        placed = dataclasses.replace(entry, paths=tuple(dict.fromkeys(places)))
        _check(path, placed)
        yield placed


def _check(path: Path, entry: DataEntry) -> None:
    where = f"{path.name}: data {entry.name!r}"
    for place in (*entry.paths, entry.prompts_file):
        pure = PurePosixPath(place)
        if pure.is_absolute() or ".." in pure.parts or "\\" in place:
            raise UserError(f"{where}: the path {place!r} leaves the data root; expected one below it, without '..'.")
    for protocol in entry.protocols:
        if protocol not in PROTOCOLS:
            raise UserError(f"{where}: protocols has {protocol!r}; expected some of {', '.join(PROTOCOLS)}.")
    for key in ("images", "bytes", "folds"):
        if (getattr(entry, key) or 0) < 0:
            raise UserError(f"{where}: {key} is {getattr(entry, key)}; expected 0 or more.")


def _refuse_twice(path: Path, key: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path.name}: {key} {twice[0]!r} stands twice, maybe through `include`; keep one of them.")


def _aggregate(path: Path, one: _Sum, entries: Sequence[DataEntry]) -> Aggregate:
    where = f"{path.name}: aggregate {one.name!r}"
    if one.names and one.tags:
        raise UserError(f"{where} has names and tags; keep one of the two keys.")
    strange = set(one.names) - {entry.name for entry in entries}
    if strange:
        raise UserError(f"{where}: names has {min(strange)!r}, which is no data set of the suite; check the spelling.")
    everything = not one.names and not one.tags
    names = tuple(
        entry.name for entry in entries if everything or entry.name in one.names or set(one.tags) & set(entry.tags)
    )
    if len(names) != one.count:
        raise UserError(
            f"{where} has {len(names)} data sets, but count says {one.count}; mend its tags, names or count."
        )
    return Aggregate(name=one.name, names=names)


def _record(table: Mapping[str, Any], kind: type[Any], where: str) -> Any:
    """A dataclass from a TOML table, with every key and type checked."""
    hints = typing.get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        close = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{where}the key {unknown[0]!r} is unknown; expected some of {', '.join(fields)}.{hint}")
    for name, one in fields.items():
        if one.default is dataclasses.MISSING and name not in table:
            raise UserError(f"{where}the key {name!r} is missing; add it.")
        if one.default is dataclasses.MISSING and table[name] == "":
            raise UserError(f"{where}the key {name!r} is empty; give it a text.")
    return kind(**{key: _typed(value, hints[key], f"{where}{key}") for key, value in table.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; expected a list.")
        return tuple(_typed(item, arguments[0], f"{where}[{place}]") for place, item in enumerate(value))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _typed(value, arguments[0], where)
    if hint == Kind:
        if value not in KINDS:
            raise UserError(f"{where} is {value!r}; expected one of {', '.join(KINDS)}.")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}; expected a table.")
        named = value.get("name")
        return _record(value, typing.cast(type[Any], hint), f"{where} ({named}): " if named else f"{where}: ")
    if hint is float and type(value) is int:
        value = float(value)
    # A TOML boolean is an int to isinstance.
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        word = {str: "a text", int: "a whole number", float: "a number"}[hint]
        raise UserError(f"{where} is {value!r}; expected {word}.")
    return value

"""What a teacher cache must be, what its manifest tells, and the sentence that refuses another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from vlkd.data.table import Table
from vlkd.data.views import ViewSettings, view_of
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule
from vlkd.models.fingerprint import model_fingerprint

FORMAT, VERSION = "vlkd-teacher-cache", 2
MANIFEST = "manifest.json"
METADATA = "vlkd"
"""The one key of a shard's metadata: safetensors writes several in no fixed order, and equal shards are equal bytes."""
DRAWN_VIEWS = 16
TOWER_FEATURES = ("image.pooled", "image.tokens", "text.pooled", "text.tokens", "text.mask")
"""They do not depend on a model's projections."""

Precision = Literal["fp32", "bf16"]
StorageType = Literal["float32", "float16", "bfloat16", "int8"]
FIDELITY = {"bf16": 0, "fp32": 1, "int8": 0, "bfloat16": 1, "float16": 2, "float32": 3}
"""Features of a more faithful pass or dtype than asked for can serve."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a cache must be.

    Args:
        features: names of image and text features to hold; scalars are always held.
        views: K, stored views per image.
        view_settings: how they are drawn; colours are the student's alone and never reach a teacher.
        view_seed: of the views.
        precision: of the pass.
        dtype: of storage; "int8" with one scale per vector of the last dimension.

    Raises:
        UserError: a value is outside its range.
    """

    features: tuple[str, ...]
    views: int
    view_settings: ViewSettings
    view_seed: int = 0
    precision: Precision = "fp32"
    dtype: StorageType = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(sorted(set(self.features))))
        sides = all(name.startswith(("image.", "text.")) for name in self.features)
        if self.views < 1 or not self.features or not sides:
            raise UserError(
                f"Found a cache of {self.views} views with the features {', '.join(self.features) or 'none'}; expected "
                "1 view or more, and names that begin with image. or text."
            )
        if self.precision not in get_args(Precision) or self.dtype not in get_args(StorageType):
            raise UserError(
                f"Found a cache of precision {self.precision!r} and dtype {self.dtype!r}; expected one of "
                f"{', '.join(get_args(Precision))} and one of {', '.join(get_args(StorageType))}."
            )


def identity(model: DualEncoderModule, spec: CacheSpec) -> dict[str, Any]:
    """Everything but the data on which stored features depend, as JSON gives it back."""
    settings = asdict(spec.view_settings)
    del settings["color"]
    # Features of views that are drawn in another way from the same settings are stale, too.
    drawn = [view_of(spec.view_settings, spec.view_seed, "", number) for number in range(DRAWN_VIEWS)]
    found = {
        "version": VERSION,
        "weights": model_fingerprint(model, towers=all(name in TOWER_FEATURES for name in spec.features)),
        "count": spec.views,
        "settings": settings | {"seed": spec.view_seed},
        "drawn": hashlib.sha256(repr([(view.box, view.flip) for view in drawn]).encode()).hexdigest()[:16],
        "features": list(spec.features),
        "precision": spec.precision,
        "dtype": spec.dtype,
    }
    return dict(json.loads(json.dumps(found)))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], *, exact: bool = False) -> list[str]:
    """Why features of one identity cannot serve another, in words.

    More views, features or fidelity than expected can serve, unless `exact`: a build is continued with its own alone.
    """

    def told(what: str, name: str) -> list[str]:
        return [f"{what} (found {found[name]}, expected {expected[name]})"] if found[name] != expected[name] else []

    phrases = told("with other weights", "weights")
    phrases += told("of other views", "settings") or told("of views drawn in another way", "drawn")
    if exact:
        names = {"count": "another number of views", "features": "other features"}
        for name in ("count", "features", "precision", "dtype"):
            phrases += told(f"with {names.get(name, f'another {name}')}", name)
        return phrases
    if found["count"] < expected["count"]:
        phrases += [
            f"{phrase}, which teachers.views={found['count']} takes" for phrase in told("of fewer views", "count")
        ]
    if missing := sorted(set(expected["features"]) - set(found["features"])):
        phrases.append(f"without {', '.join(missing)} (found {', '.join(found['features'])})")
    for name in ("precision", "dtype"):
        if FIDELITY[found[name]] < FIDELITY[expected[name]]:
            phrases += told(f"in a coarser {name}", name)
    return phrases


def refuse(name: str, folder: Path, phrases: Collection[str]) -> NoReturn:
    """Raise `UserError` with every difference named."""
    raise UserError(
        f"The features of teacher {name} in {folder} were made {', '.join(phrases)}; "
        "remove the folder or set teachers.folder (--out) to another one."
    )


def new_manifest(
    name: str,
    model: DualEncoderModule,
    pairs: Table,
    own: Mapping[str, Any],
    entries: Mapping[str, dict[str, Any]],
    scalars: Mapping[str, float],
) -> dict[str, Any]:
    """The manifest of a build that has ended.

    Args:
        name: the teacher's short name.
        model: the teacher.
        pairs: the source.
        own: the build's identity.
        entries: per shard its entry and its `error`, which only the manifest's largest one keeps.
        scalars: `logit_scale` and `logit_bias`, where the teacher has them.
    """
    transform = model.preprocessing
    settings = {key: value for key, value in own["settings"].items() if key != "seed"}
    errors = [entry.pop("error") for entry in entries.values()]
    largest = {
        feature: [max(error[feature][i] for error in errors) for i in range(2)]
        for feature in (errors[0] if errors else ())
    }
    try:
        release = version("vlkd")
    except PackageNotFoundError:
        release = "a source tree"
    return {
        "format": FORMAT,
        "version": VERSION,
        "vlkd": release,
        "teacher": {"name": name, "ref": model.name, "fingerprint": own["weights"], "width": model.width, **scalars},
        "preprocessing": {
            "image_size": list(transform.image_size),
            "context_length": transform.context_length,
            "settings": repr(getattr(model, "settings", None)),
        },
        "data": {"images": len(pairs), "captions": pairs.caption_total, "fingerprint": pairs.fingerprint()},
        "views": {"count": own["count"], "seed": own["settings"]["seed"], "settings": settings, "drawn": own["drawn"]},
        "features": own["features"],
        "precision": own["precision"],
        "dtype": own["dtype"],
        "shards": list(entries.values()),
        "error": {
            feature: {"max_cosine_distance": pair[0], "max_relative_l2": pair[1]} for feature, pair in largest.items()
        },
    }


def read_manifest(name: str, folder: Path) -> dict[str, Any]:
    """The manifest of a whole cache.

    Raises:
        UserError: it is none, of another version, or names files elsewhere.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["version"] if manifest["format"] == FORMAT else "unknown"
        if version == VERSION:
            manifest_identity(manifest)
            if all(Path(entry["file"]).name == entry["file"] for entry in manifest["shards"]):
                return dict(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / MANIFEST} of teacher {name} is no manifest of a teacher cache; remove the folder."
        ) from None
    refuse(name, folder, [f"in another format version (found {version}, expected {VERSION})"])


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write it whole or not at all."""
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def manifest_identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that a manifest tells."""
    views = manifest["views"]
    return {
        "version": manifest["version"],
        "weights": manifest["teacher"]["fingerprint"],
        "count": views["count"],
        "settings": views["settings"] | {"seed": views["seed"]},
        "drawn": views["drawn"],
        "features": manifest["features"],
        "precision": manifest["precision"],
        "dtype": manifest["dtype"],
    }

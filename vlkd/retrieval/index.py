"""A FAISS index that remembers what it holds: vectors, stable ids and paths, in one folder.

The folder holds `index.faiss` (the vectors, whole unless the settings are lossy), `items.jsonl` (one
`{"id": ..., "path": ...}` per line) and `index.json` (the model, kind, counts, versions and hashes of the two files).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.retrieval.folder import (
    FILES,
    FORMAT,
    FORMAT_VERSION,
    read_description,
    readable_folder,
    replace_folder,
    sha256,
)
from vlkd.retrieval.kinds import IndexSettings, ask, make_index, shortened, stored_vectors
from vlkd.retrieval.search import Vectors, check_embeddings

faiss: Any = _faiss  # its own stubs lack half of its names

_REMOVED_AT_MOST = 0.2


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One found item: its external id, its path and its cosine with the query (an estimate if the index is lossy)."""

    id: int
    path: str
    score: float


class SearchIndex:
    """Items that can be added, removed and searched; ids are given in order and never used twice.

    FAISS's id map renumbers wrongly over `ivf`, whose own ids are used instead. `hnsw` cannot remove: a removed vector
    stays in the graph, is filtered from every search, and the graph is rebuilt once a fifth of it is removed vectors.
    """

    def __init__(
        self,
        index: Any,
        paths: dict[int, str],
        *,
        model: str,
        fingerprint: str,
        settings: IndexSettings,
        width: int,
        next_id: int,
    ) -> None:
        """Use `build` or `load`; here `index` is the FAISS index and `paths` maps the live ids, ascending, to paths."""
        self._width = width
        self._index, self._paths, self._next_id = index, paths, next_id
        self._ids = {path: number for number, path in paths.items()}
        self.model, self.fingerprint, self.settings = model, fingerprint, settings

    @classmethod
    def build(
        cls,
        embeddings: Vectors,
        paths: Sequence[str],
        *,
        model: str,
        fingerprint: str = "",
        settings: IndexSettings | None = None,
    ) -> SearchIndex:
        """Index embeddings (N, D), which are normalised here, under their paths.

        Args:
            embeddings: (N, D).
            paths: N different names, for example file paths, or a shard's path with the sample's key.
            model: reference of the model that made the embeddings.
            fingerprint: a hash of its weights, so that a model that changed since is noticed; "" for none.
            settings: kind and parameters.

        Raises:
            UserError: bad embeddings, a path twice, a kind that does not exist, numbers that do not match.
        """
        chosen = settings or IndexSettings()
        vectors = shortened(embeddings, "embeddings", None, chosen.dims)
        index = cls(
            make_index(vectors, chosen),
            {},
            model=model,
            fingerprint=fingerprint,
            settings=chosen,
            width=embeddings.shape[1],
            next_id=0,
        )
        index._append(vectors, paths)
        return index

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def width(self) -> int:
        """D of the model, also where fewer numbers are kept."""
        return self._width

    @property
    def items(self) -> dict[int, str]:
        """A copy: the path of every id, ascending."""
        return dict(self._paths)

    def vectors(self) -> NDArray[np.float32]:
        """(N, D) the normalised vectors, in the order of their ids; where the settings are lossy, what is left."""
        if not self._paths:
            return np.empty((0, int(self._index.d)), np.float32)
        return stored_vectors(self._index, self.settings, np.fromiter(self._paths, np.int64, len(self)))

    def add(self, embeddings: Vectors, paths: Sequence[str]) -> list[int]:
        """Add items and return their new ids.

        Raises:
            UserError: bad embeddings, another width, or a path that is already there; nothing is added then.
        """
        return self._append(shortened(embeddings, "embeddings", self.width, self.settings.dims), paths)

    def _append(self, vectors: NDArray[np.float32], paths: Sequence[str]) -> list[int]:
        """`add` for vectors that are checked, cut and normalised."""
        if len(vectors) != len(paths):
            raise UserError(f"{len(vectors)} embeddings but {len(paths)} paths; give one path per embedding.")
        seen = set(self._ids)
        for path in paths:
            if path in seen:
                raise UserError(f"{path!r} is already in the index; remove it first, or leave it out.")
            seen.add(path)
        ids = range(self._next_id, self._next_id + len(paths))
        self._index.add_with_ids(vectors, np.array(ids, np.int64))
        for number, path in zip(ids, paths, strict=True):
            self._paths[number], self._ids[path] = path, number
        self._next_id = ids.stop
        return list(ids)

    def remove(self, which: Collection[int | str]) -> int:
        """Remove items by id or by path and return how many there were.

        Raises:
            UserError: one of them is not in the index; nothing is removed then.
        """
        ids = set()
        for item in which:
            number = self._ids.get(item) if isinstance(item, str) else item
            if number is None or number not in self._paths:
                raise UserError(f"{item!r} is not in the index of {len(self)} items; give an id or a path as listed.")
            ids.add(number)
        for number in ids:
            del self._ids[self._paths.pop(number)]
        if self.settings.kind != "hnsw":
            self._index.remove_ids(faiss.IDSelectorArray(np.array(sorted(ids), np.int64)))
        elif len(self) and len(self._removed()) > _REMOVED_AT_MOST * self._index.ntotal:
            self._index = self.rebuild(self.settings)._index
        return len(ids)

    def rebuild(self, settings: IndexSettings) -> SearchIndex:
        """The same items under the same ids in an index of another kind or with other parameters.

        Raises:
            UserError: the index is empty, the kind does not exist, or the whole vectors are needed and not there.
        """
        if self.settings.lossy and settings != self.settings:
            raise UserError(
                f"The index ({self.settings.name}) does not hold its vectors whole, as {settings.name} needs them; "
                "build it again from the images."
            )
        held = check_embeddings(self.vectors(), "vectors of the index")
        vectors = shortened(held, "vectors of the index", None, settings.dims)
        index = make_index(vectors, settings)
        index.add_with_ids(vectors, np.fromiter(self._paths, np.int64, len(self)))
        return SearchIndex(
            index,
            dict(self._paths),
            model=self.model,
            fingerprint=self.fingerprint,
            settings=settings,
            width=self.width,
            next_id=self._next_id,
        )

    def search(self, query: Vectors, k: int) -> list[Hit]:
        """The k items most similar to one query, best first, equal scores by id; all items if k is more than that.

        Where an approximate kind finds too few, every vector is compared.

        Args:
            query: (D,) or (1, D), not necessarily normalised.
            k: 1 or more.

        Raises:
            UserError: k below 1, more than one query, or a bad one (`check_embeddings`).
        """
        if k < 1:
            raise UserError(f"k = {k} results asked; k is 1 or more.")
        if not len(self):
            return []
        row = check_embeddings(query.reshape(1, -1) if query.ndim == 1 else query, "query", self.width)
        if len(row) != 1:
            raise UserError(f"{len(row)} queries given; search one at a time.")
        vector, wanted = shortened(row, "query", self.width, self.settings.dims), min(k, len(self))
        ask = wanted + 1
        found = self._ask(vector, ask)
        # FAISS keeps any of the equal scores at its edge: ask for more until the edge lies between unequal ones.
        while ask < len(self) and len(found) > wanted and found[wanted - 1][0] == found[-1][0]:
            ask *= 2
            found = self._ask(vector, ask)
        if len(found) < wanted:
            found = list(zip((self.vectors() @ vector[0]).tolist(), self._paths, strict=True))
        best = sorted(found, key=lambda item: (-item[0], item[1]))[:wanted]
        return [Hit(id=number, path=self._paths[number], score=score) for score, number in best]

    def _ask(self, vector: NDArray[np.float32], k: int) -> list[tuple[float, int]]:
        """(score, id) of at most k live items, descending."""
        graph = self.settings.kind == "hnsw" and self._index.ntotal > len(self)
        return ask(self._index, self.settings, vector, min(k, len(self)), self._removed() if graph else ())

    def _removed(self) -> NDArray[np.int64]:
        """Ids that are still in the graph but no longer items."""
        return np.setdiff1d(faiss.vector_to_array(self._index.id_map), np.fromiter(self._paths, np.int64, len(self)))

    def save(self, folder: str | Path) -> None:
        """Write the folder; whatever moment the process dies, `load` finds the old index or the new one, whole.

        Raises:
            UserError: `folder` is something else than an index or an empty folder.
        """

        def fill(new: Path) -> None:
            self.write_vectors(new / "index.faiss")
            lines = (json.dumps({"id": number, "path": path}) + "\n" for number, path in self._paths.items())
            (new / "items.jsonl").write_text("".join(lines), encoding="utf-8")
            (new / "index.json").write_text(json.dumps(self._description(new), indent=1), encoding="utf-8")

        replace_folder(folder, fill)

    def write_vectors(self, path: Path) -> None:
        """Write the FAISS index alone, without the paths and the description."""
        faiss.write_index(self._index, str(path))

    def _description(self, folder: Path) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "metric": "cosine: inner product of normalised vectors; binary storage: estimated from Hamming distance",
            "settings": asdict(self.settings),
            "count": len(self),
            "next_id": self._next_id,
            "versions": {"faiss": faiss.__version__, "numpy": np.__version__},
            "embeddings_sha256": hashlib.sha256(np.ascontiguousarray(self.vectors()).data).hexdigest(),
            "files": {name: sha256(folder / name) for name in FILES},
        }

    @classmethod
    def load(cls, folder: str | Path) -> SearchIndex:
        """Read an index folder.

        Raises:
            UserError: it is missing, incomplete, changed since it was written, or of another version.
        """
        place = readable_folder(folder)
        about = read_description(place)
        # Version 1 knew fewer settings, whose defaults are what it did.
        settings = (asdict(IndexSettings()) if about["format_version"] == 1 else {}) | about["settings"]
        if settings.keys() != asdict(IndexSettings()).keys():
            raise UserError(f"{place / 'index.json'} holds settings of another version; build the index again.")
        index = faiss.read_index(str(place / "index.faiss"))
        rows = [json.loads(line) for line in (place / "items.jsonl").read_text(encoding="utf-8").splitlines()]
        paths = {int(row["id"]): str(row["path"]) for row in rows}
        if len(paths) != about["count"] or index.d != (settings["dims"] or about["width"]) or index.ntotal < len(paths):
            raise UserError(
                f"{folder}: {len(paths)} items and {index.ntotal} vectors of width {index.d} do not match index.json "
                f"({about['count']} items, width {about['width']}); build the index again."
            )
        return cls(
            index,
            paths,
            model=about["model"],
            fingerprint=about["fingerprint"],
            settings=IndexSettings(**settings),
            width=about["width"],
            next_id=about["next_id"],
        )

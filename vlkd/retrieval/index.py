"""A FAISS index that remembers what it holds: vectors, stable ids and paths, in one folder.

The folder holds `index.faiss` (the vectors, whole, in every kind), `items.jsonl` (one `{"id": ..., "path": ...}` per
line) and `index.json` (the model, kind, counts, versions and hashes of the two files).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
from vlkd.retrieval.search import Vectors, check_embeddings, normalize

faiss: Any = _faiss  # its own stubs lack half of its names

Kind = Literal["flat", "hnsw", "ivf"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf")

_POINTS_PER_LIST = 39
_REMOVED_AT_MOST = 0.2


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How an index searches.

    Attributes:
        kind: `flat` compares with every vector and is exact; up to some 100,000 vectors nothing else is needed.
            `hnsw` walks a graph: fast at any size, more memory, slow to build. `ivf` looks into the nearest of the
            lists that k-means made of the vectors present at the build.
        hnsw_neighbours: links per vector (M); memory per vector grows by about 8 M bytes.
        hnsw_build_effort: candidates looked at for each insertion (efConstruction).
        hnsw_search_effort: candidates looked at in a search (efSearch); more is nearer to exact and slower.
        ivf_lists: number of lists; 0 takes 4 sqrt(N), at least 39 vectors for each (FAISS's own minimum).
        ivf_probes: lists looked into by a search; 0 takes an eighth of the lists, at least 8.
    """

    kind: Kind = "flat"
    hnsw_neighbours: int = 32
    hnsw_build_effort: int = 200
    hnsw_search_effort: int = 128
    ivf_lists: int = 0
    ivf_probes: int = 0


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One found item: its external id, its path and its cosine with the query."""

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
        next_id: int,
    ) -> None:
        """Use `build` or `load`; here `index` is the FAISS index and `paths` maps the live ids, ascending, to paths."""
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
        vectors = normalize(check_embeddings(embeddings, "embeddings")).numpy()
        index = cls(_empty(vectors, chosen), {}, model=model, fingerprint=fingerprint, settings=chosen, next_id=0)
        index.add(vectors, paths)
        return index

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def width(self) -> int:
        """D."""
        return int(self._index.d)

    @property
    def items(self) -> dict[int, str]:
        """A copy: the path of every id, ascending."""
        return dict(self._paths)

    def vectors(self) -> NDArray[np.float32]:
        """(N, D) the normalised vectors, in the order of their ids."""
        if not self._paths:
            return np.empty((0, self.width), np.float32)
        ids = np.fromiter(self._paths, np.int64, len(self))
        return np.asarray(self._index.reconstruct_batch(ids), np.float32)

    def add(self, embeddings: Vectors, paths: Sequence[str]) -> list[int]:
        """Add items and return their new ids.

        Raises:
            UserError: bad embeddings, another width, or a path that is already there; nothing is added then.
        """
        vectors = normalize(check_embeddings(embeddings, "embeddings", self.width)).numpy()
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
            UserError: the index is empty, or the kind does not exist.
        """
        vectors = check_embeddings(self.vectors(), "vectors of the index").numpy()
        index = _empty(vectors, settings)
        index.add_with_ids(vectors, np.fromiter(self._paths, np.int64, len(self)))
        return SearchIndex(
            index,
            dict(self._paths),
            model=self.model,
            fingerprint=self.fingerprint,
            settings=settings,
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
        vector, wanted = normalize(row).numpy(), min(k, len(self))
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
        """(score, id) of at most k live items, descending; never the -1 with which FAISS pads."""
        k = min(k, len(self))
        parameters = None
        if self.settings.kind == "hnsw":
            removed = self._removed() if self._index.ntotal > len(self) else ()
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(removed)) if len(removed) else None
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.settings.hnsw_search_effort, k), sel=selector)
        elif self.settings.kind == "ivf":
            lists = self._index.nlist
            parameters = faiss.SearchParametersIVF(nprobe=min(lists, self.settings.ivf_probes or max(8, lists // 8)))
        scores, ids = self._index.search(vector, k, params=parameters)
        return [pair for pair in zip(scores[0].tolist(), ids[0].tolist(), strict=True) if pair[1] >= 0]

    def _removed(self) -> NDArray[np.int64]:
        """Ids that are still in the graph but no longer items."""
        return np.setdiff1d(faiss.vector_to_array(self._index.id_map), np.fromiter(self._paths, np.int64, len(self)))

    def save(self, folder: str | Path) -> None:
        """Write the folder; whatever moment the process dies, `load` finds the old index or the new one, whole.

        Raises:
            UserError: `folder` is something else than an index or an empty folder.
        """

        def fill(new: Path) -> None:
            faiss.write_index(self._index, str(new / "index.faiss"))
            lines = (json.dumps({"id": number, "path": path}) + "\n" for number, path in self._paths.items())
            (new / "items.jsonl").write_text("".join(lines), encoding="utf-8")
            (new / "index.json").write_text(json.dumps(self._description(new), indent=1), encoding="utf-8")

        replace_folder(folder, fill)

    def _description(self, folder: Path) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "metric": "cosine: inner product of normalised float32 vectors",
            "settings": asdict(self.settings),
            "count": len(self),
            "next_id": self._next_id,
            "versions": {"faiss": faiss.__version__, "numpy": np.__version__},
            "embeddings_sha256": hashlib.sha256(self.vectors().tobytes()).hexdigest(),
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
        if about["settings"].keys() != asdict(IndexSettings()).keys():
            raise UserError(f"{place / 'index.json'} holds settings of another version; build the index again.")
        index = faiss.read_index(str(place / "index.faiss"))
        rows = [json.loads(line) for line in (place / "items.jsonl").read_text(encoding="utf-8").splitlines()]
        paths = {int(row["id"]): str(row["path"]) for row in rows}
        if len(paths) != about["count"] or index.d != about["width"] or index.ntotal < len(paths):
            raise UserError(
                f"{folder}: {len(paths)} items and {index.ntotal} vectors of width {index.d} do not match index.json "
                f"({about['count']} items, width {about['width']}); build the index again."
            )
        return cls(
            index,
            paths,
            model=about["model"],
            fingerprint=about["fingerprint"],
            settings=IndexSettings(**about["settings"]),
            next_id=about["next_id"],
        )


def _empty(vectors: NDArray[np.float32], settings: IndexSettings) -> Any:
    """An empty FAISS index for vectors like these, which train the lists of `ivf`."""
    width, metric = vectors.shape[1], faiss.METRIC_INNER_PRODUCT
    if settings.kind == "flat":
        return faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    if settings.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, settings.hnsw_neighbours, metric)
        graph.hnsw.efConstruction = settings.hnsw_build_effort
        return faiss.IndexIDMap2(graph)
    if settings.kind == "ivf":
        most = max(1, len(vectors) // _POINTS_PER_LIST)
        lists = settings.ivf_lists or min(most, round(4 * len(vectors) ** 0.5))
        if lists > len(vectors):
            raise UserError(f"ivf_lists = {lists} with {len(vectors)} vectors; give at most one list per vector, or 0.")
        index = faiss.index_factory(width, f"IVF{lists},Flat", metric)
        index.train(vectors)
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        return index
    raise UserError(f"No index is of kind {settings.kind!r}; choose one of {', '.join(KINDS)}.")

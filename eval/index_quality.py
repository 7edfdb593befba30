"""FAISS indexes of a model's images: recall of exact search, hit rate, bytes, build time, latency; re-ranking.

vlkd eval index_quality --model runs/student --data data/shards#test --types flat hnsw --storage float32 int8 binary
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.errors import UserError
from vlkd.suite.options import check_file, check_numbers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlkd.retrieval.encode import EncodedPairs
    from vlkd.retrieval.kinds import IndexSettings
    from vlkd.retrieval.quality import Truth

EXAMPLES = """The images are indexed and searched by captions, one at a time on one thread. recall is the share of the
exact first k that is found: by captions, and by images of the index, which flatters an index. --storage is that of
flat, --dims adds indexes of the first N numbers of each vector. A teacher call is one image looked at for one query.

examples:
  vlkd eval index_quality --model runs/retriever/student --data data/shards#test --dims 64 128
  vlkd eval index_quality --model runs/student --data coco.json#test --teacher teachers/large --shortlist 10 50 --json
"""
KINDS = ("flat", "hnsw", "ivf", "ivf_pq")
STORAGES = ("float32", "int8", "binary")
COLUMNS = (
    ("text recall", "recall_text_queries", 100, 1), ("image recall", "recall_image_queries", 100, 1),
    ("hit rate", "hit", 100, 1), ("loss", "hit_loss", 100, 1), ("bytes/vector", "bytes_per_vector", 1, 0),
    ("build s", "build_seconds", 1, 2), ("p50 ms", "p50_ms", 1, 3), ("p99 ms", "p99_ms", 1, 3),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Encode once, then build and measure every index; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval index_quality",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="REF", help="encodes images and captions")
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="shards, captions JSONL, Karpathy JSON")
    parser.add_argument("--types", nargs="+", choices=KINDS, default=["flat", "hnsw", "ivf_pq"], help="kinds of index")
    parser.add_argument("--dims", nargs="+", type=int, default=[], metavar="N", help="also with the first N numbers")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=["float32"], help="of flat")
    parser.add_argument("--teacher", metavar="REF", help="re-ranks shortlists of the model")
    parser.add_argument("--shortlist", nargs="+", type=int, default=[10, 20, 50, 100], metavar="N", help="lengths")
    parser.add_argument("-k", type=int, default=10, help="neighbours (default %(default)s)")
    parser.add_argument("--queries", type=int, default=5000, help="captions asked at most (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line per row")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    check_numbers(args, k=1, queries=1, batch_size=1, dims=1, shortlist=1)
    check_file(args, "out")

    from vlkd.data.sources import open_pairs

    pairs = open_pairs(args.data)
    encoded = encode(args.model, pairs, args)
    asked = spread(len(encoded.captions), args.queries)
    about = {
        "task": "index_quality", "model": args.model, "data": args.data, "k": args.k, "images": len(encoded.keys),
        "queries": len(asked), "width": encoded.image_embed.shape[1], "unreadable_images": len(encoded.bad),
        "left_out_samples": len(pairs.problems), "threads": 1, "seed": None,
        "versions": {name: version(name) for name in ("vlkd", "torch", "numpy", "faiss-cpu")},
    }  # fmt: skip
    rows = [about | row for row in index_rows(encoded, asked, args)]
    print(f"{len(encoded.keys)} images, {len(asked)} captions as queries, k = {args.k}; rates in percent")
    print(table(rows))
    if args.teacher:
        reranked = [about | row for row in teacher_rows(encoded, pairs, asked, args)]
        print(rerank_table(reranked))
        rows += reranked
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    if args.json:
        print(json.dumps({"command": "eval index_quality", "results": rows}, allow_nan=False))


def encode(ref: str, pairs: Any, args: argparse.Namespace) -> EncodedPairs:
    """Images and captions by one model, which has the width for all `--dims` if it is the one that is indexed."""
    from vlkd.models.load import load
    from vlkd.retrieval.encode import encode_pairs

    model = load(ref)
    if ref == args.model and max(args.dims, default=1) > model.width:
        raise UserError(f"--dims is {max(args.dims)}, but vectors of {ref} have {model.width} numbers; give fewer.")
    return encode_pairs(model, model, pairs, batch_size=args.batch_size)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most so many numbers below `count`, evenly spread, so that nothing is drawn."""
    import numpy as np

    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def combinations(args: argparse.Namespace) -> list[IndexSettings]:
    """Every kind with all numbers and with fewer; storages other than float32 for flat only."""
    from vlkd.retrieval.kinds import IndexSettings

    return [
        IndexSettings(kind=kind, dims=dims, storage=storage)
        for kind in dict.fromkeys(args.types)
        for dims, storage in product([0, *args.dims], args.storage if kind == "flat" else ["float32"])
    ]


def index_rows(encoded: EncodedPairs, asked: NDArray[np.int64], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per index; one that cannot be built says why in `error`."""
    from vlkd.retrieval.quality import exact_neighbours, self_truth

    gallery, queries = encoded.image_embed, encoded.text_embed[asked]
    truth = exact_neighbours(queries, gallery, args.k)
    own = self_truth(gallery, len(asked), args.k)
    wanted = encoded.image_of_text[asked]
    exact_hit = float((truth.ids == wanted[:, None]).any(1).mean())
    rows = []
    for settings in combinations(args):
        row = {"index": settings.name, "kind": settings.kind, "storage": settings.storage}
        row |= {"dims": settings.dims or gallery.shape[1], "exact_hit": exact_hit}
        try:
            rows.append(row | {"error": None} | measure(settings, truth, own, wanted, exact_hit))
        except UserError as error:
            rows.append(row | {"error": str(error)})
    return rows


def measure(
    settings: IndexSettings, truth: Truth, own: Truth, wanted: NDArray[np.int64], exact_hit: float
) -> dict[str, Any]:
    """Build and search one index; `hit_loss` is the exact search's hit rate minus this one's."""
    from vlkd.retrieval.quality import measure_against, timed_build

    index, seconds = timed_build(truth.gallery, settings)
    quality = measure_against(index, truth, own)
    hit = sum(int(image) in ids for image, ids in zip(wanted, quality.found, strict=True)) / len(wanted)
    return {
        "recall_text_queries": quality.recall, "recall_image_queries": quality.self_recall,
        "hit": hit, "hit_loss": exact_hit - hit, "bytes_per_vector": quality.bytes_per_vector,
        "build_seconds": seconds, "p50_ms": quality.p50_ms, "p99_ms": quality.p99_ms,
    }  # fmt: skip


def teacher_rows(
    encoded: EncodedPairs, pairs: Any, asked: NDArray[np.int64], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Captions to images: the model alone, its shortlists in the teacher's order, the teacher alone."""
    from vlkd.retrieval.rerank import recall_by_calls

    teacher = encode(args.teacher, pairs, args)
    if teacher.keys != encoded.keys:
        raise UserError(f"{args.teacher} and {args.model} could read different images; run again when the data rests.")
    lengths = sorted({min(n, len(encoded.keys)) for n in args.shortlist})
    figures = recall_by_calls(
        (encoded.text_embed[asked], encoded.image_embed),
        (teacher.text_embed[asked], teacher.image_embed),
        [[int(image)] for image in encoded.image_of_text[asked]],
        lengths,
        sorted({1, args.k}),
    )
    rows = []
    for place, row in enumerate(figures):
        way = "student" if not place else "teacher" if place == len(figures) - 1 else "re-ranked"
        flat = {f"hit@{k}": value for k, value in row.hit.items()}
        flat |= {f"teacher_recall@{k}": value for k, value in row.recall.items()}
        rows.append({"task": "rerank", "teacher": args.teacher, "search": way, "teacher_calls": row.calls} | flat)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One index per line, named by kind, storage and numbers kept."""
    width = max(len("index"), *(len(row["index"]) for row in rows))
    lines = ["index".ljust(width) + "".join(f"{title:>14}" for title, *_ in COLUMNS)]
    for row in rows:
        name = row["index"].ljust(width)
        if row["error"]:
            lines.append(f"{name}  {row['error']}")
        else:
            lines.append(name + "".join(f"{factor * row[key]:>14.{digits}f}" for _, key, factor, digits in COLUMNS))
    return "\n".join(lines)


def rerank_table(rows: Sequence[dict[str, Any]]) -> str:
    """Hit rates and the share of the teacher's own first results, by teacher calls per query."""
    names = [name for name in rows[0] if name.startswith(("hit@", "teacher_recall@"))]
    lines = ["search".ljust(10) + f"{'calls':>8}" + "".join(f"{name:>19}" for name in names)]
    for row in rows:
        figures = "".join(f"{100 * row[name]:>19.1f}" for name in names)
        lines.append(row["search"].ljust(10) + f"{row['teacher_calls']:>8}" + figures)
    return "\n".join(lines)

"""`vlkd search`: search an index by text or by image."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlkd.report import SearchQuery
    from vlkd.retrieval.index import Hit, SearchIndex

EPILOG = """examples:
  vlkd search photos.index "a dog on a beach" "two red cups"
  vlkd search photos.index --image photos/beach.jpg -k 20 --gallery found.html
  vlkd search photos.index "a dog on a beach" --rerank teachers/large --shortlist 50
"""
SHORTLIST = 50


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A query, its picture where it is one, and its hits, best first."""

    query: str
    image: Image | None
    hits: list[Hit]


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = parse(argv)
    from vlkd.retrieval.index import SearchIndex

    index = SearchIndex.load(args.index)
    answers, left_out = search(index, args), 0
    if args.rerank:
        answers, left_out = reranked(answers, args)
    for answer in answers:
        print(answer.query)
        for rank, hit in enumerate(answer.hits, 1):
            print(f"{rank:4}  {hit.score:6.3f}  {hit.path}")
    if args.gallery or args.contact_sheet:
        draw(answers, len(index), args)
    if args.json:
        print(json.dumps(as_json(index, answers, args) | {"not_reranked": left_out}, allow_nan=False))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises `UserError` where its words do not go together."""
    parser = argparse.ArgumentParser(
        prog="vlkd search",
        description="Search an index by text or by image; prints rank, cosine and path.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("index", type=Path, metavar="IDX", help="a folder made by `vlkd index`")
    parser.add_argument("queries", nargs="*", metavar="TEXT", help="what to look for; each text is a query")
    parser.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="look for its like")
    parser.add_argument("-k", type=int, default=10, help="results per query (default %(default)s)")
    parser.add_argument("--model", metavar="REF", help="encodes the queries, in place of the model of the index")
    parser.add_argument("--rerank", metavar="REF", help="a teacher that looks at a shortlist and puts it in order")
    parser.add_argument("--shortlist", type=int, metavar="N", help=f"images the teacher looks at (default {SHORTLIST})")
    parser.add_argument("--gallery", type=Path, metavar="FILE.html", help="write a page with thumbnails")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="write one picture with thumbnails")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    if not args.queries and not args.image:
        raise UserError('Nothing is asked; give a text such as "a dog on a beach", or --image FILE.')
    if any(not text.strip() for text in args.queries):
        raise UserError('A text to look for is empty; give one such as "a dog on a beach".')
    if args.k < 1:
        raise UserError(f"-k is {args.k}; expected 1 or more results.")
    if args.shortlist is not None and (not args.rerank or args.shortlist < args.k):
        raise UserError(
            f"--shortlist is {args.shortlist}; it goes with --rerank REF and is at least the {args.k} results of -k."
        )
    for page in (args.gallery, args.contact_sheet):
        if page is not None and not page.absolute().parent.is_dir():
            raise UserError(f"The folder of {page} does not exist; make it first.")
    return args


def search(index: SearchIndex, args: argparse.Namespace) -> list[Answer]:
    """Encode the queries, texts first, and look each of them up."""
    from vlkd.cli.index import check_fingerprint
    from vlkd.data.images import open_image
    from vlkd.models.fingerprint import model_fingerprint
    from vlkd.models.load import load

    images = [open_image(path) for path in args.image]
    ref = args.model or index.model
    model = load(ref)
    if model.width != index.width:
        raise UserError(
            f"The model {ref} gives vectors of width {model.width}, the index {args.index} holds {index.width}; "
            "search with the model that made it, or build the index again."
        )
    if not args.model:
        check_fingerprint(index, model_fingerprint(model))
    answers = []
    count = max(args.k, args.shortlist or SHORTLIST) if args.rerank else args.k
    if args.queries:
        for text, vector in zip(args.queries, model.encode_text(args.queries), strict=True):
            answers.append(Answer(query=text, image=None, hits=index.search(vector, count)))
    if images:
        for path, image, vector in zip(args.image, images, model.encode_image(images), strict=True):
            answers.append(Answer(query=f"like {path}", image=image, hits=index.search(vector, count)))
    return answers


@dataclass(frozen=True, kw_only=True)
class Items:
    """Indexed images by position, as `encode_images` reads them."""

    keys: list[str]
    captions: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image:
        """Image i, decoded."""
        from vlkd.data.items import open_item

        return open_item(self.keys[i])


def reranked(answers: Sequence[Answer], args: argparse.Namespace) -> tuple[list[Answer], int]:
    """The answers in the teacher's order with its cosines, and how many images could not be shown to it."""
    from vlkd.models.load import load
    from vlkd.retrieval.encode import encode_images
    from vlkd.retrieval.index import Hit
    from vlkd.retrieval.rerank import rerank

    if not any(answer.hits for answer in answers):
        return list(answers), 0
    teacher = load(args.rerank)
    paths = list(dict.fromkeys(hit.path for answer in answers for hit in answer.hits))
    encoded = encode_images(teacher, Items(keys=paths, captions=[()] * len(paths)))
    for path, reason in encoded.bad:
        print(f"not re-ranked, left out: {path}: {reason}", file=sys.stderr)
    row = {paths[i]: n for n, i in enumerate(encoded.index.tolist())}
    out = []
    for answer in answers:
        # What the pixels of a query give goes to the image tower, its words to the text tower.
        vector = teacher.encode_text([answer.query]) if answer.image is None else teacher.encode_image([answer.image])
        hits = {hit.id: hit for hit in answer.hits if hit.path in row}
        order = rerank(list(hits), vector[0], encoded.embed[[row[hit.path] for hit in hits.values()]]) if hits else []
        best = [Hit(id=number, path=hits[number].path, score=score) for number, score in order[: args.k]]
        out.append(Answer(query=answer.query, image=answer.image, hits=best))
    return out, len(encoded.bad)


def draw(answers: Sequence[Answer], size: int, args: argparse.Namespace) -> None:
    """The gallery page and the contact sheet, where they are asked for."""
    from vlkd.report import Report
    from vlkd.report.contact_sheet import contact_sheet

    rows = [shown(answer) for answer in answers]
    if args.gallery:
        page = Report(f"Search in {args.index}", f"{len(rows)} queries among {size:,} images.")
        page.gallery(rows)
        print(f"gallery: {page.write(args.gallery)}")
    if args.contact_sheet:
        try:
            contact_sheet(rows).save(args.contact_sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"{args.contact_sheet} cannot be written ({error}); name a .png or .jpg file.") from None
        print(f"contact sheet: {args.contact_sheet}")


def shown(answer: Answer) -> SearchQuery:
    """An answer with its pictures; one that is gone is a grey square, and a line says so."""
    from PIL import Image

    from vlkd.data.items import open_item
    from vlkd.report import FoundImage, SearchQuery

    found = []
    for hit in answer.hits:
        try:
            image = open_item(hit.path)
        except UserError as error:
            print(f"no thumbnail: {error}", file=sys.stderr)
            image = Image.new("RGB", (96, 96), (160, 160, 160))
        found.append(FoundImage(image=image, score=hit.score, label=Path(hit.path).name))
    return SearchQuery(text=answer.query, image=answer.image, found=found)


def as_json(index: SearchIndex, answers: Sequence[Answer], args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of what, and every hit."""
    return {
        "command": "search",
        "index": str(args.index),
        "items": len(index),
        "model": args.model or index.model,
        "rerank": args.rerank,
        "results": [
            {"query": a.query, "hits": [{"id": h.id, "path": h.path, "score": h.score} for h in a.hits]}
            for a in answers
        ],
    }

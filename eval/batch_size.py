"""Does the batch size of the encoders change anything? Differences of embeddings, and every changed rank.

vlkd eval batch_size --model runs/student/student --data data/shards#test
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vlkd.data.eval_set import EvalSet
    from vlkd.retrieval.encode import EncodedImages

EXAMPLES = """Ends with exit code 2 where unit embeddings of the same items differ by more than 1e-5.

examples:
  vlkd eval batch_size --model runs/retriever/student --data data/shards#test
  vlkd eval batch_size --model open_clip:ViT-B-32@w.safetensors --data pets#test --sizes 1 7 64 --images 500 --json
"""


def main(argv: Sequence[str]) -> None:
    """Encode the data with each batch size and compare with the first; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval batch_size",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="REF")
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="images with captions or classes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 7, 64], metavar="B", help="default 1 7 64")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="only the first so many; 0 is all")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)

    from vlkd.errors import UserError
    from vlkd.suite.options import check_numbers

    check_numbers(args, sizes=1, images=0, workers=1)
    if len(set(args.sizes)) < max(2, len(args.sizes)):
        raise UserError(f"--sizes is {args.sizes}; expected two or more batch sizes, each once.")

    from vlkd.data.eval_set import open_eval_set
    from vlkd.models.load import load
    from vlkd.protocols.batch_sizes import TOLERANCE
    from vlkd.suite.results import versions

    data = first_images(open_eval_set(args.data), args.images, args.data)
    model = load(args.model, device=args.device)
    images, texts = encode(model, data, args.sizes[0], args.workers)
    pairs = []
    for size in args.sizes[1:]:
        other_images, other_texts = encode(model, data, size, args.workers)
        pairs.append({"sizes": [args.sizes[0], size]} | compared(data, (images, texts), (other_images, other_texts)))
    row = {
        "model": args.model, "data": args.data, "kind": data.kind, "images": len(images.index), "texts": len(texts),
        "unreadable": len(images.bad), "device": args.device, "dtype": "float32", "tolerance": TOLERANCE,
        "within": all(pair["within"] for pair in pairs), "pairs": pairs, "versions": versions(),
    }  # fmt: skip
    print(report(row))
    if args.json:
        print(json.dumps({"command": "eval batch_size", "results": [row]}, allow_nan=False))
    if not row["within"]:
        worst = max(max(pair["image_difference"], pair["text_difference"]) for pair in pairs)
        raise UserError(
            f"Unit embeddings of {args.model} differ by up to {worst:.1e} between batch sizes; expected at most "
            f"{TOLERANCE:.0e}: compare its figures at one batch size only, in full float32 on one device."
        )


def first_images(data: EvalSet, count: int, path: str) -> EvalSet:
    """The first `count` images, all for 0; raises `UserError` for a kind without ranks or predictions."""
    from dataclasses import replace

    from vlkd.errors import UserError

    if data.kind not in ("retrieval", "classification"):
        raise UserError(f"{path} is a set for {data.kind}; expected one for retrieval or classification: name another.")
    end = count or len(data)
    return replace(
        data,
        keys=data.keys[:end],
        files=data.files[:end],
        captions=data.captions[:end],
        labels=None if data.labels is None else data.labels[:end],
        groups={name: ids[:end] for name, ids in data.groups.items()},
    )


def encode(model: Any, data: EvalSet, size: int, workers: int) -> tuple[EncodedImages, Tensor]:
    """The images, and their captions or the class vectors, `size` at a time."""
    from vlkd.retrieval.encode import encode_images, encode_texts
    from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, class_vectors

    images = encode_images(model, data, batch_size=size, workers=workers)
    if data.kind == "retrieval":
        return images, encode_texts(model, captions_of(data, images)[0], batch_size=size)

    def encode_text(texts: Sequence[str]) -> Tensor:
        embed: Tensor = model.encode_text(texts, batch_size=size).detach().float().cpu()
        return embed

    templates = data.templates or DEFAULT_TEMPLATES
    return images, class_vectors(encode_text, data.classes, templates, prompts=data.prompts, batch_size=size)


def captions_of(data: EvalSet, images: EncodedImages) -> tuple[list[str], NDArray[np.int64]]:
    """All captions of the readable images, and for each the place of its image among these."""
    import numpy as np

    own = [data.captions[row] for row in images.index.tolist()]
    return [caption for captions in own for caption in captions], np.repeat(np.arange(len(own)), [*map(len, own)])


def compared(
    data: EvalSet, before: tuple[EncodedImages, Tensor], after: tuple[EncodedImages, Tensor]
) -> dict[str, Any]:
    """The largest differences, and what changed, by the names of the items."""
    from vlkd.errors import UserError
    from vlkd.protocols.batch_sizes import TOLERANCE, largest_difference, prediction_changes, rank_changes

    images = before[0]
    if images.index.tolist() != after[0].index.tolist():
        raise UserError("Other images could be read the second time; wait until nobody changes them, and try again.")
    differences = (
        largest_difference(images.embed, after[0].embed, "image embeddings"),
        largest_difference(before[1], after[1], "text embeddings"),
    )
    row = {
        "image_difference": differences[0],
        "text_difference": differences[1],
        "within": max(differences) <= TOLERANCE,
    }
    keys = [data.keys[i] for i in images.index.tolist()]
    tables = (images.embed, before[1]), (after[0].embed, after[1])
    if data.kind == "classification":
        changed = prediction_changes(*tables)
        return row | {
            "changed_predictions": [
                {"image": keys[one.image], "before": data.classes[one.before], "after": data.classes[one.after],
                 "gap": one.gap}
                for one in changed
            ]
        }  # fmt: skip
    captions, owner = captions_of(data, images)
    names = {"image_to_text": keys, "text_to_image": captions}
    return row | {
        "changed_ranks": [
            {"direction": one.direction, "query": names[one.direction][one.query], "rank_before": one.before,
             "rank_after": one.after, "gap": one.gap}
            for one in rank_changes(*tables, owner)
        ]
    }  # fmt: skip


def report(row: Mapping[str, Any]) -> str:
    """A paragraph for each pair of sizes, with a line for every change."""
    lines = [f"{row['images']} images, {row['texts']} {'captions' if row['kind'] == 'retrieval' else 'classes'}"]
    for pair in row["pairs"]:
        before, after = pair["sizes"]
        verdict = "within" if pair["within"] else "beyond"
        ranks, predictions = pair.get("changed_ranks", ()), pair.get("changed_predictions", ())
        changed = (
            f"{len(predictions)} changed predictions"
            if "changed_predictions" in pair
            else f"{len(ranks)} changed ranks"
        )
        lines.append(
            f"batch size {after} against {before}: images differ by {pair['image_difference']:.1e}, texts by "
            f"{pair['text_difference']:.1e}, {verdict} {row['tolerance']:.0e}; {changed}"
        )
        lines += [
            f"  {one['direction'].replace('_', ' ')}, {one['query']!r}: rank {one['rank_before']} became "
            f"{one['rank_after']}, gap {one['gap']:.1e}"
            for one in ranks
        ]
        lines += [
            f"  {one['image']!r}: {one['before']} became {one['after']}, gap {one['gap']:.1e}" for one in predictions
        ]
    return "\n".join(lines)

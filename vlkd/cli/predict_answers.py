"""`vlkd predict --question`: what a generative model answers to one question about each of many pictures."""

from __future__ import annotations

import argparse
import json
import time

from vlkd.cli.predict_tables import base_figures, check_places, csv_lines, report_left_out, summary, write_table

BATCH = 16
"""Pictures at a time, where nobody says."""


def predict_answers(args: argparse.Namespace, ref: str) -> None:
    """Everything after the command line, with the model of this reference."""
    started = time.perf_counter()

    from vlkd.data.given_images import open_given
    from vlkd.data.items import item_paths
    from vlkd.engine.predict import data_root
    from vlkd.engine.predict_answers import answer_images
    from vlkd.models.load_generative import load_generative

    images = open_given(args.images, data_root(args.run))
    check_places(args, images)
    model = load_generative(ref, device=args.device)
    found = answer_images(
        model,
        images,
        args.question,
        batch_size=args.batch_size or BATCH,
        max_new_tokens=args.max_new_tokens,
        workers=args.workers,
    )
    paths = item_paths(images)
    rows = [(images.keys[row], paths[row], text) for row, text in found.texts.items()]
    if args.out.suffix.lower() == ".csv":
        text = csv_lines([("key", "path", "answer"), *rows])
    else:
        named = ({"key": key, "path": path, "question": args.question, "answer": said} for key, path, said in rows)
        text = "".join(json.dumps(row) + "\n" for row in named)
    bad_list = write_table(args.out, text, images, found.bad)
    figures = base_figures(args, ref, images, found.bad, bad_list) | {
        "question": args.question,
        "answers": len(set(found.texts.values())),
        "seconds": round(time.perf_counter() - started, 3),
        "images_per_second": round(len(images) / max(found.seconds, 1e-9), 1),
    }
    report_left_out(figures, found.bad)
    print(summary(figures, f"{figures['answers']:,} different answer{'s' if figures['answers'] > 1 else ''}"))
    if args.json:
        print(json.dumps(figures, allow_nan=False))

"""Rows of results as `vlkd eval suite` writes them, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from vlkd.suite.results import error_columns


def result_row(model: str, dataset: str, score: float, **changes: Any) -> dict[str, Any]:
    """A measured row of zero-shot classification; `changes` replace columns."""
    row = {
        "dataset": dataset, "model": model, "pretrained": "", "task": "zeroshot_classification", "language": "en",
        "metrics": {"acc1": score, "mean_per_class_recall": score - 0.01}, "status": "ok", "error": None,
        "protocol": "zero_shot", "main_metric": "acc1", "score": score, "interval": [score - 0.05, score + 0.05],
        "random_score": 0.1, "counts": {"images": 200, "classes": 10}, "per_class": {"cat": score, "dog": score - 0.02},
        "notes": {"seed": 0}, "model_ref": model, "fingerprint": f"print-{model}", "dtype": "float32",
        "precision": "fp32", "data": {"path": "/nowhere", "split": "test", "kind": "classification", "train": ""},
        "data_hash": f"hash-{dataset}", "unreadable": 0, "unreadable_keys": [], "seconds": 1.5, "versions": {},
        "suite": "tier0", "tags": ["vtab"], "parameters": 1_000_000, "items": None,
    }  # fmt: skip
    return row | changes


def error_row(model: str, dataset: str, sentence: str, protocol: str = "zero_shot") -> dict[str, Any]:
    """The row of a data set that failed."""
    return result_row(model, dataset, 0.0) | error_columns(protocol, protocol, sentence) | {"data_hash": None}


def speed_row(model: str, parameters: int, milliseconds: float) -> dict[str, Any]:
    """The row of `vlkd eval speed`, which has fewer columns."""
    row = result_row(
        model, "speed", milliseconds, protocol="speed", task="speed", main_metric="latency_ms_p50_1_thread",
        metrics={"latency_ms_p50_1_thread": milliseconds, "parameters": float(parameters)}, interval=None,
        random_score=None, counts={"threads": 2}, per_class={}, parameters=parameters,
    )  # fmt: skip
    for column in ("data", "data_hash", "unreadable", "unreadable_keys", "seconds", "suite", "tags", "precision"):
        del row[column]
    return row

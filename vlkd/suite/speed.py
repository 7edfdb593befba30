"""What a model costs: parameters, FLOPs, latency and throughput of its image tower on the CPU, size on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, evaluating
from vlkd.models.golden import SENTENCES, probe_images
from vlkd.protocols.measured import Measured

PERCENTILES = (50, 90, 99)
WARM_UP = 3
"""Runs before the clock starts: the first ones allocate, choose kernels and fill caches."""
MIN_RUNS = 5

Clock = Callable[[], float]


def measure_speed(
    model: DualEncoderModule,
    *,
    batch_sizes: tuple[int, int] = (1, 64),
    seconds: float = 1.0,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """The figures of `measure_speeds` for one model."""
    return measure_speeds([model], batch_sizes=batch_sizes, seconds=seconds, rounds=rounds, clock=clock)[0]


def measure_speeds(
    models: Sequence[DualEncoderModule],
    *,
    batch_sizes: tuple[int, int] = (1, 64),
    seconds: float = 1.0,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> list[dict[str, float]]:
    """Measure models in turns, so that a machine that slows down or speeds up favours none of them.

    A round measures, for every model, latency at one thread, latency at all threads and throughput at all threads,
    each for the given seconds; every figure of time is the median over the rounds. "All" is torch's number of threads
    at the call, which is restored afterwards. Time is that of the image tower alone, from prepared pixels to the
    embedding, float32 as loaded, on the CPU; decoding and resizing are not in it.

    Args:
        models: on the CPU.
        batch_sizes: images at once for the latency, and for the throughput.
        seconds: length of one measurement, of which there are three per model and round.
        rounds: turns.
        clock: seconds since any moment.

    Returns:
        Per model `latency_ms_pP_1_thread` and `latency_ms_pP_all_threads` for the percentiles 50, 90 and 99 (linear
        interpolation), `images_per_second_all_threads`, `threads`, and the figures of `static_figures`.

    Raises:
        UserError: no model, one that is not on the CPU, or a batch size, length or number of rounds not above 0.
    """
    if not models or min(*batch_sizes, seconds, rounds) <= 0:
        raise UserError(
            f"Found {len(models)} models, batch sizes {batch_sizes}, {seconds} seconds and {rounds} rounds; expected a "
            "model and numbers above 0."
        )
    for model in models:
        if model.device.type != "cpu":
            raise UserError(f"{model.name} is on {model.device}; speed is measured on the CPU, load it there.")
    threads = torch.get_num_threads()
    taken: list[list[dict[str, float]]] = [[] for _ in models]
    for _ in range(rounds):
        for model, found in zip(models, taken, strict=True):
            found.append(_one_round(model, batch_sizes, seconds, threads, clock))
    return [
        {name: float(np.median([turn[name] for turn in turns])) for name in turns[0]}
        | {"threads": float(threads)}
        | static_figures(model)
        for model, turns in zip(models, taken, strict=True)
    ]


def _one_round(
    model: DualEncoderModule, batch_sizes: tuple[int, int], seconds: float, threads: int, clock: Clock
) -> dict[str, float]:
    found: dict[str, float] = {}
    single, many = (_pixels(model, size) for size in batch_sizes)
    with torch.inference_mode(), evaluating(model):
        for name, count in (("1_thread", 1), ("all_threads", threads)):
            with _threads(count):
                times = durations(lambda: model.encode({"pixels": single}, ("image.embed",)), seconds, clock)
            values = np.percentile(1000 * times, PERCENTILES)
            found |= {f"latency_ms_p{p}_{name}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
        with _threads(threads):
            times = durations(lambda: model.encode({"pixels": many}, ("image.embed",)), seconds, clock)
    return found | {"images_per_second_all_threads": float(len(many) / np.median(times))}


def durations(step: Callable[[], object], seconds: float, clock: Clock) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds of each run of `step` (R,), after a warm-up: all that begin within the given time, or `MIN_RUNS`."""
    for _ in range(WARM_UP):
        step()
    times: list[float] = []
    end = clock() + seconds
    while True:
        start = clock()
        if start >= end and len(times) >= MIN_RUNS:
            return np.array(times)
        step()
        times.append(clock() - start)


def _pixels(model: DualEncoderModule, size: int) -> Tensor:
    """The first probe image, prepared as in evaluation: (B, 3, H, W)."""
    return torch.stack([model.preprocessing.image_transform(probe_images()[0])] * size)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def static_figures(model: DualEncoderModule) -> dict[str, float]:
    """What needs no clock.

    Returns:
        `image_parameters`, `text_parameters` (each with its projection) and their sum `parameters`; `flops_image` of
        one image, and `flops_text` of one sentence of seven words as the model pads it, where there is a text tower;
        `bytes`: all files of the model's folder, or where its name is no folder its parameters and buffers.
    """
    counts = model.parameter_counts()
    found = {
        "parameters": float(sum(counts.values())),
        "image_parameters": float(counts["image"]),
        "text_parameters": float(counts["text"]),
        "flops_image": float(count_flops(lambda: model.encode({"pixels": _pixels(model, 1)}, ("image.embed",)), model)),
    }
    if "text.embed" in model.provides:
        text = model.preprocessing.tokenize(SENTENCES[:1])
        found["flops_text"] = float(count_flops(lambda: model.encode(text, ("text.embed",)), model))
    return found | {"bytes": float(size_on_disk(model))}


def count_flops(step: Callable[[], object], model: torch.nn.Module) -> int:
    """FLOPs of one forward: products of matrices, convolutions and attention, a multiply-add counted as two.

    Elementwise work, norms and softmax are left out, as in the usual tables (which often count a multiply-add once).
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    # The counter knows neither the CPU's fused attention nor the fused transformer layer: both would count as zero.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            step()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def size_on_disk(model: DualEncoderModule) -> int:
    """Bytes of all files below the model's folder; without a folder, of its parameters and buffers in memory."""
    folder = Path(model.name)
    if model.name and folder.is_dir():
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def as_measured(figures: dict[str, float], *, batch_sizes: tuple[int, int], seconds: float, rounds: int) -> Measured:
    """The figures in the form of every protocol; the main one, latency, is better when smaller."""
    return Measured(
        protocol="speed",
        task="speed",
        metrics={name: value for name, value in figures.items() if name != "threads"},
        main_metric="latency_ms_p50_1_thread",
        interval=None,
        random_score=None,
        counts={"threads": int(figures["threads"])},
        per_item={},
        notes={
            "latency_batch": batch_sizes[0],
            "throughput_batch": batch_sizes[1],
            "seconds": seconds,
            "rounds": rounds,
            "flops": "a multiply-add is two",
            "device": "cpu",
        },
    )

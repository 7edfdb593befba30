"""What a run costs, from times and sizes that were measured: rates, the bottleneck, and when stored teachers pay.

Per image, an online step takes t_student + sum of t_teacher, a cached one t_student. One process prepares and trains in
turn: the data's time is added. With workers the two overlap, and the slowest of three sets the pace: the step, the
workers, and the processor's cores, which have t_step * threads + t_data of work for each image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

PART_WORDS = {"data": "preparing the data", "teacher": "the teachers' forward passes", "student": "the student's step"}
WORTHWHILE = 1.1
"""A setting is worth a word from so much more speed on."""
ROOM = 0.9
"""Share of the memory that a run may fill: what else runs there needs some, and measurements scatter."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds per image on one rank.

    Args:
        student: the step with targets at hand: forward, losses, backward, update.
        teachers: the forward pass of each, beside the student.
        data: one process reads, decodes, augments and tokenises what the student alone sees.
        data_online: the same for student and teachers.
    """

    student: float
    teachers: Mapping[str, float]
    data: float
    data_online: float


@dataclass(frozen=True, kw_only=True)
class Host:
    """What runs where.

    Args:
        cores: that each rank may use.
        threads: of the process that trains; beside a GPU it is 1.
        workers: processes that prepare data, for each rank.
        ranks: how many there are, each on a device or cores of its own.
    """

    cores: int
    threads: int
    workers: int
    ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one place must hold, in bytes by part, and what it has."""

    where: str
    parts: Mapping[str, float]
    available: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it leaves some room."""
        return self.total <= ROOM * self.available


def images_per_second(step: float, data: float, host: Host) -> float:
    """The rate of all ranks.

    Args:
        step: seconds per image of one rank's step, data aside.
        data: seconds per image of one process that prepares data.
        host: workers and cores.
    """
    if not host.workers:
        return host.ranks / (step + data)
    work = step * min(host.threads, host.cores) + data
    return host.ranks / max(step, data / min(host.workers, host.cores), work / host.cores)


def decoding_rate(data: float, host: Host) -> float:
    """Images per second that all workers of all ranks prepare when nothing else runs."""
    return host.ranks * min(max(1, host.workers), host.cores) / data


def online_rate(times: Times, host: Host) -> float:
    """Images per second with the teachers beside the student."""
    return images_per_second(times.student + sum(times.teachers.values()), times.data_online, host)


def cached_rate(times: Times, host: Host) -> float:
    """Images per second with stored teachers, and without any."""
    return images_per_second(times.student, times.data, host)


def bottleneck(times: Times, host: Host, *, online: bool) -> tuple[str, float]:
    """The part ("data", "teacher" or "student") that limits the rate, and its share of the time that does."""
    parts = {"student": times.student, "teacher": sum(times.teachers.values()) if online else 0.0}
    step, data = sum(parts.values()), times.data_online if online else times.data
    threads = min(host.threads, host.cores) if host.workers else 1
    work = {name: value * threads for name, value in parts.items()} | {"data": data}
    if host.workers and data / min(host.workers, host.cores) >= max(step, sum(work.values()) / host.cores):
        return "data", 1.0
    # Where the step itself sets the pace, preparing data costs nothing.
    found = parts if host.workers and step >= sum(work.values()) / host.cores else work
    part = max(found, key=found.__getitem__)
    return part, found[part] / sum(found.values())


def best_workers(step: float, data: float, host: Host) -> tuple[int, float]:
    """The fewest workers that come within 2 % of the best rate, and their rate."""
    rates = {
        workers: images_per_second(
            step, data, Host(cores=host.cores, threads=host.threads, workers=workers, ranks=host.ranks)
        )
        for workers in range(host.cores + 1)
    }
    best = max(rates.values())
    fewest = min(workers for workers, rate in rates.items() if rate >= 0.98 * best)
    return fewest, rates[fewest]


def parts_that_fit(memory: Memory, accumulate: int, batch_size: int) -> int | None:
    """The smallest `train.accumulate` (of doubled values) with which the memory suffices; None where none does."""
    activations = memory.parts.get("activations", 0.0)
    parts = accumulate
    while parts < batch_size:
        parts = min(2 * parts, batch_size)
        if memory.total - activations * (1 - accumulate / parts) <= ROOM * memory.available:
            return parts
    return None


def advice(
    times: Times, host: Host, memory: Memory, *, online: bool, views: int, accumulate: int, batch_size: int
) -> tuple[str, str]:
    """What limits the run ("memory", "data", "teacher" or "student"), and a sentence with the setting that moves it."""
    if not memory.fits:
        needs = f"{memory.where} would need {gib(memory.total)} and has {gib(memory.available)}"
        parts = parts_that_fit(memory, accumulate, batch_size)
        change = (
            f"train.accumulate={parts} would fit" if parts else "set train.batch_size lower or take a smaller model"
        )
        return "memory", f"Memory limits the run: the {needs}; {change}."
    part, share = bottleneck(times, host, online=online)
    rate = online_rate(times, host) if online else cached_rate(times, host)
    step = times.student + (sum(times.teachers.values()) if online else 0.0)
    workers, with_workers = best_workers(step, times.data_online if online else times.data, host)
    stored = cached_rate(times, host)
    change = {
        "data": "smaller pictures in the shards, data.keep_short_side or more cores would help",
        "student": "train.precision, train.compile or a smaller model.image would move it",
        "teacher": "smaller teachers, teachers.views or train.precision would move it",
    }[part]
    if part == "teacher" and stored >= WORTHWHILE * rate:
        change = f"teachers.views={views} would train on stored features at {count(stored)} images/s, not {count(rate)}"
    elif with_workers >= WORTHWHILE * rate:
        change = f"data.workers={workers} would give {count(with_workers)} images/s, not {count(rate)}"
    return part, f"The run is limited by {PART_WORDS[part]} ({share:.0%} of its time): {change}."


@dataclass(frozen=True, kw_only=True)
class Payback:
    """When storing the teachers' features pays; None where it never does.

    Attributes:
        epochs: of one run after which building the cache and training from it is the quicker way.
        runs: like this one that share the cache, after which it is.
    """

    epochs: float | None
    runs: int | None


def payback(*, online: float, cached: float, build: float, start: float, images: int, samples: int) -> Payback:
    """When a cache pays.

    Each image of a run saves 1/online - 1/cached seconds, each run `start`, and building costs `build`. With the
    teachers' passes over images alone, it is E * N online against K * N stored: E > K.

    Args:
        online: images per second.
        cached: images per second.
        build: seconds.
        start: seconds of encoding all captions, which each run with teachers beside it begins with.
        images: N, of one epoch.
        samples: of one run.
    """
    saved = 1 / online - 1 / cached
    by_run = saved * samples + start
    return Payback(
        epochs=max(0.0, build - start) / saved / images if saved > 0 else None,
        runs=max(1, math.ceil(build / by_run)) if by_run > 0 else None,
    )


def payback_sentence(found: Payback, *, online: float, cached: float, build: float, epochs: float, views: int) -> str:
    """The same in words.

    Args:
        found: when it pays.
        online: seconds of the run with teachers beside it.
        cached: seconds of the run with stored ones.
        build: seconds of building the cache; 0 where it is there.
        epochs: E, of the run.
        views: K.
    """
    if found.runs is None or found.epochs is None:
        return "Stored teachers never pay here: the run is as quick with the teachers beside it."
    if not build:
        return f"The cache is there: stored teachers take {duration(cached)}, teachers beside it {duration(online)}."
    takes = f"{duration(cached)} and {duration(build)} for the cache, against {duration(online)} online"
    when = f"a cache of K={views} views pays after {found.epochs:.3g} epochs"
    if found.runs == 1:
        return f"Stored teachers pay in this run of {epochs:.3g} epochs: {takes}; {when}."
    return f"Stored teachers pay from run {found.runs} that shares them on: {takes}; {when}, this run has {epochs:.3g}."


def duration(seconds: float) -> str:
    """In the unit that suits: 40 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, size in ((100, "s", 1), (100 * 60, "min", 60), (72 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**25 else f"{size / 2**20:.3g} MiB"


def count(value: float) -> str:
    """A rate: three digits, or whole numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""A stand-in for lmms-eval 0.7: the classes that an adapter meets, with their signatures and nothing behind them."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest.mock import patch


class CacheHook:
    """Remembers what it is told, as the store of answers of lmms-eval does on disk."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def add_partial(self, attr: str, req: object, res: str) -> None:
        self.told.append((attr, req, res))


class Lmms(abc.ABC):
    """`lmms_eval.api.model.lmms`."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, object] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        given = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        return cls(**given, **{key: value for key, value in (additional_config or {}).items() if value is not None})

    @property
    def rank(self):
        return self._rank


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def requests_of(docs, gen_kwargs, *, task="t", split="test", pictures=lambda doc: [doc["image"]]):
    """Requests as a task of the type generate_until makes them, and the data that the evaluator gives the model."""
    made = [
        SimpleNamespace(args=(doc["question"], dict(gen_kwargs), pictures, number, task, split))
        for number, doc in enumerate(docs)
    ]
    return made, {task: {split: docs}}


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside, `import lmms_eval` finds the stand-in."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    modules = {name: ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    with patch.dict("sys.modules", modules):
        yield

"""Conversations by their position in the endless sequence, and the batches that they make for one or two models.

Nothing depends on workers or ranks, and nothing is augmented (as LLaVA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image as images
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlkd.data.conversations import Conversation
from vlkd.data.decoded import Decoded
from vlkd.data.images import BadImage
from vlkd.data.plan import Plan
from vlkd.data.samples import Travelling
from vlkd.data.sources import ImageFile, Pairs
from vlkd.errors import TooLong, UserError
from vlkd.features import IGNORED, IMAGE_PLACEHOLDER, ConversationPreprocessing, Turn

BLANK = images.new("RGB", (32, 32), (127, 127, 127))
BLANK_TURNS = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat is it?"), Turn("assistant", "nothing"))
MOST_ASPECT = 100
"""Sides further apart would make gigabytes of a picture in processors that scale its short side."""


class AnswerStore(Protocol):
    """A teacher's stored answers."""

    def answers(self, key: str, /) -> tuple[Tensor, Tensor, Tensor]:
        """Of a conversation with a answer tokens: ids (a, K) int64 of the K likeliest tokens, their log-probabilities
        (a, K), and the probability (a,) of all others."""
        ...


@dataclass(frozen=True)
class ConversationBatch(Travelling):
    """One rank's part of a step.

    Attributes:
        keys: B keys.
        rows: (B,) the conversations' numbers.
        inputs: per model name its `pixels` (B, 3, H, W), `ids` and `labels` (B, T) int64, `mask` (B, T) bool or the
            numbers of `vlkd.models.question_mask`, and `image_sizes` where pictures are tiled. Where no conversation
            can be used, B is 0 and there is one row, a blank picture without a label, so that such a rank runs (and
            gathers) what the others do.
        stored: the teacher's `indices` (A, K) int64, `values` (A, K) and `rest` (A,) in the order of the batch's answer
            tokens; {} without stored answers.
        bad: what was left out because its picture cannot be used or it is longer than a context: key to reason.
    """

    keys: list[str]
    rows: Tensor
    inputs: dict[str, dict[str, Tensor]]
    stored: dict[str, Tensor] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def to(self, device: torch.device) -> ConversationBatch:
        """The same on another device; pixels that two models share are sent once."""
        if device.type == "cpu":
            return self
        sent: dict[int, Tensor] = {}

        def send(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for value in part.values():
                if id(value) not in sent:
                    sent[id(value)] = value.to(device, non_blocking=True)
            return {name: sent[id(value)] for name, value in part.items()}

        inputs = {name: send(part) for name, part in self.inputs.items()}
        return replace(self, inputs=inputs, stored=send(self.stored))


@dataclass(frozen=True, kw_only=True)
class ConversationSample:
    """A conversation prepared for its models; without a picture there is a problem.

    Attributes:
        key: of the conversation.
        row: its number.
        pictures: per model name as decoded for it.
        encoded: per model name ids and labels (T,), and numbers (T,) of questions that stand alone.
        stored: indices (a, K), values (a, K) and rest (a,); None without stored answers.
        problem: why it is left out.
    """

    key: str
    row: int
    pictures: Mapping[str, Image] = field(default_factory=dict)
    encoded: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    stored: tuple[Tensor, Tensor, Tensor] | None = None
    problem: str = ""


class ConversationSequence(Dataset[ConversationSample]):
    """The endless sequence of conversations, by position, as `vlkd.data.loader.BatchStream` takes it.

    Args:
        conversations: the data.
        preparations: per model name how it takes pictures and conversations; pictures that come out equal for two
            models are prepared once.
        seed: of the order without a plan.
        plan: the order; without one, a permutation of all rows for each epoch.
        stored: the teacher's answers, in place of the teacher.
        keep_side: hold all pictures in memory, decoded and reduced to this short side; 0 decodes them each time.

    Raises:
        UserError: there is no conversation.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        preparations: Mapping[str, ConversationPreprocessing],
        *,
        seed: int,
        plan: Plan | None = None,
        stored: AnswerStore | None = None,
        keep_side: int = 0,
    ) -> None:
        self.conversations = list(conversations)
        self.preparations = dict(preparations)
        self.seed = seed
        self.plan = plan or Plan([[len(self.conversations)]], seed=seed)
        self.stored = stored
        keys, texts, files = [], [], []
        for talk in self.conversations:
            keys.append(talk.key)
            texts.append(tuple(turn.text for turn in talk.turns))
            files.append(talk.image)
        self.table = Pairs(keys, texts, files)
        self.leaders = _leaders(self.preparations)
        self.decoded: Decoded | None = None
        if keep_side:
            places: dict[ImageFile, int] = {}
            self.places = [places.setdefault(file, len(places)) for file in files]
            self.decoded = Decoded(Pairs([""] * len(places), [()] * len(places), list(places)), keep_side)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, position: int) -> ConversationSample:
        """Raises `UserError` where the models' or the stored answer tokens differ; the sentence has the key."""
        row, _ = self.plan.row(position)
        talk = self.conversations[row]
        try:
            pictures = self._pictures(row)
            encoded = {
                name: (preparation.encode_questions if talk.alone else preparation.encode)(
                    talk.turns, image=pictures[name], key=talk.key
                )
                for name, preparation in self.preparations.items()
            }
        except (BadImage, TooLong) as error:
            return ConversationSample(key=talk.key, row=row, problem=str(error))
        answers = _shared_answers(talk.key, encoded)
        stored = None
        if self.stored is not None:
            stored = self.stored.answers(talk.key)
            if len(stored[0]) != answers:
                raise UserError(
                    f"The stored answers of {talk.key!r} have {len(stored[0])} tokens, found {answers} in its "
                    "conversation; store them again with `vlkd cache answers`."
                )
        return ConversationSample(key=talk.key, row=row, pictures=pictures, encoded=encoded, stored=stored)

    def _pictures(self, row: int) -> dict[str, Image]:
        """Per model the picture as decoded for it; raises `BadImage` for one that cannot be used."""
        decoded: dict[int | None, Image] = {}
        found = {}
        for name, preparation in self.preparations.items():
            hint = None if self.decoded is not None else _hint(preparation)
            if hint not in decoded:
                decoded[hint] = self._decode(row, hint)
            found[name] = decoded[hint]
        return found

    def _decode(self, row: int, hint: int | None) -> Image:
        if self.decoded is not None:
            image = self.decoded.image(self.places[row])
        else:
            image = self.table.image(row, size_hint=hint)
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise BadImage(f"the picture is {image.width} x {image.height}, longer than {MOST_ASPECT}:1; crop it.")
        return image

    def collate(self, samples: Sequence[ConversationSample]) -> ConversationBatch:
        """Pad the conversations and prepare their pictures, once for models that take them alike."""
        good = [sample for sample in samples if not sample.problem]
        pixels: dict[str, dict[str, Tensor]] = {}
        inputs = {}
        for name, preparation in self.preparations.items():
            leader = self.leaders[name]
            if leader not in pixels:
                pixels[leader] = preparation.image_inputs([sample.pictures[name] for sample in good] or [BLANK])
            rows = [sample.encoded[name] for sample in good]
            inputs[name] = {**pixels[leader], **preparation.pad(rows or [_blank_row(preparation)])}
        return ConversationBatch(
            keys=[sample.key for sample in good],
            rows=torch.tensor([sample.row for sample in good], dtype=torch.int64),
            inputs=inputs,
            stored={} if self.stored is None else _joined([sample.stored for sample in good if sample.stored]),
            bad={sample.key: sample.problem for sample in samples if sample.problem},
        )


def _hint(preparation: ConversationPreprocessing) -> int | None:
    """The side to which a decoder may reduce; tiled models need the picture's own size."""
    return 2 * max(preparation.image_size) if preparation.visual_tokens else None


def _leaders(preparations: Mapping[str, ConversationPreprocessing]) -> dict[str, str]:
    """For each model the first one that makes equal pixels of three pictures: wide, tall, and large."""
    if len(preparations) == 1:
        return {name: name for name in preparations}
    drawn = np.random.default_rng(0)
    sizes = ((61, 97), (97, 61), (500, 640))
    probes = [images.fromarray(drawn.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    known: dict[str, list[dict[str, Tensor]]] = {}
    leaders = {}
    for name, preparation in preparations.items():
        own = [preparation.image_inputs([probe]) for probe in probes]
        same = [
            other
            for other, found in known.items()
            if _hint(preparations[other]) == _hint(preparation) and all(map(_equal, own, found))
        ]
        leaders[name] = same[0] if same else name
        known[name] = own
    return leaders


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def _shared_answers(key: str, encoded: Mapping[str, tuple[Tensor, ...]]) -> int:
    """The number of answer tokens, which are the same to all models."""
    found = {name: labels[labels != IGNORED] for name, (_, labels, *_) in encoded.items()}
    first, *others = found
    for other in others:
        if not torch.equal(found[first], found[other]):
            raise UserError(
                f"The answers of the conversation {key!r} are {len(found[first])} tokens to the {first} and "
                f"{len(found[other])} other ones to the {other}: their tokenizers or chat templates differ; give "
                "models that share both."
            )
    return len(found[first])


def _blank_row(preparation: ConversationPreprocessing) -> tuple[Tensor, Tensor]:
    ids, labels = preparation.encode(BLANK_TURNS, image=BLANK)
    return ids, torch.full_like(labels, IGNORED)


def _joined(stored: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    if not stored:
        return {"indices": torch.empty((0, 1), dtype=torch.int64), "values": torch.empty(0, 1), "rest": torch.empty(0)}
    indices, values, rest = zip(*stored, strict=True)
    return {"indices": torch.cat(indices), "values": torch.cat(values), "rest": torch.cat(rest)}

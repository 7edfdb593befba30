"""Conversations about pictures as LLaVA's JSON lists them: one picture, and turns of a human and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlkd.data.records import resolve_inside
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER, Turn

ROLES: Mapping[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
FORM = '{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}'


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Questions about one picture and their answers.

    Attributes:
        key: the sample's name, without repeats.
        image: where the picture is.
        turns: user first, in turn with the assistant, who has the last word; one `<image>` in all, the user's.
    """

    key: str
    image: ImageFile
    turns: tuple[Turn, ...]


def read_llava(file: Path, root: Path | None = None) -> list[Conversation]:
    """The conversations of a LLaVA file, in its order.

    An id that stands for several samples, as in LLaVA's own mixtures, gets -2, -3 and so on from its second one.

    Args:
        file: .json with a list of samples, or .jsonl with one sample a line.
        root: folder of the pictures, which no path may leave; that of the file by default.

    Raises:
        UserError: a sample is not as expected, has not exactly one picture and one `<image>` in a question, or an
            answer without words; the sentence has its id. Or pictures are missing.
    """
    found: list[Conversation] = []
    taken: set[str] = set()
    for number, entry in enumerate(_entries(file), 1):
        name, image, turns = _sample(entry, file, number)
        key, repeat = name, 1
        while key in taken:
            repeat += 1
            key = f"{name}-{repeat}"
        taken.add(key)
        place = resolve_inside(root or file.parent, image, f"{file}, sample {name!r}")
        found.append(Conversation(key=key, image=ImageFile(place), turns=turns))
    _check_present(found, file)
    return found


def check_turns(turns: Sequence[Turn], where: str) -> None:
    """Raise `UserError` unless the turns are as `Conversation` says.

    Args:
        turns: of one conversation.
        where: file and sample, to begin the sentence.
    """
    roles = [turn.role for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{where}: the turns are {', '.join(roles) or 'none'}; expected user and assistant in turn.")
    for turn in turns:
        if turn.role == "assistant" and not turn.text.strip():
            raise UserError(f"{where}: an answer without words; write the answer, or leave the sample out.")
        if turn.role == "assistant" and IMAGE_PLACEHOLDER in turn.text:
            raise UserError(f"{where}: {IMAGE_PLACEHOLDER} in an answer; it belongs to a question.")
        try:
            turn.text.encode()  # JSON escapes can spell half a surrogate pair, which no tokenizer takes.
        except UnicodeError as error:
            raise UserError(f"{where}: a turn that is no UTF-8 ({error}); mend its escapes.") from None
    count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if count != 1:
        raise UserError(
            f"{where}: {count} times {IMAGE_PLACEHOLDER} for one picture; write it once, in the question where the "
            "picture belongs."
        )


def _entries(file: Path) -> list[Any]:
    if not file.is_file():
        raise UserError(f"There is no file {file}; check the path.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}); expected a list of {FORM}.") from None
    if not isinstance(content, list):
        raise UserError(f"{file} is no list; expected a list of {FORM}.")
    return content


def _sample(entry: object, file: Path, number: int) -> tuple[str, str, tuple[Turn, ...]]:
    """Name, picture and turns of an entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int) or entry["id"] == "":
        raise UserError(f"{file}, sample {number}: no id; expected {FORM}.")
    name = str(entry["id"])
    where = f"{file}, sample {name!r}"
    images = entry.get("image")
    listed = images if isinstance(images, list) else [images] if images else []
    if len(listed) != 1 or not isinstance(listed[0], str) or not listed[0]:
        raise UserError(f"{where}: {len(listed)} pictures, expected one; leave samples with none or several out.")
    said = entry.get("conversations")
    if not isinstance(said, list) or not all(_is_turn(turn) for turn in said):
        raise UserError(f"{where}: expected conversations as in {FORM}.")
    turns = tuple(Turn(ROLES[turn["from"]], turn["value"].strip()) for turn in said)
    check_turns(turns, where)
    return name, listed[0], turns


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and value.get("from") in list(ROLES) and isinstance(value.get("value"), str)


def _check_present(found: Sequence[Conversation], file: Path) -> None:
    known: dict[Path, bool] = {}
    missing = []
    for sample in found:
        path = sample.image.path
        if path not in known:
            known[path] = path.is_file()
        if not known[path]:
            missing.append(sample)
    if missing:
        raise UserError(
            f"{file}: the pictures of {len(missing)} of {len(found)} samples are missing, first "
            f"{missing[0].image.path} of {missing[0].key!r}; name their folder, or leave those samples out."
        )

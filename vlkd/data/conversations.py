"""Conversations about pictures, from LLaVA's JSON and from shards: one picture, and turns of a human and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from vlkd.data.files import strict_json
from vlkd.data.records import resolve_inside
from vlkd.data.remote import is_remote, redacted
from vlkd.data.shard_refs import expand_shards
from vlkd.data.shards import IndexedSample, index_shard, read_member
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER, Turn, with_choices

ROLES: Mapping[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
FORM = '{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}'
SHARD_FORM = '{"qa": [{"question", "answer"}, ...]} or {"conversations": [...]}'
LLAVA_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Questions about one picture and their answers.

    Attributes:
        key: the sample's name, without repeats.
        image: where the picture is.
        turns: user first, in turn with the assistant, who has the last word; one `<image>` in all, the user's. A
            question with choices has them in its text (`vlkd.features.with_choices`).
        kinds: of each answer, "" for none; () where no answer has one.
        choices: of each answer those to choose from, () for an open one; () where all are open.
        alone: each question is asked by itself, without the turns before it; else the turns are one dialogue.
    """

    key: str
    image: ImageFile
    turns: tuple[Turn, ...]
    kinds: tuple[str, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()
    alone: bool = False


def open_conversations(refs: Sequence[str]) -> list[Conversation]:
    """All conversations of several sources, one after the other.

    Args:
        refs: LLaVA files, `FILE.json` or `FILE.jsonl` with its pictures beside it, or `FILE.json@FOLDER` where they lie
            elsewhere; and VQA shards: a .tar, a folder of them, or a pattern with `*` or `{000..099}`.

    Returns:
        Keys without repeats: where those of a later source repeat earlier ones, its number stands in front, `1:` for
        the second.

    Raises:
        UserError: nothing is named or there, or a sample is refused by `read_llava` or `read_vqa_shards`.
    """
    if not refs:
        raise UserError("No conversations are named; give LLaVA files or shards.")
    found: list[Conversation] = []
    known: set[str] = set()
    for number, ref in enumerate(refs):
        own = _open(ref)
        while not known.isdisjoint(one.key for one in own):
            own = [replace(one, key=f"{number}:{one.key}") for one in own]
        known.update(one.key for one in own)
        found += own
    return found


def read_llava(file: Path, root: Path | None = None) -> list[Conversation]:
    """The conversations of a LLaVA file, in its order.

    A sample may say more of its answers: "kinds": [str, ...] and "choices": [[str, ...], ...], one entry per answer;
    and "alone": true, where its questions are no dialogue and each is asked by itself.

    An id that stands for several samples, as in LLaVA's own mixtures, gets -2, -3 and so on from its second one.

    Args:
        file: .json with a list of samples, or .jsonl with one sample a line.
        root: folder of the pictures, which no path may leave; that of the file by default.

    Raises:
        UserError: a sample is not as expected, has not exactly one picture and one `<image>` in a question, or an
            answer without words, or kinds or choices of another number than its answers; the sentence has its id.
            Or pictures are missing.
    """
    found: list[Conversation] = []
    taken: set[str] = set()
    for number, entry in enumerate(_entries(file), 1):
        name, image, said = _sample(entry, file, number)
        key, repeat = name, 1
        while key in taken:
            repeat += 1
            key = f"{name}-{repeat}"
        taken.add(key)
        place = resolve_inside(root or file.parent, image, f"{file}, sample {name!r}")
        found.append(Conversation(key=key, image=ImageFile(place), **said))
    _check_present(found, file)
    return found


def read_vqa_shards(shards: Sequence[Path]) -> list[Conversation]:
    """The conversations of shards of one source, in their order; written for instance by `vlkd.data.vqa_writer`.

    A sample is KEY.jpg (png, webp) and KEY.json = {"conversations": [LLaVA's turns], "kinds"?, "choices"?,
    "alone"?}, or
    {"qa": [[QUESTION, ANSWER] or {"question", "answer", "kind"?, "choices"?}, ...]}, whose questions are each asked by
    themselves. The picture is beside its questions, so an `<image>` that is missing is put before the first one.

    Raises:
        UserError: a shard has a `Problem` (see `vlkd.data.tar_members`), a key stands for two samples, or a sample has
            no JSON or another fault that `read_llava` refuses; the sentence has its key.
    """
    found: dict[str, Conversation] = {}
    for shard in shards:
        index = index_shard(shard)
        if index.problems:
            raise UserError(
                f"{shard} has {len(index.problems)} problems, first {index.problems[0]}; write the shard again, or "
                "leave it out."
            )
        for sample in index.samples:
            where = f"{shard}, sample {sample.key!r}"
            if sample.key in found:
                raise UserError(f"{where}: the key stands for two samples; give each one of its own.")
            said = _said(_shard_entry(shard, sample, where), where)
            image = ImageFile(shard, sample.image.offset, sample.image.size)
            found[sample.key] = Conversation(key=sample.key, image=image, **said)
    return list(found.values())


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


class _Said(TypedDict):
    turns: tuple[Turn, ...]
    kinds: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    alone: bool


def _open(ref: str) -> list[Conversation]:
    if is_remote(ref):
        raise UserError(f"{redacted(ref)} is not on this machine; copy conversations to a disk, and name that place.")
    file, _, root = ("", "", "") if Path(ref).exists() else ref.rpartition("@")
    if file.endswith(LLAVA_SUFFIXES):
        return read_llava(Path(file), Path(root))
    path = Path(ref)
    if path.suffix in LLAVA_SUFFIXES:
        return read_llava(path)
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"{ref} holds no conversations; expected a LLaVA .json or .jsonl, or shards (.tar).")
    if not path.exists() and path.suffix != ".tar" and not set(ref) & set("*?[{"):
        raise UserError(f"There is nothing at {ref}; give a LLaVA .json or .jsonl, or shards (.tar) or their folder.")
    found = read_vqa_shards([Path(place) for place in expand_shards([ref])])
    if not found:
        raise UserError(f"{ref} holds no sample; check it.")
    return found


def _shard_entry(shard: Path, sample: IndexedSample, where: str) -> dict[str, Any]:
    members = [text for text in sample.texts if text.extension == "json"]
    if not members:
        raise UserError(f"{where}: no JSON member; expected {SHARD_FORM}.")
    try:
        entry = strict_json(read_member(shard, members[0].offset, members[0].size).decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{where}: no UTF-8 JSON ({error}); expected {SHARD_FORM}.") from None
    if not isinstance(entry, dict) or ("qa" in entry) == ("conversations" in entry):
        raise UserError(f"{where}: expected {SHARD_FORM}.")
    if "qa" in entry:
        if entry.get("alone", True) is not True:
            raise UserError(f'{where}: "alone" beside "qa", whose questions are; write a dialogue as "conversations".')
        entry = _from_pairs(entry["qa"], where)
    said = entry["conversations"]
    spoken = isinstance(said, list) and said and all(map(_is_turn, said))
    if spoken and not any(IMAGE_PLACEHOLDER in turn["value"] for turn in said):
        said = [{**said[0], "value": f"{IMAGE_PLACEHOLDER}\n{said[0]['value']}"}, *said[1:]]
    return {**entry, "conversations": said}


def _from_pairs(pairs: object, where: str) -> dict[str, Any]:
    """LLaVA's form of questions with answers."""
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{where}: no questions; expected {SHARD_FORM}.")
    turns: list[dict[str, Any]] = []
    kinds, choices = [], []
    for pair in pairs:
        if isinstance(pair, list) and len(pair) == 2:
            pair = {"question": pair[0], "answer": pair[1]}
        if not isinstance(pair, dict) or not all(isinstance(pair.get(name), str) for name in ("question", "answer")):
            raise UserError(f"{where}: a question that is not as in {SHARD_FORM}.")
        turns += [{"from": "human", "value": pair["question"]}, {"from": "gpt", "value": pair["answer"]}]
        kinds.append(pair.get("kind") or "")
        choices.append(pair.get("choices") or [])
    return {
        "conversations": turns,
        "kinds": kinds if any(kinds) else [],
        "choices": choices if any(choices) else [],
        "alone": True,
    }


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


def _sample(entry: object, file: Path, number: int) -> tuple[str, str, _Said]:
    """Name, picture and what is said of it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int) or entry["id"] == "":
        raise UserError(f"{file}, sample {number}: no id; expected {FORM}.")
    name = str(entry["id"])
    where = f"{file}, sample {name!r}"
    images = entry.get("image")
    listed = images if isinstance(images, list) else [images] if images else []
    if len(listed) != 1 or not isinstance(listed[0], str) or not listed[0]:
        raise UserError(f"{where}: {len(listed)} pictures, expected one; leave samples with none or several out.")
    return name, listed[0], _said(entry, where)


def _said(entry: Mapping[str, Any], where: str) -> _Said:
    said = entry.get("conversations")
    if not isinstance(said, list) or not all(_is_turn(turn) for turn in said):
        raise UserError(f"{where}: expected conversations as in {FORM}.")
    turns = [Turn(ROLES[turn["from"]], turn["value"].strip()) for turn in said]
    check_turns(turns, where)
    kinds, choices = entry.get("kinds") or [], entry.get("choices") or []
    if not _are_texts(kinds) or not isinstance(choices, list) or not all(_are_texts(each) for each in choices):
        raise UserError(f'{where}: expected "kinds" as [str, ...] and "choices" as [[str, ...], ...].')
    if not isinstance(entry.get("alone", False), bool):
        raise UserError(f'{where}: found "alone": {entry["alone"]!r}; expected true or false.')
    answers = len(turns) // 2
    for name, listed in (("kinds", kinds), ("choices", choices)):
        if listed and len(listed) != answers:
            raise UserError(f"{where}: {len(listed)} {name} for {answers} answers; give one for each, or none at all.")
    for number, options in enumerate(choices):
        turns[2 * number] = Turn("user", with_choices(turns[2 * number].text, options))
    return {
        "turns": tuple(turns),
        "kinds": tuple(kinds),
        "choices": tuple(map(tuple, choices)),
        "alone": bool(entry.get("alone")),
    }


def _are_texts(value: object) -> bool:
    try:
        return isinstance(value, list) and all(isinstance(text.encode(), bytes) for text in value)
    except (AttributeError, UnicodeError):  # JSON escapes can spell half a surrogate pair
        return False


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

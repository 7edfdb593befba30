"""Conversations as a model's own chat template writes them: token ids, and labels on the answers alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vlkd.errors import TooLong, UserError
from vlkd.features import IGNORED, IMAGE_PLACEHOLDER, Turn
from vlkd.models.question_mask import FIRST_QUESTION, PADDING, SHARED
from vlkd.models.tokenizer import first_line

SHOWN = 80
"""Letters of a question in a message."""


@dataclass(frozen=True)
class Chat:
    """A processor's way with conversations; it has no weights and travels to worker processes.

    Attributes:
        name: of the model, for messages.
        processor: the transformers processor with its tokenizer and chat template.
        image_token: the token that the model replaces by the picture.
        image_token_id: its id.
        context_length: the largest number of tokens; 0 is unknown.
        listed: the template takes contents as lists of parts; else as strings.
    """

    name: str
    processor: Any
    image_token: str
    image_token_id: int
    context_length: int
    listed: bool

    def render(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        """The template's text, one image token for the picture; with `prompt` up to where an answer begins."""
        messages = [{"role": turn.role, "content": self._content(turn.text)} for turn in turns]
        try:
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False))
        except Exception as error:  # templates raise their own
            raise UserError(
                f"The chat template of {self.name} refuses a conversation of {len(turns)} turns ({first_line(error)}); "
                "expected turns of user and assistant, mend the template."
            ) from error

    def _content(self, text: str) -> Any:
        if not self.listed:
            return text.replace(IMAGE_PLACEHOLDER, self.image_token)
        parts: list[dict[str, str]] = []
        for index, words in enumerate(text.split(IMAGE_PLACEHOLDER)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": words.strip()}] if words.strip() else []
        return parts

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their characters (from, to); the tokenizer's own first token is added where the text has none."""
        tokenizer = self.processor.tokenizer
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        found = tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)
        return list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]


def open_chat(name: str, processor: Any, *, image_token_id: int, context_length: int) -> Chat:
    """How this processor wants its conversations.

    Raises:
        UserError: there is no chat template, the tokenizer is slow, or the template drops the picture.
    """
    if not getattr(processor, "chat_template", None):
        if not getattr(processor.tokenizer, "chat_template", None):
            raise UserError(
                f"{name} has no chat template; add its chat_template.jinja, which says how turns are written."
            )
        processor.chat_template = processor.tokenizer.chat_template
    if not processor.tokenizer.is_fast:
        raise UserError(f"{name} has a slow tokenizer, which tells no offsets; save its folder with a fast one.")
    token = str(processor.image_token)
    probe = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat is it?"),)
    for listed in (True, False):
        chat = Chat(name, processor, token, image_token_id, context_length, listed)
        # A template for strings prints the list itself, or stumbles over it.
        try:
            text = chat.render(probe, prompt=True)
        except UserError:
            continue
        if text.count(token) == 1 and "What is it?" in text and "'type'" not in text:
            return chat
    raise UserError(f"The chat template of {name} does not write {token} where the picture stands; mend the template.")


def encode_conversation(
    chat: Chat, turns: Sequence[Turn], *, visual_tokens: int, key: str = ""
) -> tuple[Tensor, Tensor]:
    """Token ids of a whole conversation and labels, -100 but on the answers and on the token that ends each.

    The text is tokenised as a whole. An answer reaches from where the template's prompt for it ends to its end token;
    a token that overlaps it belongs to it, as in transformers' assistant masks. Where a template ends answers by no
    special token (LLaVA 1.5's in transformers), the tokenizer's end token is put there, as in LLaVA's own training.

    Args:
        chat: from `open_chat`; also a model's `preprocessing.chat`.
        turns: user first, in turn with the assistant; one `<image>` in all.
        visual_tokens: N, by which the one image token is replaced.
        key: the sample's name, for messages.

    Returns:
        ids (T,) and labels (T,) int64; labels[t] is ids[t] or -100, not shifted.

    Raises:
        UserError: no answer, an answer without a token or with an end token inside, not exactly one picture.
        TooLong: more tokens than the context.
    """
    where = f"The conversation {key!r}" if key else "A conversation"
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{where} has no answer; expected turns of user and assistant.")
    text, answers = _text_and_answers(chat, turns, where)
    ids, places = chat.encode(text)
    labels = [IGNORED] * len(ids)
    for begin, end in answers:
        inside = [at for at, (first, last) in enumerate(places) if first < end and last > begin]
        # The last one is the end token, which alone is no answer.
        if len(inside) < 2:
            raise _no_tokens(where)
        ends = {ids[inside[-1]], chat.processor.tokenizer.eos_token_id}
        if early := [ids[at] for at in inside[:-1] if ids[at] in ends]:
            token = chat.processor.tokenizer.convert_ids_to_tokens(early[0])
            raise UserError(
                f"{where} has {token!r} inside of an answer, which to {chat.name} ends it; take it out of the text, or "
                "leave the sample out."
            )
        for at in inside:
            labels[at] = ids[at]
    return _expand(chat, ids, labels, visual_tokens, where)


def encode_questions(
    chat: Chat, turns: Sequence[Turn], *, visual_tokens: int, key: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Questions about one picture, each as if it were a conversation of its own, and the picture in front once.

    In a conversation with several questions later answers can be read off earlier ones ("Is there a red cup?", "What is
    red?") without a look at the picture. Here a question sees the picture and itself, see `vlkd.models.question_mask`.
    `<image>` goes in front of each question, as in evaluation. The row may be longer than the context, which is that of
    the picture and one question; its mask takes T^2, so a picture with hundreds of questions is better written as two.

    Args:
        chat: from `open_chat`.
        turns: as in `encode_conversation`, with nothing but questions and answers.
        visual_tokens: N.
        key: the sample's name, for messages.

    Returns:
        ids (T,) and labels (T,) as of `encode_conversation`, and the number of each token's question (T,) int64, from
        `FIRST_QUESTION` on, `SHARED` up to the picture.

    Raises:
        UserError: as `encode_conversation`, or the chat template has the question in front of the picture.
        TooLong: picture and one question are longer than the context.
    """
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    numbers: list[Tensor] = []
    for number in range(len(turns) // 2):
        asked, answered = turns[2 * number : 2 * number + 2]
        text = asked.text.replace(IMAGE_PLACEHOLDER, "").strip()
        own, own_labels = encode_conversation(
            chat, (Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}"), answered), visual_tokens=visual_tokens, key=key
        )
        shared = int((own == chat.image_token_id).nonzero()[-1]) + 1
        if number and not torch.equal(own[:shared], ids[0][: numbers[0].eq(SHARED).sum()]):
            raise UserError(
                f"The chat template of {chat.name} writes a question in front of the picture, so the questions of "
                f"{key!r} cannot share it; give each question a conversation of its own."
            )
        begin = shared if number else 0
        # What a template writes behind an answer predicts nothing.
        end = int((own_labels != IGNORED).nonzero()[-1]) + 1
        ids.append(own[begin:end])
        labels.append(own_labels[begin:end])
        numbers.append(torch.full((end - begin,), FIRST_QUESTION + number))
        if not number:
            numbers[0][:shared] = SHARED
    return torch.cat(ids), torch.cat(labels), torch.cat(numbers)


def prompt_ids(chat: Chat, turns: Sequence[Turn] | str, *, visual_tokens: int) -> Tensor:
    """Ids (T,) int64 of a prompt up to where the answer begins; a string is a question about the picture.

    Earlier answers are ended as in `encode_conversation`, so that a prompt is the beginning of what was trained.
    """
    asked = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{turns}"),) if isinstance(turns, str) else turns
    where = f"The prompt {textwrap.shorten(asked[-1].text, SHOWN)!r}"
    ids, _ = chat.encode(_text_and_answers(chat, asked, where, prompt=True)[0])
    return _expand(chat, ids, ids, visual_tokens, where)[0]


def pad_conversations(rows: Sequence[tuple[Tensor, ...]], pad_id: int, *, left: bool = False) -> dict[str, Tensor]:
    """`ids`, `labels` (B, T) int64 and `mask` (B, T) of encoded conversations, T the longest.

    The mask is bool, or the numbers of `vlkd.models.question_mask` where a row has several questions.

    Args:
        rows: from `encode_conversation` or `encode_questions`.
        pad_id: the id under padding.
        left: pad in front, as generation needs it.
    """
    longest = max(len(row[0]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.full((len(rows), longest), PADDING)
    for index, (own, own_labels, *numbers) in enumerate(rows):
        place = slice(longest - len(own), longest) if left else slice(0, len(own))
        ids[index, place], labels[index, place] = own, own_labels
        mask[index, place] = numbers[0] if numbers else SHARED
    # With one question a row there is nothing to hide, and every language model takes a bool mask.
    numbered = bool((mask > FIRST_QUESTION).any())
    return {"ids": ids, "labels": labels, "mask": mask if numbered else mask != PADDING}


def answer_positions(labels: Tensor) -> Tensor:
    """Positions (B, T) bool whose logits predict an answer token, each one before its token; A are true."""
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORED
    return keep


def answer_targets(labels: Tensor) -> Tensor:
    """The answer tokens (A,) of labels (B, T), in the order of the logits at `answer_positions`."""
    following = labels[:, 1:]
    return following[following != IGNORED]


def _text_and_answers(
    chat: Chat, turns: Sequence[Turn], where: str, *, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and the characters (from, to) of each answer with its end token."""
    whole = chat.render(turns, prompt=prompt)
    text, taken, answers = "", 0, []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        answer = turn.text.strip()
        if not answer:
            raise _no_tokens(where)
        asked, answered = chat.render(turns[:index], prompt=True), chat.render(turns[: index + 1])
        begin = len(asked)
        found = whole.find(answer, begin, len(answered))
        if not whole.startswith(asked) or found < 0:
            raise UserError(
                f"{where}: the chat template of {chat.name} does not continue its own prompt with the "
                f"answer {answer!r}; expected a template whose prompt is how it writes the turns before an answer."
            )
        after = found + len(answer)
        # A template may write the last turn otherwise: its own end is no part of the whole, nor is the next turn ours.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, answered, strict=False)))
        end = same if same >= after else len(answered)
        stop, closed = _closing(chat, whole, after, end)
        text += whole[taken:begin]
        first = len(text)
        text += whole[begin:after] + closed
        answers.append((first, len(text)))
        taken = stop
    return text + whole[taken:], answers


def _no_tokens(where: str) -> UserError:
    return UserError(f"{where} has an answer without tokens; write the answer, or leave the sample out.")


def _closing(chat: Chat, whole: str, after: int, end: int) -> tuple[int, str]:
    """Where the text goes on behind an answer, and what closes the answer: the template's end token, or ours."""
    rest = whole[after:end]
    blank = len(rest) - len(rest.lstrip())
    tokenizer = chat.processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = [token for token in special - {chat.image_token} if rest.startswith(token, blank)]
    if own:
        stop = after + blank + max(map(len, own))
        return stop, whole[after:stop]
    if not tokenizer.eos_token:
        raise UserError(
            f"{chat.name}: neither chat template nor tokenizer ends an answer; set the tokenizer's eos_token."
        )
    return after + blank, str(tokenizer.eos_token)


def _expand(
    chat: Chat, ids: Sequence[int], labels: Sequence[int], visual_tokens: int, where: str
) -> tuple[Tensor, Tensor]:
    """Both with the one image token replaced by N."""
    count = sum(token == chat.image_token_id for token in ids)
    if count != 1:
        raise UserError(
            f"{where} has {count} image tokens, expected one; write {IMAGE_PLACEHOLDER} once, where the picture stands."
        )
    at = list(ids).index(chat.image_token_id)
    long_ids = [*ids[:at], *[chat.image_token_id] * visual_tokens, *ids[at + 1 :]]
    long_labels = [*labels[:at], *[IGNORED] * visual_tokens, *labels[at + 1 :]]
    if chat.context_length and len(long_ids) > chat.context_length:
        raise TooLong(
            f"{where} has {len(long_ids)} tokens, {visual_tokens} of them for the picture, and {chat.name} takes "
            f"{chat.context_length}; shorten it or leave it out."
        )
    return torch.tensor(long_ids), torch.tensor(long_labels)

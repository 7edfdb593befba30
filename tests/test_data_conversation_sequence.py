"""Conversations as batches: labels, shared pixels, stored answers, workers, ranks and resumption."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.pairs import noise, picture_pairs
from helpers.tiny_vlms import write_llava, write_llava_next
from PIL import Image

from vlkd.data.bucketed_plan import BucketedPlan, text_lengths
from vlkd.data.conversation_sequence import ConversationBatch, ConversationSequence
from vlkd.data.conversations import Conversation
from vlkd.data.images import open_image
from vlkd.data.loader import BatchStream
from vlkd.data.sources import ImageFile, Pairs
from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.question_mask import FIRST_QUESTION, PADDING, SHARED
from vlkd.models.via_llava import load_llava

COUNT = 23
WORDS = ("There", "are", "two", "red", "cups,", "and", "a", "blue", "one.")


def talk(number: int, image: ImageFile) -> Conversation:
    """One to three questions with answers of unequal length."""
    turns = []
    for turn in range(1 + number % 3):
        turns += [
            Turn("user", ("" if turn else "<image>\n") + "How many cups are on the table?"),
            Turn("assistant", " ".join(WORDS[: 1 + (number + 2 * turn) % len(WORDS)])),
        ]
    return Conversation(key=f"k{number}", image=image, turns=tuple(turns))


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    pairs = picture_pairs(tmp_path_factory.mktemp("pictures"), [()] * COUNT)
    return [talk(number, file) for number, file in enumerate(pairs.files)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Preparations alone, as workers have them."""
    folder = tmp_path_factory.mktemp("models")
    changes = {"small": {}, "large": {"image_size": 48}, "other": {"vocab_size": 280}}
    found = {name: load_llava(str(write_llava(folder / name, **own))).preprocessing for name, own in changes.items()}
    return found | {"next": load_llava(str(write_llava_next(folder / "next"))).preprocessing}


def whole(sequence, count=COUNT) -> ConversationBatch:
    return sequence.collate([sequence[position] for position in range(count)])


def assert_same(left: ConversationBatch, right: ConversationBatch) -> None:
    assert (left.keys, left.bad, left.rows.tolist()) == (right.keys, right.bad, right.rows.tolist())
    for name, part in {**left.inputs, "stored": left.stored}.items():
        other = right.stored if name == "stored" else right.inputs[name]
        assert part.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in part.items()), name


class Numbered:
    """Stored answers that tell whose they are: indices are KEY's number, values count its tokens."""

    def __init__(self, lengths):
        self.lengths = lengths

    def answers(self, key):
        count = self.lengths[key]
        values = torch.arange(count).float()[:, None].repeat(1, 3)
        return torch.full((count, 3), int(key[1:])), values, values[:, 0] / 100


def test_collated_conversations_are_padded_as_by_hand(talks, prepared):
    preparation = prepared["small"]
    batch = whole(ConversationSequence(talks, {"student": preparation}, seed=3))
    assert sorted(batch.keys) == sorted(one.key for one in talks)
    assert [f"k{row}" for row in batch.rows] == batch.keys
    assert batch.inputs.keys() == {"student"}
    found = batch.inputs["student"]
    own = {one.key: preparation.encode(one.turns) for one in talks}
    longest = max(len(ids) for ids, _ in own.values())
    assert len({len(ids) for ids, _ in own.values()}) > 5
    for row, key in enumerate(batch.keys):
        ids, labels = (part.tolist() for part in own[key])
        missing = longest - len(ids)
        assert found["ids"][row].tolist() == ids + [preparation.pad_id] * missing
        assert found["labels"][row].tolist() == labels + [-100] * missing
        assert found["mask"][row].tolist() == [True] * len(ids) + [False] * missing
        # Read back, the labels are the answers.
        number = int(key[1:])
        spoken = preparation.chat.processor.tokenizer.decode([label for label in labels if label >= 0])
        said = [turn.text for turn in talks[number].turns if turn.role == "assistant"]
        assert [part.strip() for part in spoken.split("</s>")[:-1]] == said
        assert torch.equal(found["pixels"][row], preparation.image_transform(noise(number)))


def test_questions_that_stand_alone_have_numbers_in_the_mask(talks, prepared):
    """Beside dialogues in one batch, whose tokens all see what is in front of them."""
    preparation = prepared["small"]
    mixed = [replace(one, alone=number % 2 == 0) for number, one in enumerate(talks)]
    found = (batch := whole(ConversationSequence(mixed, {"student": preparation}, seed=3))).inputs["student"]
    assert found["mask"].dtype == torch.int64
    for row, number in enumerate(batch.rows.tolist()):
        turns = mixed[number].turns
        real = found["mask"][row] != PADDING
        if mixed[number].alone:
            ids, labels, numbers = preparation.encode_questions(turns)
            assert numbers.max() == FIRST_QUESTION - 1 + len(turns) // 2
        else:
            ids, labels = preparation.encode(turns)
            numbers = torch.full_like(ids, SHARED)
        assert torch.equal(found["ids"][row][real], ids)
        assert torch.equal(found["labels"][row][real], labels)
        assert torch.equal(found["mask"][row][real], numbers)


def test_workers_change_nothing(talks, prepared):
    lengths = {one.key: int((prepared["small"].encode(one.turns)[1] >= 0).sum()) for one in talks}
    models = {"student": prepared["small"], "teacher": prepared["large"]}
    plan = BucketedPlan(text_lengths(talks), batch_size=4, window=3, seed=1)
    alone, helped = (
        list(
            BatchStream(
                ConversationSequence(talks, models, seed=1, plan=plan, stored=Numbered(lengths)),
                batch_size=4, samples=48, workers=workers,
            )
        )
        for workers in (0, 2)
    )  # fmt: skip
    assert len(alone) == 12
    for left, right in zip(alone, helped, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("bucketed", [False, True])
def test_ranks_share_the_batches_of_one(talks, prepared, bucketed):
    def stream(**options):
        plan = BucketedPlan(text_lengths(talks), batch_size=4, window=3, seed=1) if bucketed else None
        sequence = ConversationSequence(talks, {"student": prepared["small"]}, seed=1, plan=plan)
        return list(BatchStream(sequence, batch_size=4, samples=COUNT + 4, **options))

    ranks = [stream(rank=rank, world_size=2) for rank in range(2)]
    for step, expected in enumerate(stream()):
        parts = [rank[step] for rank in ranks]
        assert [key for part in parts for key in part.keys] == expected.keys
        pixels = torch.cat([part.inputs["student"]["pixels"] for part in parts])
        assert torch.equal(pixels, expected.inputs["student"]["pixels"])
        for name in ("ids", "labels"):
            rows = [row[keep] for part in parts for row, keep in
                    zip(part.inputs["student"][name], part.inputs["student"]["mask"], strict=True)]  # fmt: skip
            own = [row[keep] for row, keep in
                   zip(expected.inputs["student"][name], expected.inputs["student"]["mask"], strict=True)]  # fmt: skip
            assert all(map(torch.equal, rows, own))


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_state_continues_in_the_middle_of_an_epoch(talks, prepared, stop):
    def stream(**options):
        plan = BucketedPlan(text_lengths(talks), batch_size=4, window=3, seed=1)
        sequence = ConversationSequence(talks, {"student": prepared["small"]}, seed=1, plan=plan, **options)
        return BatchStream(sequence, batch_size=4, samples=40)

    first = stream()
    steps = iter(first)
    taken = [next(steps) for _ in range(stop)]
    second = stream()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for found, expected in zip(taken + list(second), stream(), strict=True):
        assert_same(found, expected)


def test_a_state_of_other_data_is_refused(talks, prepared):
    def stream(data, plan=None):
        return BatchStream(
            ConversationSequence(data, {"student": prepared["small"]}, seed=1, plan=plan), batch_size=4, samples=40
        )

    answered = replace(talks[0], turns=(talks[0].turns[0], Turn("assistant", "other")))
    with pytest.raises(UserError, match="made with data"):
        stream([answered, *talks[1:]]).load_state_dict(stream(talks).state_dict())
    plan = BucketedPlan(text_lengths(talks), batch_size=4, window=3, seed=1)
    with pytest.raises(UserError, match="made with plan"):
        stream(talks, plan).load_state_dict(stream(talks).state_dict())


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, prepared):
    files = picture_pairs(tmp_path, [()] * 60, broken=(7,)).files
    Image.new("RGB", (909, 9)).save(tmp_path / "long.png")
    data = [talk(number, file) for number, file in enumerate(files)]
    data[20] = replace(data[20], image=ImageFile(tmp_path / "long.png"))
    data[41] = replace(data[41], turns=(data[41].turns[0], Turn("assistant", "cups " * 200)))
    stream = BatchStream(ConversationSequence(data, {"student": prepared["small"]}, seed=0), batch_size=12, samples=60)
    batches = list(stream)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(
        {one.key for one in data} - {"k7", "k20", "k41"}
    )
    assert all(len(batch.inputs["student"][name]) == len(batch.keys) for batch in batches for name in ("pixels", "ids"))
    assert stream.bad.keys() == {"k7", "k20", "k41"}
    assert "is damaged" in stream.bad["k7"]
    assert "909 x 9, longer than 100:1" in stream.bad["k20"]
    assert "tokens" in stream.bad["k41"]


def test_a_batch_of_nothing_is_one_blank_picture_without_labels(tmp_path, prepared):
    files = picture_pairs(tmp_path, [()] * 2, broken=(0, 1)).files
    models = {"student": prepared["small"], "teacher": prepared["large"]}
    sequence = ConversationSequence(
        [talk(n, file) for n, file in enumerate(files)], models, seed=0, stored=Numbered({})
    )
    batch = whole(sequence, 2)
    assert (batch.keys, len(batch.rows), set(batch.bad)) == ([], 0, {"k0", "k1"})
    for name, preparation in models.items():
        found = batch.inputs[name]
        assert found["pixels"].shape == (1, 3, *preparation.image_size)
        assert (found["labels"] == -100).all()
        image_id = preparation.chat.image_token_id
        assert int((found["ids"] == image_id).sum()) == preparation.visual_tokens
    assert {name: len(value) for name, value in batch.stored.items()} == {"indices": 0, "values": 0, "rest": 0}


def test_equal_pixels_are_prepared_once_and_others_are_each_models_own(talks, prepared):
    same = whole(ConversationSequence(talks, {"student": prepared["small"], "teacher": prepared["other"]}, seed=0), 0)
    assert same.inputs["student"]["pixels"] is same.inputs["teacher"]["pixels"]
    assert same.inputs["student"]["ids"] is not same.inputs["teacher"]["ids"]
    moved = same.to(torch.device("meta"))
    assert moved.inputs["student"]["pixels"] is moved.inputs["teacher"]["pixels"]
    assert {value.device.type for part in moved.inputs.values() for value in part.values()} == {"meta"}
    found = whole(ConversationSequence(talks, {"student": prepared["small"], "teacher": prepared["large"]}, seed=0), 4)
    for name, model in (("student", "small"), ("teacher", "large")):
        alone = whole(ConversationSequence(talks, {name: prepared[model]}, seed=0), 4)
        assert all(torch.equal(value, found.inputs[name][key]) for key, value in alone.inputs[name].items())
    # Settings that differ in nothing but the mean are told apart, too.
    shifted = pickle.loads(pickle.dumps(prepared["small"]))
    shifted.processor.image_mean = [0.4, 0.5, 0.5]
    assert ConversationSequence(talks, {"a": prepared["small"], "b": shifted}, seed=0).leaders == {"a": "a", "b": "b"}


@pytest.mark.parametrize("workers", [0, 1])
def test_models_with_other_answer_tokens_are_refused(talks, prepared, workers):
    sequence = ConversationSequence(talks, {"student": prepared["small"], "teacher": prepared["other"]}, seed=0)
    with pytest.raises(UserError, match=r"^The answers of the conversation 'k\d+' are \d+ tokens to the student and"):
        list(BatchStream(sequence, batch_size=4, samples=20, workers=workers))


def test_stored_answers_stand_in_the_order_of_the_labels(talks, prepared):
    lengths = {one.key: int((prepared["small"].encode(one.turns)[1] >= 0).sum()) for one in talks}
    batch = whole(ConversationSequence(talks, {"student": prepared["small"]}, seed=3, stored=Numbered(lengths)))
    labels = batch.inputs["student"]["labels"]
    owners = (labels[:, 1:] != -100).nonzero()[:, 0].tolist()
    assert batch.stored["indices"].shape == (len(owners), 3)
    assert [f"k{number}" for number in batch.stored["indices"][:, 0]] == [batch.keys[row] for row in owners]
    within = [place for key in batch.keys for place in range(lengths[key])]
    assert batch.stored["values"][:, 0].tolist() == within
    np.testing.assert_allclose(batch.stored["rest"].numpy(), np.array(within) / 100, rtol=1e-6)
    sequence = ConversationSequence(
        talks, {"student": prepared["small"]}, seed=3, stored=Numbered(lengths | {"k5": lengths["k5"] + 1})
    )
    with pytest.raises(UserError, match=f"The stored answers of 'k5' have {lengths['k5'] + 1} tokens, found"):
        whole(sequence)


def test_pictures_in_memory_are_decoded_once_and_small(tmp_path, prepared, monkeypatch):
    files = picture_pairs(tmp_path, [()] * 3, broken=(2,)).files
    data = [talk(number, files[min(number // 2, 2)]) for number in range(5)]
    read = []
    before = Pairs.image
    monkeypatch.setattr(Pairs, "image", lambda *args, **more: read.append(args[1]) or before(*args, **more))
    sequence = ConversationSequence(data, {"student": prepared["small"]}, seed=0, keep_side=20)
    assert read == [0, 1, 2]
    batch = whole(sequence, 5)
    assert read == [0, 1, 2]
    assert set(batch.bad) == {"k4"}
    for key, pixels in zip(batch.keys, batch.inputs["student"]["pixels"], strict=True):
        seen = noise(int(key[1:]) // 2).resize((27, 20), Image.Resampling.BICUBIC)
        assert torch.equal(pixels, prepared["small"].image_transform(seen))


def test_tiled_pictures_keep_their_own_sizes(tmp_path, prepared):
    data = []
    for number, size in enumerate([(64, 32), (40, 90), (70, 70)]):
        noise(number, size).save(tmp_path / f"{number}.jpg")
        data.append(talk(number, ImageFile(tmp_path / f"{number}.jpg")))
    preparation = prepared["next"]
    batch = whole(ConversationSequence(data, {"teacher": preparation}, seed=0), 3)
    found = batch.inputs["teacher"]
    pictures = [open_image(tmp_path / f"{key[1:]}.jpg") for key in batch.keys]
    assert found["image_sizes"].tolist() == [[picture.height, picture.width] for picture in pictures]
    assert torch.equal(found["pixels"], preparation.image_inputs(pictures)["pixels"])
    for picture, ids in zip(pictures, found["ids"], strict=True):
        assert int((ids == preparation.chat.image_token_id).sum()) == preparation.places_of(picture)


def test_real_padding_falls(talks, prepared):
    """In tokens, of the places of language alone: a picture's are equal for all."""

    def padding(plan):
        sequence = ConversationSequence(talks, {"student": prepared["small"]}, seed=1, plan=plan)
        batches = list(BatchStream(sequence, batch_size=4, samples=4 * COUNT))
        masks = [batch.inputs["student"]["mask"][:, 16:] for batch in batches]
        return sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    plain, sorted_ = padding(None), padding(BucketedPlan(text_lengths(talks), batch_size=4, window=5, seed=1))
    assert plain > 0.25
    assert sorted_ < 0.5 * plain


def test_a_sequence_travels_to_a_spawned_worker(talks, prepared):
    sequence = ConversationSequence(talks, {"student": prepared["small"], "teacher": prepared["large"]}, seed=0)
    copy = pickle.loads(pickle.dumps(sequence))
    assert_same(pickle.loads(pickle.dumps(whole(copy, 3))), whole(sequence, 3))

"""A teacher's stored answers: what they keep, how they are continued, found again, refused and verified."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch
from helpers.tiny_conversations import COLOURS, colour_image, colour_turns
from helpers.tiny_vlms import write_llava

from vlkd.cli.cache import main
from vlkd.data.conversation_sequence import ConversationSequence
from vlkd.data.conversations import Conversation
from vlkd.data.sources import ImageFile
from vlkd.distill.answers import build
from vlkd.distill.answers.build import build_answers
from vlkd.distill.answers.dense import densify, rounded, sparsify
from vlkd.distill.answers.fidelity import error_in_words, verify_answers
from vlkd.distill.answers.format import AnswerSpec, states_of
from vlkd.distill.answers.read import open_answers
from vlkd.distill.token_distiller import TEACHER, answer_logits
from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.label_masks import answer_targets, pad_conversations
from vlkd.models.via_llava import load_llava
from vlkd.objectives import token_kl

SPEC = AnswerSpec(top=8, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("answers") / "teacher", seed=1)


@pytest.fixture
def teacher(folder):
    return load_llava(folder)


@pytest.fixture
def talks(tmp_path):
    """Seven conversations of different lengths, one of two turns."""
    found = []
    for index in range(7):
        name = list(COLOURS)[index % 4]
        path = tmp_path / f"{index}.png"
        colour_image(name).resize((40 + index, 40)).save(path)
        turns = [
            *colour_turns(name),
            *([Turn("user", "Sure?"), Turn("assistant", "yes " * index)] if index > 3 else []),
        ]
        found.append(Conversation(key=f"talk-{index}", image=ImageFile(path), turns=tuple(turns)))
    return found


def alone(teacher, talk):
    """The teacher's logits for one conversation, nothing beside it."""
    from PIL import Image

    image = Image.open(talk.image.path).convert("RGB")
    prepared = teacher.preprocessing
    row = prepared.encode(talk.turns, image=image)
    inputs = prepared.image_inputs([image]) | pad_conversations([row], prepared.pad_id)
    with torch.no_grad():
        return answer_logits(teacher, inputs)


def test_a_whole_distribution_comes_back_up_to_a_constant():
    logits = 5 * torch.randn(200, 30)
    dense = densify(*sparsify(logits, 30), 30)
    torch.testing.assert_close(dense, logits.log_softmax(dim=1), rtol=1e-5, atol=1e-5)
    student = torch.randn(200, 30)
    torch.testing.assert_close(
        token_kl(dense, student, tau=2.0), token_kl(logits, student, tau=2.0), rtol=1e-4, atol=1e-5
    )


def test_what_is_left_is_spread_evenly():
    logits = torch.tensor([[3.0, 0.0, 2.0, -1.0, 0.5], [0.0, 9.0, 1.0, 1.0, 2.0]])
    indices, values, rest = sparsify(logits, 2)
    shares = logits.double().softmax(dim=1)
    assert indices.tolist() == [[0, 2], [1, 4]]
    torch.testing.assert_close(values.double().exp(), shares.gather(1, indices), rtol=1e-5, atol=0)
    found = densify(indices, values, rest, 5).double().softmax(dim=1)
    for row in range(2):
        for token in range(5):
            left = 1 - shares[row, indices[row]].sum()
            expected = shares[row, token] if token in indices[row] else left / 3
            assert found[row, token].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_small_rest_keeps_its_digits_and_none_stays_finite():
    logits = torch.zeros(1, 10)
    logits[0, 0] = 60.0
    _, _, rest = sparsify(logits, 1)
    assert rest.item() == pytest.approx(9 * 2.718281828459045**-60, rel=1e-3)
    dense = densify(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1), 10)
    assert torch.isfinite(dense).all()
    assert densify(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0), 5).shape == (0, 5)


def test_half_precision_holds_tokens_that_are_masked_by_a_large_number(tmp_path, teacher, talks):
    logits = torch.tensor([[1.0, 0.5, -1e9, -1e9]])
    indices, values, rest = sparsify(logits, 3)
    assert densify(indices, rounded(values, torch.float16), rest, 4).isfinite().all()
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight[4:].mul_(1e6)
    stored = build_answers(tmp_path / "out", teacher, talks, AnswerSpec(top=teacher.vocabulary))
    assert stored.manifest["identity"]["dtype"] == "float16"
    for talk in talks:
        _, values, _ = stored.answers(talk.key)
        logs = alone(teacher, talk).log_softmax(dim=1).sort(dim=1, descending=True).values
        assert logs.min() < -65504
        assert values.isfinite().all()
        torch.testing.assert_close(values, logs.clamp_min(-65504), rtol=2e-3, atol=1e-2)


def test_stored_answers_are_those_of_each_conversation_alone(tmp_path, teacher, talks):
    stored = build_answers(tmp_path / "out", teacher, talks, SPEC, batch_size=3)
    assert len(stored) == 7
    assert stored.vocabulary == teacher.vocabulary
    for talk in reversed(talks):
        indices, values, rest = stored.answers(talk.key)
        logs = alone(teacher, talk).log_softmax(dim=1)
        expected = logs.topk(8, dim=1)
        assert indices.dtype == torch.int64
        assert indices.tolist() == expected.indices.tolist()
        torch.testing.assert_close(values, expected.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rest, 1 - expected.values.exp().sum(dim=1), rtol=1e-3, atol=1e-5)
    assert stored.manifest["tokens"] == sum(len(alone(teacher, talk)) for talk in talks)
    travelled = pickle.loads(pickle.dumps(stored))
    assert all(map(torch.equal, travelled.answers("talk-5"), stored.answers("talk-5")))


def test_they_reach_batches_in_the_order_of_their_answer_tokens(tmp_path, teacher, talks):
    stored = build_answers(tmp_path / "out", teacher, talks, replace(SPEC, top=teacher.vocabulary), batch_size=3)
    sequence = ConversationSequence(talks, {TEACHER: teacher.preprocessing}, seed=3, stored=stored)
    batch = sequence.collate([sequence[position] for position in range(5)])
    with torch.no_grad():
        logits = answer_logits(teacher, batch.inputs[TEACHER])
    assert len(batch.stored["rest"]) == len(answer_targets(batch.inputs[TEACHER]["labels"]))
    dense = densify(*(batch.stored[name] for name in ("indices", "values", "rest")), stored.vocabulary)
    torch.testing.assert_close(dense, logits.log_softmax(dim=1), rtol=1e-4, atol=1e-4)


def test_a_build_that_was_stopped_is_continued(tmp_path, teacher, talks, monkeypatch):
    monkeypatch.setattr(build, "SHARD_CONVERSATIONS", 3)
    build_answers(tmp_path / "whole", teacher, talks, SPEC, batch_size=2)
    passes = []

    def counted(*args, stop):
        passes.append(1)
        if len(passes) > stop:
            raise KeyboardInterrupt
        return answer_logits(*args)

    monkeypatch.setattr(build, "answer_logits", lambda *args: counted(*args, stop=3))
    with pytest.raises(KeyboardInterrupt):
        build_answers(tmp_path / "out", teacher, talks, SPEC, batch_size=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.00000.safetensors"]
    with pytest.raises(UserError, match="holds half of the stored answers; continue them with `vlkd cache answers"):
        open_answers(tmp_path / "out", teacher, talks)
    with pytest.raises(UserError, match=r"with another top \(found 8, expected 4\)"):
        build_answers(tmp_path / "out", teacher, talks, replace(SPEC, top=4), batch_size=2)
    passes.clear()
    monkeypatch.setattr(build, "answer_logits", lambda *args: counted(*args, stop=99))
    stored = build_answers(tmp_path / "out", teacher, talks, SPEC, batch_size=2)
    # Two conversations pass at a time, those of the first shard no more.
    assert len(passes) == 3
    assert stored.manifest["computed"] == 4
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    passes.clear()
    build_answers(tmp_path / "out", teacher, talks, SPEC, batch_size=2)
    assert not passes
    damaged = tmp_path / "out" / "answers.00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"answers.00001.safetensors is missing, damaged or not the one"):
        open_answers(tmp_path / "out", teacher, talks)
    (tmp_path / "out" / "manifest.json").unlink()
    assert build_answers(tmp_path / "out", teacher, talks, SPEC, batch_size=2).manifest["computed"] == 3


def test_a_dialogue_and_the_same_questions_alone_have_other_answers(talks):
    talk = talks[0]
    assert states_of([talk]) == states_of([replace(talk)]) != states_of([replace(talk, alone=True)])


def test_answers_of_something_else_are_refused(tmp_path, teacher, talks):
    out = tmp_path / "out"
    build_answers(out, teacher, talks, SPEC)
    open_answers(out, teacher, talks[2:5][::-1])
    changed = [*talks[:3], replace(talks[3], turns=tuple(colour_turns("blue")))]
    with pytest.raises(UserError, match=r"from other data \(found 3 of 4 conversations as they are now; not 'talk-3'"):
        open_answers(out, teacher, changed)
    with pytest.raises(UserError, match=r"from other data \(found 0 of 1 conversations"):
        open_answers(out, teacher, [replace(talks[0], key="other")])
    with pytest.raises(UserError, match=r"of 7 conversations \(expected 4\)"):
        build_answers(out, teacher, talks[:4], SPEC)
    colour_image("blue").resize((90, 90)).save(talks[2].image.path)
    with pytest.raises(UserError, match=r"found 6 of 7 conversations as they are now; not 'talk-2'"):
        open_answers(out, teacher, talks)
    colour_image("green").resize((42, 40)).save(talks[2].image.path)
    open_answers(out, teacher, talks)
    teacher.processor.chat_template = teacher.processor.chat_template.replace("'<|assistant|>'", "'<|user|>'").replace(
        "'<|' + message['role'] + '|>'", "'<|user|>'"
    )
    with pytest.raises(UserError, match=r"with another chat template"):
        open_answers(out, teacher, talks)
    other = load_llava(teacher.name)
    with torch.no_grad():
        next(other.part_parameters("projector")).add_(0.1)
    with pytest.raises(
        UserError, match=r"stored by a teacher with other weights or preprocessing \(found \w+, expected"
    ):
        open_answers(out, other, talks)
    with pytest.raises(UserError, match=r"holds no stored answers; store them with"):
        open_answers(tmp_path / "nowhere", teacher, talks)
    with pytest.raises(UserError, match=r"Found --top 9999 for a vocabulary of"):
        build_answers(out, teacher, talks, replace(SPEC, top=9999))
    (out / "manifest.json").write_text('{"format": "vlkd-teacher-cache"}')
    with pytest.raises(UserError, match="is no manifest of stored answers of format version 2"):
        open_answers(out, teacher, talks)


def test_what_cannot_be_used_is_named_and_has_no_answers(tmp_path, teacher, talks):
    talks[1].image.path.write_bytes(b"no picture")
    stored = build_answers(tmp_path / "out", teacher, talks, SPEC, batch_size=1)
    assert list(stored.left_out) == ["talk-1"]
    with pytest.raises(UserError, match=r"holds no answers of 'talk-1' \(.*\); leave that conversation out"):
        stored.answers("talk-1")
    with pytest.raises(UserError, match=r"holds no answers of 'new' \(it was not there\)"):
        stored.answers("new")
    assert verify_answers(stored, teacher, talks)["tokens"] == stored.manifest["tokens"]
    talks[2].image.path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 7 conversations cannot be used"):
        build_answers(tmp_path / "more", teacher, talks, SPEC)


def test_the_error_of_storing_is_measured(tmp_path, teacher, talks):
    errors = {
        top: build_answers(tmp_path / f"{top}", teacher, talks, AnswerSpec(top=top)).manifest["error"]
        for top in (2, 32)
    }
    kept, kl, tokens = 0.0, 0.0, 0
    for talk in talks:
        for row in alone(teacher, talk).double().log_softmax(dim=1):
            best = row.argsort(descending=True)[:2]
            stored = torch.full_like(row, float(((1 - row[best].exp().sum()) / (len(row) - 2)).log()))
            stored[best] = row[best].half().double()
            kl += float((row.exp() * (row - stored.log_softmax(dim=0))).sum())
            kept += float(row[best].exp().sum())
            tokens += 1
    assert errors[2]["tokens"] == tokens
    assert errors[2]["kept"] == pytest.approx(kept / tokens, rel=1e-3)
    assert errors[2]["kl"] == pytest.approx(kl / tokens, rel=1e-2)
    for name in ("kl", "token_kl at tau 1/difference", "token_kl at tau 3/difference", "dbild/difference"):
        assert errors[32][name] < errors[2][name]
    assert errors[32]["dbild/value"] == pytest.approx(errors[2]["dbild/value"])


def test_errors_are_told_as_shares_of_their_losses():
    errors = {
        "tokens": 9.0,
        "kept": 0.5,
        "dbild/value": 2.0,
        "dbild/difference": 0.5,
        "kl/value": 0.0,
        "kl/difference": 0,
    }
    assert error_in_words(errors) == "dbild by 25.0%"
    assert error_in_words({}) == ""


def test_verification_finds_flipped_bytes_and_other_numbers(tmp_path, teacher, talks):
    stored = build_answers(tmp_path / "out", teacher, talks, AnswerSpec(top=16))
    found = verify_answers(stored, teacher, talks, sample=3)
    assert found["kl"] < 1e-4
    assert 0 < found["tokens"] < stored.manifest["tokens"]
    other = load_llava(teacher.name)
    with torch.no_grad():
        next(other.part_parameters("projector")).add_(0.1)
    assert verify_answers(stored, other, talks)["kl"] > 0.01
    path = tmp_path / "out" / "answers.00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"has changed since it was written \(sha256"):
        verify_answers(stored, teacher, talks)


def test_the_command_line(tmp_path, folder, talks, capsys, monkeypatch):
    roles = {"user": "human", "assistant": "gpt"}
    samples = [
        {
            "id": talk.key,
            "image": talk.image.path.name,
            "conversations": [{"from": roles[turn.role], "value": turn.text} for turn in talk.turns],
        }
        for talk in talks
    ]
    data = tmp_path / "talks.json"
    data.write_text(json.dumps(samples))
    words = ["answers", "--teacher", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), "--top", "16"]
    main([*words, "--json"])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert (found["conversations"], found["top"], found["dtype"], found["left_out"]) == (7, 16, "float16", 0)
    assert found["conversations_per_second"] > 0
    assert "of the probability kept, KL from the full distribution" in out
    main([*words, "--verify"])
    assert "all hashes as written" in capsys.readouterr().out
    monkeypatch.setattr("vlkd.distill.answers.fidelity.sparsify", lambda z, k: sparsify(z.flip(1), k))
    with pytest.raises(UserError, match=r"are not those computed anew \(largest KL"):
        main([*words, "--verify"])
    with pytest.raises(UserError, match="--top is 0; expected 1 or more"):
        main([*words, "--top", "0"])
    with pytest.raises(UserError, match="there are embeddings and answers"):
        main(["answer"])

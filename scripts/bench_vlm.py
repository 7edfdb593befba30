"""What a Switch-KD step costs beside the sum of its parts, and batched generation beside one answer at a time.

    python scripts/bench_vlm.py --json
    python scripts/bench_vlm.py --student RUN/student --teacher REF --data vqa/val --batch 32 --device cuda --json

Step: vision tower, projector and language model of the student, of the teacher, and the switch path, each measured
alone (forward, and backward where the step has one; the switch path's language model checkpointed as in the step)
against the whole step of the recipe with its three losses. No optimiser is in either, and no loss in the parts.
Generation: the same questions answered in one batch and one by one, with as many new tokens each, and the answers
compared. Without references, two random LLaVA are built, the teacher at least four times the student. All rows go in
turn; figures are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd import recipes
from vlkd.data.conversation_sequence import ConversationBatch, ConversationSequence
from vlkd.data.conversations import open_conversations
from vlkd.distill.token_distiller import STUDENT, TEACHER, TokenDistiller
from vlkd.models.generative import GenerativeVLM
from vlkd.models.label_masks import answer_positions
from vlkd.models.llava_spec import LlavaSpec
from vlkd.models.load_generative import build_vlm, load_generative
from vlkd.models.question_mask import PADDING
from vlkd.models.timm_vlm import TimmVLM

WANTED = {"step_over_parts": "<= 1.25", "batched_over_single": ">= 3"}
SIZES = {
    "student": LlavaSpec(vision_layers=4, language_width=256, language_layers=3),
    "teacher": LlavaSpec(vision_layers=6, language_width=512, language_layers=6, language_heads=8),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="", metavar="REF")
    parser.add_argument("--teacher", default="", metavar="REF")
    parser.add_argument("--data", required=True, nargs="+", metavar="REF", help="conversations")
    parser.add_argument("--batch", type=int, default=16, help="conversations of a step")
    parser.add_argument("--questions", type=int, default=32, help="answered in one batch and one by one")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=0, help="widen the logits of both models to so many tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        models = open_models(args, Path(folder))
        figures = measure_step(args, *models) | measure_generation(args, models[0])
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:<28} {value:10.4f}  {WANTED.get(name, '')}")
    if args.json:
        print(json.dumps(figures | {"settings": {key: value for key, value in vars(args).items()}}, allow_nan=False))


def open_models(args: argparse.Namespace, folder: Path) -> tuple[GenerativeVLM, GenerativeVLM]:
    """Student and teacher on the device, the teacher frozen and checkpointed."""
    refs = {"teacher": args.teacher, "student": args.student}
    texts = [turn.text for one in open_conversations(args.data) for turn in one.turns]
    for name, spec in SIZES.items():
        if not refs[name]:
            torch.manual_seed(0)
            refs[name] = str(build_vlm(spec, folder / name, texts=texts))
    student, teacher = (load_generative(refs[name], device=args.device) for name in ("student", "teacher"))
    if args.vocabulary:
        for model in (student, teacher):
            library_model(model).resize_token_embeddings(args.vocabulary)
            model.vocabulary = args.vocabulary
    student.train()
    teacher.freeze()
    teacher.checkpointing(True)
    counts = {name: sum(one.numel() for one in model.parameters()) for name, model in
              (("student", student), ("teacher", teacher))}  # fmt: skip
    print(", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items()))
    return student, teacher


def library_model(model: GenerativeVLM) -> Any:
    """The transformers model inside: a LLaVA, or the language model behind a timm tower."""
    return model.language_model if isinstance(model, TimmVLM) else model.model


def open_batch(args: argparse.Namespace, student: GenerativeVLM, teacher: GenerativeVLM) -> ConversationBatch:
    """The first conversations."""
    found = open_conversations(args.data)[: args.batch]
    sequence = ConversationSequence(found, {STUDENT: student.preprocessing, TEACHER: teacher.preprocessing}, seed=0)
    return sequence.collate([sequence[i] for i in range(len(found))]).to(torch.device(args.device))


def measure_step(args: argparse.Namespace, student: GenerativeVLM, teacher: GenerativeVLM) -> dict[str, object]:
    """Milliseconds of the whole step and of each part, and their ratio."""
    batch = open_batch(args, student, teacher)
    recipe = recipes.load(recipes.find("tasks", "switch_kd"))
    distiller = TokenDistiller(student, recipe.terms(recipe.config().method), teacher).to(args.device).train()
    rows = {"step": lambda: whole_step(distiller, batch), **parts(student, teacher, batch)}
    rounds = timed(rows, args)
    seconds = {name: statistics.median(one[name] for one in rounds) for name in rows}
    for name, value in seconds.items():
        print(f"{name:<28} {1000 * value:10.2f} ms")
    ratio = statistics.median(
        one["step"] / sum(value for name, value in one.items() if name != "step") for one in rounds
    )
    answers = int(answer_positions(batch.inputs[STUDENT]["labels"]).sum())
    return {
        "ms": {name: 1000 * value for name, value in seconds.items()},
        "step_over_parts": ratio,
        "answer_tokens": answers,
        "tokens": int((batch.inputs[STUDENT]["mask"] != PADDING).sum()),
        "vocabulary": student.vocabulary,
    }


def whole_step(distiller: TokenDistiller, batch: ConversationBatch) -> None:
    """Forward, losses, backward."""
    distiller.zero_grad(set_to_none=True)
    tokens = float(answer_positions(batch.inputs[STUDENT]["labels"]).sum())
    distiller.total(distiller(batch, progress=0.5, tokens=tokens, images=float(len(batch.keys)))).backward()


def parts(student: GenerativeVLM, teacher: GenerativeVLM, batch: ConversationBatch) -> dict[str, Callable[[], None]]:
    """What the step is made of, each alone and from ready inputs."""
    own, other = batch.inputs[STUDENT], batch.inputs[TEACHER]
    keep, keep_other = answer_positions(own["labels"]), answer_positions(other["labels"])
    with torch.no_grad():
        tokens = student.vision(own["pixels"])

    def logits(model: GenerativeVLM, inputs: dict[str, Tensor], seen: Tensor, kept: Tensor) -> Tensor:
        return model.forward_logits(None, inputs["ids"], inputs["mask"], visual=model.project(seen), keep=kept)

    def student_vision() -> None:
        student.zero_grad(set_to_none=True)
        found = student.vision(own["pixels"])
        found.backward(torch.ones_like(found))

    def student_language() -> None:
        student.zero_grad(set_to_none=True)
        found = logits(student, own, tokens.clone().requires_grad_(), keep)
        found.backward(torch.ones_like(found))

    def teacher_pass() -> None:
        with torch.no_grad():
            teacher.forward_logits(other["pixels"], other["ids"], other["mask"], keep=keep_other)

    def switch() -> None:
        found = logits(teacher, other, tokens.clone().requires_grad_(), keep_other)
        found.backward(torch.ones_like(found))

    return {
        "student vision": student_vision,
        "student language": student_language,
        "teacher": teacher_pass,
        "switch path": switch,
    }


def measure_generation(args: argparse.Namespace, student: GenerativeVLM) -> dict[str, object]:
    """Batched answers against one by one, of as many new tokens each."""
    student.eval()
    # No token ends an answer, so that all have the same length.
    library_model(student).generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.questions, 96, 96, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(one.numpy()) for one in pixels]
    questions = [f"What is there{' in the picture' * (i % 3)}?" for i in range(args.questions)]
    found: dict[str, list[str]] = {}

    def answer(name: str, batch_size: int) -> None:
        found[name] = student.answer(images, questions, batch_size=batch_size, max_new_tokens=args.new_tokens)

    rounds = timed({"batched": lambda: answer("batched", args.questions), "single": lambda: answer("single", 1)}, args)
    different = sum(one != two for one, two in zip(found["batched"], found["single"], strict=True))
    print(f"{different} of {args.questions} answers differ between one batch and one by one")
    return {
        "batched_over_single": statistics.median(one["single"] / one["batched"] for one in rounds),
        "different_answers": different,
    }


def timed(rows: dict[str, Callable[[], None]], args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of each row in each round, one call each."""
    for call in rows.values():
        call()
    rounds = []
    for number in range(args.rounds):
        seconds = {}
        # Every other time in the other order: what follows on what is the same for all.
        for name, call in reversed(rows.items()) if number % 2 else rows.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            seconds[name] = time.perf_counter() - started
        rounds.append(seconds)
    return rounds


def synchronize() -> None:
    """Wait for a GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""The run of a generative model from its recipe to its report: data, teacher, checks, student, stages, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from vlkd.config import override
from vlkd.data.conversation_sequence import ConversationSequence
from vlkd.data.conversations import Conversation, open_conversations
from vlkd.data.files import write_whole
from vlkd.data.loader import BatchStream, plain_errors
from vlkd.distill.answers.fidelity import error_in_words
from vlkd.distill.answers.read import StoredAnswers, open_answers
from vlkd.distill.gates import check_alone, check_sees, check_switch, check_vocabulary
from vlkd.distill.token_distiller import STUDENT, TEACHER, TokenDistiller
from vlkd.engine.accelerator import accelerator_of
from vlkd.engine.folder import FIRST_WEIGHTS, claim_folder
from vlkd.engine.vlm.batches import batches_of, sequence_of
from vlkd.engine.vlm.checks import check_batch_norms, check_data, check_questions
from vlkd.engine.vlm.finish import finish
from vlkd.engine.vlm.loop import Before, Outcome, train
from vlkd.engine.vlm.settings import VlmRun
from vlkd.engine.vlm.smoke import shrink_to_smoke
from vlkd.engine.vlm.stages import SWITCH, Stage, wanted_stages
from vlkd.engine.vlm.watch import Watch, open_asked
from vlkd.models.base import channels_last, evaluating
from vlkd.models.generative import PARTS, GenerativeVLM, Part
from vlkd.models.llava_spec import LANGUAGE
from vlkd.models.load_generative import build_vlm, load_generative
from vlkd.protocols.vqa import too_long

START, TOKENIZER = FIRST_WEIGHTS
"""Folders of a run: the first weights, and the teacher's tokenizer."""
STAGES, CHECKPOINTS = "stages", "checkpoints"
"""What each stage left, and its checkpoints."""
SEEN_AT_A_TIME, REHEARSED = 16, 4
"""Conversations of a batch of the start-up check, and those whose losses are computed before training."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """Attributes: model: runs beside the student. stored: its answers instead. vocabulary: V that both share."""

    model: GenerativeVLM | None = None
    stored: StoredAnswers | None = None
    vocabulary: int | None = None


def run_vlm(recipe: ModuleType, assignments: Sequence[str]) -> Path:
    """Run `recipe.config()`, changed by `key=value` assignments, through `recipe.stages(config)`; returns its folder.

    Raises:
        UserError: a setting, a path, a model or the data are not as expected, or the teacher cannot teach this student.
    """
    config: VlmRun = override(recipe.config(), assignments)
    accelerator = accelerator_of(config.train.device, config.train.precision, smoke=config.smoke)
    with accelerator.main_process_first():
        if config.smoke:
            taught = any(stage.taught for stage in recipe.stages(config) if stage.settings.samples)
            config = shrink_to_smoke(config, taught=taught)
            accelerator.print("smoke: drawn scenes and untrained models stand in for data.*, model.* and teacher.*.")
        folder = claim_folder(config)
    stages = wanted_stages(recipe.stages(config), teacher=config.teacher.ref, stored=config.teacher.stored)
    conversations = {stage.name: open_conversations(stage.settings.data or config.data.train) for stage in stages}
    check_data(stages, conversations)
    asked = open_asked(config)
    for name, own in conversations.items():
        accelerator.print(f"{name}: {len(own)} conversations, {sum(len(one.turns) // 2 for one in own)} answers")
    for ref in config.report.compare if accelerator.is_main_process else ():
        load_generative(ref)  # What cannot be opened is told now, not when training has ended.
    teacher = load_generative(config.teacher.ref, device=accelerator.device) if config.teacher.ref else None
    with accelerator.main_process_first():
        student = open_student(config, folder, stages, conversations, teacher)
    if config.train.channels_last:
        for model in [student, teacher] if teacher else [student]:
            channels_last(model)
    accelerator.print(f"student: {counts(student)}" + (f"; teacher: {counts(teacher)}" if teacher else ""))
    check_batch_norms(student, stages)
    check_alone([student], chain.from_iterable(conversations.values()))
    answering = [student, teacher] if teacher and config.report.teacher else [student]
    every = [question for own in asked.final.values() for question in own]
    check_questions(every, answering)
    truths = student.count_tokens([question.answer for question in every])
    if problem := too_long(every, truths, config.train.max_new_tokens):
        accelerator.print(f"{problem} Set train.max_new_tokens.")
    teaching = open_teaching(config, student, teacher, stages, conversations, accelerator)
    runner = StageRunner(config=config, folder=folder, teaching=teaching, accelerator=accelerator,
                         watch=Watch(asked=asked.watched, settings=config.train))  # fmt: skip
    runner.rehearse(student, stages, conversations)
    outcomes = runner.run(student, stages, conversations)
    if accelerator.is_main_process:
        student.save(folder / STUDENT)
        finish(config, folder, outcomes, asked, student, teacher)
    accelerator.end_training()
    return folder


def open_student(
    config: VlmRun,
    folder: Path,
    stages: Sequence[Stage],
    conversations: Mapping[str, list[Conversation]],
    teacher: GenerativeVLM | None,
) -> GenerativeVLM:
    """The student as the last finished stage left it, or the one to begin with; random weights are the seed's.

    A new one takes the teacher's tokenizer, or else one that is trained on the conversations.
    """
    for number in reversed(range(len(stages))):
        if (left := stage_folder(folder, number, stages[number])).is_dir():
            return load_generative(left)
    if config.start:
        return load_generative(config.start)
    if not (folder / START).is_dir():
        spec = config.model
        if teacher is not None and not spec.tokenizer and spec.language in LANGUAGE:
            teacher.processor.save_pretrained(str(folder / TOKENIZER))
            spec = replace(spec, tokenizer=str(folder / TOKENIZER))
        texts = (turn.text for own in conversations.values() for one in own for turn in one.turns)
        torch.manual_seed(config.seed)
        build_vlm(spec, folder / START, texts=texts)
    return load_generative(folder / START)


def open_teaching(
    config: VlmRun,
    student: GenerativeVLM,
    teacher: GenerativeVLM | None,
    stages: Sequence[Stage],
    conversations: Mapping[str, list[Conversation]],
    accelerator: Accelerator,
) -> Teaching:
    """What the stages are taught by, checked against the student; and that the teacher looks at pictures is shown.

    Raises:
        UserError: vocabularies, visual tokens or widths do not fit, or the teacher does not look at the picture, or not
            at each question by itself.
    """
    taught = [stage for stage in stages if stage.taught]
    if not taught or teacher is None:
        return Teaching()
    settings = config.teacher
    vocabulary = check_vocabulary(student, teacher)
    for stage in taught:
        if stage.reads(SWITCH):
            check_switch(student, teacher, stage.settings.parts, bridge=settings.bridge)
    check_alone([teacher], chain.from_iterable(conversations[stage.name] for stage in taught))
    if settings.see:
        own = conversations[taught[0].name]
        shown = sequence_of({TEACHER: teacher}, own[:: max(1, len(own) // settings.see)], seed=config.seed)
        found = check_sees(teacher, batches_of(shown, SEEN_AT_A_TIME, accelerator.device))
        accelerator.print(
            f"teacher: with a blank picture its answers move by {found['blank_kl']:.3f} nats a token and their loss "
            f"rises by {found['blank_nll_rise']:.3f}; with another's picture by {found['shuffled_nll_rise']:.3f}"
        )
    if settings.stored:
        # Stages may have data of their own with keys in common.
        every = [open_answers(Path(settings.stored), teacher, conversations[stage.name]) for stage in taught]
        manifest = every[0].manifest
        if words := error_in_words(manifest.get("error", {})):
            top = f"{manifest['identity']['top']} of {every[0].vocabulary} tokens"
            accelerator.print(f"teacher: its answers were stored as {top}, which changes {words}")
        return Teaching(stored=every[0], vocabulary=vocabulary)
    teacher.freeze()
    teacher.checkpointing(settings.checkpointing)
    return Teaching(model=teacher, vocabulary=vocabulary)


@dataclass(frozen=True, kw_only=True)
class StageRunner:
    """Runs stages, with what all of them share."""

    config: VlmRun
    folder: Path
    teaching: Teaching
    accelerator: Accelerator
    watch: Watch

    def run(
        self, student: GenerativeVLM, stages: Sequence[Stage], conversations: Mapping[str, list[Conversation]]
    ) -> dict[str, Outcome]:
        """One after another; a finished one is kept as the folder of its student, and not run again."""
        outcomes: dict[str, Outcome] = {}
        before = Before()
        for number, stage in enumerate(stages):
            left = stage_folder(self.folder, number, stage)
            noted = left.with_suffix(".json")
            if left.is_dir():
                outcome = Outcome(**json.loads(noted.read_text()))
            else:
                outcome = self.run_stage(student, number, stage, conversations[stage.name], before)
                if self.accelerator.is_main_process:
                    left.parent.mkdir(exist_ok=True)
                    write_whole(noted, json.dumps(asdict(outcome)).encode())
                    student.save(left)
                self.accelerator.wait_for_everyone()
            outcomes[stage.name] = outcome
            before = Before(steps=before.steps + outcome.steps, samples=before.samples + outcome.samples)
        return outcomes

    def rehearse(
        self, student: GenerativeVLM, stages: Sequence[Stage], conversations: Mapping[str, list[Conversation]]
    ) -> None:
        """Compute every stage's losses once, so that a term that cannot be is refused before the first stage trains."""
        for stage in stages:
            distiller, stored = self.distiller(student, stage), self.teaching.stored if stage.taught else None
            own = [one for one in conversations[stage.name] if stored is None or one.key not in stored.left_out]
            sequence = sequence_of(models_of(distiller), own[:REHEARSED], seed=self.config.seed, stored=stored)
            distiller.to(self.accelerator.device)
            with torch.no_grad(), evaluating(distiller), self.accelerator.autocast():
                for batch in batches_of(sequence, REHEARSED, self.accelerator.device):
                    distiller(batch, progress=0.0, tokens=1.0, images=1.0)

    def distiller(self, student: GenerativeVLM, stage: Stage) -> TokenDistiller:
        """The student of a stage with its terms and what teaches it."""
        teaching = self.teaching if stage.taught else Teaching()
        bridge = None
        if self.config.teacher.bridge and stage.reads(SWITCH) and teaching.model is not None:
            bridge = nn.Linear(student.visual_width, teaching.model.visual_width)
        return TokenDistiller(
            student,
            stage.terms,
            teaching.model,
            bridge=bridge,
            vocabulary=teaching.vocabulary,
            stored_vocabulary=teaching.stored.vocabulary if teaching.stored else 0,
        )

    def run_stage(
        self, student: GenerativeVLM, number: int, stage: Stage, conversations: list[Conversation], before: Before
    ) -> Outcome:
        """Train one stage."""
        config = self.config
        student.train_only(cast("tuple[Part, ...]", stage.settings.parts))
        student.checkpointing(config.train.checkpointing)
        torch.manual_seed(config.seed)
        distiller = self.distiller(student, stage)
        stream = self.stream(distiller, number, stage, conversations)
        # Dropout draws anew on each rank; weights are those of rank 0.
        torch.manual_seed(config.seed + 1 + self.accelerator.process_index)
        with plain_errors():
            return train(
                distiller,
                stream,
                stage,
                config.train,
                self.folder,
                self.folder / CHECKPOINTS / stage_name(number, stage),
                self.accelerator,
                self.watch,
                before,
            )

    def stream(
        self, distiller: TokenDistiller, number: int, stage: Stage, conversations: list[Conversation]
    ) -> BatchStream[ConversationSequence]:
        """The stage's batches of this rank; each stage has an order of its own."""
        config, own = self.config, stage.settings
        stored = self.teaching.stored if stage.taught else None
        if stored is not None and stored.left_out:
            # What did not fit the teacher has no answers there.
            conversations = [one for one in conversations if one.key not in stored.left_out]
        sequence = sequence_of(
            models_of(distiller),
            conversations,
            seed=config.seed + number,
            batch_size=own.batch_size,
            window=config.data.window,
            stored=stored,
            keep_short_side=config.data.keep_short_side,
        )
        return BatchStream(
            sequence,
            batch_size=own.batch_size,
            samples=stage.steps * own.batch_size,
            workers=config.data.workers,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )


def models_of(distiller: TokenDistiller) -> dict[str, GenerativeVLM]:
    """Those that conversations are prepared for, by name."""
    return {STUDENT: distiller.student} | ({TEACHER: distiller.teacher} if distiller.teacher is not None else {})


def stage_name(number: int, stage: Stage) -> str:
    """Of its folders, in order."""
    return f"{number + 1}-{stage.name}"


def stage_folder(folder: Path, number: int, stage: Stage) -> Path:
    """Where the student is kept as the stage left it."""
    return folder / STAGES / stage_name(number, stage)


def counts(model: GenerativeVLM) -> str:
    """Its size, part by part."""
    parts = {part: sum(one.numel() for one in model.part_parameters(part)) / 1e6 for part in PARTS}
    return f"{sum(parts.values()):.2f} M parameters ({', '.join(f'{part} {n:.2f}' for part, n in parts.items())})"

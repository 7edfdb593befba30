"""Conversations about pictures of one colour, as batches for tiny generative models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.features import IMAGE_PLACEHOLDER, Turn
from vlkd.models.generative import GenerativeVLM
from vlkd.models.label_masks import pad_conversations

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (20, 180, 40), "a white one": (250, 250, 250)}


def colour_image(name: str) -> Image.Image:
    return Image.new("RGB", (40, 40), COLOURS[name])


def colour_turns(name: str) -> list[Turn]:
    return [Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat colour is it?"), Turn("assistant", name)]


def colour_batch(names: Sequence[str], *, alone: bool = False, **models: GenerativeVLM) -> ConversationBatch:
    """A batch of these colours, prepared for each of the models by its own preprocessing; asked twice with `alone`."""
    inputs = {}
    images = [colour_image(name) for name in names]
    for role, model in models.items():
        prepared = model.preprocessing
        rows = [
            prepared.encode_questions(2 * colour_turns(name), image=image)
            if alone
            else prepared.encode(colour_turns(name), image=image)
            for name, image in zip(names, images, strict=True)
        ]
        inputs[role] = prepared.image_inputs(images) | pad_conversations(rows, prepared.pad_id)
    keys = [f"{index}-{name}" for index, name in enumerate(names)]
    return ConversationBatch(keys=keys, rows=torch.arange(len(keys)), inputs=inputs, stored={}, bad={})


def blank_batch(**models: GenerativeVLM) -> ConversationBatch:
    """What stands for a batch of which nothing can be used: one picture without an answer."""
    found = colour_batch(["red"], **models)
    for inputs in found.inputs.values():
        inputs["pixels"] = torch.zeros_like(inputs["pixels"])
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    return ConversationBatch(keys=[], rows=found.rows[:0], inputs=found.inputs, stored={}, bad={"x": "broken"})

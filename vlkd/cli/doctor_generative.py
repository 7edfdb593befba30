"""`vlkd doctor` on a model that answers questions: its parts, its input, and whether its answers see the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlkd.errors import UserError

if TYPE_CHECKING:
    from vlkd.models.generative import GenerativeVLM

QUESTION = "What is in the picture?"
SHOWN, AT_A_TIME = 64, 16
"""Conversations of --data on which the answers are looked at, and how many pass at once."""


def generative_facts(folder: str, data: str | None) -> dict[str, str]:
    """Load a generative model, and show that its answers depend on the picture.

    Raises:
        UserError: it cannot be loaded, its logits are no numbers, its answers do not depend on the picture, or no
            conversation of `data` can be read.
    """
    from vlkd.models.generative import PARTS
    from vlkd.models.load_generative import load_generative

    model = load_generative(folder)
    sizes = {part: sum(value.numel() for value in model.part_parameters(part)) for part in PARTS}
    prepared = model.preprocessing
    tokens = f"{prepared.visual_tokens} tokens" if prepared.visual_tokens else "tokens by its size"
    return {
        "kind": f"answers questions about pictures ({type(model).__name__})",
        "parameters": f"{sum(sizes.values()):,}: " + ", ".join(f"{number:,} {part}" for part, number in sizes.items()),
        "picture": f"{tokens}, {model.visual_width} wide from the vision tower",
        "vocabulary": f"{len(model.tokenizer):,} tokens",
        "answers": on_data(model, data) if data else on_drawn(model),
    }


def on_drawn(model: GenerativeVLM) -> str:
    """How the first word of an answer moves between drawn pictures, in words."""
    import torch
    from torch.nn import functional as F

    from vlkd.models.golden import probe_images
    from vlkd.models.label_masks import pad_conversations

    images = probe_images()
    prepared = model.preprocessing
    prompts = [prepared.prompt_ids(QUESTION, image=image) for image in images]
    padded = pad_conversations([(ids, ids) for ids in prompts], prepared.pad_id)
    # Those of the last token of each prompt.
    keep = torch.zeros_like(padded["mask"])
    keep[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])] = True
    with torch.no_grad():
        logits = model.forward_logits(
            **prepared.image_inputs(images), ids=padded["ids"], mask=padded["mask"], keep=keep
        )
    log_p = F.log_softmax(logits.double(), dim=-1)
    moved = float(F.kl_div(log_p[1:], log_p[:1].expand_as(log_p[1:]), reduction="sum", log_target=True))
    moved /= len(images) - 1
    if not moved > 0:
        raise UserError(
            f"{model.name} does not look at pictures: the first word of its answer moves by {moved:.2g} nats between "
            "drawn pictures, expected more than 0; train it, or use another."
        )
    return f"their first word moves by {moved:.2g} nats between drawn pictures; --data QUESTIONS shows more"


def on_data(model: GenerativeVLM, data: str) -> str:
    """How answers to real questions depend on their pictures, in words."""
    from vlkd.data.conversations import open_conversations
    from vlkd.distill.gates import check_alone, check_sees
    from vlkd.distill.token_distiller import TEACHER
    from vlkd.engine.vlm.batches import batches_of, sequence_of

    conversations = open_conversations([data])
    check_alone([model], conversations)
    shown = sequence_of({TEACHER: model}, conversations[:: max(1, len(conversations) // SHOWN)][:SHOWN], seed=0)
    found = check_sees(model, batches_of(shown, AT_A_TIME, model.device))
    return (
        f"with a blank picture they move by {found['blank_kl']:.3f} nats a token and their loss rises by "
        f"{found['blank_nll_rise']:.3f}; with another's picture by {found['shuffled_nll_rise']:.3f}"
    )

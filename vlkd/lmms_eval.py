"""A vlkd model inside lmms-eval: `lmms-eval --model vlkd --model_args pretrained=runs/switch --tasks pope`.

lmms-eval 0.6 and later find it by the entry point `lmms_eval.models` of the installed package
(https://github.com/EvolvingLMMs-Lab/lmms-eval). Nothing else in vlkd imports this file, which needs lmms-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lmms_eval.api.model import lmms
from tqdm import tqdm

from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER, Turn

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

NAME = "vlkd"
MAX_NEW_TOKENS = 1024
"""Where a task does not say, as in lmms-eval's own adapters."""


def manifest() -> Any:
    """What lmms-eval's registry wants to know: the name and the class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{VlkdVLM.__name__}")


class VlkdVLM(lmms):  # type: ignore[misc]  # of a package that need not be there
    """A generative model that answers greedily, one picture a request, in batches padded in front, in float32.

    Args:
        pretrained: a run, a model's folder, or hf:OWNER/NAME.
        batch_size: requests at a time, which changes no answer.
        device: where it runs; each process takes the same.
        max_batch_size: of lmms-eval's automatic batch sizes, which there are not.

    Raises:
        UserError: nothing answers to `pretrained`, or the batch size is no number from 1.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str = "cpu", max_batch_size: int | None = None
    ) -> None:
        from vlkd.models.load_generative import load_generative

        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise UserError(f"--batch_size is {batch_size}; expected a number from 1, and no --max_batch_size.")
        self.batch_size = int(batch_size)
        # A module among the attributes is dropped by lmms-eval once all is answered.
        self.vlm = load_generative(pretrained, device=device)

    @property
    def device(self) -> torch.device:
        """Where the model is, for gathering over processes."""
        return self.vlm.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, each cut where a stop string of its request begins, in the order of the requests.

        Args:
            requests: with `args` = (context, settings, function from a document to its pictures, number of the
                document, task, split).

        Raises:
            UserError: a request has not exactly one picture, is to be sampled or searched by beams, or is too long.
        """
        asked = [request.args for request in requests]
        settings, prompts = [_settings(given[1]) for given in asked], [_prompt(given[0]) for given in asked]
        # Requests of one batch end at the same number of tokens; the longest first, which may not fit.
        order = sorted(range(len(asked)), key=lambda place: (settings[place][0], -len(asked[place][0])))
        answers = [""] * len(asked)
        with tqdm(total=len(asked), unit="request", desc="answers", disable=self.rank != 0) as bar:
            while order:
                most = settings[order[0]][0]
                batch = [place for place in order[: self.batch_size] if settings[place][0] == most]
                order = order[len(batch) :]
                said = self.vlm.answer(
                    [self._picture(*asked[place][2:6]) for place in batch],
                    [prompts[place] for place in batch],
                    batch_size=len(batch),
                    max_new_tokens=most,
                )
                for place, text in zip(batch, said, strict=True):
                    answers[place] = _until(text, settings[place][1])
                    self.cache_hook.add_partial("generate_until", asked[place][:2], answers[place])
                bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:  # noqa: ARG002 - refused whatever they are
        """Refused: the model is asked in words."""
        raise UserError("vlkd's model gives no likelihoods to lmms-eval; choose tasks of the type generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:  # noqa: ARG002
        """Refused: one question at a time."""
        raise UserError("vlkd's model answers one round in lmms-eval; choose tasks of the type generate_until.")

    def _picture(self, pictures_of: Any, document: Any, task: str, split: str) -> Image:
        """The only picture of a request."""
        from PIL.Image import Image

        found = pictures_of(self.task_dict[task][split][document])
        pictures = [one for one in (found if isinstance(found, list | tuple) else [found]) if one is not None]
        if len(pictures) != 1 or not isinstance(pictures[0], Image):
            kinds = ", ".join(type(one).__name__ for one in pictures) or "nothing"
            raise UserError(
                f"Document {document} of the task {task} has {len(pictures)} pictures ({kinds}), expected one picture; "
                "choose tasks with one picture a question."
            )
        return pictures[0].convert("RGB")


def _settings(given: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The most tokens of an answer, and the strings before which it ends."""
    beams, temperature = given.get("num_beams") or 1, given.get("temperature") or 0
    if given.get("do_sample") or beams > 1 or temperature > 0:
        raise UserError(
            f"A task asks for do_sample={given.get('do_sample')}, temperature={temperature}, num_beams={beams}, and "
            "vlkd's model answers greedily; give --gen_kwargs do_sample=False,temperature=0,num_beams=1."
        )
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return int(given.get("max_new_tokens") or MAX_NEW_TOKENS), tuple(stop for stop in stops if stop)


def _prompt(context: str) -> str | tuple[Turn, ...]:
    """A question about the picture, or a turn that says where it stands."""
    count = context.count(IMAGE_PLACEHOLDER)
    if count > 1:
        raise UserError(f"A request has {count} times {IMAGE_PLACEHOLDER}; expected one picture a question.")
    return (Turn("user", context),) if count else context


def _until(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))].strip()

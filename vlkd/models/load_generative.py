"""One reference names any generative model: a folder with a timm vision, a run, a LLaVA's folder, or hf:OWNER/NAME."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from vlkd.errors import UserError
from vlkd.models.folder import MODEL_JSON
from vlkd.models.generative import GenerativeVLM
from vlkd.models.generative_refs import generative_ref
from vlkd.models.llava_spec import LlavaSpec, build_llava
from vlkd.models.timm_vlm import PREFIX, build_timm_vlm, load_timm_vlm
from vlkd.models.tokenizer import first_line
from vlkd.models.via_llava import load_llava


def load_generative(ref: str | Path, *, device: str | torch.device = "cpu") -> GenerativeVLM:
    """Load any generative model in evaluation mode, with float32 weights; no code from it is run.

    Args:
        ref: a folder with the model.json of a `TimmVLM`, a run's folder with such a folder or a LLaVA as `student`, or
            whatever `load_llava` takes.
        device: where the model goes.

    Raises:
        UserError: there is no such model, what is there is damaged, pickled or of another kind, or there is no such
            device.
    """
    name = generative_ref(str(ref))
    vlm: GenerativeVLM = load_timm_vlm(name) if (Path(name) / MODEL_JSON).is_file() else load_llava(name)
    try:
        return vlm.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device} cannot be used ({first_line(error)}); name another one.") from None


def build_vlm(spec: LlavaSpec, folder: str | Path, *, texts: Iterable[str] = ()) -> Path:
    """Write the folder of a generative model with the vision that the spec names: by timm, or a LLaVA.

    Args:
        spec: what to build.
        folder: a new or empty folder.
        texts: questions and answers, read where a tokenizer is trained.

    Returns:
        The folder.

    Raises:
        UserError: see `build_llava` and `build_timm_vlm`.
    """
    build = build_timm_vlm if spec.vision.startswith(PREFIX) else build_llava
    return build(spec, folder, texts=texts)

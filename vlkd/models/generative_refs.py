"""Which folders hold a model that answers questions, told without loading it."""

from __future__ import annotations

from pathlib import Path

from vlkd.models.classifier_images import STUDENT, student_of
from vlkd.models.folder import read_format
from vlkd.models.via_llava import FAMILIES, config_family

FORMAT = "vlkd-vlm"


def generative_folder(ref: str) -> str | None:
    """The folder of the generative model that is meant by a folder: itself, or of a run its student.

    None where no such model lies there, and for names that are no folders, of which only loading tells.
    """
    for folder in (Path(ref), Path(ref) / STUDENT):
        if ref and (read_format(folder) == FORMAT or config_family(folder) in FAMILIES):
            return str(folder)
    return None


def generative_ref(ref: str) -> str:
    """The folder of `generative_folder`, or the reference as it is where it tells of none.

    Raises:
        UserError: it is a run without a student yet.
    """
    return generative_folder(ref) or student_of(ref)

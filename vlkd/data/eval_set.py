"""One way to open any evaluation set: CLIP_benchmark's layout, class folders, captions in four forms, selections."""

from __future__ import annotations

from pathlib import Path

from vlkd.data.eval_types import KINDS, Choice, EvalSet, Kind
from vlkd.data.eval_wds import is_wds, open_wds
from vlkd.data.labelled import open_split, read_prompts
from vlkd.data.selection import is_selection, open_selection
from vlkd.data.sources import open_pairs, place_of
from vlkd.errors import UserError

__all__ = ["KINDS", "Choice", "EvalSet", "Kind", "open_eval_set"]


def open_eval_set(path: str | Path, *, split: str = "", kind: Kind | None = None) -> EvalSet:
    """Open an evaluation set, whose form is found from what lies there.

    - a folder with `nshards.txt`, `0.tar` or `dataset_type.txt`: CLIP_benchmark's and DataComp's layout (`open_wds`);
    - a selection file, or a folder of such files (`open_selection`), where `split` names one subset;
    - a folder or file of shards, a captions JSONL or CSV, a Karpathy JSON: retrieval (`open_pairs`);
    - any other folder, `PATH/SPLIT/CLASS/*.jpg`: classification (`open_split`).

    Args:
        path: the folder or file; `PATH#SPLIT` stands for the two.
        split: as its folder or the file calls it; "" for all there is, in a wds folder for `test` or the only one.
        kind: what it must be; needed only for a wds folder of several labels a picture without `dataset_type.txt`.

    Raises:
        UserError: nothing is there, it is empty or of another kind, a label or a caption is missing, or any file of it
            has another form.
    """
    place, named = place_of(str(path))
    split = split or named
    root = Path(place)
    if kind is not None and kind not in KINDS:
        raise UserError(f"The kind {kind!r} is unknown; expected one of {', '.join(KINDS)}.")
    if is_wds(root, split):
        opened = open_wds(root, split, kind)
    elif kind == "selection" or (kind is None and is_selection(root)):
        opened = open_selection(root, split)
    elif _holds_pairs(root, split) or kind == "retrieval":
        opened = _retrieval(place, split)
    else:
        opened = _class_folders(root, split)
    if kind is not None and opened.kind != kind:
        raise UserError(f"{path} is a set for {opened.kind}, expected {kind}; name other data or another kind.")
    return opened


def _holds_pairs(root: Path, split: str) -> bool:
    if not root.is_dir() or any((root / split).glob("*.tar")):
        return True
    # Splits of shards, of which none is named: opening them as pairs says so.
    return not split and any(root.glob("*/*.tar"))


def _retrieval(place: str, split: str) -> EvalSet:
    ref = f"{place}#{split}" if split else place
    pairs = open_pairs(ref)
    bare = [key for key, captions in zip(pairs.keys, pairs.captions, strict=True) if not captions]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(pairs)} pictures of {ref} have no caption, first {bare[0]!r}; retrieval needs one "
            "for each: caption or remove them."
        )
    return EvalSet(
        kind="retrieval", keys=pairs.keys, files=pairs.files, captions=pairs.captions, problems=pairs.problems
    )


def _class_folders(root: Path, split: str) -> EvalSet:
    labelled = open_split(root, split)
    return EvalSet(
        kind="classification",
        keys=labelled.keys,
        files=labelled.files,
        classes=labelled.classes,
        templates=labelled.templates,
        prompts=read_prompts(root / split, labelled.classes),
        labels=labelled.labels,
    )

"""Numbers out of their range end in one sentence, whatever the command."""

from __future__ import annotations

import argparse

import pytest

from vlkd.cli.main import main
from vlkd.errors import UserError
from vlkd.suite.options import check_numbers


def test_only_what_is_below_its_least_is_refused():
    args = argparse.Namespace(batch_size=1, seed=0, k=3, dims=[4, 0])
    check_numbers(args, batch_size=1, seed=0, k=3)
    for least, sentence in (
        ({"batch_size": 2}, "--batch-size is 1; expected 2 or more"),
        ({"k": 4}, "-k is 3; expected 4 or more"),
        ({"dims": 1}, "--dims is 0; expected 1 or more"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_numbers(args, **least)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("suite --suite tier0 --data x --model y --batch-size 0", "--batch-size is 0; expected 1 or more."),
        ("suite --suite tier0 --data x --model y --seed -1", "--seed is -1; expected 0 or more."),
        ("suite --suite tier0 --data x", "No model is named; give --model REF, or --dry-run."),
        ("zero_shot --data x --model y --workers 0", "--workers is 0; expected 1 or more."),
        ("compare x --seed -1", "--seed is -1; expected 0 or more."),
        ("compare x y z", "3 results are named; expected one folder or two."),
        ("index_quality --data x --model y -k 0", "-k is 0; expected 1 or more."),
        ("index_quality --data x --model y --dims 8 0", "--dims is 0; expected 1 or more."),
        ("agreement --teacher x --model y --data z -k 0", "-k is 0; expected 1 or more."),
        ("agreement --teacher x --model y --data z --batch-size 0", "--batch-size is 0; expected 1 or more."),
        ("speed --model x --rounds 0", "--rounds is 0; expected 1 or more."),
        ("speed --model x --batch-size 0", "--batch-size is 0; expected 1 or more."),
        ("duplicates --train x --data y --workers 0", "--workers is 0; expected 1 or more."),
        (
            "duplicates --train x --data y --threshold 1",
            "--threshold is 1.0; expected 0 (equal thumbnails) to below 1.",
        ),
        ("duplicates --train x --data y --similarity 3", "--similarity is 3.0; expected a cosine from -1 to 1."),
        ("duplicates --train x --data y --out /", "--out / is a folder; expected a file: name one in it."),
        ("index_quality --data x --model y --out /", "--out / is a folder; expected a file: name one in it."),
        ("compare x --out /", "--out / is a folder; expected a file: name one in it."),
        ("table x --html /", "--html / is a folder; expected a file: name one in it."),
        (
            "suite --suite tier0 --data nowhere --dry-run",
            "There is no folder nowhere; give the root of the data sets, as `vlkd prep tier0` makes one.",
        ),
    ],
)
def test_commands_say_it_in_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", *words.split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"vlkd: {sentence}\n"

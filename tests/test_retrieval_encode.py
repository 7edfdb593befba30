"""The image pass: decoding ahead in threads changes the time and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.tiny_models import tiny_composite, tiny_images
from PIL import Image

from vlkd.data.sources import open_pairs
from vlkd.errors import UserError
from vlkd.retrieval.encode import encode_images, encode_unread

PATIENCE = 30.0
"""Seconds until a test that waits for another thread gives up."""


class Source:
    """Image i is one grey value, i; counts what was asked for, and lets a test hold an image back."""

    def __init__(self, count, broken=(), before=None):
        self.keys = [f"k{i}" for i in range(count)]
        self.captions = [()] * count
        self.broken, self.before = broken, before or (lambda i: None)
        self.decoded: set[int] = set()
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.keys)

    def image(self, i):
        self.before(i)
        with self.lock:
            self.decoded.add(i)
        if i in self.broken:
            raise self.broken[i]
        return Image.new("RGB", (2, 2), (i, i, i))


class Model:
    """An image is its grey value; `before` runs with the images of a batch before they are encoded."""

    def __init__(self, before=lambda values: None):
        self.batches, self.before = [], before

    def encode_image(self, images, *, batch_size=64):
        values = [image.getpixel((0, 0))[0] for image in images]
        self.before(values)
        self.batches.append(values)
        return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_batches_and_errors_do_not_depend_on_the_workers(workers):
    broken = {2: UserError("cut short"), 6: OSError("gone"), 7: UserError("cut short, too")}
    model = Model()
    encoded = encode_images(model, Source(11, broken), batch_size=4, workers=workers, progress=False)
    assert model.batches == [[0, 1, 3], [4, 5], [8, 9, 10]]
    assert encoded.index.tolist() == encoded.embed[:, 0].tolist() == [0, 1, 3, 4, 5, 8, 9, 10]
    assert encoded.bad == (("k2", "cut short"), ("k6", "gone"), ("k7", "cut short, too"))


def test_pictures_and_a_model_give_the_same_bits_for_any_workers(tmp_path):
    for i, image in enumerate(tiny_images(13)):
        image.save(tmp_path / f"{i:02d}.png")
    (tmp_path / "05.png").write_bytes(b"no picture")
    model, pairs = tiny_composite(), open_pairs(str(tmp_path))
    one, *others = [encode_images(model, pairs, batch_size=5, workers=workers, progress=False) for workers in (1, 2, 7)]
    direct = model.encode_image([pairs.image(i) for i in (0, 1, 2, 3, 4)], batch_size=5)
    assert torch.equal(one.embed[:5], direct)
    for other in others:
        assert torch.equal(one.embed, other.embed)
        assert (one.index.tolist(), one.bad) == (other.index.tolist(), other.bad)
    assert [key for key, _ in one.bad] == ["05.png"]


def test_a_slow_image_does_not_change_the_order():
    second = threading.Event()

    def before(i):
        if i == 0:
            assert second.wait(PATIENCE), "image 1 was not decoded while image 0 was"
        if i == 1:
            second.set()

    encoded = encode_images(Model(), Source(6, before=before), batch_size=3, workers=2, progress=False)
    assert encoded.embed[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_next_batch_is_decoded_while_one_is_encoded_and_no_more():
    size, count = 4, 40
    ready = threading.Event()
    held = []

    def before_decoding(i):
        if i == 2 * size - 1:
            ready.set()

    def before_encoding(values):
        if values[0] == 0:
            assert ready.wait(PATIENCE), "the second batch was not decoded while the first was encoded"
        held.append(len(source.decoded) - values[0])

    source = Source(count, before=before_decoding)
    encode_images(Model(before_encoding), source, batch_size=size, workers=2, progress=False)
    assert len(held) == count / size
    assert max(held) <= 2 * size


@pytest.mark.parametrize("fails", ["source", "model"])
def test_any_other_error_ends_the_pass_and_its_threads(fails):
    def refuse(values):
        if fails == "model":
            raise RuntimeError("no such thing")

    source = Source(1000, {3: RuntimeError("no such thing")} if fails == "source" else {})
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no such thing"):
        encode_images(Model(refuse), source, batch_size=4, workers=2, progress=False)
    assert threading.active_count() == before
    assert len(source.decoded) <= 9


def test_unread_images_are_tried_again_and_take_their_places():
    broken = {2: OSError("denied"), 5: UserError("cut short"), 6: OSError("denied")}
    first = encode_images(Model(), Source(9, broken), batch_size=4, progress=False)
    model = Model()
    source = Source(9, {5: broken[5]})
    found = encode_unread(model, source, first, batch_size=4)
    assert (model.batches, source.decoded) == ([[2, 6]], {2, 5, 6})
    assert found.index.tolist() == found.embed[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert found.bad == (("k5", "cut short"),)
    assert encode_unread(model, source, found, batch_size=4) is found

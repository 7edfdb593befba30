"""Lift a dual encoder's zero-shot accuracy: its tower's ImageNet classifier, class names, and unlabelled photos.

    python scripts/lift_teacher.py --teacher runs/teacher/student --classifier tf_efficientnet_lite2.safetensors \\
        --pairs data/coco/dataset_coco.json#train --images data/unlabelled_photos \\
        --domain data/caltech101/train=caltech101/classnames.txt --val data/caltech101#test --out runs/lifted --seed 0

Both towers stay frozen; the projections and the logit scale are trained on features that are computed once. With u the
embedding of photo x, w_k that of a prompt about name k, s the scale, three terms are added:

    KL(p(. | x) || softmax_c(s cos(u, w_c)))    photos and made-up features: p is the ImageNet classifier
    KL(q(. | x) || softmax_k(s cos(u, w_k)))    unlabelled photos of a domain with the names of its classes
    CLIP's loss                                 captioned photos: what the teacher knew before

q starts as ConSE (Norouzi et al., 2014, https://arxiv.org/abs/1312.5650) over the domain's names, cos(e(x), t_k) with
e(x) = sum_c p(c | x) t_c, where t is the text tower's view of a name and its dictionary definition. It is then refined
on the domain's photos: assignments with classes of equal size (Sinkhorn's iteration, as in Asano et al., 2020,
https://arxiv.org/abs/1911.05371) give prototypes, which give new assignments. So equal shares of the classes among
these photos are assumed. No label of any photo is read but by --val, which trains nothing; a teacher with a domain has
seen that domain's photos and names, so its accuracy is transductive.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from tqdm import tqdm

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.data.labelled import Labelled, open_split, read_names
from vlkd.data.sources import Pairs, open_pairs, place_of
from vlkd.errors import UserError
from vlkd.models.composite import CompositeModel, load_composite
from vlkd.models.towers import image_tower_width
from vlkd.retrieval.encode import PairSource, encode_images, encode_texts
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, accuracy, class_vectors

MAX_SCALE = 100.0
PROTOTYPE_TEMPERATURE = 0.05
NAME_SHARE = 0.5
"""Weight of a name's features beside those of its definition."""
SUBSETS = ("imagenet-1k", "imagenet-12k", "imagenet-22k")
"""Where definitions are looked for, the most common senses first."""
MADE_UP_GAIN = (4.0, 16.0)
"""By how much the logit of its class rises in a made-up feature."""
WARM_UP = 20


@dataclass(frozen=True)
class Photos:
    """Pooled features of photos (I, F), captioned ones first, and captions (T, G): each photo's first, how many."""

    features: Tensor
    text_features: Tensor
    first: Tensor
    count: Tensor


@dataclass(frozen=True)
class Names:
    """Pooled features: prompts (N, M, G), every name in every template; names_of (C, K), rows of it by class, repeated
    where a class has fewer names; meanings (C, 2, G), the mean of a class's prompts, and its definition."""

    prompts: Tensor
    names_of: Tensor
    meanings: Tensor

    def centred(self, origin: Tensor) -> Tensor:
        """(C, 2 G) unit, seen from the origin (2, G)."""
        units = normalize(self.meanings - origin, dim=2)
        return normalize(torch.cat([NAME_SHARE * units[:, 0], units[:, 1]], dim=1))

    def draw(self, generator: torch.Generator) -> Tensor:
        """(C, G): of each class one name in one template."""
        count, most = self.names_of.shape
        row = self.names_of[torch.arange(count), torch.randint(most, (count,), generator=generator)]
        return self.prompts[row, torch.randint(self.prompts.shape[1], (count,), generator=generator)]


@dataclass(frozen=True)
class Domain:
    """Unlabelled photos (I, F), the names of their C classes, and the refined assignments (I, C)."""

    features: Tensor
    names: Names
    shares: Tensor


@dataclass(frozen=True)
class Classifier:
    """p(c | x) = softmax_c(W x + b) of pooled features x: W (C, F), b (C,)."""

    weight: Tensor
    bias: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """(B, F) to (B, C)."""
        return (features @ self.weight.T + self.bias).softmax(dim=1)

    def patterns(self, features: Tensor) -> Tensor:
        """(C, F): S w / (w^T S w), S the covariance (Haufe et al., 2014, doi:10.1016/j.neuroimage.2013.10.067)."""
        centred = features - features.mean(dim=0)
        filters = self.weight - self.weight.mean(dim=0)
        found = filters @ (centred.T @ centred / len(centred))
        return found / (found * filters).sum(dim=1, keepdim=True)


class PooledTowers:
    """The towers without projections, as what `encode_images` and `encode_texts` ask for."""

    def __init__(self, model: CompositeModel) -> None:
        self.model = model

    def encode_image(self, images: Sequence, *, batch_size: int = 64) -> Tensor:
        """(B, F)."""
        prepare = self.model.preprocessing.image_transform
        with torch.no_grad():
            parts = torch.stack([prepare(image) for image in images]).split(batch_size)
            return torch.cat([self.model.image_tower(self.model.normalised(pixels)) for pixels in parts])

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(B, G)."""
        inputs = self.model.preprocessing.tokenize(texts)
        with torch.no_grad():
            parts = zip(inputs["ids"].split(batch_size), inputs["mask"].split(batch_size), strict=True)
            return torch.cat([self.model.text_features(ids, mask)["text.pooled"] for ids, mask in parts])


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="vlkd model folder")
    add("--classifier", type=Path, required=True, help="safetensors file with timm's keys, ImageNet-1k")
    add("--pairs", required=True, help="photos with captions")
    add("--images", nargs="*", default=[], help="photos without captions")
    add("--domain", nargs="*", default=[], metavar="PHOTOS=NAMES.txt", help="unlabelled photos, names of their classes")
    add("--val", nargs="*", default=[], metavar="FOLDER#SPLIT", help="class folders, to measure before and after")
    add("--out", type=Path, required=True, help="the new model folder")
    for name, value in (("--seed", 0), ("--steps", 500)):
        add(name, type=int, default=value)
    add("--batch", type=int, default=128, help="photos a step, of any kind and of every domain")
    add("--made-up", type=float, default=0.25, help="made-up features per photo")
    add("--lr", type=float, default=1e-3)
    add("--tau", type=float, default=0.1, help="temperature of the first assignments")
    add("--rounds", type=int, default=4, help="of refinement; 0 leaves the first assignments")
    return parser.parse_args()


def main() -> None:
    """Compute the features, train, save, and measure before and after."""
    args = command_line()
    torch.manual_seed(args.seed)
    model = load_composite(args.teacher)
    classifier = read_classifier(args.classifier, model)
    # Everything is opened before the minutes in which features are computed.
    sets = [open_split(Path(place), split) for place, split in map(place_of, args.val)]
    opened = [open_domain(ref) for ref in args.domain]
    pairs, more = open_pairs(args.pairs), [open_pairs(ref) for ref in args.images]
    photos = read_photos(model, pairs, more, args.pairs)
    names = name_features(model, [own for own, _ in definitions(SUBSETS[:1])])
    domains = [read_domain(model, own, classifier, names, args) for own in opened]
    checks = [(labelled, *image_features(model, labelled)) for labelled in sets]
    before = [zero_shot(model, *check) for check in checks]
    train(model, photos, names, domains, classifier, args)
    model.save(args.out, golden=True)
    for ref, check, old in zip(args.val, checks, before, strict=True):
        print(f"{ref}: zero-shot accuracy {old:.1%} before, {zero_shot(model, *check):.1%} after, in {args.out}")


def read_classifier(path: Path, model: CompositeModel) -> Classifier:
    """The linear layer of a timm model; raises `UserError` for none, or another width or number of classes."""
    try:
        state = load_file(str(path))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a safetensors file with timm's keys.") from None
    width = image_tower_width(model.image_tower)
    found = {key: tuple(state[key].shape) for key in state if key.startswith("classifier.")}
    if found != {"classifier.weight": (1000, width), "classifier.bias": (1000,)}:
        raise UserError(f"{path} holds the classifier {found}, expected 1000 classes of width {width}; give its own.")
    return Classifier(state["classifier.weight"].float(), state["classifier.bias"].float())


def image_features(model: CompositeModel, source: PairSource) -> tuple[Tensor, Tensor]:
    """Pooled features of the photos that can be read, and their positions."""
    found = encode_images(PooledTowers(model), source, batch_size=32, workers=1)
    if found.bad:
        print(f"left out {len(found.bad)} photos that cannot be read, such as {found.bad[0]}")
    return found.embed, torch.from_numpy(found.index)


def read_photos(model: CompositeModel, pairs: Pairs, more: Sequence[Pairs], ref: str) -> Photos:
    """The features of all photos without a domain, and of all captions."""
    if pairs.captioned < len(pairs):
        raise UserError(f"{ref} has photos without captions, expected one for each; name them with --images.")
    features, index = image_features(model, pairs)
    captions = [pairs.captions[row] for row in index.tolist()]
    count = torch.tensor([len(own) for own in captions])
    others = [image_features(model, own)[0] for own in more]
    texts = encode_texts(PooledTowers(model), [text for own in captions for text in own], batch_size=1024)
    return Photos(torch.cat([features, *others]), texts, count.cumsum(0) - count, count)


def definitions(subsets: Sequence[str]) -> list[tuple[list[str], str]]:
    """Names and definition of every class of ImageNet's subsets, as timm ships them."""
    from timm.data import ImageNetInfo

    texts = [text for subset in subsets for text in ImageNetInfo(subset).label_descriptions(detailed=True)]
    return [(text.partition(": ")[0].split(", "), text.partition(": ")[2]) for text in texts]


def name_features(model: CompositeModel, names: Sequence[Sequence[str]]) -> Names:
    """The features of classes with one or more names each."""
    encoder, known = PooledTowers(model), dict[str, str]()
    for own, definition in definitions(SUBSETS):
        for name in own:
            known.setdefault(name.lower(), f"{own[0]}: {definition}")
    flat = [name for own in names for name in own]
    texts = [template.replace("{c}", name) for name in flat for template in DEFAULT_TEMPLATES]
    prompts = encode_texts(encoder, texts, batch_size=1024).unflatten(0, (len(flat), len(DEFAULT_TEMPLATES)))
    meanings = encode_texts(encoder, [defined(own[0].lower(), known) for own in names], batch_size=1024)
    sizes = [len(own) for own in names]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = [[start + i % size for i in range(max(sizes))] for start, size in zip(starts, sizes, strict=True)]
    means = torch.stack([part.mean(dim=(0, 1)) for part in prompts.split(sizes)])
    return Names(prompts, torch.tensor(rows), torch.stack([means, meanings], dim=1))


def defined(name: str, known: dict[str, str]) -> str:
    """A name with its definition, or alone where no dictionary word is like it."""
    forms = (name, name.rstrip("s"), name.replace(" ", ""), name.rstrip("s").replace(" ", ""))
    entry = next((known[form] for form in forms if form in known), "")
    return f"{name}, {entry}" if entry else name


def open_domain(ref: str) -> tuple[Pairs, tuple[str, ...]]:
    """The photos and the class names of `PHOTOS=NAMES.txt`."""
    place, _, file = ref.rpartition("=")
    if not place:
        raise UserError(f"Found the domain {ref!r}, expected PHOTOS=NAMES.txt, a file with one class name per line.")
    return open_pairs(place), read_names(Path(file), None)


def read_domain(
    model: CompositeModel, domain: tuple[Pairs, tuple[str, ...]], classifier: Classifier, known: Names, args
) -> Domain:
    """The features of a domain's photos and names, and which photo probably belongs to which name."""
    features = image_features(model, domain[0])[0]
    names = name_features(model, [[name] for name in domain[1]])
    origin = known.meanings.mean(dim=0)
    guess = normalize(classifier.probabilities(features) @ known.centred(origin))
    shares = refined(guess @ names.centred(origin).T / args.tau, features, args.rounds)
    return Domain(features, names, shares)


def refined(logits: Tensor, features: Tensor, rounds: int) -> Tensor:
    """Assignments (I, C) from first logits (I, C): half their weight, and prototypes of the assignments before."""
    units = normalize((features - features.mean(dim=0)) / (features.std(dim=0) + features.std(dim=0).mean()))
    shares = balanced(logits)
    for _ in range(rounds):
        shares = balanced(logits / 2 + units @ normalize(shares.T @ units).T / PROTOTYPE_TEMPERATURE)
    return shares


def balanced(logits: Tensor, rounds: int = 5) -> Tensor:
    """Sinkhorn's iteration: rows that sum to 1, columns of nearly equal sums; (I, C)."""
    shares = logits.softmax(dim=1)
    for _ in range(rounds):
        shares = shares / shares.sum(dim=0).clamp_min(1e-12)
        shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return shares


def zero_shot(model: CompositeModel, labelled: Labelled, features: Tensor, index: Tensor) -> float:
    """Accuracy from the pooled features of the photos that could be read."""
    vectors = class_vectors(model.encode_text, labelled.classes, labelled.templates or DEFAULT_TEMPLATES)
    with torch.no_grad():
        return accuracy(model.image_projection(features), vectors, labelled.labels[index.numpy()])["acc1"]


def train(
    model: CompositeModel, photos: Photos, names: Names, domains: Sequence[Domain], classifier: Classifier, args
) -> None:
    """Train the projections and the scale in place; a cosine schedule after a short warm-up."""
    heads, scale = nn.ModuleList([model.image_projection, model.text_projection]), model.log_logit_scale
    groups = [{"params": list(heads.parameters())}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    generator = torch.Generator().manual_seed(args.seed)
    everything = torch.cat([photos.features, *(domain.features for domain in domains)])
    patterns = classifier.patterns(everything)
    heads.train()
    with tqdm(range(args.steps), desc="train", unit="step") as steps:
        for _ in steps:
            features = photos_drawn(everything, patterns, args, generator)
            total = taught(model, features, names, classifier.probabilities(features), generator)
            for domain in domains:
                rows = torch.randint(len(domain.features), (args.batch,), generator=generator)
                total = total + taught(model, domain.features[rows], domain.names, domain.shares[rows], generator)
            total = total + contrasted(model, photos, args.batch, generator)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                scale.clamp_(max=math.log(MAX_SCALE))
            steps.set_postfix(loss=f"{total.item():.3f}", scale=f"{scale.exp().item():.1f}")
    heads.eval()


def photos_drawn(features: Tensor, patterns: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """(B + made-up, F): photos, and others half way to the mean, pushed along the pattern of a class."""
    made_up = round(args.made_up * args.batch)
    drawn = features[torch.randint(len(features), (args.batch + made_up,), generator=generator)]
    gain = MADE_UP_GAIN[0] + (MADE_UP_GAIN[1] - MADE_UP_GAIN[0]) * torch.rand(made_up, 1, generator=generator)
    pushes = gain * patterns[torch.randint(len(patterns), (made_up,), generator=generator)]
    pushed = ((drawn[args.batch :] + features.mean(dim=0)) / 2 + pushes).relu()
    return torch.cat([drawn[: args.batch], pushed])


def taught(model: CompositeModel, features: Tensor, names: Names, shares: Tensor, generator: torch.Generator) -> Tensor:
    """KL(shares || softmax(s cos(u, w))) against one prompt of each class."""
    texts = normalize(model.text_projection(names.draw(generator)))
    logits = model.log_logit_scale.exp() * normalize(model.image_projection(features)) @ texts.T
    return kl_div(logits.log_softmax(dim=1), shares, reduction="batchmean")


def contrasted(model: CompositeModel, photos: Photos, batch: int, generator: torch.Generator) -> Tensor:
    """CLIP's loss over photos and one caption of each; photos that are drawn twice are positives of each other."""
    rows = torch.randint(len(photos.first), (batch,), generator=generator)
    texts = photos.first[rows] + (torch.rand(batch, generator=generator) * photos.count[rows]).long()
    images = normalize(model.image_projection(photos.features[rows]))
    captions = normalize(model.text_projection(photos.text_features[texts]))
    logits = model.log_logit_scale.exp() * images @ captions.T
    same = (rows[:, None] == rows).float()
    same = same / same.sum(dim=1, keepdim=True)
    return -((logits.log_softmax(dim=1) + logits.T.log_softmax(dim=1)) * same).sum(dim=1).mean() / 2


if __name__ == "__main__":
    main()

"""What each figure of the benchmark means, in which unit it is shown, and which way is better."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MetricWords:
    """How a figure is read.

    Attributes:
        meaning: a sentence; "" for a figure this project does not know.
        percent: a share from 0 to 1, shown in percent.
        lower_is_better: for times, sizes, ranks and errors.
    """

    meaning: str
    percent: bool = True
    lower_is_better: bool = False

    def number(self, value: float) -> float:
        """The value in the unit it is shown in."""
        return 100 * value if self.percent else value

    def text(self, value: float) -> str:
        """The value in words: percent with one decimal, anything else with four digits."""
        return f"{100 * value:.1f}" if self.percent else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _share(meaning: str) -> MetricWords:
    return MetricWords(meaning=meaning)


def _plain(meaning: str, *, lower: bool = False) -> MetricWords:
    return MetricWords(meaning=meaning, percent=False, lower_is_better=lower)


# The first pattern that is found in the whole name counts.
_KNOWN: tuple[tuple[str, MetricWords], ...] = (
    (r"answer_accuracy|choice_accuracy|yes_no_accuracy", _share("share of questions answered right")),
    (r"exact_match", _share("share of answers that equal the truth once both are normalised")),
    (r"commonest_answer", _share("accuracy of one who knows the commonest answer of each kind, and no picture")),
    (r"yes_no_precision", _share("share of answers of yes whose truth is yes")),
    (r"yes_no_recall", _share("share of truths of yes that are answered so")),
    (r"yes_no_yes_ratio", _share("share of yes among the answers of yes or no")),
    (
        r"parse_failures|(yes_no|choice)_unparsed",
        MetricWords(meaning="share of answers that are none of what was asked for", lower_is_better=True),
    ),
    (r"acc1|accuracy|top1", _share("share of images whose best-scoring class is the right one")),
    (
        r"acc1_(label|teacher)_head",
        _share("share of images whose best-scoring class by this head alone is the right one"),
    ),
    (r"acc5|top5", _share("share of images whose right class is among the five that score best")),
    (r"mean_per_class_recall(_.*)?", _share("accuracy within each class, averaged over the classes")),
    (r".*ranking_average_precision", _share("how far an image's own classes score before the others, averaged")),
    (r"mean_average_precision|mAP", _share("average precision of each class over the ranked images, averaged")),
    (
        r"image_retrieval_recall@\d+",
        _share("captions that find their image among the first k (hit rate, text to image)"),
    ),
    (r"text_retrieval_recall@\d+", _share("images that find a caption among the first k (hit rate, image to text)")),
    (r"(mean_hit|mean_recall)@1", _share("mean of both directions' hit@1")),
    (r"(image_to_text|text_to_image)_R@\d+", _share("queries with at least one right answer among the first k")),
    (r".*hit(_rate)?@\d+", _share("queries with at least one right answer among the first k")),
    (r".*recall@\d+", _share("share of a query's right answers among the first k, averaged")),
    (r".*mAP@R", _share("average precision up to the number of right answers R, averaged over queries")),
    (
        r".*(ndcg|map|mrr|reciprocal_rank|precision).*",
        _share("quality of the ranking, 1 when all right answers come first"),
    ),
    (r".*(median|mean)_rank", _plain("rank of the first right answer, counted from 1", lower=True)),
    (r"rsum", _plain("sum of both directions' hit rates in percent")),
    (r"image_acc", _share("captions for which the right image is chosen")),
    (r"text_acc", _share("images for which the right caption is chosen")),
    (r"(group_)?acc", _share("items in which every choice is right")),
    (r".*(worst|_wg).*", _share("accuracy of the group where it is lowest")),
    (r".*group.*", _share("accuracy by group")),
    (r".*jaccard.*", _share("overlap of the chosen and the right answers")),
    (r".*(ece|calibration).*", MetricWords(meaning="gap between confidence and accuracy", lower_is_better=True)),
    (r"(?i:.*f1.*)", _share("harmonic mean of precision and recall")),
    (r".*retention.*", _share("the student's figure divided by the teacher's")),
    (r".*(agreement|overlap).*", _share("share on which student and teacher give the same answer")),
    (r".*kendall.*", _plain("order of the answers compared with the teacher's: 1 the same, -1 reversed")),
    (r".*cka.*", _plain("likeness of two embedding spaces, from 0 to 1")),
    (r"(.*_)?kl(_.*)?", _plain("divergence of the student's class probabilities from the teacher's", lower=True)),
    (r".*latency.*", _plain("milliseconds for one input", lower=True)),
    (r".*(per_second|throughput).*", _plain("inputs per second")),
    (r".*parameters.*", _plain("weights of the model", lower=True)),
    (r".*(flops|macs).*", _plain("arithmetic for one input", lower=True)),
    (r".*(bytes|size|_mb).*", _plain("size on disk", lower=True)),
)


def metric_words(metric: str) -> MetricWords:
    """How to read a figure; one that is not known is shown as it is, higher being better."""
    base = re.sub(r"^fold\d+_", "", metric)
    return next((words for pattern, words in _KNOWN if re.fullmatch(pattern, base)), _plain(""))

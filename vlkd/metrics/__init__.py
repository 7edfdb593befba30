"""Metrics as pure functions of ranks, hits, labels and scores; numpy only.

Ranks are 0-based (0 is the best). Functions return one value per query or image wherever the mean is only one of the
uses, so that the same values feed the mean, the bootstrap and a gallery of the worst. Figures are fractions, not
percent, except `rsum`. Equal scores are ordered by the smaller id.

"Recall@k" has two meanings. CLIP papers print `hit_at_k` (is any positive among the first k) under that name;
`recall_at_k` is recall in the sense of information retrieval (which share of the positives is among the first k).
"""

from vlkd.metrics.aggregate import aggregate
from vlkd.metrics.agreement import kendall_tau, linear_cka, mean_kl, top_k_overlap
from vlkd.metrics.bootstrap import (
    bootstrap_interval,
    bootstrap_means,
    interval,
    mean_over_seeds,
    paired_bootstrap,
    percent_interval,
    stratified_interval,
    wilson_interval,
)
from vlkd.metrics.classification import (
    expected_calibration_error,
    f1_macro,
    group_accuracy,
    jaccard,
    mean_per_class_recall,
    per_class_recall,
    worst_group,
)
from vlkd.metrics.closed_forms import random_hit_at_k
from vlkd.metrics.multilabel import average_precision_by_class, mean_average_precision
from vlkd.metrics.ranking import (
    PositiveRanks,
    average_precision,
    average_precision_at_r,
    hit_at_k,
    knn_recall,
    mean_rank,
    median_rank,
    ndcg_at_k,
    ndcg_graded,
    precision_at_k,
    recall_at_k,
    reciprocal_rank,
    rsum,
)
from vlkd.metrics.yes_no import from_counts, yes_no_figures

__all__ = [
    "PositiveRanks",
    "aggregate",
    "average_precision",
    "average_precision_at_r",
    "average_precision_by_class",
    "bootstrap_interval",
    "bootstrap_means",
    "expected_calibration_error",
    "f1_macro",
    "from_counts",
    "group_accuracy",
    "hit_at_k",
    "interval",
    "jaccard",
    "kendall_tau",
    "knn_recall",
    "linear_cka",
    "mean_average_precision",
    "mean_kl",
    "mean_over_seeds",
    "mean_per_class_recall",
    "mean_rank",
    "median_rank",
    "ndcg_at_k",
    "ndcg_graded",
    "paired_bootstrap",
    "per_class_recall",
    "percent_interval",
    "precision_at_k",
    "random_hit_at_k",
    "recall_at_k",
    "reciprocal_rank",
    "rsum",
    "stratified_interval",
    "top_k_overlap",
    "wilson_interval",
    "worst_group",
    "yes_no_figures",
]

"""Objectives: pure functions of tensors that know no model, rank, device or configuration.

Embeddings come in as models give them, not normalised, in the letters of `vlkd.features` (B batch, D joint width).
Answer tokens come in as logits, (A, V). An objective is unreduced, (B,) or (A,), unless it compares whole sets, ().
It computes in float32 even under autocast (float64 stays float64), and what comes from a teacher is treated as a
constant: no gradient ever reaches it. Under data parallelism the caller gathers the batch first; B is then the global
batch.
"""

from vlkd.objectives.class_vectors import class_kl
from vlkd.objectives.classification import (
    binary_kl_norm,
    cross_entropy,
    distillation_kl,
    feature_cosine,
)
from vlkd.objectives.contrastive import info_nce, interactive_contrastive, siglip
from vlkd.objectives.dbild import dbild
from vlkd.objectives.embedding import embedding_cosine, embedding_mse
from vlkd.objectives.kneedle import kneedle_k
from vlkd.objectives.matching import hard_negatives, image_text_matching
from vlkd.objectives.relational import neighbour_kl, relational_kl
from vlkd.objectives.token_logits import taid_kl, taid_target, token_cross_entropy, token_kl
from vlkd.objectives.visual_tokens import relation_loss, visual_feature_matching

__all__ = [
    "binary_kl_norm",
    "class_kl",
    "cross_entropy",
    "dbild",
    "distillation_kl",
    "embedding_cosine",
    "embedding_mse",
    "feature_cosine",
    "hard_negatives",
    "image_text_matching",
    "info_nce",
    "interactive_contrastive",
    "kneedle_k",
    "neighbour_kl",
    "relation_loss",
    "relational_kl",
    "siglip",
    "taid_kl",
    "taid_target",
    "token_cross_entropy",
    "token_kl",
    "visual_feature_matching",
]

"""Evaluation protocols: pure functions from embeddings to figures, one file per protocol."""

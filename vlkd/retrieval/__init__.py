"""Encoding a data set, exact retrieval metrics, and the FAISS index. Knows nothing of training."""

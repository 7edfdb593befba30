"""The benchmark suite: declared data sets, embeddings computed once, protocols, results that can be compared."""

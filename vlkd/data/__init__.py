"""Data: decoding images, writing and indexing shards, and drawing captioned scenes offline."""

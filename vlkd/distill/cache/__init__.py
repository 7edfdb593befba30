"""Teacher features on disk, one folder per teacher and source: column shards and a manifest, checked when opened."""

from vlkd.distill.cache.columns import check_embeddings
from vlkd.distill.cache.format import CacheSpec
from vlkd.distill.cache.open import ensure_cache, open_cache, verify_cache
from vlkd.distill.cache.reader import CacheReader

__all__ = ["CacheReader", "CacheSpec", "check_embeddings", "ensure_cache", "open_cache", "verify_cache"]

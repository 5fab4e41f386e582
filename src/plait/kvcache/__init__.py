"""Bookkeeping of KV blocks: which hold what, who shares them, what may be overwritten.

pool.py     reference-counted blocks, those free but still cached, copy-free sharing
prefix.py   stable names for the content of full blocks, and the index from name to block
"""

from plait.kvcache.pool import KvBlockPool
from plait.kvcache.prefix import PrefixIndex, PrefixNamespace, chain_keys

__all__ = ["KvBlockPool", "PrefixIndex", "PrefixNamespace", "chain_keys"]

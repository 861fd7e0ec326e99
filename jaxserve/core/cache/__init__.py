"""Pages: the table that maps positions to them, and the pool that holds keys and values."""

from jaxserve.core.cache.kv_pool import KVPool, bytes_per_page, copy_pages, init_kv_pool
from jaxserve.core.cache.page_table import PageTable, init_page_table

__all__ = ["KVPool", "PageTable", "bytes_per_page", "copy_pages", "init_kv_pool", "init_page_table"]

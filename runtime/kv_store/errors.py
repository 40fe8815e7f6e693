"""What the store says when it is misused or full."""

from __future__ import annotations


class KVStoreError(RuntimeError):
    """A request that the store cannot serve; the store is as it was before."""


class OutOfPages(KVStoreError):
    """No free page is left below the limit of a pool."""

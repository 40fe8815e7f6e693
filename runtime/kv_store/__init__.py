"""A paged store of keys and values: pools of pages, and views of sequences that may share pages."""

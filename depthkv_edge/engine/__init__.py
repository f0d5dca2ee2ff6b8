"""The library as Python sees it: finding it, its C API, plans, contexts, statistics, what it logs."""

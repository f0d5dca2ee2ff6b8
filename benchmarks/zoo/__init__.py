"""Models with the attention of real ones, small everywhere else, and what works on them: docs/support.md."""

"""Answers and conversations over one context."""

"""Programs of others that run with a budget."""

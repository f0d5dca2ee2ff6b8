"""llama-server with a budget, and its page."""

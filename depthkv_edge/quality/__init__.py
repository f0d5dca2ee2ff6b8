"""Quality, memory and speed of a KV cache, beside everything a user would pick instead."""

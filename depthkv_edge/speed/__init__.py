"""Speed and memory of KV caches, measured side by side: one process for each, taking turns."""

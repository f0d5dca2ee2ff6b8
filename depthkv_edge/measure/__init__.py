"""What every measurement shares: the facts that it depends on, and its progress."""

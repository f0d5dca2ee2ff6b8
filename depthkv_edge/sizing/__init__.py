"""What a budget costs and what a machine has room for, before anything is loaded."""

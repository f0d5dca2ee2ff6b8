"""Beside kvpress, on the same model, tokens and metric: see README.md. `scripts/peers.sh` runs it."""

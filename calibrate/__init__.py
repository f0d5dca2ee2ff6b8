"""The workstation half: how much each layer suffers when its KV cells are evicted, measured in torch."""

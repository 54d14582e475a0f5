"""How long a test waits for what must come."""

PATIENCE_S = 300.0
"""Ends what hangs, and nothing else: beside three other workers on two cores a process of the lowest priority may wait a minute for its turn."""

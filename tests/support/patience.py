"""How long a test waits for what must come."""

PATIENCE_S = 900.0
"""Ends what hangs, and nothing else: beside three other workers on two cores that their host slows down, a launcher that takes 20 core-seconds took more than 300."""

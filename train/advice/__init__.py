"""What becomes of an attempt that failed: evidence, rules and a verdict."""

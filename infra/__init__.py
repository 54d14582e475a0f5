"""Machines: configuration, storage, processes, logs. Knows nothing of images or text."""

"""A run and its stages: the table of stages, places, inputs by lineage, elastic sizes, cluster jobs."""

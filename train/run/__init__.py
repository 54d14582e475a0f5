"""A run and its stages: the table of stages, where their files lie, inputs checked by lineage, changing numbers of ranks, cluster jobs."""

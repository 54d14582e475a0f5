"""Where models meet data: the stages of a run."""

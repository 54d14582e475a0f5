"""The launcher, whole stages and the whole pipeline."""

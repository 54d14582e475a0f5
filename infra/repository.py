"""Where the checkout is, and paths below its root. No other module may count folders upwards from its ``__file__``."""

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LAUNCHER = REPOSITORY / "launcher.py"
DOCS = REPOSITORY / "docs"

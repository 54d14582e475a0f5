"""Where the checkout is, paths below its root, and its commit. No other module may count folders upwards from its ``__file__``. Standard library only."""

import re
import subprocess
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LAUNCHER = REPOSITORY / "launcher.py"
DOCS = REPOSITORY / "docs"
ARCHIVED = Path(__file__).parent / "commit.txt"
"""``git archive`` fills in the commit (.gitattributes); in a checkout it has a placeholder."""


@cache
def commit() -> str:
    """The commit of this checkout, followed by ``+dirty`` if tracked files differ from it; that of a ``git archive``; otherwise ``unknown``. Looked up once in a
    process, because a checkout that changes later does not change the code that runs."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        asked = subprocess.run([*git, "rev-parse", "HEAD", "--show-toplevel"], capture_output=True, text=True, check=True).stdout.splitlines()
        if len(asked) == 2 and Path(asked[1]).resolve() == REPOSITORY.resolve():  # a copy below another checkout has not that one's commit
            return asked[0] + ("+dirty" if subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        archived = ARCHIVED.read_text().strip()
    except OSError:
        return "unknown"
    return archived if re.fullmatch(r"[0-9a-f]{40,64}", archived) else "unknown"

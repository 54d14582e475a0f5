"""The last stage's work: a run folder -> report.html."""

from infra import storage
from train.report.page import render
from train.report.view import RunView


def build(run_url: str) -> str:
    """Write ``report.html`` into a run folder, finished or not; see ``train.report.page.render``.

    Args:
        run_url: the run folder, local or s3://.

    Returns:
        URL of the page.
    """
    url = storage.join(run_url, "report.html")
    storage.write_bytes(url, render(RunView(run_url)).encode())
    return url

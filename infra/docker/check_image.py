"""The last step of an image's build. It checks that the environment imports, that torch's CUDA version is the recorded one, and that what Triton compiles at its
first use can be compiled here.

No GPU and no driver is needed: an empty library stands in for the driver's, because linking needs no more of it than the name.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

IMPORTS = ("torch", "deepspeed", "streaming", "boto3", "tensorboard", "sentencepiece", "pyarrow", "simplejpeg", "resvg_py", "pycld2")
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
DRIVER = "libcuda.so.1"


def recorded_cuda(constraints: str) -> str:
    """The CUDA version that the locked torch was built with, from the head of constraints.txt (.ci/freeze.py writes it).

    Raises:
        SystemExit: there is no such line.
    """
    found = re.search(r"^# torch\.version\.cuda: (\S+)$", constraints, re.M)
    if not found:
        raise SystemExit("constraints.txt: no line '# torch.version.cuda: ...'; write the file with .ci/freeze.py.")
    return found[1]


def check_cuda(built: str | None, recorded: str) -> None:
    """A CUDA build of torch must have the recorded CUDA version; a CPU build (None) has none.

    Raises:
        SystemExit: the versions differ.
    """
    if built is not None and built != recorded:
        raise SystemExit(f"torch was built with CUDA {built}, constraints.txt records {recorded}: freeze it again (.ci/freeze.py), then images.lock.")


def compile_stub(cache: Path) -> Path:
    """Compile and load Triton's launcher with the compiler and the headers that are here; returns the library.

    Raises:
        subprocess.CalledProcessError, RuntimeError, ImportError: no compiler, no headers, or a library that cannot be loaded.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    cache.mkdir()
    subprocess.run([build._find_compiler("c"), "-shared", f"-Wl,-soname,{DRIVER}", "-x", "c", os.devnull, "-o", str(cache / DRIVER)], check=True)
    source = str(Path(driver.dirname, "driver.c"))
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    library = build.compile_so_from_file(
        source,
        "cuda_utils",
        library_dirs=[str(cache)],
        include_dirs=driver.include_dirs,
        libraries=driver.libraries,
        ccflags=["-Wl,-z,lazy", f"-Wl,-rpath,{cache}"],
    )
    sys.setdlopenflags(os.RTLD_LAZY)  # the driver's functions are resolved only when they are called, which needs a GPU
    assert build._load_module_from_path("cuda_utils", library).launch
    return Path(library)


def main() -> None:
    """Run every check and print a line for each."""
    for name in IMPORTS:
        importlib.import_module(name)
    print(f"imported: {', '.join(IMPORTS)}")
    import torch

    recorded = recorded_cuda(CONSTRAINTS.read_text())
    check_cuda(torch.version.cuda, recorded)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none (a CPU build)'}; recorded: {recorded}")
    if torch.version.cuda is None and importlib.util.find_spec("triton") is None:
        print("no Triton: a CPU build has none")
        return
    with tempfile.TemporaryDirectory() as folder:
        library = compile_stub(Path(folder, "cache"))
        print(f"Triton's launcher compiled and loaded: {library.name}, {library.stat().st_size} bytes, headers of {sysconfig.get_paths()['include']}")


if __name__ == "__main__":
    main()

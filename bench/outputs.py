"""Where results go, checked before the measurement: afterwards there may be hours to lose."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from ..errors import UserError


def require_suffix(output: Path, suffix: str) -> None:
    """Raise UserError unless `output` is named as a file that ends in `suffix`: of any other name it is not
    clear what the files beside it are called, and whether they are somebody else's."""
    if output.suffix != suffix:
        raise UserError(f"--output {output}: give a name that ends in {suffix}, e.g. {output}{suffix}")
    if output.is_dir():
        raise UserError(
            f"--output {output} is a folder; give the name of a file, e.g. {output / 'r'}{suffix}"
        )


def require_writable(folder: Path) -> None:
    """Raise UserError unless files can be written to `folder`. It need not exist; it is left as it was."""
    made: list[Path] = []
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".dlp-deploy-"):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); give another --output") from None
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()

"""What the package loads before it is known what it must do."""

from __future__ import annotations

import subprocess
import sys


def test_help_and_errors_do_not_wait_for_torch() -> None:
    code = "import sys, dlp_deploy, dlp_deploy.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

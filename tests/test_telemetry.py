"""Nothing is reported to anyone: ONNX Runtime keeps a device id and a queue of events where it is let."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
{first}
import onnxruntime
from onnx import TensorProto, helper, save
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), sys.argv[1])
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""


def written(home: Path, first: str) -> list[str]:
    """Files that a session leaves in a home of its own."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "CI"))}
    program = PROGRAM.format(first=first)
    model = home.parent / f"{home.name}.onnx"
    subprocess.run([sys.executable, "-c", program, str(model)], check=True, env=kept | {"HOME": str(home)})
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def test_sessions_started_through_us_leave_no_trace(tmp_path: Path) -> None:
    assert written(tmp_path / "ours", "import dlp_deploy") == []


def test_the_variable_is_what_silences_it(tmp_path: Path) -> None:
    script = "import os, dlp_deploy; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    subprocess.run([sys.executable, "-c", script], check=True)

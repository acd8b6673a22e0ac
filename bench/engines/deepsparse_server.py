from __future__ import annotations

from . import LOCKS, Engine

ENGINE = Engine(
    name="deepsparse-server",
    title="DeepSparse's own pipelines and server",
    worker="",
    reads="deepsparse",
    precisions=(),
    licence="Neural Magic DeepSparse Community License (not open source)",
    modules=("deepsparse.transformers", "deepsparse.server.openai_server"),
    lock=LOCKS / "deepsparse-server.txt",
    pythons=((3, 11), (3, 10)),
    download_mb=330,
    notes=(
        "TextGeneration, deepsparse.server and deepsparse.benchmark. Not needed to bench or to serve.",
        "They write the shapes they load into model.onnx; dlp-deploy puts them back when it reads it.",
    ),
)

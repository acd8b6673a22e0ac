"""Messages between the bench and its worker processes: a JSON header and raw arrays.

A message is the length of the header (uint64, little endian), the header (UTF-8 JSON), and the
bytes of the arrays that the header lists under "arrays", in that order, C-contiguous.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import numpy as np

_LENGTH = struct.Struct("<Q")

Arrays = dict[str, np.ndarray]


def send(connection: socket.socket, body: dict[str, Any], arrays: Arrays | None = None) -> None:
    """Send one message. OSError when the other side is gone; TimeoutError as the socket is set."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    listed = [
        {"name": name, "dtype": array.dtype.str, "shape": array.shape} for name, array in contiguous.items()
    ]
    header = json.dumps({"body": body, "arrays": listed}).encode()
    connection.sendall(_LENGTH.pack(len(header)) + header)
    for array in contiguous.values():
        if array.size:
            connection.sendall(array.reshape(-1).view(np.uint8).data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], Arrays]:
    """Receive one message. EOFError when the other side closed or died."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    header = json.loads(bytes(_exactly(connection, length)))
    arrays = {}
    for listed in header["arrays"]:
        dtype, shape = np.dtype(listed["dtype"]), tuple(listed["shape"])
        raw = _exactly(connection, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays[listed["name"]] = np.frombuffer(raw, dtype).reshape(shape)
    return header["body"], arrays


def _exactly(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other side closed the connection")
        view = view[count:]
    return buffer

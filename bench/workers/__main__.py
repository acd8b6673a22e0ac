"""Start a worker: `python <this folder> <module or path of a .py file> <cores, as 0,2,4> <scratch folder>`.

Standard input is one end of a socket pair; messages go both ways over it (frames.py). When the other side is
gone, however it died, the worker removes its scratch folder and ends, whatever it is computing.
"""

import importlib
import importlib.util
import os
import select
import shutil
import socket
import sys
import threading
from pathlib import Path


def _load_package(folder):
    """Import this folder as a package, so that no sibling file shadows a library of the same name."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    _load("engine_workers", folder / "__init__.py", submodule_search_locations=[str(folder)])


def _load(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_session(worker):
    """The worker module: one of this folder, or a file elsewhere."""
    if worker.endswith(".py"):
        return _load("engine_workers.custom", worker)
    return importlib.import_module("engine_workers." + worker)


def _forbid_network():
    """Engines measure; none has a reason to talk to anyone."""

    def refuse(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            raise PermissionError(f"workers have no network: {event} refused")

    sys.addaudithook(refuse)


def _end_with_client(connection, scratch):
    """Wait, without using a processor, for the other end to be closed, which a killed client's is too."""
    hang_up = select.poll()
    hang_up.register(connection, 0)
    hang_up.poll()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def main():
    worker, cores, scratch = sys.argv[1], [int(core) for core in sys.argv[2].split(",")], sys.argv[3]
    # Before any import that starts threads: they inherit the affinity of the one that starts them.
    os.sched_setaffinity(0, cores)
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_client, args=(connection, scratch), daemon=True).start()
    _forbid_network()
    _load_package(Path(__file__).resolve().parent)
    serve = importlib.import_module("engine_workers.serve")
    serve.serve(connection, lambda: _load_session(worker).Session(len(cores)))


if __name__ == "__main__":
    main()

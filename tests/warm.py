"""A Python that begins with torch imported, which takes two seconds of every process that does so itself.

`warm.py serve SOCKET PYTHON` imports what hesscli needs, computes nothing, and forks for each that asks.
`warm.py ask SOCKET WORDS` asks: it is the process that its parent sees. The fork takes the words as Python does, and
has the folder, the environment and the streams of the one that asks; it gets its signals, and both end alike.
What depends on how a process begins (what is imported when, PYTHONPATH, closed streams) wants a real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

HANDED_ON = (signal.SIGINT, signal.SIGTERM)


def ask(path: str, words: list[str]) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    wanted = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(wanted).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(wanted)
    code = int.from_bytes(_all(server, 2), "big", signed=True)
    if code < 0:
        for number in HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: str) -> list[str]:
    """Forks until standard input ends; returns in a fork, with its words."""
    import select
    from contextlib import suppress

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    _import()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        with suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            sys.exit()
        asking, _ = listener.accept()
        if not os.fork():
            listener.close()
            return _begun(asking)
        asking.close()


def _import() -> None:
    import pkgutil
    from importlib import import_module

    import hesscli
    from hesscli.job.starting import start

    start()
    for module in pkgutil.walk_packages(hesscli.__path__, "hesscli."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for name in ("scipy.sparse.linalg", "torch.export", "torch.distributed.launcher.api"):
        import_module(name)


def _begun(asking: socket.socket) -> list[str]:
    """Returns in a fork; this process hands signals on to it, and its code back."""
    import threading

    size, streams, _, _ = socket.recv_fds(asking, 4, 3)
    words, folder, environment = json.loads(_all(asking, int.from_bytes(size, "big")))
    child = os.fork()
    if child:

        def hand_on() -> None:
            while number := asking.recv(1):
                os.kill(child, number[0])
            os.kill(child, signal.SIGKILL)  # the one that asked was killed

        threading.Thread(target=hand_on, daemon=True).start()
        for stream in (0, 1, 2, *streams):
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        asking.sendall(code.to_bytes(2, "big", signed=True))
        os._exit(0)
    asking.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words


def _all(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            sys.exit("the warm process is gone")
        found += part
    return found


def run(words: list[str]) -> None:
    """What Python does with its words, in a module that is called as the main one is."""
    import runpy

    if words[0] == "-u":
        del words[0]
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], vars(sys.modules["__main__"]))
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    words = serve(sys.argv[2])
    sys.executable, code = sys.argv[3], 0
    try:
        run(words)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch apart takes as long as most of what is run

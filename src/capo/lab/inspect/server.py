"""The token report over a local port, for runs too big for one file: steps are sent when asked for."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from capo.core.errors import InputError
from capo.lab.inspect.encode import pack_step
from capo.lab.inspect.gather import Gathered
from capo.lab.inspect.page import render

HOST = "127.0.0.1"


def make_server(run: Path, port: int = 0, *, step: int | None = None) -> ThreadingHTTPServer:
    """A server of one run's token report, on this machine only.

    Args:
        run: its directory.
        port: to listen on; 0 for any that is free.
        step: the recorded step to open at.

    Raises:
        InputError: no run, no recorded tokens, no such step, or the port cannot be had.
    """
    gathered = Gathered(Path(run))
    if step is not None:
        gathered.check_step(step)
    page = render(gathered, None, step, gathered.words).encode()

    class Handler(BaseHTTPRequestHandler):
        """Answers for the page and for ``/step/N``."""

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            number = path.removeprefix("/step/")
            if path == "/":
                self._answer(page, "text/html; charset=utf-8")
            elif path == "/favicon.ico":
                self._answer(b"", "image/x-icon")
            elif number.isdecimal() and int(number) in gathered.files:
                packed = pack_step(int(number), gathered.arrays(int(number)))
                self._answer(packed, "application/octet-stream")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of every request."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError("--port", f"{port} cannot be listened on: {error}.") from None


def serve(run: Path, port: int, *, step: int | None, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Raises:
        InputError: see `make_server`.
    """
    server = make_server(run, port, step=step)
    say(f"http://{HOST}:{server.server_address[1]}/ (end with Ctrl-C)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("ended")
    finally:
        server.server_close()

"""A small HTTP server with byte ranges on loopback, which can fail in the ways that servers do."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Fault = Callable[[str, int], str | None]  # path, how often it was asked for before -> what goes wrong, None: nothing


class RangeServer:
    """Serves the files below `root`. `fault(path, n)` decides about the request number n for the same bytes.

    Faults: a status such as "503"; "cut" closes the connection in mid-body; "short" and "empty" send fewer bytes, and
    say so; "flip" changes one bit; "whole" ignores the range; "hang" says nothing for a while.
    `log` lists (path, range) of all requests, `answered` those that got all their bytes.
    """

    def __init__(self, root: Path, fault: Fault | None = None, hang_s: float = 30.0) -> None:
        self.log: list[tuple[str, str]] = []
        self.answered: list[tuple[str, str]] = []
        self.fault = fault or (lambda path, n: None)
        counts: Counter[tuple[str, str]] = Counter()
        lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else head and body of an answer are 40 ms apart

            def do_HEAD(self) -> None:
                self.do_GET(body=False)

            def do_GET(self, body: bool = True) -> None:
                path, span = unquote(urlsplit(self.path).path), self.headers.get("Range", "")
                with lock:
                    fault = server.fault(path, counts[path, span]) if body else None
                    counts[path, span] += body
                    server.log.append((path, span))
                file = root / path.lstrip("/")
                if fault == "hang":
                    time.sleep(hang_s)
                if fault and fault.isdigit():
                    self.answer(int(fault), {}, b"")
                elif file.is_file():
                    self.send_file(file, None if fault == "whole" else span, body, fault)
                    if fault is None:
                        server.answered.append((path, span))
                else:
                    self.answer(404, {}, b"")

            def send_file(self, file: Path, span: str | None, body: bool, fault: str | None) -> None:
                content = file.read_bytes()
                headers = {"Accept-Ranges": "bytes", "ETag": f'"{file.stat().st_mtime_ns}"'}
                match = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")
                if match is None:
                    self.answer(200, headers, self.spoil(fault, content), body, fault)
                    return
                start = int(match[1])
                stop = min(int(match[2]) + 1 if match[2] else len(content), len(content))
                if start >= len(content):
                    self.answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                    return
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                self.answer(206, headers, self.spoil(fault, content[start:stop]), body, fault)

            def spoil(self, fault: str | None, data: bytes) -> bytes:
                if fault in ("short", "empty"):
                    return data[: len(data) // 2] if fault == "short" else b""
                if fault == "flip":
                    at = len(data) // 3  # the middle of a run of samples is where the headers of one are
                    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                return data

            def answer(
                self, status: int, headers: dict[str, str], data: bytes, body: bool = True, fault: str | None = None
            ) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not body:
                    return
                try:
                    self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                if fault == "cut":
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> RangeServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

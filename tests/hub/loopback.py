"""The HTTP server under the test Hub: it runs in a thread, keeps a log, and lets requests fail as a test asks for."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /raw/path" matches `pattern` (`re.search`).

    In this order: `before()` and `delay` when the request arrives; `status` instead of handling it, or `after()` once it is
    handled; `corrupt` and `truncate` for the body of the answer. The answer to a commit that was made gets lost with
    `Fault("POST .*/commit/", truncate=0)`; content of LFS comes from "GET /cdn/", that of Xet from "GET /cas/xorb/".
    """

    pattern: str
    status: int | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None  # X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo
    message: str = "a fault that the test asked for"
    truncate: int | None = None  # bytes of the body to send before the connection is closed
    corrupt: bool = False  # change the last byte of the body's first 64 KiB
    delay: float = 0.0
    before: Callable[[], object] = lambda: None  # called in a thread of its own, so it may wait or kill
    after: Callable[[], object] = lambda: None


class Refusal(Exception):
    """An error for the client, which goes by the header X-Error-Code first and by the status second."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        self.status, self.body, self.headers = status, {"error": message, **body}, dict(headers or {})
        self.headers["X-Error-Message"] = (
            " ".join(message.split()).encode("ascii", "replace").decode()
        )  # one line, as headers are
        self.headers |= {"X-Error-Code": code} if code else {}


class Call(Request):
    """A request; `content` is its body, `login` the name of the user."""

    content: IO[bytes]
    login: str | None

    def flag(self, name: str) -> bool:
        return self.query_params.get(name, "").lower() in ("true", "1")

    def data(self) -> dict:
        return json.loads(self.content.read() or b"{}")


PARTS = {"repo": "(?P<type>models/|datasets/|spaces/|)(?P<id>[^/]+/[^/]+)", "path": "(?P<path>.+)"}
ROUTES: list[tuple[str, re.Pattern, str, Callable]] = []


def route(methods: str, path: str, right: str = "see"):
    """Serve `path`: its {parts} (of PARTS, or up to the next slash) become arguments, {repo} a `Repo` the user may `right`.

    The raw path is matched: "exp/a" arrives as "exp%2Fa", and a framework's router would decode it before it splits.
    """

    def register(handler):
        pattern = re.sub(r"\{(\w+)\}", lambda part: PARTS.get(part[1], f"(?P<{part[1]}>[^/]+)"), path)
        ROUTES.extend((method, re.compile(pattern), right, handler) for method in methods.split())
        return handler

    return register


class Server:
    """Answers every request with `handle(call, path)`: a `Response` or what JSON can hold.

    `log` has the (method, raw path without query, Range header) of every request from its arrival on, `bytes_served` counts
    the bytes of files, and the first of `faults` that matches a request and is not used up is applied to it.
    """

    content = re.compile("/")  # paths that `bytes_served` counts

    def __init__(self, port: int = 0):
        self.arrival = threading.Condition()
        self.socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.reset()

    def handle(self, call: Call, path: str) -> Any:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the log and the faults; repositories stay."""
        self.log: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.bytes_served = 0

    def start(self) -> str:
        # `_answer` prints errors; uvicorn's own log would show a traceback for every `truncate`
        self.server = uvicorn.Server(uvicorn.Config(self, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self.url

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def count(self, pattern: str) -> int:
        """How many requests had a "METHOD /raw/path" that matches."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path, _ in list(self.log))

    def wait_for(self, pattern: str, count: int = 1, timeout: float = 60) -> None:
        """Wait until `count` such requests have arrived; they may not be answered yet."""
        with self.arrival:
            if not self.arrival.wait_for(lambda: self.count(pattern) >= count, timeout):
                raise TimeoutError(f"{self.count(pattern)} of {count} requests like {pattern!r} arrived in {timeout} s")

    async def __call__(self, scope, receive, send) -> None:
        call, path = Call(scope, receive), scope["raw_path"].decode()
        with self.arrival:
            self.log.append((call.method, path, call.headers.get("range")))
            self.arrival.notify_all()
            matching = (f for f in self.faults if f.times > 0 and re.search(f.pattern, f"{call.method} {path}"))
            fault = next(matching, Fault(""))
            fault.times -= 1
        await run_in_threadpool(lambda: (fault.before(), time.sleep(fault.delay)))
        with tempfile.SpooledTemporaryFile(max_size=1 << 20) as call.content:
            try:
                async for block in call.stream():
                    call.content.write(block)
            except ClientDisconnect:
                return
            call.content.seek(0)
            response = await run_in_threadpool(self._answer, call, path, fault)
        await response(scope, receive, self._wire(send, path, fault))

    def _answer(self, call: Call, path: str, fault: Fault) -> Response:
        try:
            if fault.status:
                raise Refusal(fault.status, fault.message, fault.code)
            answer = self.handle(call, path)
            response = answer if isinstance(answer, Response) else JSONResponse(answer)
            fault.after()
        except Refusal as refusal:
            response = JSONResponse(refusal.body, refusal.status, refusal.headers)
        except Exception as error:
            traceback.print_exc()
            response = JSONResponse({"error": f"the test Hub failed: {error!r}"}, 500)
        response.headers.update(fault.headers)
        return response

    def _wire(self, send, path: str, fault: Fault):
        """`send` that counts content, and spoils the body as the fault says."""
        left, corrupt, counted = fault.truncate, fault.corrupt, False

        async def wire(message) -> None:
            nonlocal left, corrupt, counted
            if message["type"] == "http.response.start":
                counted = bool(self.content.search(path)) and message["status"] in (200, 206)
                return await send(message)
            body, more = message.get("body", b""), message.get("more_body", False)
            if corrupt and body:
                body, corrupt = body[:-1] + bytes([body[-1] ^ 1]), False
            cut = left is not None and (len(body) > left or (more and left == 0))
            body = body[:left]
            left = None if left is None else left - len(body)
            self.bytes_served += len(body) * counted
            await send({**message, "body": body, "more_body": more or cut})
            if cut:
                raise ConnectionAbortedError("the fault's `truncate`")  # at which uvicorn closes the connection

        return wire

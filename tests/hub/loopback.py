"""The HTTP server under the test Hub: it runs in a thread, keeps a log, and lets requests fail as a test asks for."""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /raw/path" matches `pattern` (`re.search`).

    In this order: `before()` and `delay` on arrival; `status` instead of handling it; `after()`; the answer, `corrupt` and
    `truncate` its body. `Fault("POST .*/commit/", truncate=0)` loses the answer to a commit that was made.
    """

    pattern: str
    status: int | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None  # X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo
    message: str = "a fault that the test asked for"
    truncate: int = sys.maxsize  # bytes of the body to send before the connection is closed
    corrupt: bool = False  # change the last byte of the body's first 64 KiB
    delay: float = 0.0
    before: Callable[[], object] = lambda: None  # called in a thread of its own, so it may wait or kill; `after` as well
    after: Callable[[], object] = lambda: None


class Refusal(Exception):
    """An error for the client, which goes by the header X-Error-Code first and by the status second."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()  # as headers are
        headers = {**(headers or {}), "X-Error-Message": one_line, **({"X-Error-Code": code} if code else {})}
        self.response = JSONResponse({"error": message, **body}, status, headers)


class Call(Request):
    """A request; `content` is set to its body and `login` to the name of the user, or `None`."""

    def flag(self, name: str) -> bool:
        return self.query_params.get(name, "").lower() in ("true", "1")

    def data(self) -> dict:
        return json.loads(self.content or b"{}")


PARTS = {"repo": "(?P<type>(model|dataset|space)s/)?(?P<id>[^/]+/[^/]+)", "path": "(?P<path>.+)"}
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
    """Answers every request with its subclass's `handle(call, path)`: a `Response` or what JSON can hold.

    Requests are handled one after another, in one thread, so `handle` needs no lock. `log` has each one's (method, raw path
    without query, Range header), `bytes_served` counts the bytes of files, and the first fault that matches is applied.
    """

    def __init__(self, port: int = 0):
        self.socket = socket.create_server(("127.0.0.1", port))
        # connections inherit it; without, the second packet of an answer waits 40 ms for the client's acknowledgement
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.reset()

    def reset(self) -> None:
        """Forget the log and the faults; repositories stay."""
        self.log: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.bytes_served = 0

    def start(self) -> str:
        self.server = uvicorn.Server(uvicorn.Config(self, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        return self.url

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def count(self, pattern: str) -> int:
        """How many requests had a "METHOD /raw/path" that matches."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path, _ in list(self.log))

    async def __call__(self, scope, receive, send) -> None:
        call, path = Call(scope, receive), scope["raw_path"].decode()
        self.log.append((call.method, path, call.headers.get("range")))
        fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, f"{call.method} {path}")), Fault(""))
        fault.times -= 1
        await run_in_threadpool(lambda: (fault.before(), time.sleep(fault.delay)))
        call.content = await call.body()
        try:
            if fault.status:
                raise Refusal(fault.status, fault.message, fault.code)
            answer = self.handle(call, path)
            response = answer if isinstance(answer, Response) else JSONResponse(answer)
        except Refusal as refusal:
            response = refusal.response
        response.headers.update(fault.headers)
        await run_in_threadpool(fault.after)
        left, corrupt = fault.truncate, fault.corrupt

        async def spoiled(message) -> None:
            nonlocal left, corrupt
            body = message.get("body", b"")[:left]
            if corrupt and body:
                body, corrupt = body[:-1] + bytes([body[-1] ^ 1]), False
            left -= len(body)
            self.bytes_served += len(body) * isinstance(response, FileResponse)
            await send({**message, "body": body})

        await response(scope, receive, spoiled)  # uvicorn closes the connection after a body that is too short

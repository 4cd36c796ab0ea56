"""Parts of a file over HTTP ranges, when the Hub, its storage or the network do not do what they should."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi
from server import Fault

from hf_ewc.errors import HubError, HubUnavailableError
from hf_ewc.hub import RemoteFile, remote_files

LEGS = ("lfs",)  # ranges go to the CDN in both

CONTENT, LINK = "GET /cdn/", "HEAD .*/resolve/"
DATA = random.Random(3).randbytes(200_000)


@pytest.fixture
def file(hub, name) -> RemoteFile:
    """A file in LFS or Xet, with the link to its content in hand."""
    HfApi().create_repo(name, repo_type="dataset", private=True)
    commit = HfApi().upload_file(repo_id=name, repo_type="dataset", path_in_repo="f.safetensors", path_or_fileobj=DATA).oid
    file = remote_files(name, "dataset", commit)["f.safetensors"]
    assert file.read(0, 1) == DATA[:1]
    hub.reset()
    return file


def test_exactly_the_bytes_that_were_asked_for(hub, file):
    asked = [(0, 8), (17, 18), (100_000, 163_000), (199_999, 200_000), (0, 200_000)]
    for start, stop in asked:
        assert file.read(start, stop) == DATA[start:stop]
    assert hub.log == [("GET", hub.log[0][1], f"bytes={start}-{stop - 1}") for start, stop in asked], "and nothing else"
    assert hub.bytes_served == sum(stop - start for start, stop in asked)
    assert file.read(5, 5) == b""
    assert len(hub.log) == len(asked)
    for start, stop in ((0, 200_001), (-1, 4), (200_001, 200_002)):
        with pytest.raises(ValueError, match="which has 200000"):
            file.read(start, stop)
    assert repr(file).endswith("f.safetensors, 200,000 bytes)")


def test_threads_share_one_link(hub, file):
    together = threading.Barrier(8)
    hub.faults.append(Fault(CONTENT, status=403, times=8, before=together.wait))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: bytes(file.read(start, start + 10_000)), range(0, 200_000, 10_000)))
    assert b"".join(parts) == DATA
    assert hub.count(CONTENT) == 8 + 20
    assert hub.count(LINK) == 1, "eight threads learn at once that the link has expired; one asks for another"


@pytest.mark.parametrize("status", [400, 401, 403, 410])
def test_an_expired_link_is_asked_for_again(hub, file, status):
    hub.faults.append(Fault(CONTENT, status=status))
    assert file.read(5, 600) == DATA[5:600]
    assert (hub.count(LINK), hub.count(CONTENT)) == (1, 2)
    hub.faults.append(Fault(CONTENT, status=status, times=2))
    with pytest.raises(HubUnavailableError, match="refuses the link that the Hub hands out, and a fresh one, too"):
        file.read(5, 600)


def test_no_access_is_no_expired_link(hub, file):
    """The link expires, and by then the repository is gated: the Hub's own refusal is what is told."""
    hub.faults += [Fault(CONTENT, status=403), Fault(LINK, status=403, code="GatedRepo")]
    with pytest.raises(HubError, match="it is gated, and you were not let in"):
        file.read(5, 600)


@pytest.mark.parametrize("arrives", [0, 1, 70_000])
def test_a_connection_that_breaks_off_is_taken_up_again(hub, file, arrives):
    hub.faults.append(Fault(CONTENT, truncate=arrives, times=2))
    assert file.read(3_000, 180_000) == DATA[3_000:180_000]
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for _, _, asked in hub.log]
    assert starts == [3_000, 3_000 + arrives, 3_000 + 2 * arrives], "what has arrived is not asked for again"


def test_a_server_that_never_gets_anywhere(hub, file, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(Fault(CONTENT, truncate=0, times=99))
    with pytest.raises(HubUnavailableError, match="no byte arrived in 5 attempts") as caught:
        file.read(0, 600)
    assert "Run it again later" in str(caught.value)
    assert hub.count(CONTENT) == 5


@pytest.mark.parametrize("busy", [CONTENT, LINK, "GET /api/datasets/.*/tree/"])
def test_busy_servers_are_asked_again(hub, file, busy):
    hub.faults += [Fault(busy, status=503), Fault(busy, status=429, headers={"Retry-After": "0"})]
    fresh = remote_files(file.repo_id, "dataset", file.commit)["f.safetensors"]
    assert fresh.read(10, 20) == DATA[10:20]
    assert hub.count(busy) == 3


@pytest.mark.parametrize("busy", [CONTENT, LINK])
def test_a_server_that_stays_busy(hub, file, busy, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults += [Fault(busy, status=503, times=99)]
    fresh = remote_files(file.repo_id, "dataset", file.commit)["f.safetensors"]
    with pytest.raises(HubUnavailableError, match="failed with 503"):
        fresh.read(10, 20)


class Storage(BaseHTTPRequestHandler):
    """A storage that answers every request with `status`, `headers` and `body`, and then hangs up."""

    status: int = 206
    headers_to_send: dict[str, str]
    body: bytes
    asked: list[str]
    sent: int = 0

    def do_GET(self):
        type(self).asked.append(self.headers["Range"])
        self.send_response(self.status)
        for key, value in self.headers_to_send.items():
            self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for start in range(0, len(self.body), 10_000):
                self.wfile.write(self.body[start : start + 10_000])
                type(self).sent += 10_000
        except ConnectionError:
            pass  # the client does not want the rest

    def log_message(self, *arguments):
        pass


@pytest.fixture
def storage(hub, file):
    """Instead of its own storage, the Hub links to one that does as it is told; `file` has yet to ask for the link."""
    handler = type("Told", (Storage,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.faults.append(Fault(CONTENT, status=403))
    hub.faults.append(Fault(LINK, headers={"Location": f"http://localhost:{server.server_port}/x"}, times=9))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


LONG = bytes(50_000_000)
WRONG = {
    "all of it": (200, {"Content-Length": "50000000"}, LONG, "does not serve parts of files: .* with status 200"),
    "no range": (206, {"Content-Range": "units 1", "Content-Length": "600"}, DATA[:600], "Content-Range 'units 1'"),
    "another file": (206, {"Content-Range": "bytes 600-1199/9000"}, DATA[600:1200], "has a file of 9,000 bytes there"),
    "earlier": (206, {"Content-Range": "bytes 0-599/*"}, DATA[:600], "600 to 1199 were asked for, the server sends 0 to 599"),
    "further": (206, {"Content-Range": "bytes 600-1200/*"}, DATA[600:1201], "sends 600 to 1200"),
    "backwards": (206, {"Content-Range": "bytes 600-599/*"}, b"", "sends 600 to 599"),
    "more": (206, {"Content-Range": "bytes 600-1199/200000"}, DATA[600:1201], "sent more than the 600 bytes"),
    "compressed": (206, {"Content-Range": "bytes 600-1199/*", "Content-Encoding": "gzip"}, b"", r"compressed \(gzip\)"),
    "an error": (404, {"Content-Length": "0"}, b"", "answered 404|no such file"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_answers_that_are_something_else(storage, file, kind):
    storage.status, storage.headers_to_send, storage.body, said = WRONG[kind]
    with pytest.raises(HubError, match=said):
        file.read(600, 1200)
    assert storage.asked == ["bytes=600-1199"]
    assert storage.sent < len(LONG) / 2, "it is noticed before all of it has arrived"


def test_a_part_may_come_in_parts(storage, file):
    """RFC 9110 permits a server to answer with less than what was asked for."""
    storage.headers_to_send, storage.body = {"Content-Range": "bytes 600-899/*", "Content-Length": "300"}, DATA[600:900]
    with pytest.raises(HubError, match="900 to 1199 were asked for, the server sends 600 to 899"):
        file.read(600, 1200)
    assert storage.asked == ["bytes=600-1199", "bytes=900-1199"], "the rest of it is asked for"


def test_a_whole_file_may_come_as_such(storage, file):
    storage.status, storage.headers_to_send, storage.body = 200, {"Content-Length": "200000"}, DATA
    assert file.read(0, 200_000) == DATA


@pytest.mark.parametrize("header", [{"X-Linked-Size": "12"}, {"X-Linked-Etag": "5" * 64}])
def test_a_link_to_something_else(hub, file, header):
    hub.faults += [Fault(CONTENT, status=403), Fault(LINK, headers=header)]
    with pytest.raises(HubError, match=r"the Hub links to (a file of 12 bytes|content with sha256 5{64}), and lists"):
        file.read(10, 20)


def test_small_files_come_from_the_hub_itself(hub, file):
    """A regular file of a private repository is not in the storage: the Hub serves it, and needs the token."""
    commit = HfApi().upload_file(repo_id=file.repo_id, repo_type="dataset", path_in_repo="a.txt", path_or_fileobj=b"abcde").oid
    HfApi().upload_file(repo_id=file.repo_id, repo_type="dataset", path_in_repo="below/b.txt", path_or_fileobj=b"abcde")
    listed = remote_files(file.repo_id, "dataset", "main")
    assert listed.keys() == {".gitattributes", "a.txt", "f.safetensors"}, "only the top is listed"
    small = remote_files(file.repo_id, "dataset", commit)["a.txt"]
    assert small.sha256 is None
    assert small.read(1, 4) == b"bcd"
    with pytest.raises(HubError, match="no such repository"):
        RemoteFile(file.repo_id, "dataset", commit, "a.txt", 5, token="hf_other").read(1, 4)


def test_offline_and_unreachable(hub, file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match="HF_HUB_OFFLINE is set"):
        file.read(1, 4)
    monkeypatch.undo()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults += [Fault(CONTENT, status=403), Fault(LINK, headers={"Location": "http://localhost:9/x"})]
    with pytest.raises(HubUnavailableError, match="cannot be reached"):
        file.read(1, 4)

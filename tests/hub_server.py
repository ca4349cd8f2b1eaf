"""A small model hub on this machine: what the hub's client needs to create, upload, list and download.

It speaks the hub's HTTP interface as its client uses it, with large files over LFS (not xet), users with
tokens, private repositories, branches, and faults on demand. It keeps everything in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_sha1(self) -> str:
        """Git's name of the content, or of the pointer that git holds in place of a large one."""
        held = self.content
        if self.large:
            pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
            held = pointer.format(self.sha256, len(self.content)).encode()
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


Files = dict[str, Blob]


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Attributes:
        request: pattern of "METHOD /path".
        status: answer with it; 0 drops the connection after half of the body was read.
        times: how often.
        seconds: wait before the answer, which then is as usual if no status is given.
    """

    request: str
    status: int | None = None
    times: int = 1
    seconds: float = 0.0
    words: str = ""


class Hub(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = {"hf_" + "a" * 34: "me", "hf_" + "b" * 34: "other"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def token(self) -> str:
        """The access token of the user ``me``."""
        return next(iter(self.users))

    def asked(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.log)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that runs until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Refused(Exception):
    def __init__(self, status: int, words: str = "", code: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing goes to stderr, where tests look for what the client says."""

    def _serve(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        self.server.headers.append({key.lower(): value for key, value in self.headers.items()})
        try:
            fault = self._fault()
            if fault is not None and fault.status == 0:
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self._body()
            if fault is not None:
                threading.Event().wait(fault.seconds)  # tests may replace time.sleep
                if fault.status is not None:
                    raise Refused(fault.status, fault.words)
            with self.server.lock:
                self._answer(body)
        except Refused as refused:
            headers = {"X-Error-Message": refused.words} if refused.words else {}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            self._send(refused.status, json.dumps({"error": refused.words}).encode(), **headers)
        except OSError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _fault(self) -> Fault | None:
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times and re.search(fault.request, f"{self.command} {self.path}"):
                    fault.times -= 1
                    return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        with suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), Content_Type="application/json")

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        user, found = self._user(), self.server.repositories.get(name)
        owner = name.partition("/")[0]
        if found is None or (found.private and user != owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refused(403, "You have no right to write here")
        return found

    def _files(self, repository: Repository, revision: str) -> tuple[str, Files]:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def _answer(self, body: bytes) -> None:
        path = urlsplit(self.path).path
        for pattern, serve in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                serve(self, body, **{key: unquote(value) for key, value in match.groupdict().items()})
                return
        raise Refused(404, f"There is no {self.command} {path}")

    def create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked["organization"] or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.server.repositories:
            raise Refused(409, "You already created this model repo")
        private = asked.get("private") or asked.get("visibility") == "private"
        made = self.server.repositories[name] = Repository(private)
        made.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def check_card(self, body: bytes) -> None:
        front = json.loads(body)["content"].split("---\n")[1]
        errors = []
        try:
            metadata = yaml.safe_load(front)
            if metadata.get("license") == "not-a-license":
                errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        content = json.dumps({"warnings": [], "errors": errors}).encode()
        self._send(400 if errors else 200, content)

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._repository(repo)
        sha, files = self._files(found, revision)
        siblings = [{"rfilename": name} for name in files]
        self._json({"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._files(self._repository(repo), revision)
        self._json([_entry(name, blob) for name, blob in files.items()])

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        found = self._repository(repo, write=True)
        found.branches[branch] = found.branches["main"]
        self._json({})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._files(self._repository(repo, write=True), revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10**7
            there = files.get(file["path"])
            oid = (there.sha256 if there.large else there.git_sha1) if there else None
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        self._repository(repo, write=True)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.server.url}/storage/{wanted['oid']}?X-Amz-Signature=signed"
            actions = {} if wanted["oid"] in self.server.objects else {"actions": {"upload": {"href": href}}}
            objects.append({**wanted, **actions})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The content has another hash")
        self.server.objects[oid] = body
        self._send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repository(repo, write=True)
        files, message = dict(self._files(found, revision)[1]), ""
        for line in body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, f"The object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files, message)
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        sha, files = self._files(self._repository(repo), revision)
        if file not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        blob = files[file]
        content, tag = blob.content, blob.sha256 if blob.large else blob.git_sha1
        headers = {"X_Repo_Commit": sha, "ETag": f'"{tag}"', "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            self._send(200, **headers, Content_Length=str(len(content)))
        elif given := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(given[1])
            span = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, content[first:], **headers, Content_Range=span)
        else:
            self._send(200, content, **headers)


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    large = {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.large else {}
    return {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_sha1, **large}


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.check_card),
    (rf"GET /api/models/{_REPO}", Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)/?", Handler.tree),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /storage/(?P<oid>[0-9a-f]{64})", Handler.store),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]

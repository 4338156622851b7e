"""A Hub of our own: an HTTP server in a thread that answers what huggingface_hub asks for.

Repositories live in memory, as commits of whole file trees. `fail` makes a request fail on purpose.
Files are stored the LFS way, never the Xet way: clients set `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_of_the_owner"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
NO_REPO = {"X-Error-Code": "RepoNotFound"}
NO_REVISION = {"X-Error-Code": "RevisionNotFound"}
NO_ENTRY = {"X-Error-Code": "EntryNotFound"}


@dataclass
class Answer:
    """Status, body (bytes, or what becomes JSON) and headers."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, {"error": message}, {"X-Error-Message": message, **(headers or {})})


@dataclass
class Repo:
    """File trees by commit, and commits by branch and tag."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = repr((len(self.commits), sorted(files.items()))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or itself."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


class Hub:
    """The server's state, and what a test may ask of it.

    Attributes:
        url: for `HF_ENDPOINT`.
        repos: by id.
        requests: `(method, path)` of all that was asked, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[str, Answer | None]] = []
        self.url = ""

    def add(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Make a repository and return its commit."""
        return self.repos.setdefault(repo_id, Repo()).commit("main", files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.find(revision) or ""]

    def fail(self, request: str, answer: Answer | None) -> None:
        """Answer the next request like `request`, a regex of `METHOD path`, with an error, or hang up."""
        self.failures.append((request, answer))

    def snapshot(self) -> dict[str, Repo]:
        return copy.deepcopy(self.repos)

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Answer | None:
        self.requests.append((method, path))
        for index, (pattern, planned) in enumerate(self.failures):
            if re.search(pattern, f"{method} {path}"):
                del self.failures[index]
                return planned
        given = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given != TOKEN:
            return error(401, "Invalid credentials in Authorization header")
        for methods, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in methods.split():
                values = {name: unquote(text) for name, text in found.groupdict().items() if text}
                if "repo" in values and (denied := self._denied(method, values["repo"], given)):
                    return denied
                return handler(self, method, body, **values)
        return error(404, f"no such route: {method} {path}")

    def _denied(self, method: str, repo_id: str, token: str) -> Answer | None:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not token):
            return error(404 if token else 401, "Repository not found", NO_REPO)
        if method in ("POST", "PUT", "DELETE") and not token:
            return error(403, "Authorization error")
        return None

    def whoami(self, method: str, body: bytes) -> Answer:
        return Answer(body={"name": "me", "type": "user", "orgs": []})

    def create(self, method: str, body: bytes) -> Answer:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            return Answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.repos[repo_id] = Repo(private=private)
        self.repos[repo_id].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return Answer(body={"url": url, "name": repo_id, "id": repo_id})

    def delete(self, method: str, body: bytes) -> Answer:
        asked = json.loads(body)
        del self.repos[f"{asked.get('organization') or 'me'}/{asked['name']}"]
        return Answer()

    def info(self, method: str, body: bytes, repo: str, revision: str = "main") -> Answer:
        found, sha = self.repos[repo], self.repos[repo].find(revision)
        if sha is None:
            return error(404, "Invalid rev id", NO_REVISION)
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        fields = {
            "id": repo,
            "sha": sha,
            "private": found.private,
            "siblings": siblings,
            "tags": [],
        }
        return Answer(body=fields)

    def refs(self, method: str, body: bytes, repo: str) -> Answer:
        found = self.repos[repo]

        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}
                for name, sha in refs.items()
            ]

        branches, tags = listed(found.branches, "heads"), listed(found.tags, "tags")
        return Answer(body={"branches": branches, "tags": tags, "converts": []})

    def branch(self, method: str, body: bytes, repo: str, revision: str) -> Answer:
        found = self.repos[repo]
        if method == "DELETE":
            del found.branches[revision]
        elif revision in found.branches:
            return error(409, "Reference already exists")
        else:
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            found.branches[revision] = found.find(start) or ""
        return Answer()

    def tag(self, method: str, body: bytes, repo: str, revision: str) -> Answer:
        found, name = self.repos[repo], json.loads(body)["tag"]
        if name in found.tags:
            return error(409, "Tag reference exists already")
        found.tags[name] = found.find(revision) or ""
        return Answer()

    def tree(self, method: str, body: bytes, repo: str, revision: str) -> Answer:
        sha = self.repos[repo].find(revision)
        if sha is None:
            return error(404, "Invalid rev id", NO_REVISION)
        return Answer(
            body=[
                {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                | ({"lfs": lfs_of(data)} if is_large(path) else {})
                for path, data in sorted(self.repos[repo].commits[sha].items())
            ]
        )

    def preupload(self, method: str, body: bytes, repo: str, revision: str) -> Answer:
        sha = self.repos[repo].find(revision)
        if sha is None:
            return error(404, "Invalid rev id", NO_REVISION)
        known = self.repos[repo].commits[sha]
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            entry = {"path": path, "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if is_large(path) else "regular"
            if path in known:
                data = known[path]
                entry["oid"] = lfs_of(data)["oid"] if is_large(path) else git_hash(data)
            files.append(entry)
        return Answer(body={"files": files})

    def batch(self, method: str, body: bytes, repo: str) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/lfs/{asked['oid']}"},
                "verify": {"href": f"{self.url}/lfs/{asked['oid']}/verify"},
            }
            known = asked["oid"] in self.objects
            objects.append(asked if known else {**asked, "actions": actions})
        return Answer(body={"transfer": "basic", "objects": objects})

    def upload(self, method: str, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return error(400, "The content is not that of the oid")
        self.objects[oid] = body
        return Answer()

    def verify(self, method: str, body: bytes, oid: str) -> Answer:
        arrived = len(self.objects.get(oid, b""))
        return Answer() if arrived == json.loads(body)["size"] else error(422, "Not all arrived")

    def commit(self, method: str, body: bytes, repo: str, revision: str) -> Answer:
        found = self.repos[repo]
        head = found.branches.get(revision)
        if head is None:
            return error(404, "Invalid rev id", NO_REVISION)
        files = dict(found.commits[head])
        for line in body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header" and value.get("parentCommit", head) != head:
                return error(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    return error(400, f"LFS pointer pointed to a file that does not exist: {value}")
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        url = f"{self.url}/{repo}/commit/{sha}"
        return Answer(body={"success": True, "commitOid": sha, "commitUrl": url})

    def resolve(self, method: str, body: bytes, repo: str, revision: str, path: str) -> Answer:
        sha = self.repos[repo].find(revision)
        if sha is None:
            return error(404, "Invalid rev id", NO_REVISION)
        data = self.repos[repo].commits[sha].get(path)
        if data is None:
            return error(404, "Entry not found", {**NO_ENTRY, "X-Repo-Commit": sha})
        etag = lfs_of(data)["oid"] if is_large(path) else git_hash(data)
        return Answer(body=data, headers={"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    def validate_card(self, method: str, body: bytes) -> Answer:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else {}
        problems = [
            *(
                ["license must be a string"]
                if not isinstance(metadata.get("license", ""), str)
                else []
            ),
            *(
                f"language {code!r} must be an ISO 639-1, 639-2 or 639-3 code"
                for code in metadata.get("language", [])
                if not re.fullmatch("[a-z]{2,3}", code)
            ),
            *(
                ["base_model_relation is none of " + ", ".join(sorted(RELATIONS))]
                if metadata.get("base_model_relation", "finetune") not in RELATIONS
                else []
            ),
        ]
        problems = [{"message": problem} for problem in problems]
        return Answer(400 if problems else 200, {"errors": problems, "warnings": []})


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def lfs_of(data: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


API = rf"/api/models/{REPO}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create),
    ("DELETE", "/api/repos/delete", Hub.delete),
    ("POST", "/api/validate-yaml", Hub.validate_card),
    ("GET", API, Hub.info),
    ("GET", rf"{API}/revision/{REVISION}", Hub.info),
    ("GET", rf"{API}/refs", Hub.refs),
    ("GET", rf"{API}/tree/{REVISION}(?:/.*)?", Hub.tree),
    ("POST DELETE", rf"{API}/branch/{REVISION}", Hub.branch),
    ("POST", rf"{API}/tag/{REVISION}", Hub.tag),
    ("POST", rf"{API}/preupload/{REVISION}", Hub.preupload),
    ("POST", rf"{API}/commit/{REVISION}", Hub.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Hub.upload),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", Hub.verify),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _serve(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        answer = self.hub.answer(self.command, path, self.headers, body)
        if answer is None:  # hang up without a word
            self.close_connection = True
            return
        content = answer.body
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            answer.headers["Content-Type"] = "application/json"
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (http.server's names)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty Hub on a free port of this machine until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

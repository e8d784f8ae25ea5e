"""A hub on 127.0.0.1 that speaks what huggingface_hub asks one for to download and to upload.

Files are sent whole in the commit ("regular"): there is no LFS and no Xet.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

SHA = "c" * 40  # of the one commit that a repository has
TOKEN = "hf_of_tester"


@dataclass
class FakeHub:
    """What is on the hub, and what it was asked.

    Attributes:
        url: its address.
        repos: content by path, by repository.
        gated: repositories whose terms nobody has accepted.
        private: repositories that only a token sees.
        role: what the token may do.
        refuses_commits: answers 403 to every upload.
        asked: methods and paths, in the order received.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    role: str = "write"
    refuses_commits: bool = False
    asked: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that shall use this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}

    def add(self, repo: str, folder: Path) -> None:
        """Puts a directory's files there."""
        self.repos[repo] = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fetched(self) -> set[str]:
        """The names of the files that were downloaded."""
        words = [line.split("/resolve/") for line in self.asked if line.startswith("GET")]
        return {word[1].partition("/")[2] for word in words if len(word) == 2}


class HubError(Exception):
    """An answer that is no success: status, huggingface_hub's X-Error-Code, and a JSON object."""

    def __init__(self, status: int, code: str = "", **body: str) -> None:
        super().__init__(status, code)
        self.status, self.code, self.body = status, code, body


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.state.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if path.startswith("/api/"):
                self._send(json.dumps(self._api(path.removeprefix("/api/"), body)).encode())
            else:
                self._file(path)
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self._send(json.dumps(error.body).encode(), error.status, headers)

    def _api(self, path: str, body: bytes) -> Any:
        kind, _, rest = path.partition("/")
        if path == "whoami-v2":
            self._check_token()
            token = {"accessToken": {"role": self.state.role}}
            orgs = [{"name": "readers", "roleInOrg": "read"}]
            return {"type": "user", "name": "tester", "orgs": orgs, "auth": token}
        if path == "repos/create":
            return self._create(json.loads(body))
        if path == "validate-yaml":
            return {"errors": [], "warnings": []}
        if kind != "models":  # what huggingface_hub can do without
            raise HubError(404)
        repo, (what, *more) = "/".join(rest.split("/")[:2]), rest.split("/")[2:] or [""]
        files = self._files(repo)
        if what in ("", "revision"):
            if more and more[0] not in ("main", SHA):
                raise HubError(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            is_private = repo in self.state.private
            return {"id": repo, "sha": SHA, "siblings": siblings, "private": is_private}
        if what == "tree":
            return [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
        self._check_token()
        if self.state.refuses_commits:
            raise HubError(403)
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {
                "files": [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
                ]
            }
        assert what == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.state.url}/{repo}/commit/{SHA}", "commitOid": SHA}

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        self._check_token()
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = {"url": f"{self.state.url}/{repo}"}
        if repo in self.state.repos:
            raise HubError(409, **url)
        self.state.repos[repo] = {}
        if asked.get("visibility") == "private":
            self.state.private.add(repo)
        return url

    def _file(self, path: str) -> None:
        repo, _, rest = path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        files = self._files(repo)
        if repo in self.state.gated:
            raise HubError(403, "GatedRepo")
        if name not in files:
            raise HubError(404, "EntryNotFound")
        self._send(files[name], 200, {"X-Repo-Commit": SHA, "ETag": f'"{_oid(files[name])}"'})

    def _files(self, repo: str) -> dict[str, bytes]:
        is_hidden = repo in self.state.private and not self._has_token()
        if repo not in self.state.repos or is_hidden:
            raise HubError(404, "RepoNotFound")
        return self.state.repos[repo]

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _check_token(self) -> None:
        if not self._has_token():
            raise HubError(401)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return sha1(content, usedforsecurity=False).hexdigest()

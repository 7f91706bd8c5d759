"""A stand-in for the Hub on the loopback: enough of its HTTP interface to create, push to, look into and load from repositories.

`HubStub()` is a context manager; `environment(home)` is what a process needs in order to speak to it and to nothing else.
As on the Hub, writing needs a token, large and binary files go through LFS and arrive with the checksum they were announced with,
and a commit may only name LFS files that were uploaded. What it does not know is answered with 501 and kept in `unknown`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stub"
USER = "me"
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin", ".npz")
REPOSITORY = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"


class Stored(NamedTuple):
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the blob; of an LFS file the name of its content."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Repository:
    """Files by path, of every commit by its hash; the newest commit is `main`."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, Stored]] = {}
        self.commit({})

    def commit(self, files: dict[str, Stored]) -> str:
        names = [f"{path} {file.oid}" for path, file in sorted(files.items())]
        self.head = hashlib.sha1("\n".join([str(len(self.commits)), *names]).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    @property
    def files(self) -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.head].items()}


class HubStub:
    """The server, its repositories by ("models" or "datasets", id), and what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploaded: dict[str, bytes] = {}  # LFS content by its sha256
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str, kind: str = "models") -> dict[str, bytes]:
        """What `main` of a repository holds, by path."""
        return self.repositories[kind, name].files

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that is online here only, with its cache in `home` and the stub's token."""
        left_out = ("HF_", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # uploads then speak LFS, which plain HTTP can stand in for
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Refused(Exception):
    def __init__(self, status: int, code: str, **headers: str):
        super().__init__(code)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code} | headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self._read()
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for methods, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods:
                    values = found.groupdict()
                    if "kind" in values:
                        values["kind"] = values["kind"] or "models"
                    return answer(self, **values)
            self.hub.unknown.append(f"{self.command} {path}")
            raise _Refused(501, "NotInTheStub")
        except _Refused as refused:
            self._send(b'{"error": "%s"}' % str(refused).encode(), refused.status, **refused.headers)

    @property
    def hub(self) -> HubStub:
        return self.server.hub  # type: ignore[attr-defined]

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _need_token(self) -> None:
        if not self._has_token():
            raise _Refused(401, "Unauthorized")

    def _repository(self, kind: str, id: str) -> Repository:
        repository = self.hub.repositories.get((kind, id))
        if repository is None or (repository.private and not self._has_token()):
            raise _Refused(404, "RepoNotFound")
        return repository

    def _commit(self, kind: str, id: str, revision: str) -> tuple[str, dict[str, Stored]]:
        repository = self._repository(kind, id)
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    # ---- writing

    def create(self) -> None:
        self._need_token()
        asked = json.loads(self.body)
        kind, id = f"{asked.get('type', 'model')}s", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        if (kind, id) in self.hub.repositories:
            self._send(json.dumps({"error": "already there", "url": url}).encode(), 409)
            return
        self.hub.repositories[kind, id] = Repository(asked.get("visibility") == "private")
        self._json({"url": url, "name": id, "id": id})

    def preupload(self, kind: str, id: str, revision: str) -> None:
        self._need_token()
        self._commit(kind, id, revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or b"\0" in base64.b64decode(file["sample"])
            modes.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        self._json({"files": modes})

    def batch(self, kind: str, id: str) -> None:
        self._need_token()
        self._repository(kind, id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.uploaded:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "WrongChecksum")
        self.hub.uploaded[oid] = self.body
        self._send()

    def commit(self, kind: str, id: str, revision: str) -> None:
        self._need_token()
        files = dict(self._commit(kind, id, revision)[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.uploaded:
                    raise _Refused(400, "LfsFileNotUploaded")
                files[value["path"]] = Stored(self.hub.uploaded[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise _Refused(400, f"Unknown operation {key}")
        commit = self._repository(kind, id).commit(files)
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}"})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def whoami(self) -> None:
        self._need_token()
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    # ---- reading

    def info(self, kind: str, id: str, revision: str | None) -> None:
        commit, files = self._commit(kind, id, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        about = {"id": id, "sha": commit, "private": self._repository(kind, id).private, "siblings": siblings}
        self._json(about | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, kind: str, id: str, revision: str, folder: str | None) -> None:
        files = self._commit(kind, id, revision)[1]
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _Refused(404, "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        self._json(_entries(inside, prefix, recursive))

    def paths_info(self, kind: str, id: str, revision: str) -> None:
        files = self._commit(kind, id, revision)[1]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        everything = {entry["path"]: entry for entry in _entries(files, "", recursive=True)}
        self._json([everything[path] for path in paths if path in everything])

    def refs(self, kind: str, id: str) -> None:
        head = self._repository(kind, id).head
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": head}
        self._json({"branches": [main], "converts": [], "tags": []})

    def resolve(self, kind: str, id: str, revision: str, path: str) -> None:
        commit, files = self._commit(kind, id, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", X_Repo_Commit=commit)
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self._send(file.content, **headers)
            return
        first, last = int(part[1]), min(int(part[2] or len(file.content)), len(file.content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
        self._send(file.content[first : last + 1], 206, **headers)


def _entries(files: Mapping[str, Stored], prefix: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under a prefix, as the tree of the Hub lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(files.items()):
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        if recursive or len(parts) == 1:
            blob = hashlib.sha1(file.oid.encode()).hexdigest() if file.lfs else file.oid
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": blob}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
            entries[path] = entry
    return list(entries.values())


ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), API + "/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), API + "/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("POST",), API + "/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (("GET",), API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), API + "/refs", _Handler.refs),
    (("GET",), API + "(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("POST",), REPOSITORY + r"\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (("GET", "HEAD"), REPOSITORY + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]

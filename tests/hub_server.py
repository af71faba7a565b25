"""A small Hugging Face Hub on loopback: what downloads, range reads and uploads use of its protocol, and faults."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub:
    """Repositories in memory, each with one branch, main; every commit is kept.

    Attributes:
        repos: owner/name -> {commit: {path: bytes}}, in order of time.
        private: names that need the token "secret".
        fault: called with (method, path, n-th call of that path); may return "cut", "slow", "damaged", or a status.
        log: (method, path, range header) of every request.
    """

    def __init__(self):
        self.repos, self.private, self.log, self.blobs = {}, set(), [], {}
        self.fault = lambda method, path, n: None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo, files):
        """A new commit with these files on top of the last one; returns its hash."""
        commits = self.repos.setdefault(repo, {})
        tree = {**(list(commits.values())[-1] if commits else {}), **files}
        name = hashlib.sha1(repr((repo, len(commits), sorted(tree.items()))).encode()).hexdigest()
        commits[name] = tree
        return name

    def head(self, repo):
        return list(self.repos[repo])[-1]

    def bytes_sent(self, path):
        return sum(sent for method, at, sent in self.log if method == "GET" and path in at)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer("HEAD")

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        earlier = sum(1 for m, p, _ in self.hub.log if (m, p) == (method, path))
        self.sent = 0
        fault = self.hub.fault(method, path, earlier)
        try:
            if isinstance(fault, int):
                self._send(fault, {"error": f"fault {fault}"})
            else:
                time.sleep(1 if fault == "slow" else 0)
                self._route(method, path, body, fault)
        finally:
            self.hub.log.append((method, path, self.sent))

    def _route(self, method, path, body, fault):
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._file(method, *match.groups(), fault)
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(tree|revision|paths-info)/([^/]+)(?:/.*)?", path):
            return self._listing(*match.groups(), body)
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)", path):
            return self._listing(match[1], "revision", "main", body)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.hub.repos:
                return self._send(409, {"error": "exists", "url": f"{self.hub.endpoint}/{repo}"})
            self.hub.repos[repo] = {}
            self.hub.commit(repo, {})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo)
            return self._send(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/(\S+)", path):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.blobs[match[1]] = body
            return self._send(200, {})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/(\S+)", path):
            return self._commit(match[1], body)
        return self._send(404, {"error": "Not Found"})

    def _commit(self, repo, body):
        import base64

        files = {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.commit(repo, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        return self._send(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def _tree(self, repo, revision):
        """(commit, files), or None after an error was sent."""
        if repo in self.hub.private and self.headers.get("Authorization") != "Bearer secret":
            self._send(401, {"error": "Invalid credentials"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if repo not in self.hub.repos:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.head(repo) if revision == "main" else revision
        if commit not in self.hub.repos[repo]:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, self.hub.repos[repo][commit]

    def _listing(self, repo, kind, revision, body):
        if (found := self._tree(repo, revision)) is None:
            return None
        commit, files = found
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            private = repo in self.hub.private
            found = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": private}
            return self._send(200, found)
        if kind == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(rb"paths=([^&]*)", body)
            asked = {unquote(p.decode() if isinstance(p, bytes) else p) for p in asked}
            entries = [entry for entry in entries if entry["path"] in asked]
        return self._send(200, entries)

    def _file(self, method, repo, revision, name, fault):
        if (found := self._tree(repo, revision)) is None:
            return None
        commit, files = found
        if name not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data, status = files[name], 200
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        if fault == "damaged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if method == "HEAD":
            return None
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        self.wfile.write(data)
        self.sent = len(data)
        return None

    def _send(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            **(headers or {}),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

"""A small Hugging Face Hub in this process: it answers the requests that huggingface_hub makes to
create a repository and to commit files, small ones in the commit and large ones through Git LFS.

Written after the Hub's API as huggingface_hub calls it; not recorded from the Hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_token_of_a_test"


class FakeHub:
    """`with FakeHub() as hub: hub.url`; `hub.repos` are the files of each repository by name."""

    def __init__(self, status: int | None = None) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.messages: list[str] = []
        self.cards: list[str] = []
        """Model cards that came to be validated."""
        self.requests: list[str] = []
        self.status = status
        """Answer to all requests that change something, if not None."""
        self._large: dict[str, bytes] = {}

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def answer(self, status: int, content: Any, code: str | None = None) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if code:
                    self.send_header("X-Error-Code", code)
                    self.send_header("X-Error-Message", code)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_GET(self) -> None:
                hub.requests.append(f"GET {self.path}")
                parts = urlsplit(self.path).path.strip("/").split("/")
                name = "/".join(parts[2:4])
                if parts[:2] != ["api", "models"] or name not in hub.repos:
                    self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
                    return
                self.answer(200, hub.info(name))

            def do_PUT(self) -> None:
                content = self.body()
                hub._large[hashlib.sha256(content).hexdigest()] = content
                self.answer(200, {})

            def do_POST(self) -> None:
                hub.requests.append(f"POST {self.path}")
                body = self.body()
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.answer(401, {"error": "Invalid credentials in Authorization header"})
                elif hub.status is not None:
                    self.answer(hub.status, {"error": "You don't have the rights"})
                else:
                    self.answer(200, hub.post(self.path, body))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def info(self, name: str) -> dict:
        siblings = []
        for file, content in self.repos[name].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row = {"rfilename": file, "blobId": blob, "size": len(content)}
            if is_large(file):
                digest = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                row["blobId"] = "0" * 40
            siblings.append(row)
        private = self.visibility.get(name) == "private"
        return {"id": name, "modelId": name, "private": private, "siblings": siblings, "tags": []}

    def post(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.visibility[name] = asked["visibility"]
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [
                    {**item, "actions": {"upload": {"href": f"{self.url}/storage/{item['oid']}"}}}
                    for item in json.loads(body)["objects"]
                ],
            }
        assert "/commit/" in path, path
        return self.commit("/".join(path.split("/")[3:5]), body)

    def commit(self, name: str, body: bytes) -> dict:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[name][value["path"]] = self._large[value["oid"]]
        return {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/1"}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))

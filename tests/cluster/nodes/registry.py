"""A registry of images on a node's own loopback, where containerd asks without TLS; run as a program: PORT ARCHIVE

It has the image of the archive under each name that ends in `gpuml-train:1`, those in `private/` for a login only, and
nothing else. Names in `busy/` it has no time for."""

import base64
import hashlib
import http.server
import json
import sys
import tarfile

LOGIN = "team:secret-of-the-team"
IMAGES = {"manifest": "application/vnd.docker.distribution.manifest.v2+json",
          "config": "application/vnd.docker.container.image.v1+json",
          "layer": "application/vnd.docker.image.rootfs.diff.tar"}  # fmt: skip


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def read_archive(path: str) -> tuple[bytes, dict[str, bytes]]:
    "The manifest of an image that lies in an archive as `docker save` writes it, and all its parts by their digests"
    with tarfile.open(path) as archive:
        (listed,) = json.load(archive.extractfile("manifest.json"))
        config, *layers = (archive.extractfile(name).read() for name in (listed["Config"], *listed["Layers"]))
    config = json.dumps(
        json.loads(config) | {"author": "registry"}
    ).encode()  # a login would be asked of all with its id

    def part(kind: str, content: bytes) -> dict:
        return {"mediaType": IMAGES[kind], "size": len(content), "digest": digest(content)}

    manifest = {"schemaVersion": 2, "mediaType": IMAGES["manifest"], "config": part("config", config)}
    text = json.dumps(manifest | {"layers": [part("layer", layer) for layer in layers]}).encode()
    return text, {digest(content): content for content in (text, config, *layers)}


class Registry(http.server.BaseHTTPRequestHandler):
    "GET and HEAD of /v2/NAME/manifests/TAG and /v2/NAME/blobs/DIGEST"

    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"  # who asks by TLS hears that there is none

    def do_GET(self) -> None:
        *_, kind, name = self.path.split("/")
        expected = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
        if "/busy/" in self.path:
            return self.answer(503)
        if "/private/" in self.path and self.headers.get("Authorization") != expected:
            return self.answer(401, {"WWW-Authenticate": 'Basic realm="registry"'})
        content = self.server.parts.get(name)
        if kind == "manifests" and name == "1" and self.path.endswith("gpuml-train/manifests/1"):
            content = self.server.manifest
        if content is None:
            return self.answer(404)
        sort = IMAGES["manifest"] if kind == "manifests" else "application/octet-stream"
        self.answer(200, {"Content-Type": sort, "Docker-Content-Digest": digest(content)}, content)

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Registry)
    server.manifest, server.parts = read_archive(sys.argv[2])
    server.serve_forever()

"""A bucket for tests: Google Cloud Storage on loopback, and a TensorFlow that believes in it.

`Bucket` answers as much of Google's JSON interface as TensorFlow, TensorStore and google-cloud-storage use, from
memory, with a latency and with failures on request, and counts requests and bytes. The latter two are sent to it by
environment variables. TensorFlow has the addresses built in, so `environment` makes a copy of it (of hard links, which
take no room) in which they are replaced by others of the same length.
"""

import base64
import collections
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import re
import shutil
import threading
import time
import urllib.parse

import tensorflow
from runs import ROOT

LIBRARY = "libtensorflow_framework.so.2"


class Bucket:
    """A server in threads of this process; a context manager.

    Attributes:
      objects: `bucket/name` -> bytes.
      latency: seconds that each answer takes.
      failures: (part of `METHOD path`, status, how many times), each used up from its front.
      requests: kind -> number.
      bytes_out: of bodies.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.latency, self.failures = 0.0, []
        self.requests, self.bytes_out = collections.Counter(), 0
        self._generations, self._uploads, self._lock = {}, {}, threading.Lock()
        self._numbers = itertools.count(int(time.time() * 1e6))
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()

    def put(self, name: str, content: bytes) -> dict:
        with self._lock:
            self.objects[name], self._generations[name] = bytes(content), str(next(self._numbers))
        return self.describe(name)

    def remove(self, name: str) -> bool:
        with self._lock:
            return self.objects.pop(name, None) is not None

    def describe(self, name: str) -> dict:
        bucket, _, rest = name.partition("/")
        content, moment = self.objects[name], time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return {
            "kind": "storage#object", "bucket": bucket, "name": rest, "id": name, "size": str(len(content)),
            "generation": self._generations[name], "metageneration": "1", "updated": moment, "timeCreated": moment,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "etag": self._generations[name],
        }  # fmt: skip

    def generation(self, name: str) -> str | None:
        return self._generations[name] if name in self.objects else None

    def upload(self, name: str | None = None, number: str = "") -> tuple[str, list]:
        """Begins an upload in parts, or finds one: its number, and [name, content so far]."""
        if name:
            number = str(next(self._numbers))
            self._uploads[number] = [name, b""]
        return number, self._uploads[number]

    def failure(self, request: str) -> int | None:
        with self._lock:
            for number, (part, status, times) in enumerate(self.failures):
                if part in request and times > 0:
                    self.failures[number] = (part, status, times - 1)
                    return status
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bucket: Bucket

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # of a process that was killed
            super().handle()

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        if isinstance(content, dict):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | headers
        self.bucket.bytes_out += len(content)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, message: str = "emulated") -> None:
        self.answer(status, {"error": {"code": status, "message": message}})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        path, body = re.sub(r"^/p+/", "/", url.path), self.body()  # p: see `_redirected`
        time.sleep(self.bucket.latency)
        if status := self.bucket.failure(f"{self.command} {urllib.parse.unquote(self.path)}"):
            self.bucket.requests["failed"] += 1
            return self.error(status)
        if "/b/nowhere/" in path + "/":
            return self.error(404, "The specified bucket does not exist.")
        if found := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(found[1], query, body)
        if path.endswith("/storageLayout"):
            return self.answer(200, {"hierarchicalNamespace": {"enabled": False}})
        found = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if not found:  # the media of an object, as the XML interface has it
            return self.object(urllib.parse.unquote(path[1:]), query | {"alt": "media"})
        bucket, name = found[1], found[2]
        if name is None:
            return (
                self.list(bucket, query)
                if path.endswith("/o")
                else self.answer(200, {"name": bucket, "location": "US"})
            )
        if copy := re.fullmatch(r"(.+)/(rewriteTo|copyTo)/b/([^/]+)/o/(.+)", name):
            return self.copy(
                f"{bucket}/{urllib.parse.unquote(copy[1])}", f"{copy[3]}/{urllib.parse.unquote(copy[4])}", copy[2]
            )
        return self.object(f"{bucket}/{urllib.parse.unquote(name)}", query)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_request

    def object(self, name: str, query: dict) -> None:
        bucket = self.bucket
        if self.command == "DELETE":
            bucket.requests["delete"] += 1
            return self.answer(204 if bucket.remove(name) else 404)
        generation, wanted = bucket.generation(name), query.get("ifGenerationMatch")
        if generation is None:
            bucket.requests["missing"] += 1
            return self.error(404, f"No such object: {name}")
        if query.get("ifGenerationNotMatch") == generation:
            return self.answer(304)
        if wanted is not None and wanted != generation:
            return self.error(412)
        if query.get("alt") != "media":
            bucket.requests["stat"] += 1
            return self.answer(200, bucket.describe(name))
        bucket.requests["read"] += 1
        content = bucket.objects[name]
        headers = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
            last = min(int(asked[2]) if asked[1] and asked[2] else len(content) - 1, len(content) - 1)
            if first >= len(content):
                return self.answer(416)
            return self.answer(
                206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}", **headers
            )
        return self.answer(200, content, **headers)

    def list(self, bucket: str, query: dict) -> None:
        self.bucket.requests["list"] += 1
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        low, high = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names = sorted(
            name.partition("/")[2] for name in list(self.bucket.objects) if name.startswith(f"{bucket}/{prefix}")
        )
        items, folders, following = [], set(), None
        for name in names:
            if not max(low, query.get("pageToken", "")) <= name < high:
                continue
            inner = name[len(prefix) :]
            if delimiter and delimiter in inner:
                folders.add(prefix + inner.partition(delimiter)[0] + delimiter)
                continue
            if len(items) == int(query.get("maxResults", 1000)):
                following = name
                break
            items.append(self.bucket.describe(f"{bucket}/{name}"))
        answer = {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}
        self.answer(200, answer | ({"nextPageToken": following} if following else {}))

    def copy(self, source: str, target: str, how: str) -> None:
        if self.bucket.generation(source) is None:
            return self.error(404)
        made = self.bucket.put(target, self.bucket.objects[source])
        size = {"totalBytesRewritten": made["size"], "objectSize": made["size"]}
        return self.answer(200, {"done": True, "resource": made} | size if how == "rewriteTo" else made)

    def upload(self, bucket: str, query: dict, body: bytes) -> None:
        store, kind = self.bucket, query.get("uploadType")
        if "upload_id" in query:
            _, upload = store.upload(number=query["upload_id"])
            upload[1] += body
            whole = re.search(r"/(\d+)$", self.headers.get("Content-Range", ""))
            if self.headers.get("Content-Range") and (not whole or len(upload[1]) < int(whole[1])):
                return self.answer(308, **({"Range": f"bytes=0-{len(upload[1]) - 1}"} if upload[1] else {}))
            store.requests["written"] += 1
            return self.answer(200, store.put(*upload))
        if kind == "resumable":
            number, _ = store.upload(f"{bucket}/{query.get('name') or json.loads(body)['name']}")
            place = (
                f"http://127.0.0.1:{store.port}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            )
            return self.answer(200, Location=place)
        name = query.get("name")
        if kind == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, content = (part.split(b"\r\n\r\n", 1)[1] for part in body.split(b"--" + mark)[1:3])
            name, body = json.loads(about)["name"], content[:-2]
        name, wanted = f"{bucket}/{name}", query.get("ifGenerationMatch")
        if wanted is not None and wanted != (store.generation(name) or "0"):
            return self.error(412)
        store.requests["written"] += 1
        return self.answer(200, store.put(name, body))


@contextlib.contextmanager
def environment(bucket: Bucket):
    """The environment variables of processes for which `gs://` is the bucket."""
    folder = ROOT / ".cache" / f"tensorflow-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _redirected(folder, bucket.port)
        yield {
            "PYTHONPATH": f"{folder}:{ROOT}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{bucket.port}",
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{bucket.port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _redirected(folder: pathlib.Path, port: int) -> None:
    """Copies TensorFlow to `folder`, with the bucket's addresses in place of Google's, filled up with p."""
    source = pathlib.Path(tensorflow.__file__).parent
    shutil.copytree(source, folder / "tensorflow", copy_function=os.link, ignore=shutil.ignore_patterns("include"))
    library = folder / "tensorflow" / LIBRARY
    content = library.read_bytes()
    for end in (b"upload/storage/v1/", b"storage/v1/"):
        old, new = b"https://www.googleapis.com/" + end, b"http://127.0.0.1:%d/" % port
        content = _replaced(content, old, new + b"p" * (len(old) - len(new) - len(end) - 1) + b"/" + end)
    host = b"127.0.0.1:%d/" % port
    content = _replaced(content, b"storage.googleapis.com", host.ljust(len(b"storage.googleapis.com"), b"p"))
    content = _replaced(content, b"https://", b"http:///")  # of which curl takes three slashes for two
    library.unlink()
    library.write_bytes(content)


def _replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    """With another text where the old one stands by itself."""
    assert len(old) == len(new) and b"\0" + old + b"\0" in content, f"TensorFlow has {old} no more"
    return content.replace(b"\0" + old + b"\0", b"\0" + new + b"\0")

"""What stands between a training and its tracker, and behaves as networks, proxies and servers do on bad days."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import struct
import threading
import time
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Gate:
    """An HTTP or HTTPS proxy in front of a server. While it is ``open`` it passes everything on.

    While it is not, each request of anybody's meets ``misbehave``, a function of the handler and the request's body,
    which returns whether the request is to be passed on all the same.
    """

    def __init__(self, server, *, certificate=None):
        self.open = True
        self.misbehave = None
        self._connections = set()
        self.certificate = certificate
        """The context to speak TLS with; None: it does not."""
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                if gate.certificate is not None:
                    self.request = gate.certificate.wrap_socket(self.request, server_side=True)
                gate._connections.add(self.request)
                super().setup()

            def finish(self):
                gate._connections.discard(self.request)
                try:
                    super().finish()
                finally:
                    self.request.close()  # of TLS, which the server does not know of

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.forward(b"")

            def do_POST(self):
                self.forward(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def forward(self, body):
                if not (gate.open or gate.misbehave is None or gate.misbehave(self, body)):
                    return
                upstream = HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "host")}
                    upstream.request(self.command, self.path, body or None, headers)
                    answer = upstream.getresponse()
                    self.answer(answer.status, answer.read(), answer.getheader("Content-Type"))
                except (OSError, HTTPException):
                    self.answer(502, b"", "text/plain")
                finally:
                    upstream.close()

            def answer(self, status, content, kind, length=None, headers=()):
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content) if length is None else length))
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True  # the client has gone

            def hang_up(self):
                """Close the connection; with a reset, if nothing was sent yet."""
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

            def handle_error(self, request, address):
                pass  # a client that does not like the certificate

        self._make = lambda port: Server(("127.0.0.1", port), Handler)
        self._http = self._thread = None
        self._listen(0)
        self.port = self._http.server_address[1]

    def _listen(self, port):
        self._http = self._make(port)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def shut(self, *, refuse=False):
        """Misbehave from now on, or close the port itself. Connections that stand are cut."""
        self.open = False
        if refuse:
            self._deafen()
        self._cut()

    def reopen(self):
        """Be good again."""
        self.open = True
        if self._http is None:
            self._listen(self.port)
        self._cut()

    def close(self):
        """Stop it."""
        self._deafen()
        self._cut()

    def _deafen(self):
        if self._http is not None:
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()
            self._http = None

    def _cut(self):
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


# -- bad days -------------------------------------------------------------------------------------------------------


def reset(handler, body):
    """The connection is reset."""
    handler.hang_up()


def half(handler, body):
    """The server takes the request and dies in the middle of its answer."""
    handler.answer(200, b'{"ru', "application/json", length=4711)
    handler.hang_up()


def page(handler, body):
    """A captive portal, or a login page, answers in the server's stead."""
    handler.answer(200, b"<html><body>Please log in</body></html>", "text/html")


def nothing(handler, body):
    """Something answers 200 and says nothing."""
    handler.answer(200, b"", "text/plain")


def full(handler, body):
    """The server's disk is full."""
    message = {"error_code": "INTERNAL_ERROR", "message": "database or disk is full"}
    handler.answer(500, json.dumps(message).encode(), "application/json")


def busy(handler, body):
    """Too many requests: come back in 2 s."""
    handler.answer(429, b"", "text/plain", headers=[("Retry-After", "2")])


def flap(handler, body):
    """Up for a second, down for a second."""
    if int(time.monotonic()) % 2:
        return True
    handler.hang_up()
    return False


class Poison:
    """The server refuses one window for good, and every batch that it is in."""

    def __init__(self):
        self.stamps = []
        """Time of that window in milliseconds: the newest of the first request."""

    def __call__(self, handler, body):
        if not handler.path.endswith("/log-batch"):
            return True
        stamps = {metric["timestamp"] for metric in json.loads(body)["metrics"] if "memory/" in metric["key"]}
        if stamps and not self.stamps:
            self.stamps.append(max(stamps))
        if stamps.isdisjoint(self.stamps):
            return True
        message = {"error_code": "INVALID_PARAMETER_VALUE", "message": "one of these values is bad"}
        handler.answer(400, json.dumps(message).encode(), "application/json")
        return False


def certificates(folder, host):
    """A certificate for a host that a client is told to trust, and one that it does not: the path of the authority, and
    the contexts of the two, ``good`` and ``bad``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    contexts = {}
    for name in ("good", "bad"):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} tracker")])
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        path = folder / f"{name}.pem"
        plain = serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        contexts[name] = context
    return folder / "good.pem", contexts

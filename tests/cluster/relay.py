"A relay in front of the API server, whose connection to the client can be cut at bad moments"

import socket
import ssl
import threading
from contextlib import suppress
from urllib.parse import urlsplit


class Relay:
    "Plain HTTP to the client, TLS to the server; `lose` answers to POST are dropped after the server has acted"

    def __init__(self, url: str, certificate: str):
        address, self.context = urlsplit(url), ssl.create_default_context(cafile=certificate)
        self.upstream, self.lose, self.lost = (address.hostname, address.port), 0, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.socket.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        raw = socket.create_connection(self.upstream)
        server, posting = self.context.wrap_socket(raw, server_hostname=self.upstream[0]), threading.Event()
        threading.Thread(target=self._forward, args=(client, server, posting), daemon=True).start()
        with suppress(OSError):
            while data := server.recv(65_536):
                if posting.is_set() and self.lose > 0:
                    self.lose, self.lost = self.lose - 1, self.lost + 1
                    break
                posting.clear()
                client.sendall(data)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _forward(self, client: socket.socket, server: ssl.SSLSocket, posting: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65_536):
                if (
                    data.startswith(b"POST ")
                    and b"/jobs" in data.split(b" ", 2)[1]
                    and b"dryRun" not in data.split(b" ", 2)[1]
                ):
                    posting.set()
                server.sendall(data)

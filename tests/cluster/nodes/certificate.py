"Certificates that the control plane's own one vouches for"

from pathlib import Path

from tests.cluster.nodes.machine import run
from tests.cluster.plane import Plane


def sign(plane: Plane, name: str, subject: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
    "A certificate and its key, made once for a name; `subject` as openssl has it: who that is, and in which group"
    certificate, key = plane.folder / f"{name}.crt", plane.folder / f"{name}.key"
    if not certificate.exists():
        new = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "7",
        ]
        names = ["-subj", subject, "-addext", f"subjectAltName=IP:{address}"]
        issuer = ["-CA", plane.certificate, "-CAkey", plane.key]
        run(*new, *names, *issuer, "-keyout", key, "-out", certificate)
    return certificate, key

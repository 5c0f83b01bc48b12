"""HTTPS: certificates of the test's own, what is wrong with them, and their renewal."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.fake_head import Behaviour, FakeHead

from flexpert.cli.client import Client, ClientError, trusted
from flexpert.cli.client_commands import connect
from flexpert.cli.settings import settings
from flexpert.config import Config, ServerConfig
from flexpert.errors import ConfigError
from flexpert.server import service_process
from flexpert.server.tls import TlsFiles, tls_files

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True, timeout=20)


def make(folder: Path, name: str = "it", *, password: str = "") -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"),
        *("-addext", "subjectAltName=IP:127.0.0.1"),
        *(("-passout", f"pass:{password}") if password else ("-nodes",)),
    )
    key.chmod(0o600)
    return certificate, key


def tls(certificate: Path, key: Path | None = None, password: str | None = None) -> ServerConfig:
    return ServerConfig(
        port=0, tls_cert_file=certificate, tls_key_file=key, tls_key_password=password
    )


def served(
    config: ServerConfig, capture: pytest.CaptureFixture[str], do: Callable[[str], None]
) -> None:
    """Do something with a service's URL, in a thread: the main one is the service's."""
    failures: list[BaseException] = []

    def beside() -> None:
        try:
            output = ""
            while "ready: " not in output:
                time.sleep(0.01)
                output += capture.readouterr().out
            do(output.split("ready: ")[1].split()[0].removesuffix("/v1"))
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=beside)
    thread.start()
    tree = Config(server=config)
    assert service_process.serve(tree, head=lambda _: FakeHead(tree, Behaviour())) == 0
    thread.join(10)
    if failures:
        raise failures[0]


def test_clients_are_served_over_https_and_trust_whom_they_are_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = make(tmp_path)

    def ask(url: str) -> None:
        assert url.startswith("https://127.0.0.1:")
        with connect(url, None, certificate) as client:
            assert client.cluster().ranks
        body = {"prompt": "x", "max_tokens": 30, "stream": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, verify=trusted(certificate), timeout=20
        ) as answered:
            assert answered.read().rstrip().endswith(b"data: [DONE]")
        with Client(url, None) as client, pytest.raises(ClientError, match=r"--ca-file"):
            client.cluster()
        plain = url.replace("https:", "http:")
        with Client(plain, None) as client, pytest.raises(ClientError, match="write https://"):
            client.cluster()

    served(tls(certificate, key), capsys, ask)


def test_https_to_a_service_without_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def ask(url: str) -> None:
        secure = url.replace("http:", "https:")
        with Client(secure, None) as client, pytest.raises(ClientError, match="write http://"):
            client.cluster()

    served(ServerConfig(port=0), capsys, ask)


def test_a_key_in_the_same_file_and_one_with_a_password_are_taken(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    both = tmp_path / "both.pem"
    both.write_text(certificate.read_text() + key.read_text())
    TlsFiles(tls(both))
    certificate, key = make(tmp_path, "locked", password="open sesame")
    TlsFiles(tls(certificate, key, "open sesame"))
    with pytest.raises(ConfigError, match="tls_key_password does not open"):
        TlsFiles(tls(certificate, key, "open barley"))
    with pytest.raises(ConfigError, match="FLEXPERT_SERVER__TLS_KEY_PASSWORD"):
        TlsFiles(tls(certificate, key))


def test_what_is_wrong_with_the_files_is_said_before_the_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = make(tmp_path)
    _, other = make(tmp_path, "other")
    nothing = tmp_path / "empty.pem"
    nothing.write_text("nothing\n")
    for files, complaint in (
        ((tmp_path / "none.crt", key), "cannot read server.tls_cert_file"),
        ((certificate, tmp_path / "none.key"), "cannot read server.tls_key_file"),
        ((nothing, key), "empty.pem holds no certificate in PEM"),
        ((certificate, nothing), "empty.pem holds no private key in PEM"),
        ((certificate, None), "name its file with --tls-key-file"),
        ((certificate, other), "other.key is not the key of the certificate"),
    ):
        tree = Config(server=tls(*files))

        def head(_: Config) -> FakeHead:
            raise AssertionError("it was started")

        assert service_process.serve(tree, head=head) == 2
        assert complaint in capsys.readouterr().err


def test_a_key_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tls_cert_file is missing"):
        settings(None, {"server.tls_key_file": str(tmp_path / "it.key")})
    assert tls_files(ServerConfig()) is None


def test_a_renewed_certificate_is_taken_and_a_broken_one_is_not(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    files = TlsFiles(tls(certificate, key))
    assert not files.reload()
    assert subject(files) == "it"
    certificate.write_text("half of it")
    assert not files.reload()
    assert subject(files) == "it"
    for new, old in zip(make(tmp_path, "new"), (certificate, key), strict=True):
        os.replace(new, old)
    assert files.reload()
    assert subject(files) == "new"


def subject(files: TlsFiles) -> str:
    """The common name in the certificate that a client is shown."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    server = files.context.wrap_bio(to_server, to_client, server_side=True)
    client = trusting.wrap_bio(to_client, to_server)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    said = subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-noout", "-subject"],
        input=shown,
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout.decode()
    return said.strip().rpartition("=")[2].strip()


def test_a_file_that_trusts_nobody_is_a_clear_error(tmp_path: Path) -> None:
    nothing = tmp_path / "empty.pem"
    nothing.write_text("nothing\n")
    for file, complaint in ((nothing, "holds no certificate"), (tmp_path / "no", "cannot read")):
        with pytest.raises(ClientError, match=complaint):
            Client("https://127.0.0.1:1", None, ca_file=file)

"""TLS for HTTP: a certificate and its key from files, read again when they are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from pathlib import Path

from flexpert.config import ServerConfig
from flexpert.errors import ConfigError
from flexpert.reading import read_text
from flexpert.server.keys import warn_if_open

log = logging.getLogger("flexpert.server")

CHECK_EVERY_S = 60.0
_LONGEST_FILE = 2**20  # a chain has some 10 KiB


class TlsFiles:
    """The files that the settings name.

    context: for the server; TLS 1.2 or newer.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raises: ConfigError: a file cannot be read or is not what it should be."""
        assert config.tls_cert_file is not None
        self._certificate = config.tls_cert_file
        self._key = config.tls_key_file
        password = config.tls_key_password
        self._password = password.get_secret_value() if password else ""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(self.context)
        self._seen = self._state()
        with contextlib.suppress(OSError):  # it may be gone by now
            warn_if_open(self._key or self._certificate, "the key file of TLS")

    async def watch(self) -> None:
        """Read files that were replaced, for connections from then on; ends when cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            await asyncio.to_thread(self.reload)

    def reload(self) -> bool:
        """Whether there were new ones. Those that cannot be used are logged, and the old ones stay
        in force."""
        state = self._state()
        if state == self._seen:
            return False
        self._seen = state
        try:
            # tried apart: a chain without its key would leave the context with half of each
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except ConfigError as error:
            log.error("the certificate stays the one that was read before: %s", error)
            return False
        log.info("the certificate %s was read again", self._certificate)
        return True

    def _load(self, context: ssl.SSLContext) -> None:
        key = self._key or self._certificate
        for file, what in ((self._certificate, "tls_cert_file"), (key, "tls_key_file")):
            read_text(file, f"server.{what}", most=_LONGEST_FILE)
        self._password_used = False
        try:
            context.load_cert_chain(self._certificate, key, self._asked_for_password)
        except ssl.SSLError as error:
            raise ConfigError(self._wrong(error)) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"server.tls_cert_file {self._certificate}: {error}") from None

    def _asked_for_password(self) -> str:
        if not self._password:
            raise ValueError(
                f"the key in {self._key or self._certificate} is encrypted: give its password with "
                "FLEXPERT_SERVER__TLS_KEY_PASSWORD"
            )
        self._password_used = True
        return self._password

    def _wrong(self, error: ssl.SSLError) -> str:
        certificate, key = self._certificate, self._key or self._certificate
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"server.tls_key_file {key} is not the key of the certificate in {certificate}"
        if self._password_used:
            return f"server.tls_key_password does not open {key}"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
        except ssl.SSLError:
            return f"server.tls_cert_file {certificate} holds no certificate in PEM"
        name = "server.tls_key_file" if self._key else "server.tls_cert_file"
        more = "" if self._key else "; name its file with --tls-key-file"
        return f"{name} {key} holds no private key in PEM that can be used{more}"

    def _state(self) -> tuple[tuple[Path, int, int], ...]:
        found = []
        for file in (self._certificate, self._key):
            if file is None:
                continue
            try:
                status = file.stat()
            except OSError:
                found.append((file, 0, 0))
            else:
                found.append((file, status.st_ino, status.st_mtime_ns))
        return tuple(found)


def tls_files(config: ServerConfig) -> TlsFiles | None:
    """None: plain HTTP. Raises: ConfigError"""
    return None if config.tls_cert_file is None else TlsFiles(config)

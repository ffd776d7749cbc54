"""JSON over HTTP to one server: patient with what passes, plain about what does not, and silent about the key."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from trainer.config.distill import ServerConfig
from trainer.errors import ConfigError, ExitCode, TrimtabError

logger = logging.getLogger(__name__)

PATH = "distill.teacher.server"
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 300.0
_LONGEST_ANSWER_BYTES = 1 << 30
_LONGEST_MESSAGE = 300
_FOR_NOW = {408, 409, 425, 429}
"""Statuses that another try may turn; all of 500 and above too."""


class ServerRefusedError(TrimtabError):
    """The server will not answer this request: asking again changes nothing."""


class ServerFailedError(TrimtabError):
    """The server did not answer, after all tries."""

    exit_code = ExitCode.CRASHED


class _PassingError(Exception):
    """One try that failed; the text is the reason."""

    def __init__(self, reason: str, wait_seconds: float = 0.0):
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class JsonClient:
    """Requests of one server; may be called from several threads at once."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        environment: Mapping[str, str] = os.environ,
        pause: Callable[[float], object] | None = None,
    ):
        """
        Args:
            environment: where the key is.
            pause: waits so many seconds between two tries; None: until then or :meth:`close`.

        Raises:
            ConfigError: the address is none, or the key is missing.
        """
        self.url = _checked_url(config.url)
        self._key = _key(config, environment)
        self._timeout, self._retries = config.timeout_seconds, config.retries
        self._closed = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._pause = pause or self._closed.wait
        # not the global generator: its state is part of a run's
        self._random = random.Random()  # noqa: S311
        headers = {"Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
            if self.url.startswith("http:"):
                logger.warning("the key of %s travels unencrypted: https would hide it", self.url)
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(config.timeout_seconds, pool=None),
            limits=httpx2.Limits(max_connections=config.requests, max_keepalive_connections=config.requests),
            follow_redirects=False,
        )

    def get(self, path: str) -> Any:
        """The answer to GET `path` below the address; errors as :meth:`post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to POST `path` with `body`, as parsed from JSON.

        Raises:
            ServerRefusedError: the server refuses the request for good; with its own message.
            ServerFailedError: no answer after all tries; with the last reason.
        """
        return self._ask("POST", path, body)

    def close(self) -> None:
        """No further tries; waits for an answer, and between tries, end."""
        self._closed.set()
        for connection in list(self._sockets):
            # closing alone would not wake a thread that reads
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._client.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        address, wait = self.url + path, _FIRST_WAIT_SECONDS
        for tries in range(1, self._retries + 2):
            try:
                return self._once(method, address, body)
            except _PassingError as error:
                reason, asked = str(error), error.wait_seconds
            if self._closed.is_set():
                raise ServerFailedError(f"{address} was given up: the run is ending")
            if asked > _LONGEST_WAIT_SECONDS:
                raise ServerFailedError(f"{address} asks to wait {asked:.0f} s, which is too long: {reason}")
            if tries <= self._retries:
                # ranks that were turned away together should not come back together
                seconds = max(asked, wait) * self._random.uniform(1.0, 1.25)
                logger.warning(
                    "%s: %s; another try in %.1f s (%d of %d)", address, reason, seconds, tries, self._retries
                )
                self._pause(seconds)
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        count = "1 try" if self._retries == 0 else f"{self._retries + 1} tries"
        raise ServerFailedError(
            f"{address} gave no answer in {count}, the last time because: {reason}; "
            "look whether the server runs, then start again"
        )

    def _once(self, method: str, address: str, body: Mapping[str, Any] | None) -> Any:
        try:
            status, headers, content = self._exchange(method, address, body)
        except httpx2.TimeoutException as error:
            raise _PassingError(f"no answer within {self._timeout:g} s") from error
        except httpx2.TransportError as error:
            raise _PassingError(self._plain(str(error) or type(error).__name__)) from error
        except RuntimeError as error:
            # what httpx says of a client that close() has closed meanwhile
            raise _PassingError("the connection was closed") from error
        if 300 <= status < 400:
            target = self._plain(headers.get("location", "nowhere"))
            raise ServerRefusedError(
                f"{address} redirects to {target}, which is not followed: set {PATH}.url to the server itself"
            )
        if status != 200:
            reason = f"{status} {self._plain(_message(content))}".strip()
            if status in _FOR_NOW or status >= 500:
                raise _PassingError(reason, _retry_after(headers.get("retry-after")))
            raise ServerRefusedError(f"{address} refuses: {reason}")
        try:
            return json.loads(content)
        except ValueError as error:
            raise _PassingError(f"its answer is not JSON: {self._plain(str(error))}") from error

    def _exchange(
        self, method: str, address: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content; the whole answer within the time, not only each part of it."""
        deadline = time.monotonic() + self._timeout
        content = bytearray()
        with self._client.stream(method, address, json=body, extensions={"trace": self._note}) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the answer takes too long")
                if len(content) > _LONGEST_ANSWER_BYTES:
                    raise ServerRefusedError(f"{address} answers with more than {_LONGEST_ANSWER_BYTES >> 30} GiB")
            return response.status_code, response.headers, bytes(content)

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _plain(self, text: str) -> str:
        """Text of others on one line, short, without control characters and without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"


def _checked_url(text: str) -> str:
    def refuse(sentence: str) -> ConfigError:
        return ConfigError([(f"{PATH}.url", sentence)])

    try:
        url = httpx2.URL(text.strip())
    except httpx2.InvalidURL as error:
        raise refuse("is no address; it looks like http://node7:8000/v1") from error
    if url.userinfo:
        raise refuse("holds a user or a password; put the key into an environment variable and name it in key_variable")
    if url.scheme not in ("http", "https") or not url.host:
        raise refuse(f"{text!r} is no address of a server; it looks like http://node7:8000/v1")
    if url.query or url.fragment:
        raise refuse(f"{text!r} has more than a path; it looks like http://node7:8000/v1")
    return str(url).rstrip("/")


def _key(config: ServerConfig, environment: Mapping[str, str]) -> str | None:
    if config.key_variable is None:
        return None
    key = environment.get(config.key_variable, "").strip()
    if not key:
        raise ConfigError(
            [
                (
                    f"{PATH}.key_variable",
                    f"the environment variable {config.key_variable} is not set; export the key in it",
                )
            ]
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            [
                (
                    f"{PATH}.key_variable",
                    f"the environment variable {config.key_variable} holds characters that no key has",
                )
            ]
        )
    return key


def _message(content: bytes) -> str:
    """The server's own words: OpenAI's `error.message`, FastAPI's `detail`, or the text."""
    text = content.decode("utf-8", errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        return text
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or text
        return str(error)
    return text


def _retry_after(value: str | None) -> float:
    """Seconds from now of a Retry-After header (RFC 9110, section 10.2.3); 0: none."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())

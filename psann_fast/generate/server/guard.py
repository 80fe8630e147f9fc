"""What stands before every route: the API key, and the count of answers."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any, Callable

from starlette.responses import JSONResponse

from .answers import error_body

Scope = dict[str, Any]


class Guard:
    """ASGI middleware.

    api_key      asked for as `Authorization: Bearer KEY`, or as the password of HTTP Basic, which browsers can send; not on /health
    responded    called with path and status of every answer; paths that are no route are counted as one
    """

    def __init__(self, app: Any, api_key: str | None, responded: Callable[[str, int], None], known_paths: set[str]) -> None:
        self._app, self._key, self._responded, self._known = app, api_key, responded, known_paths

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._known else "other"

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._responded(path, message["status"])
            await send(message)

        if self._key is not None and scope["path"] != "/health" and not self._has_key(scope):
            body = error_body(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                "authentication_error",
                code="invalid_api_key",
            )
            # Asked by Basic, a browser opens a dialog: right for an address that someone opened, wrong for what our page posts.
            challenge = "Bearer" if scope["method"] == "POST" else "Basic"
            refusal = JSONResponse(body, 401, {"WWW-Authenticate": f'{challenge} realm="psann-fast", charset="UTF-8"'})
            await refusal(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _has_key(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, credentials = sent.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(credentials.strip(), self._key.encode())

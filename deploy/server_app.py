"""The HTTP routes: OpenAI's three, /health and /metrics."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.server_answers import Answer
from deploy.server_errors import ApiError, shown
from deploy.server_fields import parse_json
from deploy.server_mailbox import Mailbox
from deploy.server_metrics import CONTENT_TYPE, Metrics
from deploy.server_protocol import (
    ApiRequest,
    ModelLimits,
    read_chat,
    read_completion,
    unknown_model,
)
from deploy.server_requests import Model
from deploy.server_scheduler import Scheduler, shutting_down
from deploy.server_stream import EventStream, hang_up_watch, raise_error

BODY_SECONDS = 30.0
CLIENT_CLOSED = 499  # as nginx calls it: nobody reads this answer
Reader = Callable[[Mapping[str, Any], ModelLimits], ApiRequest]


@dataclass(frozen=True)
class Service:
    """What the routes work with. `api_key`: None lets everybody in."""

    model: Model
    scheduler: Scheduler
    metrics: Metrics
    api_key: str | None
    max_body_bytes: int
    description: Mapping[str, Any]


def build_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes = Routes(service)
    app = Starlette(
        routes=[
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.one_model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/health", routes.health),
            Route("/metrics", routes.figures),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_gone,
            Exception: _our_error,
        },
    )
    return Doorkeeper(app, service)


class Routes:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.service.model.name:
            raise unknown_model(name, self.service.model.name)
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, read_completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, read_chat)

    async def health(self, request: Request) -> Response:
        """200 while requests are welcome, 503 while shutting down, 500 when the engine is gone."""
        scheduler = self.service.scheduler
        status = "draining" if scheduler.is_draining else "ok"
        if not scheduler.is_alive():
            status = "failed"
        code = {"ok": 200, "draining": 503, "failed": 500}[status]
        described = {k: v for k, v in self.service.description.items() if k != "directory"}
        body = {"status": status, "model": self.service.model.name, **described}
        return JSONResponse(body, code)

    async def figures(self, request: Request) -> Response:
        metrics = self.service.metrics
        with metrics.lock:
            metrics.memory.set(psutil.Process().memory_info().rss)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def _model(self) -> dict[str, Any]:
        model = self.service.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "budgeted-lora",
            "max_model_len": model.context,
        }

    async def _generate(self, request: Request, read: Reader) -> Response:
        model = self.service.model
        asked = read(parse_json(await self._body(request)), model.limits)
        if asked.model != model.name:
            raise unknown_model(asked.model, model.name)
        prompts = await run_in_threadpool(model.prompts, asked)
        mailbox = Mailbox()
        choices = model.choices(asked, prompts, mailbox)
        answer = Answer(
            asked.kind, model.name, len(choices), sum(map(len, prompts)), model.token_text
        )
        self.service.scheduler.submit(choices)
        stream = EventStream(
            answer, mailbox, asked.include_usage, lambda: self.service.scheduler.cancel(choices)
        )
        return await (stream.opened(request) if asked.stream else self._whole(request, stream))

    async def _whole(self, request: Request, stream: EventStream) -> Response:
        """The whole answer at once; given up when the client hangs up."""
        try:
            async with hang_up_watch(request.receive, stream.mailbox):
                while not stream.answer.is_complete:
                    deltas = await stream.mailbox.take()
                    if not deltas:
                        return Response(status_code=CLIENT_CLOSED)
                    for delta in deltas:
                        raise_error(delta)
                        stream.answer.add(delta)
        finally:
            stream.give_up()
        return JSONResponse(stream.answer.body())

    async def _body(self, request: Request) -> bytes:
        """Raises: ApiError 413, 415 or 408."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"the Content-Type is {shown(kind)}; needs application/json; set that header",
                code="unsupported_media_type",
            )
        limit = self.service.max_body_bytes
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise _too_large(limit)
        try:
            return await asyncio.wait_for(_received(request, limit), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {BODY_SECONDS:g} s; send it again"
            ) from None


class Doorkeeper:
    """Checks the key of every /v1 request and counts every answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = _endpoint(scope["path"])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                with self.service.metrics.lock:
                    self.service.metrics.requests.add(1, endpoint, str(message["status"]))
            await send(message)

        if scope["path"].startswith("/v1/"):
            refusal = self._refusal(scope)
            if refusal is not None:
                await _error(refusal)(scope, receive, counted)
                return
        await self.app(scope, receive, counted)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self.service.api_key is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            wanted = b"Bearer " + self.service.api_key.encode()
            if not hmac.compare_digest(given, wanted):
                return ApiError(
                    401,
                    "the API key is missing or wrong; needs the header Authorization: Bearer KEY; "
                    "ask whoever runs this server for the key",
                    code="invalid_api_key",
                )
        is_late = scope["method"] == "POST" and self.service.scheduler.is_draining
        return shutting_down() if is_late else None


async def _received(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than the {limit} bytes allowed; shorten the prompt",
        code="body_too_large",
    )


def _endpoint(path: str) -> str:
    """A label of few values, whatever paths clients ask for."""
    known = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
    return next((name for name in known if path == name), "other")


def _error(error: ApiError) -> Response:
    headers = dict(error.headers)
    if error.status in (408, 413):
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {ascii(request.url.path)[:80]}: {error.detail}"
    api_error = ApiError(
        error.status_code,
        f"{what}; allowed are GET /v1/models, POST /v1/completions, POST /v1/chat/completions, "
        "GET /health and GET /metrics; correct the address",
        code="unknown_url" if error.status_code == 404 else "invalid_request",
    )
    response = _error(api_error)
    response.headers.update(error.headers or {})
    return response


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _our_error(request: Request, error: Exception) -> Response:
    return _error(ApiError(500, "an internal error happened; the server's log says which"))

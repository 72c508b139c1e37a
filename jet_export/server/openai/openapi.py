"""/openapi.json: the endpoints, and the fields that their bodies may have, from the models that parse them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"
STREAMED = {"text/event-stream": {"schema": {"type": "string"}}}
PLAIN = {"text/plain": {"schema": {"type": "string"}}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What every failure is answered with."""

    error: ErrorDetail


_FAILURES = {
    400: "A field is wrong or not supported.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    413: "The body is too long.",
    415: "The body is not application/json.",
    429: "The queue is full.",
    500: "The engine failed.",
    503: "The request waited too long, or the server is shutting down.",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route."""
    return {status: {"model": Error, "description": _FAILURES[status]} for status in statuses}


def accepts(body: type[BaseModel]) -> dict[str, Any]:
    """Arguments of a route that parses `body` itself."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": failures(400, 401, 404, 413, 415),
    }


def generates(body: type[BaseModel]) -> dict[str, Any]:
    """Of one that generates text, at once or as a stream."""
    streamed = {"description": "The answer, or with stream its chunks as server-sent events.", "content": STREAMED}
    return {**accepts(body), "responses": {**failures(*_FAILURES), 200: streamed}}


def describe(app: FastAPI, *bodies: type[BaseModel], version: str) -> None:
    """Have `app` describe its routes and these bodies."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title,
                version=version,
                routes=app.routes,
                description="OpenAI's API and some of vLLM's. A field that is null is as good as absent.",
            )
            _, schemas = models_json_schema([(b, "validation") for b in bodies], ref_template=REF)
            found["components"]["schemas"] |= schemas["$defs"]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]

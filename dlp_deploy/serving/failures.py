"""Errors as OpenAI words them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..bench.worker import WorkerError
from .decoding import Busy, EngineFault
from .protocol import ChatRequest, CompletionRequest, Message, TextPart

TYPES = {404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1
FIELDS = {
    name for model in (CompletionRequest, ChatRequest, Message, TextPart) for name in model.model_fields
}


class ApiError(Exception):
    """A request that is answered with an error; `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_of(error: Exception) -> ApiError:
    """What a client is told about `error`; 500 without a code when it was not foreseen."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, "too many requests wait for the engine; try again", code="rate_limit_exceeded")
    if isinstance(error, WorkerError):
        return ApiError(500, f"the engine failed: {error}; the server ends", code="engine_failed")
    if isinstance(error, EngineFault):
        return ApiError(500, f"the engine cannot answer this: {error}", code="engine_fault")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    return ApiError(500, "internal error; the server's log has the details")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in this form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        told = error_of(error)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if told.status == 429 else None
        return JSONResponse(told.body(), told.status, headers)

    foreseen = (ApiError, Busy, EngineFault, WorkerError, HTTPException, RequestValidationError)
    for kind in (*foreseen, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, and where."""
    told = min(error.errors(), key=_vagueness)
    context = told.get("ctx", {})
    if told["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context['error']}")
    # Places in a union have names of types between those of fields.
    steps = [str(step) for step in told["loc"][1:] if isinstance(step, int) or step in FIELDS]
    field = context.get("field") or ".".join(steps)
    if not field:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    return ApiError(400, f"{field}: {told['msg']}", param=field)


def _vagueness(problem: Mapping[str, Any]) -> tuple[bool, int]:
    """Every member of a union complains: one of another type says least, one deep inside says most."""
    return str(problem["type"]).endswith("_type"), -len(problem["loc"])

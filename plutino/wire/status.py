"""The one table between plutino's errors and gRPC statuses, and the two ways through it.

A servicer ends a call with :func:`abort_with` (or :func:`abort_with_aio`); a client turns what it caught back into the
same error class with :func:`error_from_rpc`. The status code serves programs that know only gRPC; the class travels by
name in the trailing metadata.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio

from plutino import errors
from plutino.errors import PlutinoError, SecurityError, UnreachableError, WireError

ERROR_METADATA_KEY = "plutino-error"
"""Trailing metadata key of the error class's name."""

MAX_DETAIL_BYTES = 4096
"""Bound on a message in a status. gRPC sends each byte beyond ASCII as three, in headers of bounded size."""

STATUS_CODES: dict[type[PlutinoError], grpc.StatusCode] = {
    errors.PlutinoError: grpc.StatusCode.INTERNAL,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QuantizationError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PlanError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InfeasiblePlanError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnmeasuredError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.WireError: grpc.StatusCode.INTERNAL,
    errors.FrameError: grpc.StatusCode.DATA_LOSS,
    errors.StaleFrameError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PeerLostError: grpc.StatusCode.UNAVAILABLE,
    errors.AgentError: grpc.StatusCode.INTERNAL,
    errors.AgentLostError: grpc.StatusCode.UNAVAILABLE,
    errors.OutOfMemoryError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.JobError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnknownJobError: grpc.StatusCode.NOT_FOUND,
    errors.InvalidTransitionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NumericsError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ActivationCacheError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ExportError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StoreError: grpc.StatusCode.INTERNAL,
    errors.SecurityError: grpc.StatusCode.PERMISSION_DENIED,
    errors.UnreachableError: grpc.StatusCode.UNAVAILABLE,
}

_CLASSES = {error_class.__name__: error_class for error_class in STATUS_CODES}


def abort_with(context: grpc.ServicerContext, error: PlutinoError) -> NoReturn:
    """End a call of a sync servicer with ``error``; never returns."""
    error_class = _known_class(error)
    context.set_trailing_metadata(((ERROR_METADATA_KEY, error_class.__name__),))
    context.abort(STATUS_CODES[error_class], _bounded(str(error)))
    raise AssertionError("grpc's abort returned")


async def abort_with_aio(context: grpc.aio.ServicerContext[Any, Any], error: PlutinoError) -> NoReturn:
    """End a call of an aio servicer with ``error``; never returns."""
    error_class = _known_class(error)
    metadata = ((ERROR_METADATA_KEY, error_class.__name__),)
    await context.abort(STATUS_CODES[error_class], _bounded(str(error)), metadata)
    raise AssertionError("grpc's abort returned")


def error_from_rpc(error: grpc.RpcError, address: str) -> PlutinoError:
    """Turn what a call to ``address`` raised into the error that the other side met, or into what became of the call.

    The caller raises the result ``from`` the given error.
    """
    if not isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return WireError(f"the call to {address} failed: {error}")
    code, details = error.code(), error.details() or "no details"
    error_class = _CLASSES.get(_class_name(error.trailing_metadata()))
    if error_class is not None:
        return error_class(details)
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return UnreachableError(
                f"{address} does not answer ({details}); check that it is running and that the address is right"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(
                f"{address} did not answer in time ({details}); it is overloaded or the link is down: try again, "
                "or look at its log"
            )
        case grpc.StatusCode.CANCELLED:
            return UnreachableError(f"the call to {address} was cancelled ({details}); try again")
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return SecurityError(f"{address} refused the call: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return WireError(
                f"{address} does not know this call ({details}); use the same version of plutino on both sides"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return WireError(f"a message to or from {address} passes a bound: {details}")
        case _:
            return PlutinoError(f"{address} failed with {code.name}: {details}; its log tells more")


def _known_class(error: PlutinoError) -> type[PlutinoError]:
    """The error's class, or the nearest one above it that clients know too."""
    return next(error_class for error_class in type(error).__mro__ if error_class in STATUS_CODES)


def _class_name(metadata: Any) -> str:
    # Untyped: the sync stubs, the aio stubs and grpc itself each give another type for pairs of key and value.
    for key, value in metadata or ():
        if key == ERROR_METADATA_KEY and isinstance(value, str):
            return value
    return ""


def _bounded(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= MAX_DETAIL_BYTES:
        return text
    return encoded[:MAX_DETAIL_BYTES].decode(errors="ignore") + "... (cut)"

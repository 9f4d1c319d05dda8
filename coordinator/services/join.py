"""JoinService and CertificateService: how a device becomes a member and stays one."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any

import grpc.aio

from coordinator.security.warden import Warden
from plutino.errors import ConfigError, PlutinoError, SecurityError
from plutino.security.identity import PeerName, Role
from plutino.security.interceptors import caller_of
from plutino.wire.status import abort_with_aio
from protos import security_pb2 as pb
from protos import security_pb2_grpc

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_MAX_NAME_CHARS = 63


class JoinServicer(security_pb2_grpc.JoinServiceServicer):
    """Lets devices with a token in."""

    def __init__(self, warden: Warden, devices_port: int) -> None:
        self._warden = warden
        self._devices_port = devices_port

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """One device."""
        try:
            response = await asyncio.to_thread(self._join, request)
        except PlutinoError as error:
            logger.warning("%s could not join with token %s: %s", context.peer(), request.token_id[:12], error)
            await abort_with_aio(context, error)
        logger.info("%s joined as %s with token %s", request.name, response.node_id, request.token_id)
        return response

    def _join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        if not 0 < len(request.name) <= _MAX_NAME_CHARS or not request.name.isprintable():
            raise ConfigError(f"a device's name has 1 to {_MAX_NAME_CHARS} letters, digits, '.', '-' or '_'")
        name = PeerName(secrets.token_hex(8), Role.NODE)
        # Signed first: a request that cannot be signed must not use the token up.
        certificate = self._warden.authority.sign(request.certificate_request, name, self._warden.lifetime_s)
        self._warden.admit(request.token_id, request.secret, node_id=name.name, name=request.name)
        return pb.JoinResponse(
            node_id=name.name, certificate=certificate, devices_port=self._devices_port, now_s=time.time()
        )


class CertificateServicer(security_pb2_grpc.CertificateServiceServicer):
    """Gives members their next certificate."""

    def __init__(self, warden: Warden) -> None:
        self._warden = warden

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """The next certificate of whoever asks, for a fresh key."""
        try:
            caller = caller_of(context.auth_context())
            if caller is None:
                raise SecurityError("a certificate is renewed with the one before, and this call came without")
            certificate = self._warden.authority.sign(request.certificate_request, caller, self._warden.lifetime_s)
            await asyncio.to_thread(self._warden.records.renewed, caller.name)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.RenewResponse(certificate=certificate)

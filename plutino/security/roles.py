"""Who may call what: one table over every method of every service. A method that is not in it is refused."""

from __future__ import annotations

from plutino.security.identity import Role

_NODES = frozenset({Role.NODE})
_PEOPLE = frozenset({Role.PERSON})
_RUNNERS = frozenset({Role.RUNNER})

METHOD_ROLES: dict[str, frozenset[Role]] = {
    "/plutino.v1.AgentService/Attach": _NODES,
    "/plutino.v1.WorkerService/Work": _NODES,
    "/plutino.v1.CertificateService/Renew": _NODES,
    "/plutino.v1.BulkService/PutShadow": _NODES | _RUNNERS,
    "/plutino.v1.BulkService/GetShadow": _NODES | _RUNNERS,
    "/plutino.v1.BulkService/GetRange": _NODES | _RUNNERS,
    "/plutino.v1.BulkService/GetManifest": _NODES | _RUNNERS,
    "/plutino.v1.CacheService/Holds": _NODES,
    "/plutino.v1.CacheService/GetBlob": _NODES,
    "/plutino.v1.RunnerService/Run": _RUNNERS,
    "/plutino.v1.JobService/Submit": _PEOPLE,
    "/plutino.v1.JobService/Plan": _PEOPLE,
    "/plutino.v1.JobService/List": _PEOPLE,
    "/plutino.v1.JobService/Get": _PEOPLE,
    "/plutino.v1.JobService/Trace": _PEOPLE,
    "/plutino.v1.JobService/Watch": _PEOPLE,
    "/plutino.v1.JobService/Cancel": _PEOPLE,
    "/plutino.v1.JobService/Pause": _PEOPLE,
    "/plutino.v1.JobService/Resume": _PEOPLE,
    "/plutino.v1.JobService/Devices": _PEOPLE,
    "/plutino.v1.JobService/CheckLinks": _PEOPLE,
    "/plutino.v1.SweepService/Submit": _PEOPLE,
    "/plutino.v1.SweepService/Get": _PEOPLE,
    "/plutino.v1.SweepService/List": _PEOPLE,
    "/plutino.v1.SweepService/Cancel": _PEOPLE,
    "/plutino.v1.Llm2LlmService/Submit": _PEOPLE,
    "/plutino.v1.Llm2LlmService/Get": _PEOPLE,
    "/plutino.v1.Llm2LlmService/List": _PEOPLE,
    "/plutino.v1.Llm2LlmService/Cancel": _PEOPLE,
    "/plutino.v1.Llm2LlmService/Resume": _PEOPLE,
    "/plutino.v1.Llm2LlmService/Samples": _PEOPLE,
    "/plutino.v1.DoctorService/Greet": _NODES,
    "/plutino.v1.DoctorService/DialBack": _NODES,
    "/plutino.v1.SecurityService/CreateToken": _PEOPLE,
    "/plutino.v1.SecurityService/ListTokens": _PEOPLE,
    "/plutino.v1.SecurityService/RevokeToken": _PEOPLE,
    "/plutino.v1.SecurityService/RevokeDevice": _PEOPLE,
    "/plutino.v1.SecurityService/Audit": _PEOPLE,
    # Not in a .proto file: frames are bytes (edge_node/transport/streams.py).
    "/plutino.v1.DataService/Exchange": _NODES,
    # Likewise bytes (plutino/doctor/burst.py).
    "/plutino.v1.BurstService/Take": _NODES,
    "/plutino.v1.BurstService/Give": _NODES,
}
"""Method to the roles that may call it."""

OPEN_METHODS: frozenset[str] = frozenset({"/plutino.v1.JoinService/Join"})
"""Methods for callers that have no certificate yet, on a port of their own."""

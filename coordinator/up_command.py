"""``plutino up``: the coordinator in the foreground."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from coordinator.command_parts import AsJson, StateDir


def up(
    state_dir: StateDir = None,
    engine: Annotated[
        Literal["ray", "local"], typer.Option(help="Where schedules and jobs are worked on: Ray, or this process.")
    ] = "ray",
    ray_address: Annotated[
        str | None, typer.Option(help="Join a running Ray cluster instead of starting one; trust all of it.")
    ] = None,
    fleet: Annotated[
        Literal["joined", "ray"],
        typer.Option(help="Devices are those that join; with ray an agent is placed on each node of the cluster, too."),
    ] = "joined",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where devices dial.")] = "127.0.0.1:7420",
    api: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where people and programs dial.")] = "127.0.0.1:7421",
    lease: Annotated[
        float, typer.Option(metavar="SECONDS", min=1.0, help="A device that is silent for so long is lost.")
    ] = 15.0,
    settle: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="Plans wait until no device has joined for so long.")
    ] = 1.5,
    advertise: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Where other machines reach this one, for join tokens. May be repeated."),
    ] = None,
    insecure_loopback: Annotated[
        bool, typer.Option("--insecure-loopback", help="No TLS: this machine only, and trust everybody on it.")
    ] = False,
    weights_rate: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes a second that weights and training state may take together: 50MB."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the coordinator until Ctrl-C; its jobs go on at the next start."""
    # Read when gRPC is imported. Children here are other programs, and gRPC would tell of each, on the screen, that it
    # does not follow them.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

    from coordinator.app import CoordinatorConfig
    from coordinator.fleet.registry import Patience
    from coordinator.serve import serve
    from plutino.endpoint import default_state_dir
    from plutino.sizes import parse_size

    config = CoordinatorConfig(
        state_dir=state_dir or default_state_dir(),
        devices_address=listen,
        people_address=api,
        engine=engine,
        ray_address=ray_address,
        is_fleet_on_ray=fleet == "ray",
        patience=Patience(lease_s=lease, settle_s=settle),
        advertised_hosts=tuple(advertise or ()),
        is_plaintext=insecure_loopback,
        bulk_rate_bytes_per_s=0 if weights_rate is None else parse_size(weights_rate),
    )
    serve(config, as_json=as_json)

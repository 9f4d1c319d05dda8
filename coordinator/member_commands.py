"""``plutino token ...`` and ``plutino devices ...``: who is in, who may come in, and who must leave."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.command_parts import AsJson, StateDir, local_client, print_json
from plutino.errors import ConfigError

if TYPE_CHECKING:
    pass

token_app = typer.Typer(help="Make, list and revoke the tokens that devices join with.", no_args_is_help=True)
devices_app = typer.Typer(help="List the devices, with what they give and why they are as they are; cut one off.")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@token_app.command("create")
def create(
    uses: Annotated[int, typer.Option(min=1, help="How many devices may join with it.")] = 1,
    ttl: Annotated[str, typer.Option(help="How long it may be used: 90s, 15m, 1h, 2d.")] = "15m",
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print the line that joins a device. It is shown once and kept nowhere."""
    with local_client(state_dir) as client:
        made = client.members.create_token(uses=uses, ttl_s=parse_duration(ttl))
    if as_json:
        return print_json({"token": made.token, "token_id": made.token_id, "expires_at_s": made.expires_at_s})
    print(f"plutino node join {made.token}")


@token_app.command("list")
def list_tokens(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List all tokens, without their secrets."""
    with local_client(state_dir) as client:
        found = client.members.tokens()
    if as_json:
        return print_json(found)
    import time

    from coordinator.screens import make_console, token_table

    make_console().print(token_table(found, now_s=time.time()))


@token_app.command("revoke")
def revoke_token(
    token: Annotated[str, typer.Argument(metavar="ID", help="A token's id, or its beginning.")],
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Let nobody join with a token any more; devices that did stay."""
    with local_client(state_dir) as client:
        token_id = client.members.revoke_token(token)
    if as_json:
        return print_json({"token_id": token_id})
    print(f"token {token_id} is revoked")


@devices_app.callback(invoke_without_command=True)
def devices(context: typer.Context, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List the devices, with what they give and why they are as they are."""
    if context.invoked_subcommand is not None:
        return
    with local_client(state_dir) as client:
        found = client.devices()
    if as_json:
        return print_json(found)
    from coordinator.screens import device_table, link_table, make_console

    console = make_console()
    console.print(device_table(found))
    if len(found) > 1:
        console.print(link_table(found))


@devices_app.command("revoke")
def revoke_device(
    device: Annotated[str, typer.Argument(metavar="NAME", help="A device's name, or the beginning of its id.")],
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Cut a device off at once and for good; its jobs go on without it. It can join again with a new token."""
    with local_client(state_dir) as client:
        node_id, name = client.members.revoke_device(device)
    if as_json:
        return print_json({"node_id": node_id, "name": name})
    print(f"{name} ({node_id}) is cut off")


@devices_app.command("audit")
def audit(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Show what was done to tokens and devices, and by whom."""
    with local_client(state_dir) as client:
        found = client.members.audit()
        while len(more := client.members.audit(after=found[-1].number if found else 0)) > 0:
            found += more
    if as_json:
        return print_json(found)
    import time

    for entry in found:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at_s))
        print(f"{at}  {entry.event}  {entry.subject}  by {entry.actor}  {entry.detail}".rstrip())


def parse_duration(text: str) -> float:
    """Seconds of a duration as people write it.

    Raises:
        ConfigError: it is none.
    """
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is no duration; write a number and a unit: 90s, 15m, 1h or 2d")
    return float(match[1]) * _UNIT_S[match[2]]

"""One end of a mutual TLS connection: ``rpc.py door IDENTITY HOST``, or ``rpc.py knock`` (or ``measure``) and then
``IDENTITY ADDRESS NODE_ID``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from plutino.doctor.burst import measure_link
from plutino.doctor.door import Door, knock
from plutino.security.identity import PeerName, Role
from plutino.security.tls import Credentials

if __name__ == "__main__":
    what, identity, place, *names = sys.argv[1:]
    credentials = Credentials(Path(identity))
    if what == "door":
        with Door(place, credentials) as door:
            print(door.address, flush=True)
            sys.stdin.read()
    elif what == "measure":
        figures = measure_link(place, credentials=credentials, peer=PeerName(names[0], Role.NODE))
        print(json.dumps(asdict(figures)))
    else:
        print(knock(place, credentials=credentials, peer=PeerName(names[0], Role.NODE)))

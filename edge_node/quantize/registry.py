"""All quantisation schemes, by their name in job specs."""

from __future__ import annotations

from edge_node.quantize.base import Scheme
from edge_node.quantize.int4 import Int4
from edge_node.quantize.int8 import Int8
from edge_node.quantize.nf4 import Nf4
from plutino.errors import QuantizationError

SCHEMES: dict[str, Scheme] = {"int8": Int8(), "nf4": Nf4(), "int4": Int4()}


def scheme_of(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        QuantizationError: there is none.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise QuantizationError(
            f"no quantisation scheme is called {name!r}; take one of {', '.join(SCHEMES)}"
        ) from None

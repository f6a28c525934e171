# ruff: noqa: E501 - lists read best filled
"""Where fuzzing starts: the requests of the vector file, and the words that they are made of."""

from __future__ import annotations

import re

from mlflow_hokusai_auth.core import keys, operations
from tests.server.gate.test_adapters import VECTORS, expand

#: Pieces that are worth putting together.
WORDS = [
    *(b"x-api-key:", b"authorization:", b"x-mlflow-authorization:", b"cookie:", b"host:localhost"),
    *(b"bearer ", b"basic ", b"apikey ", b"hokusai_session=", b"__Host-hokusai_session=", b"x_api_key:"),
    *(b"api_key=", b"api%5Fkey=", b"&", b"=", b"%", b"+", b",", b";", b":", b" ", b"\t", b"\n", b"\0", b"/"),
    *(b"hk_live_", b"hk_test_", b"hk_session_", b"hk%5Flive%5f", b"%68k_", b"0" * 32, b"\xff", b"abcd"),
    *(b"GET ", b"POST ", b"HEAD ", b"OPTIONS ", b"/health", b"/mlflow", b"/api/mlflow", b"..", b"//", b"x"),
    keys.generate().encode(),
    keys.session_token().encode(),
]  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Inputs for the property of this name."""
    wires = [case.wire for row in VECTORS["case"] for case in expand(row)]
    if name == "credentials":
        found = {
            b"\n".join([wire.split[1], *(f"{n}: {v}".encode("latin-1") for n, v in wire.headers)])
            for wire in wires
        }
    elif name == "operations":
        rules = {re.sub(r"[{}]|:path", "", operation.rule) for operation in operations.rules()}
        lines = {f"{wire.method} {wire.target}".partition("?")[0] for wire in wires} | rules
        found = {f"{line}\n/mlflow\n/api/mlflow".encode() for line in lines}
    else:
        found = {value.encode("latin-1") for wire in wires for _, value in wire.headers} | {*WORDS}
    return sorted(text for text in found if len(text) < 1000)

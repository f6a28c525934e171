from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.standin import Standin


@pytest.fixture(scope="module")
def service() -> Iterator[Standin]:
    with Standin() as standin:
        yield standin

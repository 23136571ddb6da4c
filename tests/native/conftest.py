"""What compiles and emulates starts before all other tests, so that it runs beside them and not behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOM = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ROOM not in item.path.parents)

"""What tests of the native kernels share."""

from __future__ import annotations

from types import ModuleType
from typing import Callable, Iterator

import pytest
from psann_kernels import native


@pytest.fixture(params=native.instruction_sets(native.NATIVE) if native.NATIVE is not None else [])
def isa(request) -> Iterator[str]:
    """Every instruction set that this build and processor have, in use while the test runs."""
    held = native.NATIVE.isa()
    assert native.NATIVE.use_isa(request.param)
    yield request.param
    native.NATIVE.use_isa(held)


@pytest.fixture
def launches_of(monkeypatch) -> Callable[[ModuleType], list[str]]:
    """launches_of(module): names of the kernels that the module launches from then on."""

    def record(module: ModuleType) -> list[str]:
        names: list[str] = []

        def recorded(name: str, *numbers: object) -> None:
            names.append(name)
            native.launch(name, *numbers)

        monkeypatch.setattr(module, "launch", recorded)
        return names

    return record

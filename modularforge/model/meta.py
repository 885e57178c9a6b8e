"""What is built on the meta device, where tensors have shapes and no numbers.

torch draws first weights there too, by functions that import torch._dynamo to stay out of its graphs: a second at the
start of every job. Nothing of it is wanted, so nothing is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


@contextmanager
def without_weights(draws_in_vain: bool = False) -> Iterator[None]:
    """What is built here lies on the meta device; `draws_in_vain` moves torch's generator on as if it did not.

    Then each weight is drawn on the host, one at a time, and forgotten.
    """
    with torch.device("meta"), _Drawing(draws_in_vain):
        yield


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws for tensors on the meta device into ones on the host, or not at all."""

    def __init__(self, draws_in_vain: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws_in_vain = draws_in_vain

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports torch._dynamo for this class too

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operation not in DRAWS or not arguments[0].is_meta:
            return operation(*arguments, **(named or {}))
        if self._draws_in_vain:
            operation(torch.empty(arguments[0].shape, dtype=arguments[0].dtype, device="cpu"), *arguments[1:])
        return arguments[0]

"""A watch on what makes the host wait for the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# A number that is read, sizes that depend on numbers, and tensors that the host compares. Reads of tolist stand apart.
WAITS = (
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
    aten.repeat_interleave,
)


class HostLooks(TorchDispatchMode):
    """Within it, operations that wait for the device are counted, whatever device the tensors are on.

    Attributes:
        found: those operations.
        operations: how many operations of any kind there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0
        self._tolist: Any = None

    def __enter__(self) -> "HostLooks":
        self._tolist = torch.Tensor.tolist  # on the CPU it reads memory, past all operations

        def tolist(tensor: torch.Tensor) -> Any:
            self.found.append("tolist")
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        packet = func.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if packet in WAITS or masks:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

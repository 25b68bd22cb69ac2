"""What layers keep between passes belongs to them alone: copies of a layer and files of it start without."""

from __future__ import annotations

from typing import Any, Self


class NotCopied:
    """Copies of it, and what is read back from a file of it, are as new."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

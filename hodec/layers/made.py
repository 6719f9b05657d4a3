"""Classes that are made when they are first needed: how copies and pickles of their instances find them."""

from collections.abc import Callable
from functools import cache
from typing import ClassVar, ParamSpec, SupportsIndex, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


class Made:
    """Base of such classes: an instance is copied and pickled with what makes its class, not with the class.

    Attributes:
        made_by: the function that makes the class, and its arguments.
    """

    made_by: ClassVar[tuple[object, ...]]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        _, _, *rest = cast(tuple[object, ...], super().__reduce_ex__(protocol))
        return (_blank, self.made_by, *rest)


def once(make: Callable[P, T]) -> Callable[P, T]:
    """``make``, which is called once for the same arguments."""
    return cast(Callable[P, T], cache(make))


def _blank(make: Callable[..., type[T]], *args: object) -> T:
    made = make(*args)
    return made.__new__(made)

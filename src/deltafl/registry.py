"""Names to builders. A misspelt name is an error that offers the right one."""

from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar, cast

from deltafl.errors import DeltaflError, did_you_mean

T = TypeVar("T")
E = TypeVar("E")


class Registry(dict[str, T]):
    """Name -> entry, in the order of names, filled by a decorator; errors call an entry `kind`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def register(self, name: str) -> Callable[[E], E]:
        """Decorator: `@RULES.register("median")`. One name twice is a programming error."""

        def add(entry: E) -> E:
            if name in self:
                raise ValueError(f'{self.kind} "{name}" is registered twice')
            self[name] = cast(T, entry)
            return entry

        return add

    def __missing__(self, name: str) -> NoReturn:
        raise DeltaflError(f'unknown {self.kind} "{name}"; {did_you_mean(name, self)}')

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.keys()))

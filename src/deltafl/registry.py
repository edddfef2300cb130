"""Names to builders. A misspelt name is an error that offers the right one."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from deltafl.errors import DeltaflError, did_you_mean

T = TypeVar("T")
E = TypeVar("E")


class Registry(Generic[T]):
    """A mapping name -> entry, filled by a decorator; `kind` is what errors call an entry."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Decorator: `@RULES.register("median")`. One name twice is a programming error."""

        def add(entry: E) -> E:
            if name in self._entries:
                raise ValueError(f'{self.kind} "{name}" is registered twice')
            self._entries[name] = cast(T, entry)
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise DeltaflError(
                f'unknown {self.kind} "{name}"; {did_you_mean(name, self._entries)}'
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

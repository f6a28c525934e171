"""The lifetimes of keys: by default, at most, and after a rotation."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidRequest
from .times import span


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """The lifetimes of new keys, in seconds. None means that there is no limit."""

    #: The lifetime of a key that is made without one.
    default: float | None = None
    #: The maximum.
    longest: float | None = None

    @property
    def usual(self) -> float | None:
        """The lifetime of a key that is made without one: the default, within the maximum."""
        if self.longest is None:
            return self.default
        return self.longest if self.default is None else min(self.default, self.longest)

    def within(self, seconds: float) -> float:
        """Return a lifetime of `seconds`, or the maximum if that is shorter."""
        return seconds if self.longest is None else min(seconds, self.longest)

    def check(self, seconds: float | None, field: str = "expires_in") -> None:
        """Raise InvalidRequest if a lifetime of `seconds` (None: for ever) is above the maximum.

        The message names `field`, which the lifetime stands in.
        """
        if self.longest is None or (seconds is not None and seconds <= self.longest):
            return
        problem = "a key must end" if seconds is None else "this is too long"
        raise InvalidRequest(
            f"{field}: {problem}: keys of this server live {span(self.longest)} "
            f"({self.longest:.0f} s) at most, by HOKUSAI_AUTH_KEY_LIFETIME_MAX."
        )

    def end(self, seconds: float | None, now: float) -> float | None:
        """Return when a key ends that is made at `now` to live for `seconds` (None: for ever).

        Times are seconds since the epoch; None means never. The maximum holds.
        """
        if self.longest is not None and (seconds is None or seconds > self.longest):
            seconds = self.longest
        return None if seconds is None else now + seconds

    def end_after_rotation(
        self, made: float, ends: float | None, now: float, *, renewed: bool
    ) -> float | None:
        """Return when the successor of a key ends that was made at `made` and ends at `ends`.

        Times are seconds since the epoch; None means never. If `renewed`, the successor lives as long
        as the key was to live from its making. If not, it ends when the key would have. The maximum
        holds either way.
        """
        if renewed and ends is not None:
            ends = now + (ends - made)
        if self.longest is None:
            return ends
        latest = now + self.longest
        return latest if ends is None else min(ends, latest)


#: Keys live for ever unless somebody says how long.
UNLIMITED = Lifetimes()

"""Token buckets: how often something may be done, by one port or by all together."""

from __future__ import annotations

_MAX_PORTS = 2048  # then all are forgotten: more than a network has


class Bucket:
    """Tokens up to `depth`, `rate` more a second."""

    __slots__ = ("_depth", "_rate", "_then", "_tokens")

    def __init__(self, depth: float, rate: float, now: float) -> None:
        self._depth, self._rate, self._tokens, self._then = depth, rate, depth, now

    def take(self, now: float) -> bool:
        """Take a token, if there is one."""
        self._tokens = min(self._depth, self._tokens + max(0.0, now - self._then) * self._rate)
        self._then = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Buckets:
    """A bucket for each port; what comes from no port that is known (None) shares one."""

    def __init__(self, depth: float, rate: float) -> None:
        self._depth, self._rate = depth, rate
        self._of: dict[int | None, Bucket] = {}

    def take(self, port: int | None, now: float) -> bool:
        """Take a token of the port's, if there is one."""
        bucket = self._of.get(port)
        if bucket is None:
            if len(self._of) >= _MAX_PORTS:
                self._of.clear()
            bucket = self._of[port] = Bucket(self._depth, self._rate, now)
        return bucket.take(now)

    def forget(self, port: int) -> None:
        """What was counted against a port is void."""
        self._of.pop(port, None)

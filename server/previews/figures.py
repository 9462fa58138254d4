"""Counts what a worker does, until it is told to the database, which tells it to the metrics of the servers."""

from bisect import bisect_left

from server.ledger import PREVIEW_BOUNDS_SECONDS, PreviewFigure, PreviewState


class Figures:
    """Lives in one event loop."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str, float], tuple[int, float]] = {}

    def count(self, file_type: str, state: PreviewState, seconds: float) -> None:
        """One more file whose previews ended in a state, after so many seconds of work."""
        key = (file_type, state, PREVIEW_BOUNDS_SECONDS[bisect_left(PREVIEW_BOUNDS_SECONDS, seconds)])
        files, before = self._counted.get(key, (0, 0.0))
        self._counted[key] = (files + 1, before + seconds)

    def take(self) -> list[PreviewFigure]:
        """What was counted since the last time, in order."""
        taken = [
            PreviewFigure(file_type=file_type, state=state, upto_seconds=upto, files=files, seconds=seconds)
            for (file_type, state, upto), (files, seconds) in sorted(self._counted.items())
        ]
        self._counted.clear()
        return taken

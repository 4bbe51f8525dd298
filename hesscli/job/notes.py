"""What a command has to say besides its result."""

from __future__ import annotations

from hesscli.job.options import Listener


class Notes:
    """Tells a listener, each text once.

    Attributes:
        texts: those that were told.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.texts: list[str] = []

    def __call__(self, *texts: str) -> None:
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
                self.listener.note(text)

"""What recipes say about pictures with captions."""

from veneer.train.settings import Settings


class CaptionedData(Settings):
    """The `data` part for text-to-image."""

    path: str

"""What recipes say about the objective of a denoiser."""

from veneer.train.settings import TrainSettings


class ObjectiveSettings(TrainSettings):
    """The `train` part for text-to-image."""

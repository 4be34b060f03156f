"""scanside: the box beside the CT scanner."""

__version__ = "0.1.0"

"""The version of this package; imports nothing, so that building a wheel needs nothing."""

__version__ = "0.1.0"

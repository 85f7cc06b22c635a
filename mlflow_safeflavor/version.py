"""The one place that knows the version; imports nothing, so that building a wheel needs nothing."""

__version__ = "0.1.0"

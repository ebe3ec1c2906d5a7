"""A stand-in for ONT's client library; see tests/standins."""

__version__ = "7.13.6"

"""Whimbrel moves a running Linux service to another host while its users keep using it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("whimbrel")
except PackageNotFoundError:  # a source tree on PYTHONPATH that was never installed
    __version__ = "0+unknown"

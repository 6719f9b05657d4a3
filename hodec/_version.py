"""The version of hodec, read by the package's metadata too."""

__version__ = "0.2.0"

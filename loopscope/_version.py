"""The version, for the package and for pyproject.toml alike."""

__version__ = "0.1.0"

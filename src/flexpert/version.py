"""The version, for every part of the package."""

VERSION = "0.1.0"

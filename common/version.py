"""This package's own version."""

from importlib.metadata import PackageNotFoundError, version

try:
    FEDISTILL = version("fedistill")
except PackageNotFoundError:  # run from a folder, not installed
    FEDISTILL = "0"

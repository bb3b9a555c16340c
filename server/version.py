"""The version of the installed distribution, and the fingerprint that answers carry."""

from importlib.metadata import version

VERSION = version("bezel-serve")
SYSTEM_FINGERPRINT = f"bezel-{VERSION}"

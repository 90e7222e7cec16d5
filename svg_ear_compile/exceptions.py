"""What can svg_ear raise?"""

from __future__ import annotations


class SettingsError(ValueError):
    """A setting has a value, or a name, that makes no sense."""


class PassError(RuntimeError):
    """A pass failed while `strict` was set. The cause is the original error."""


class SiteError(RuntimeError):
    """An op of an attention site failed while `strict` was set. The cause is the original error."""

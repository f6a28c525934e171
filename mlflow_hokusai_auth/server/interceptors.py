"""The names that a site's interceptors import; they stay, wherever `gate.interceptors` goes."""

from __future__ import annotations

from .exchange import RequestView
from .gate.interceptors import Refusal

__all__ = ["Refusal", "RequestView"]

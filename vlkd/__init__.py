"""vlkd distils large vision-language teachers into small models people can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkd.models.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use, so that `import vlkd` stays free of torch."""
    if name == "load":
        from vlkd.models.load import load

        return load
    raise AttributeError(f"module 'vlkd' has no attribute {name!r}")

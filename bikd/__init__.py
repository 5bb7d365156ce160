__version__ = "0.2.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bikd.own_data import distill

__all__ = ["distill"]


def __getattr__(name: str) -> Any:
    "Import `bikd.distill` when it is first used: `import bikd` alone does not load torch."
    if name == "distill":
        from bikd.own_data import distill

        return distill
    raise AttributeError(f"module 'bikd' has no attribute {name!r}")


def __dir__() -> list[str]:
    "Every name that can be used, also those that are loaded only then."
    return sorted({*globals(), *__all__})

"""awqconv: AWQ int4 checkpoints, repacked ahead of time for the kernel that will read them.

>>> import awqconv
>>> awqconv.convert("model-awq", "model-marlin", target="marlin")   # doctest: +SKIP
>>> awqconv.verify("model-marlin").ok                                # doctest: +SKIP
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from awqconv._version import __version__
from awqconv.errors import AwqconvError, VerificationError

if TYPE_CHECKING:
    from awqconv.conversion import Conversion as Conversion
    from awqconv.conversion import convert as convert
    from awqconv.hub.pull import PullResult as PullResult
    from awqconv.hub.pull import pull as pull
    from awqconv.hub.push import PushResult as PushResult
    from awqconv.hub.push import push as push
    from awqconv.inspection import Inspection as Inspection
    from awqconv.inspection import inspect as inspect
    from awqconv.verification import Verification as Verification
    from awqconv.verification import verify as verify

_LAZY = {
    "pull": "hub.pull",
    "PullResult": "hub.pull",
    "push": "hub.push",
    "PushResult": "hub.push",
    "convert": "conversion",
    "Conversion": "conversion",
    "inspect": "inspection",
    "Inspection": "inspection",
    "verify": "verification",
    "Verification": "verification",
}

__all__ = [  # noqa: PLE0604
    "AwqconvError",
    "VerificationError",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'awqconv' has no attribute {name!r}")
    return getattr(import_module(f"awqconv.{_LAZY[name]}"), name)

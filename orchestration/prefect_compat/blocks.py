"""Private interfaces of Prefect's blocks: a run imports the blocks that it uses, when it uses them.

`defer_notifications` comes before the first import of Prefect, so this module imports no Prefect.
"""

import contextlib
import importlib
import sys
import threading
from types import ModuleType
from typing import Any

_DEFERRED = ("prefect.blocks.notifications", "prefect.blocks.webhook")

_lock = threading.RLock()


class _DeferredModule(ModuleType):
    """Stands for a module that is imported when one of its names is read."""

    def __getattr__(self, name: str) -> Any:
        # Python reads such names of all modules, for example to find the module of an object.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return getattr(_import(self), name)


def _import(deferred: _DeferredModule) -> ModuleType:
    """Import the module that a deferred one stands for."""
    name = deferred.__name__
    with _lock:
        if sys.modules.get(name) is deferred:
            del sys.modules[name]
        module = importlib.import_module(name)
        vars(deferred).update((key, value) for key, value in vars(module).items() if not key.startswith("__"))
    return module


def defer_notifications() -> None:
    """Import Prefect's notification and webhook blocks only when a run uses one.

    Replaces: `prefect.blocks.notifications` and `prefect.blocks.webhook` in `sys.modules`
    Why: Prefect imports them for each run, which takes a tenth of all its imports, and few runs use them
    Until: `prefect.blocks` imports them when they are used
    """
    for name in _DEFERRED:
        if name not in sys.modules:
            sys.modules[name] = _DeferredModule(name)


def look_up_before_import() -> None:
    """Find the class of a block among those that are imported, before all integrations are imported.

    Replaces: `Block.get_block_class_from_key`
    Why: Prefect first imports all installed integrations, here those of the worker, which take as long as Prefect
    Until: Prefect looks the class up first
    """
    from prefect.blocks.core import Block
    from prefect.utilities.dispatch import lookup_type

    find = Block.get_block_class_from_key.__func__  # type: ignore[attr-defined]

    def found(cls: type[Block], key: str) -> Any:
        with contextlib.suppress(KeyError):
            return lookup_type(cls, key)
        for name in _DEFERRED:
            if isinstance(deferred := sys.modules.get(name), _DeferredModule):
                _import(deferred)
        return find(cls, key)

    Block.get_block_class_from_key = classmethod(found)  # type: ignore[assignment]

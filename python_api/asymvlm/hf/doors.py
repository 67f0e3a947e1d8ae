"""The forward of one module, entered and left under our names: hooks on the instance, undone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from asymvlm.hf.arguments import CACHE, Callee, bind

Arguments = dict[str, Any]
DOOR = "_asymvlm_door"  # where a module keeps its door


def check_free(module: nn.Module) -> None:
    """Raise a RuntimeError if a module has a door already, because two models share it and one is patched."""
    if DOOR in module.__dict__:
        raise RuntimeError(
            f"this {type(module).__name__} is part of another model that is patched: remove that patch first"
        )


class Door:
    """One pre-hook and one hook of a module, for all parts of the library together, so that their order is code.

    Args:
        module: whose forward is meant.
        enter: gets the module and the arguments under our names; returns those to go on with, or None for the same.
        leave: gets the module, the arguments under our names and the output, None after an exception; returns the
            output to hand out, or None for the same. torch.compile guards on a hook's number, so a compiled module
            gets none that it does not need.
    Raises:
        MechanismError: if the module's forward does not name its cache.
        RuntimeError: as `check_free` does.
    """

    def __init__(
        self,
        module: nn.Module,
        enter: Callable[[nn.Module, Arguments], Arguments | None],
        leave: Callable[[nn.Module, Arguments, Any], Any] | None = None,
    ) -> None:
        self.callee = Callee.of(type(module).forward)
        check_free(module)
        self.module = module
        module.__dict__[DOOR] = self
        self._enter, self._leave = enter, leave
        self._hooks = [module.register_forward_pre_hook(self._before, with_kwargs=True)]
        if leave is not None:
            self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        del self.module.__dict__[DOOR]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        arguments = bind(type(module).forward, module, args, kwargs)
        changed = self._enter(module, arguments)
        if changed is None:
            if CACHE not in arguments or self.callee.cache in kwargs:
                return None
            changed = arguments  # the caller used a name of another version
        return (), self.callee.write(changed)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> Any:
        assert self._leave is not None
        return self._leave(module, bind(type(module).forward, module, args, kwargs), output)

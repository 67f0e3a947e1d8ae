"""The model that lmms-eval loads as ``asymvlm``: any of its own, patched.

What lmms-eval is given is an object of a subclass of the wrapped model's class, so that it finds there whatever it
looks for. Answers are the wrapped class's; `Pruning` stands around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from torch import nn

from asymvlm.evaluation.lmms_eval.asked import NAMES, Asked, split
from asymvlm.evaluation.lmms_eval.dialogue import answer_in_turns
from asymvlm.evaluation.lmms_eval.guard import Guard
from asymvlm.evaluation.lmms_eval.prompts import warn_of_other_prompts
from asymvlm.patch import patch

PROCESSORS = ("processor", "_processor", "_image_processor")


class Pruning:
    """Of a model of lmms-eval: its ``generate`` prunes, and what a pruned prompt cannot answer is refused."""

    wrapped: str  # name in lmms-eval
    asked: Asked
    guard: Guard | None

    def set_up(self, wrapped: str, asked: Asked) -> None:
        """Patch the loaded model.

        Raises:
            TypeError: if there is no module of transformers inside.
            ValueError: for a family or a method that cannot be served.
        """
        self.wrapped, self.asked, self.guard = wrapped, asked, None
        if asked.whole:
            return
        model = getattr(self, "model", None)
        if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
            found = type(model).__name__
            raise TypeError(f"model={wrapped} holds a {found}, wanted a model of transformers in this process to patch")
        processor = next((getattr(self, name) for name in PROCESSORS if hasattr(self, name)), None)
        arm = asked.arm(model, processor)
        evicts = {"cache": arm.cache} if arm.cache is not None else {"text": asked.text_eviction()}
        self.guard = Guard(patch(model, arm.vision, **evicts))

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """Answers in the order of ``requests``. Raises what the patch raises; nothing is answered emptily instead."""
        warn_of_other_prompts(self.wrapped, requests)
        answer = super().generate_until  # type: ignore[misc]
        if self.guard is None:
            return answer(requests)
        calls = self.guard.calls
        with self.guard.watching():
            answers = answer(requests)
        if requests and self.guard.calls == calls:
            model = type(self.guard.handle.model).__name__
            raise RuntimeError(f"model={self.wrapped} answered without {model}.generate, so that nothing was pruned")
        held = f"{self.guard.held:.0f} of {self.guard.vision_tokens} vision tokens in an average layer so far"
        logger.info(f"asymvlm: {self.asked.method}, keep={self.asked.keep}: {held}")
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Answers of a dialogue, each turn with the model's own earlier answers: `answer_in_turns` for chat models."""
        if self.is_simple:  # type: ignore[attr-defined]
            raise NotImplementedError(f"model={self.wrapped} reads no messages, wanted a chat model for several turns")
        return answer_in_turns(self, requests)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """The wrapped model's own. Refused where tokens go: it reads logits by columns of the whole prompt."""
        if self.guard is not None:
            wanted = "a task with output_type generate_until, or keep=1"
            raise NotImplementedError(f"loglikelihood reads logits by columns of the unpruned prompt, wanted {wanted}")
        return super().loglikelihood(requests)  # type: ignore[misc]


class Simple(lmms):
    """Makes a `Pruning` model from ``--model_args``; lmms-eval never sees an object of this class."""

    is_simple = True

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Any:
        """As lmms-eval calls it.

        Args:
            arg_string: ``model=NAME``, options of that model of lmms-eval, and those of `Asked`.
            additional_config: ``batch_size`` and ``device`` of the command line; None where not given.
        Raises:
            ValueError: for a name that lmms-eval does not have, or options that cannot be read.
        """
        options = dict(simple_parse_args_string(arg_string))
        beside = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "model" not in options:
            raise ValueError(f"no model=NAME found in --model_args {arg_string!r}, wanted one that lmms-eval has")
        name = str(options.pop("model"))
        kind = MODEL_REGISTRY_V2.get_model_class(name, force_simple=cls.is_simple)
        if issubclass(kind, Simple):
            raise ValueError(f"model={name} found in --model_args, wanted the model to be wrapped")
        asked, own = split(options)
        made: Any = type(f"Pruned{kind.__name__}", (Pruning, kind), {"__module__": kind.__module__})(**own, **beside)
        made.set_up(name, asked)
        return made

    def generate_until(self, requests: Any) -> Any:
        raise NotImplementedError

    generate_until_multi_round = loglikelihood = generate_until


class Chat(Simple):
    """The same for models that take messages; where the wrapped model takes none, it is a simple one all the same."""

    is_simple = False


__all__ = ["NAMES", "Chat", "Pruning", "Simple"]

"""Which patches of the tower a vision token is made from: a patch that is NaN must turn up in the same tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from checks import uniform
from tiny import make_batch, make_video

import asymvlm
from asymvlm.methods import BeforeMethod
from asymvlm.models import adapter_for

UNTOLD = ("got_ocr2",)  # whose convolutions mix patches of several tokens


class Watch(BeforeMethod):
    """Keeps everything it sees."""

    name = "watch"
    needs_tower = True

    def scores(self, prompt):
        self.features, self.embeds, self.tokens = prompt.features, prompt.embeds, prompt.tokens
        return prompt.features.norm(dim=-1)


def hidden_states(output) -> list[torch.Tensor]:
    """All that the projector may read of a tower's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    found = [output.last_hidden_state, *(getattr(output, "hidden_states", None) or ())]
    return [hidden for hidden in found if hidden is not None]


def break_patch(hidden: torch.Tensor, number: int) -> None:
    """Make a patch NaN in hidden states ``(patches, width)``, ``(..., patches, width)``, or channels first."""
    if hidden.ndim == 4 and hidden.shape[1:] == (16, 4, 4):
        hidden = hidden.permute(0, 2, 3, 1)
    shape = hidden.shape[:-1]
    hidden[torch.unravel_index(torch.tensor(number % shape.numel()), shape)] = float("nan")


@pytest.mark.every_family
def test_a_broken_patch_is_in_the_features_of_the_tokens_it_reaches(family, model):
    if adapter_for(model).tower_tokens is None:
        assert family in UNTOLD
        return
    inputs, watch, reached = make_batch(family, "left_padded"), Watch(), []

    def poison(module, args, output):
        for hidden in {id(one): one for one in hidden_states(output)}.values():
            break_patch(hidden, number)

    tower = model.get_submodule(adapter_for(model).tower)
    behind = [getattr(tower, name) for name in ("merger", "head_linear") if hasattr(tower, name)]
    if behind:  # inside the tower, behind the hidden states that it hands out
        behind[0].register_forward_pre_hook(lambda module, args: break_patch(args[0], number))
    elif family == "kimi_k25":
        tower.final_layernorm.register_forward_hook(lambda module, args, output: break_patch(output, number))
    else:
        tower.register_forward_hook(poison)
    for number in (1, 6, 23, 37, 61):
        with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=watch)):
            model(**inputs)
        places = watch.tokens.vision & ~watch.tokens.separators
        broken = (watch.embeds.isnan().any(-1) & places).nonzero().tolist()
        assert (watch.features.isnan().any(-1) & places).nonzero().tolist() == broken, f"patch {number}"
        reached.append(len(broken))
    assert max(reached) == 1, "a patch belongs to one token"
    assert sum(reached) >= 3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_the_tower_runs_once_and_keeps_no_hook(family, model):
    tower, calls = model.get_submodule(adapter_for(model).tower), []
    hooks = len(tower._forward_hooks)
    tower.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=Watch())):
        model(**make_batch(family, "left_padded"))
    assert len(calls) == 1
    assert len(tower._forward_hooks) == hooks + 1


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True)
def test_images_beside_a_video_are_refused(family, model):
    told = "features of the vision tower need one kind of pictures in a call"
    with asymvlm.patch(model, vision=uniform(0.5, method=Watch())), pytest.raises(NotImplementedError, match=told):
        model(**make_video(family, with_image=True))


def test_a_family_that_does_not_say_is_refused(monkeypatch):
    model = tiny.build("llava")
    adapter = adapter_for(model)
    with asymvlm.patch(model, vision=uniform(0.5, method=Watch())) as handle:
        monkeypatch.setattr(type(adapter), "__setattr__", object.__setattr__)
        monkeypatch.setattr(handle.adapter, "tower_tokens", None)
        with pytest.raises(NotImplementedError, match="llava adapter does not say how patches"):
            model(**make_batch("llava", "single"))

"""Two methods of your own, and the library's controls beside them. Run it in the root of a checkout:

python examples/methods.py
"""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm
from asymvlm.methods import BeforeMethod, CachedMethod, CachedTokens, VisionPrompt


class Unusual(BeforeMethod):
    """Vision tokens stay that are least like the mean of their row's vision tokens."""

    name = "unusual"

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        rows = prompt.embeds.float()
        mine = prompt.tokens.prunable[..., None]
        mean = (rows * mine).sum(1, keepdim=True) / mine.sum(1, keepdim=True).clamp_min(1)
        return 1 - torch.cosine_similarity(rows, mean, dim=-1)  # (B, S) fp32: the higher, the longer a token stays


@dataclass(frozen=True)
class Fading(CachedMethod):
    """Generated tokens go that the newest one attends to least, older ones sooner."""

    name = "fading"
    half_life: float = 64.0  # tokens after which attention counts half

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        age = tokens.newest[:, None] - tokens.columns
        return tokens.attention * 0.5 ** (age / self.half_life)  # (lines, slots): the lowest go first


MODEL = "bench/tinyvlm/checkpoint"
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
content = [{"type": "image", "image": Image.open("examples/page.png")}, {"type": "text", "text": "list all keys"}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)

whole = model.generate(**inputs, max_new_tokens=16)
print("all tokens:", processor.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
for method in (Unusual(), None, "random", "stride", "spiral"):
    text = asymvlm.TextEviction(threshold=8, retention=0.5, method=Fading())
    vision = asymvlm.VisionPruning(method=method, budget=asymvlm.UniformBudget(0.5))
    with asymvlm.patch(model, vision=vision, text=text) as handle:
        output = model.generate(**inputs, max_new_tokens=16)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{handle.last.method}: {answer}  evicted {handle.last.eviction.evicted[0]}")

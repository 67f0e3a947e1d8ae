"""The README's quick start: a question about a page, answered with half of its vision tokens.

Run it in the root of a checkout:

python examples/quickstart.py
"""

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm

MODEL = "bench/tinyvlm/checkpoint"  # 2.6 MB, in this repository; or yours, such as "llava-hf/llava-1.5-7b-hf"
SCORER = "bench/quality/scorers/default-0"  # learned for that model; None scores by cosine similarity

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
page = Image.open("examples/page.png")
content = [{"type": "image", "image": page}, {"type": "text", "text": "what is the value of Q"}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)

settings = asymvlm.VisionPruning(scorer=SCORER, budget=asymvlm.UniformBudget(0.5))  # keep half of the vision tokens
with asymvlm.patch(model, vision=settings) as handle:
    output = model.generate(**inputs, max_new_tokens=16)  # the model's own generate, on a shorter prompt

print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
report = handle.last
print(f"{report.kept[0]} of {report.vision_tokens[0]} vision tokens")
print(f"{report.tokens_after[0]} of {report.tokens_before[0]} prompt tokens")
print(f"{report.kv_bytes} of {report.kv_bytes_before} bytes of K/V")

"""A dialogue on one cache: earlier answers leave it as a whole, questions and images stay.

Run it in the root of a checkout:

python examples/dialogue.py
"""

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm

MODEL, SCORER = "bench/tinyvlm/checkpoint", "bench/quality/scorers/default-0"

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
page = Image.open("examples/page.png")

vision = asymvlm.VisionPruning(scorer=SCORER)  # with the budget that was saved beside the scorer
turns = asymvlm.TurnEviction(threshold=4, retention=0.5)  # so low only to show something within four questions
with asymvlm.patch(model, vision=vision, turns=turns):
    talk = asymvlm.Conversation(model, processor, max_new_tokens=16)
    for number, key in enumerate("QCGK"):
        reply = talk.ask(f"what is the value of {key}", images=[page] if number == 0 else ())
        left = reply.report.eviction.answers[0]
        held = talk.cache.stats()
        print(f"{key}: {reply.text}  answers that left: {left}  {held.physical} of {held.logical} tokens in the cache")

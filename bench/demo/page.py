"""A page that looks like a document: an invoice with a letterhead, a table and totals, drawn with Pillow alone."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 840, 1088  # letter proportions
MARGIN = 64
INK, SOFT, RULE, BRAND, SHADE = "#1c2430", "#5d6878", "#c9d0da", "#1f4e79", "#eef2f7"
QUESTION = "What is the total amount due?"

SENDER = ("Lake Placid Instruments Inc.", "14 Mirror Lake Drive, Lake Placid, NY 12946", "accounts@lakeplacid.example")
FACTS = (("Invoice no.", "LP-20417"), ("Issued", "14 March 2025"), ("Due", "13 April 2025"), ("Customer", "C-0093"))
CUSTOMER = ("Bill to", "Hudson Valley Survey Group", "Att. M. Okafor", "220 Warren Street", "Hudson, NY 12534")
ITEMS = (
    ("Theodolite T2, overhaul", 1, 1280.00),
    ("Optical plummet, alignment", 1, 215.50),
    ("Tripod, hardwood, heavy duty", 2, 348.00),
    ("Levelling staff, 5 m", 3, 96.40),
    ("Prism set with carrying case", 2, 412.75),
    ("Field calibration on site (hours)", 6, 118.00),
    ("Freight and insurance", 1, 74.20),
)
TAX_RATE = 0.08
NOTES = (
    "Payment by bank transfer within 30 days. Please quote the invoice number.",
    "Goods remain the property of the sender until paid in full.",
)


def render_page() -> Image.Image:
    """The demo's page, RGB, the same pixels on every run with the same Pillow."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, WIDTH, 14), fill=BRAND)
    _text(draw, (MARGIN, 62), SENDER[0], 27, BRAND)
    for line, text in enumerate(SENDER[1:]):
        _text(draw, (MARGIN, 100 + 22 * line), text, 15, SOFT)
    _text(draw, (WIDTH - MARGIN, 58), "INVOICE", 36, INK, anchor="ra")
    for line, (name, value) in enumerate(FACTS):
        _text(draw, (WIDTH - MARGIN - 150, 196 + 25 * line), name, 16, SOFT, anchor="ra")
        _text(draw, (WIDTH - MARGIN, 196 + 25 * line), value, 16, INK, anchor="ra")
    for line, text in enumerate(CUSTOMER):
        _text(draw, (MARGIN, 196 + 25 * line), text, 16, SOFT if line == 0 else INK)
    bottom = _table(draw, top=368)
    _totals(draw, top=bottom + 22)
    draw.line((MARGIN, HEIGHT - 122, WIDTH - MARGIN, HEIGHT - 122), fill=RULE, width=1)
    for line, text in enumerate(NOTES):
        _text(draw, (MARGIN, HEIGHT - 106 + 22 * line), text, 14, SOFT)
    return page


def _table(draw: ImageDraw.ImageDraw, top: int) -> int:
    """Draw the items; returns the y below the last row."""
    row_height, columns = 40, (WIDTH - MARGIN - 290, WIDTH - MARGIN - 140, WIDTH - MARGIN - 12)
    draw.rectangle((MARGIN, top, WIDTH - MARGIN, top + row_height), fill=BRAND)
    _text(draw, (MARGIN + 12, top + 11), "Description", 16, "white")
    for x, name in zip(columns, ("Quantity", "Unit price", "Amount"), strict=True):
        _text(draw, (x, top + 11), name, 16, "white", anchor="ra")
    y = top + row_height
    for number, (name, quantity, price) in enumerate(ITEMS):
        if number % 2:
            draw.rectangle((MARGIN, y, WIDTH - MARGIN, y + row_height), fill=SHADE)
        _text(draw, (MARGIN + 12, y + 11), name, 16, INK)
        for x, value in zip(columns, (str(quantity), f"{price:,.2f}", f"{quantity * price:,.2f}"), strict=True):
            _text(draw, (x, y + 11), value, 16, INK, anchor="ra")
        y += row_height
    draw.line((MARGIN, y, WIDTH - MARGIN, y), fill=BRAND, width=2)
    return y


def _totals(draw: ImageDraw.ImageDraw, top: int) -> None:
    net = sum(quantity * price for _, quantity, price in ITEMS)
    tax = round(net * TAX_RATE, 2)
    right, names = WIDTH - MARGIN - 12, WIDTH - MARGIN - 160
    for line, (name, value) in enumerate((("Subtotal", net), (f"Sales tax {TAX_RATE:.0%}", tax))):
        _text(draw, (names, top + 30 * line), name, 16, SOFT, anchor="ra")
        _text(draw, (right, top + 30 * line), f"{value:,.2f}", 16, INK, anchor="ra")
    box = top + 68
    draw.rectangle((WIDTH // 2 + 20, box, WIDTH - MARGIN, box + 52), fill=SHADE)
    _text(draw, (names, box + 15), "Total due", 20, BRAND, anchor="ra")
    _text(draw, (right, box + 15), f"$ {net + tax:,.2f}", 20, BRAND, anchor="ra")


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str, *, anchor: str = "la"
) -> None:
    draw.text(at, text, fill=colour, font=ImageFont.load_default(size=size), anchor=anchor)

"""Once per request, on vision tokens: score, gap, select, gather, and their fusion."""

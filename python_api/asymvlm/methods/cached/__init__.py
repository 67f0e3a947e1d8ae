"""Methods that score the tokens of a K/V cache while decoding."""

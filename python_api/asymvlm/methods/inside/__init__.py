"""Methods that drop vision tokens between two layers of the decoder, while it prefills."""

"""What the tokens of a prompt are, read once: roles, images and their grids, the words of the user's turns."""

"""Files that people hand in: JSON with errors that name the line, pictures as RGB."""

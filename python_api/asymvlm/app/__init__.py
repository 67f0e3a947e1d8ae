"""Applications of the library, for the command line and for people at a keyboard: loading, sessions, dialogues."""

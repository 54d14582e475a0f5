"""Networks and their mathematics; imports torch and the standard library only."""

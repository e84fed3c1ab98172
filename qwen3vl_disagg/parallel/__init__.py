"""One model over several ranks: the only room that knows DTensor and the collectives of the language ranks."""

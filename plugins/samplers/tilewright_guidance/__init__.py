"""Logits processor ``choice``, and the bytes of a vocabulary's tokens."""

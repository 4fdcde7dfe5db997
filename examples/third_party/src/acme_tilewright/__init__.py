"""Four plugins for Tilewright, each in a module of its own."""

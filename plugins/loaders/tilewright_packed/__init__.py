"""Loader packed: models that ``tilewright convert`` has written."""

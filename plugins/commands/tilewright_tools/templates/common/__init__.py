"""MY_SUMMARY: MY_NOUN ``my-plugin`` for Tilewright."""

"""Moving whole machines: capture, a stream of bytes, restore; nested state included."""

"""`hokusai-auth doctor` and `smoke`, which find out why a key does not work from this machine."""

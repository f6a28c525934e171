"""`hokusai-auth doctor` and `smoke`: they find out why a key does not work from this machine."""

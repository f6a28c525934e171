"""The data that the server keeps in its own database: keys, sessions, uses and the audit log."""

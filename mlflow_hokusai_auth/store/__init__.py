"""Everything that the server keeps in its own database: keys, sessions, uses, the audit log."""

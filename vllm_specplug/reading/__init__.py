"""Files of users: opened, cut into records, and read as text, the same way for all commands."""

"""What is particular to SQLite and to PostgreSQL."""

"""Alembic's environment: runs on the connection, and in the transaction, that it is handed."""

from alembic import context

from slm.server.db.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()

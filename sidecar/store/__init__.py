"""The stores: one interface (base), Cassandra or ScyllaDB and SQLite behind it."""

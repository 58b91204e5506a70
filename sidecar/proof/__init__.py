"""The proof of the ledger: everything folded once more from the tables, by code that shares nothing with the ledger."""

"""The quirk ledger: one module a system, each entry tested against the oracle."""

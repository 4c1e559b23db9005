"""promoe."""

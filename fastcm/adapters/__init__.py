"""Networks of other libraries under this package's protocol; nothing of theirs is imported."""

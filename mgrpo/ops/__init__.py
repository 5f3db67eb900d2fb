"""Loss ops: one name each, several backends, the plain-torch reference is the definition."""

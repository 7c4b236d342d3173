"""Events on their way: decoded from records, kept when dead, imported, waited with, forwarded."""

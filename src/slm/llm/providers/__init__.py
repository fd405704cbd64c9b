"""One adapter per provider; each is imported, with its SDK, when it is first used."""
